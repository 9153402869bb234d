"""Advantages against numbers by hand and a plain double loop, and their policy gradient in exact expectation."""

from itertools import product

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from alignkit.algo.advantage import GAE, GRPO, RLOO, ReinforcePlusPlus, gae, normalise
from alignkit.algo.kl import kl_estimate
from alignkit.algo.losses import clipped_policy_loss
from alignkit.algo.shaping import reward_slots, shape_reward
from alignkit.algo.types import ShapedReward

LENGTHS = [5, 1, 3, 4]
GENERATOR = torch.Generator().manual_seed(0)
REWARDS = torch.randn(4, 5, generator=GENERATOR, dtype=torch.float64)
VALUES = torch.randn(4, 5, generator=GENERATOR, dtype=torch.float64)
MASK = torch.arange(5)[None, :] < torch.tensor(LENGTHS)[:, None]
SHAPED = ShapedReward(per_token=REWARDS.where(MASK, 0.0), kl=torch.zeros_like(REWARDS), mask=MASK)
PLAIN = {"whiten": "none", "clip": None}
STRATEGIES = {
    "GAE": GAE(gamma=1.0, lam=0.95, **PLAIN),
    "RLOO": RLOO(**PLAIN),
    "GRPO": GRPO(divide_by_std=True, **PLAIN),
    "REINFORCE++": ReinforcePlusPlus(gamma=0.9, **PLAIN),
}


def rewarded(*sums: float) -> ShapedReward:
    """Responses of one and two tokens in turn, with these sums of rewards."""
    mask = torch.tensor([[True, i % 2 == 1] for i in range(len(sums))])
    per_token = torch.tensor([[x, 0.0] if i % 2 == 0 else [0.25, x - 0.25] for i, x in enumerate(sums)])
    return ShapedReward(per_token=per_token.double(), kl=torch.zeros(len(sums), 2), mask=mask)


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


@pytest.mark.parametrize("name", ["GAE", "REINFORCE++"])
def test_the_order_of_rows_changes_nothing(name):
    order = torch.tensor([2, 0, 3, 1])
    moved = ShapedReward(SHAPED.per_token[order], SHAPED.kl[order], SHAPED.mask[order])
    whole = STRATEGIES[name](SHAPED, VALUES, MASK, 1)
    part = STRATEGIES[name](moved, VALUES[order], MASK[order], 1)
    assert part.advantages.equal(whole.advantages[order]) and part.returns.equal(whole.returns[order])


@pytest.mark.parametrize("name", ["RLOO", "GRPO"])
def test_the_order_of_prompts_and_that_within_a_prompt_change_nothing(name):
    reward, order = rewarded(1.0, 3.0, -2.0, 0.5, 7.0, 0.0), torch.tensor([5, 3, 4, 1, 0, 2])  # prompts of 3
    moved = ShapedReward(reward.per_token[order], reward.kl[order], reward.mask[order])
    whole = STRATEGIES[name](reward, reward.kl, reward.mask, 3).advantages
    part = STRATEGIES[name](moved, moved.kl, moved.mask, 3).advantages
    torch.testing.assert_close(part, whole[order], rtol=0, atol=1e-14)


def test_every_strategy_gives_0_on_padding_and_reads_no_values_there():
    for strategy in STRATEGIES.values():
        values = torch.where(MASK, VALUES, torch.nan)
        found = strategy(SHAPED, values, MASK, 2)
        assert not found.advantages[~MASK].any() and not found.returns[~MASK].any()
        assert found.advantages[MASK].any() and torch.isfinite(found.advantages).all()


def test_strategies_without_a_value_model_read_no_values_and_give_no_returns():
    for strategy in STRATEGIES.values():
        if not strategy.uses_values:
            found = strategy(SHAPED, torch.full_like(VALUES, torch.nan), MASK, 2)
            assert torch.isfinite(found.advantages).all() and not found.returns.any()


