"""Generalised advantage estimation against numbers by hand and a plain double loop."""

import numpy as np
import pytest
import torch

from alignkit.algo.advantage import GAE, gae
from alignkit.algo.masked import moments

LENGTHS = [5, 1, 3, 4]
GENERATOR = torch.Generator().manual_seed(0)
REWARDS = torch.randn(4, 5, generator=GENERATOR, dtype=torch.float64)
VALUES = torch.randn(4, 5, generator=GENERATOR, dtype=torch.float64)
MASK = torch.arange(5)[None, :] < torch.tensor(LENGTHS)[:, None]


def reference(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """A_t = sum_k (gamma lam)^k delta_{t+k} of one response, straight from the definition."""
    following = np.append(values[1:], 0.0)
    delta = rewards + gamma * following - values
    return np.array([sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))])


def test_gae_gives_the_published_numbers():
    rewards = torch.tensor([[-0.1, 0.2, 1.0]], dtype=torch.float64)
    values = torch.tensor([[0.5, 0.4, 0.3]], dtype=torch.float64)
    advantages, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=0.95)
    np.testing.assert_allclose(advantages[0].numpy(), [0.52675, 0.765, 0.7], atol=1e-12)
    np.testing.assert_allclose(returns[0].numpy(), [1.02675, 1.165, 1.0], atol=1e-12)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0), (0.0, 0.5)])
def test_ragged_responses_equal_the_definition_row_by_row(gamma, lam):
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma=gamma, lam=lam)
    for row, length in enumerate(LENGTHS):
        expected = reference(REWARDS[row, :length].numpy(), VALUES[row, :length].numpy(), gamma, lam)
        np.testing.assert_allclose(advantages[row, :length].numpy(), expected, rtol=1e-12)
        np.testing.assert_allclose(returns[row, :length].numpy(), expected + VALUES[row, :length].numpy(), rtol=1e-12)
    assert not advantages[~MASK].any() and not returns[~MASK].any()


def test_lambda_1_returns_the_sum_of_rewards_to_come_whatever_the_values():
    _, returns = gae(REWARDS, VALUES * 100, MASK, gamma=1.0, lam=1.0)
    to_come = torch.where(MASK, REWARDS, 0.0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, torch.where(MASK, to_come, 0.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("fill", [0.0, 7.0, float("nan"), float("inf")])
def test_padding_changes_nothing(fill):
    wide = {name: torch.full((4, 8), fill, dtype=torch.float64) for name in ("rewards", "values")}
    wide["rewards"][:, :5] = torch.where(MASK, REWARDS, fill)
    wide["values"][:, :5] = torch.where(MASK, VALUES, fill)
    mask = torch.nn.functional.pad(MASK, (0, 3))
    plain = gae(REWARDS, VALUES, MASK, gamma=0.9, lam=0.8)
    for part, whole in zip(gae(wide["rewards"], wide["values"], mask, gamma=0.9, lam=0.8), plain):
        torch.testing.assert_close(part[:, :5], whole, rtol=0, atol=0)
        assert not part[:, 5:].any()


def test_the_order_of_rows_changes_nothing():
    order = torch.tensor([2, 0, 3, 1])
    advantage = GAE(gamma=1.0, lam=0.95, whiten=True)
    whole, moved = advantage(REWARDS, VALUES, MASK), advantage(REWARDS[order], VALUES[order], MASK[order])
    torch.testing.assert_close(moved.advantages, whole.advantages[order], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(moved.returns, whole.returns[order], rtol=0, atol=0)


def test_returns_are_taken_before_whitening():
    plain = GAE(gamma=1.0, lam=0.95, whiten=False)(REWARDS, VALUES, MASK)
    white = GAE(gamma=1.0, lam=0.95, whiten=True)(REWARDS, VALUES, MASK)
    torch.testing.assert_close(white.returns, plain.returns, rtol=0, atol=0)
    real = plain.advantages[MASK].numpy()
    expected = (real - real.mean()) / np.sqrt(real.var() + 1e-8)
    np.testing.assert_allclose(white.advantages[MASK].numpy(), expected, rtol=1e-12)


def test_two_ranks_whiten_as_one():
    advantage = GAE(gamma=1.0, lam=0.95, whiten=True)
    raw = GAE(gamma=1.0, lam=0.95, whiten=False)(REWARDS, VALUES, MASK).advantages
    ranks = (slice(0, 1), slice(1, 4))
    both = torch.stack([moments(raw[rank], MASK[rank]) for rank in ranks])
    parts = [advantage(REWARDS[rank], VALUES[rank], MASK[rank], gather=lambda own: both).advantages for rank in ranks]
    torch.testing.assert_close(torch.cat(parts), advantage(REWARDS, VALUES, MASK).advantages, rtol=1e-12, atol=1e-13)


def test_the_inputs_are_left_as_they_were():
    rewards, values = REWARDS.clone(), VALUES.clone()
    gae(rewards, values, MASK, gamma=1.0, lam=0.95)
    assert rewards.equal(REWARDS) and values.equal(VALUES)


def test_faults_are_refused():
    with pytest.raises(ValueError, match="expected one shape"):
        gae(REWARDS, VALUES[:, :4], MASK, gamma=1.0, lam=0.95)
    with pytest.raises(ValueError, match="bool"):
        gae(REWARDS, VALUES, MASK.double(), gamma=1.0, lam=0.95)