def test_rloo_compares_with_the_mean_of_the_others():
    """Two prompts, three responses each; the advantage stands on every token of its response."""
    reward = rewarded(1.0, 3.0, -2.0, 5.0, 5.0, 5.0)
    found = RLOO(**PLAIN)(reward, reward.kl, reward.mask, 3).advantages
    expected = [[0.5, 0.0], [3.5, 3.5], [-4.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)


def test_grpo_compares_with_the_mean_of_all_and_may_divide_by_their_deviation():
    """Of 1, 3, -1: mean 1, standard deviation 2 (n - 1). Equal responses give 0 and not NaN."""
    reward = rewarded(1.0, 3.0, -1.0, 5.0, 5.0, 5.0)
    for divide, unit in ((False, 1.0), (True, 1 / (2 + 1e-4))):
        found = GRPO(divide_by_std=divide, **PLAIN)(reward, reward.kl, reward.mask, 3).advantages
        expected = [[0.0, 0.0], [2 * unit, 2 * unit], [-2 * unit, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)


def test_reinforce_plus_plus_sums_the_rewards_to_come():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    rewards = torch.tensor([[-0.1, 0.2, 1.0], [0.4, -2.0, 0.0]], dtype=torch.float64)
    reward = ShapedReward(per_token=rewards, kl=torch.zeros(2, 3), mask=mask)
    found = ReinforcePlusPlus(gamma=0.5, **PLAIN)(reward, rewards, mask, 1).advantages
    expected = torch.tensor([[0.25, 0.7, 1.0], [-0.6, -2.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


def test_reinforce_plus_plus_sees_a_score_on_the_slot_after_the_response():
    mask = torch.tensor([[True, True, False]])
    shaped = shape_reward(
        torch.tensor([2.0]), torch.zeros(1, 3), torch.zeros(1, 3), reward_slots(mask, "eos_plus_one"), coef=0.1
    )
    found = ReinforcePlusPlus(gamma=1.0, **PLAIN)(shaped, torch.zeros(1, 3), mask, 1).advantages
    assert found.tolist() == [[2.0, 2.0, 0.0]]


def test_returns_are_taken_before_whitening():
    """Whatever `whiten` says: the value model's target is in units of reward, not of the batch's spread."""
    plain = GAE(gamma=1.0, lam=0.95, whiten="none", clip=None)(SHAPED, VALUES, MASK, 1)
    for kind, over in (("batch", "batch"), ("minibatch", "minibatch")):
        white = GAE(gamma=1.0, lam=0.95, whiten=kind, clip=0.5)(SHAPED, VALUES, MASK, 1)
        assert white.returns.equal(plain.returns) and white.advantages.equal(plain.advantages)
        torch.testing.assert_close(white.returns, torch.where(MASK, white.advantages + VALUES, 0.0), rtol=0, atol=0)
        real = plain.advantages[MASK].numpy()
        expected = (real - real.mean()) / np.sqrt(real.var() + 1e-8)
        found = normalise(white.advantages, MASK, kind, None, over=over)
        np.testing.assert_allclose(found[MASK].numpy(), expected, rtol=1e-12)
        assert not found[~MASK].any()


def test_whitening_and_clipping_come_once_and_in_that_order():
    """Per batch or per minibatch; if nothing is whitened, the clip is due with the batch."""
    advantages = torch.tensor([[30.0, -10.0, 1.0]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    white = normalise(advantages, mask, "batch", None, over="batch")
    assert white.abs().max() < 2
    for kind, over, expected in (
        ("none", "batch", advantages.clamp(-0.5, 0.5)),
        ("none", "minibatch", advantages),
        ("batch", "batch", white.clamp(-0.5, 0.5)),
        ("batch", "minibatch", advantages),
        ("minibatch", "batch", advantages),
        ("minibatch", "minibatch", white.clamp(-0.5, 0.5)),
    ):
        assert normalise(advantages, mask, kind, 0.5, over=over).equal(expected), (kind, over)


# In exact expectation: all responses of at most two tokens over {0, 1, END}, each weighted by its probability.

END, BETA = 2, 0.3
TREE = [(END,)] + [(first, second) for first in (0, 1) for second in (0, 1, END)]
TABLE = torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)  # at the start, after 0, 1
REF_TABLE = torch.randn(3, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
SCORES = {response: float(x) for response, x in zip(TREE, [0.3, 2.0, -1.0, 0.5, -0.7, 1.5, 4.0])}


def tree_logprobs(table: torch.Tensor, responses: list[tuple[int, ...]]) -> torch.Tensor:
    """[n, 2] log-probabilities of the tokens, 0 where a response has none."""
    logp, zero = table.log_softmax(dim=1), torch.zeros((), dtype=torch.float64)
    return torch.stack([torch.stack([logp[0, r[0]], logp[1 + r[0], r[1]] if len(r) == 2 else zero]) for r in responses])


def exact_gradient(beta: float) -> torch.Tensor:
    """Of - (E[score] - beta KL(policy || reference)) over whole responses."""
    table = TABLE.clone().requires_grad_(True)
    logp, ref = tree_logprobs(table, TREE).sum(dim=1), tree_logprobs(REF_TABLE, TREE).sum(dim=1)
    scores = torch.tensor([SCORES[r] for r in TREE], dtype=torch.float64)
    (-(logp.exp() * (scores - beta * (logp - ref))).sum()).backward()
    return table.grad


def sampled_gradient(strategy, samples: int, position: str) -> torch.Tensor:
    """E over all batches of `samples` responses to a prompt: the gradient of the package's loss, summed over tokens and
    divided by the responses."""
    table = TABLE.clone().requires_grad_(True)
    total = 0.0
    for responses in product(TREE, repeat=samples):
        logprobs = tree_logprobs(table, responses)
        mask = torch.tensor([[True, len(r) == 2] for r in responses])
        kl = kl_estimate(logprobs.detach(), tree_logprobs(REF_TABLE, responses), mask)
        scores = torch.tensor([SCORES[r] for r in responses], dtype=torch.float64)
        shaped = shape_reward(scores, kl, kl, reward_slots(mask, position), coef=BETA)
        values = torch.tensor([[0.9, (-0.4, 1.7, 0.6)[r[0]]] for r in responses], dtype=torch.float64)  # of prefixes
        advantages = strategy(shaped, values, mask, samples).advantages
        loss, _ = clipped_policy_loss(logprobs, logprobs.detach(), advantages, mask, clip=0.2)
        total = total + logprobs.detach().sum().exp() * loss.sum() / samples
    total.backward()
    return table.grad


@pytest.mark.parametrize(
    "strategy, samples, position",
    [
        (GAE(gamma=1.0, lam=1.0, **PLAIN), 1, "eos"),
        (GAE(gamma=1.0, lam=1.0, **PLAIN), 1, "eos_plus_one"),
        (RLOO(**PLAIN), 2, "eos"),
        (RLOO(**PLAIN), 3, "eos"),
        (ReinforcePlusPlus(gamma=1.0, **PLAIN), 1, "eos"),
    ],
    ids=["gae", "gae, eos_plus_one", "rloo of 2", "rloo of 3", "reinforce++"],
)
def test_the_expected_policy_gradient_is_that_of_reward_less_kl(strategy, samples, position):
    """With lambda 1 any function of the prefix may stand for the values; it moves the spread and not the mean."""
    expected = exact_gradient(BETA)
    assert (expected - exact_gradient(0.0)).abs().max() > 0.05, "the penalty is seen"
    torch.testing.assert_close(sampled_gradient(strategy, samples, position), expected, rtol=0, atol=1e-14)


def test_grpo_without_the_deviation_follows_the_same_gradient_scaled():
    """The mean includes the response itself, which takes 1 / samples off the gradient's length and turns nothing."""
    found = sampled_gradient(GRPO(divide_by_std=False, **PLAIN), 2, "eos")
    torch.testing.assert_close(found, exact_gradient(BETA) * 0.5, rtol=0, atol=1e-14)


def test_the_inputs_are_left_as_they_were():
    rewards, values = REWARDS.clone(), VALUES.clone()
    gae(rewards, values, MASK, gamma=1.0, lam=0.95)
    assert rewards.equal(REWARDS) and values.equal(VALUES)


def test_faults_are_refused():
    with pytest.raises(ValueError, match=r"expected one shape.*\(4, 5\).*\(4, 4\)"):
        gae(REWARDS, VALUES[:, :4], MASK, gamma=1.0, lam=0.95)
    with pytest.raises(ValueError, match="mask must be a bool tensor, got torch.float64"):
        gae(REWARDS, VALUES, MASK.double(), gamma=1.0, lam=0.95)
    with pytest.raises(ValueError, match=r"expected one shape.*\(4, 5\).*\(1, 5\)"):
        STRATEGIES["GAE"](SHAPED, VALUES[:1], MASK, 1)


@pytest.mark.parametrize(
    "kind, change",
    [
        (GAE, {"gamma": 1.1, "lam": 0.95}),
        (GAE, {"gamma": 1.0, "lam": -0.1}),
        (GAE, {"gamma": 1.0, "lam": 0.95, "whiten": "rank"}),
        (GAE, {"gamma": 1.0, "lam": 0.95, "clip": 0.0}),
        (RLOO, {"whiten": True}),
        (RLOO, {"clip": -1.0}),
        (GRPO, {"divide_by_std": "yes"}),
        (GRPO, {"divide_by_std": True, "clip": float("nan")}),
        (ReinforcePlusPlus, {"gamma": 2.0}),
    ],
)
def test_settings_without_a_meaning_are_refused(kind, change):
    with pytest.raises(ValidationError):
        kind(**{**PLAIN, **change})


@pytest.mark.parametrize("name", ["GAE", "RLOO", "GRPO"])
def test_a_mask_of_another_shape_than_the_rewards_is_refused(name):
    with pytest.raises(ValueError, match="expected one shape"):
        STRATEGIES[name](SHAPED, VALUES, MASK[:1], 2)


@pytest.mark.parametrize("name", ["RLOO", "GRPO"])
def test_rows_that_do_not_divide_into_prompts_are_refused(name):
    with pytest.raises(ValueError, match="4.*3"):
        STRATEGIES[name](SHAPED, VALUES, MASK, 3)
