"""Clipped losses by hand, sums over tokens, and padding that reaches neither value nor gradient."""

import numpy as np
import pytest
import torch

from alignkit.algo.losses import clipped_policy_loss, clipped_value_loss, negative_log_likelihood, pairwise_loss

GENERATOR = torch.Generator().manual_seed(0)
NEW, OLD, ADVANTAGES, RETURNS = (torch.randn(4, 5, generator=GENERATOR, dtype=torch.float64) for _ in range(4))
MASK = torch.arange(5)[None, :] < torch.tensor([5, 1, 3, 4])[:, None]
LOSSES = {
    "policy": lambda new, mask: clipped_policy_loss(new, OLD, ADVANTAGES, mask, clip=0.2)[0],
    "value": lambda new, mask: clipped_value_loss(new, OLD, RETURNS, mask, clip=0.2)[0],
    "value unclipped": lambda new, mask: clipped_value_loss(new, OLD, RETURNS, mask, clip=None)[0],
    "language model": negative_log_likelihood,
}


def one(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


@pytest.mark.parametrize(
    "advantage, ratio, loss, gradient, active",
    [
        (1.0, 1.5, -1.2, 0.0, True),
        (-1.0, 1.5, 1.5, 1.5, False),
        (-1.0, 0.5, 0.8, 0.0, True),
        (1.0, 0.5, -0.5, -0.5, False),
        (1.0, 1.0, -1.0, -1.0, False),
        (-1.0, 1.1, 1.1, 1.1, False),
    ],
)
def test_the_policy_loss_in_its_six_cases(advantage, ratio, loss, gradient, active):
    """With its gradient in the new log-probability: - ratio * A where the clip is off, 0 where it is on."""
    logprobs = (one(-1.0) + np.log(ratio)).requires_grad_(True)
    summed, clipped = clipped_policy_loss(logprobs, one(-1.0), one(advantage), one(1.0).bool(), clip=0.2)
    summed.total.backward()
    assert summed.total.item() == pytest.approx(loss, abs=1e-12) and int(summed.count) == 1
    assert float(logprobs.grad) == pytest.approx(gradient, abs=1e-12)
    assert bool(clipped) is active


@pytest.mark.parametrize(
    "value, old, target, loss, gradient, active",
    [
        (1.5, 1.0, 2.0, 0.5 * 0.8**2, 0.0, True),  # moved beyond 1.2 towards the target: no more reward for it
        (1.5, 1.0, 0.0, 0.5 * 1.5**2, 1.5, False),  # moved away from it: full loss, full gradient
        (1.1, 1.0, 2.0, 0.5 * 0.9**2, -0.9, False),
        (0.5, 1.0, 0.0, 0.5 * 0.8**2, 0.0, True),
    ],
)
def test_the_value_loss_takes_the_larger_of_plain_and_clipped(value, old, target, loss, gradient, active):
    values = one(value).requires_grad_(True)
    summed, clipped = clipped_value_loss(values, one(old), one(target), one(1.0).bool(), clip=0.2)
    summed.total.backward()
    assert summed.total.item() == pytest.approx(loss, abs=1e-12)
    assert float(values.grad) == pytest.approx(gradient, abs=1e-12)
    assert bool(clipped) is active


def test_the_value_loss_without_clip_is_half_the_squared_error():
    summed, clipped = clipped_value_loss(NEW, OLD, RETURNS, MASK, clip=None)
    assert float(summed.total) == pytest.approx(0.5 * float(((NEW - RETURNS)[MASK] ** 2).sum()), rel=1e-13)
    assert not clipped.any()


def test_losses_equal_numpy_over_the_real_tokens():
    new, old, advantages, returns = (x.numpy()[MASK.numpy()] for x in (NEW, OLD, ADVANTAGES, RETURNS))
    ratio = np.exp(new - old)
    policy = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 0.8, 1.2)).sum()
    held = np.clip(new, old - 0.2, old + 0.2)
    value = 0.5 * np.maximum((new - returns) ** 2, (held - returns) ** 2).sum()
    assert float(LOSSES["policy"](NEW, MASK).total) == pytest.approx(policy, rel=1e-13)
    assert float(LOSSES["value"](NEW, MASK).total) == pytest.approx(value, rel=1e-13)
    assert float(LOSSES["language model"](NEW, MASK).total) == pytest.approx(-new.sum(), rel=1e-13)


@pytest.mark.parametrize("name", LOSSES)
def test_sums_and_counts_of_parts_add_up_to_the_whole(name):
    """Tokens, not rows, are counted: 13 of them; a split by columns is as good as one by rows."""
    whole = LOSSES[name](NEW, MASK)
    columns = torch.arange(5)[None, :] < 2
    parts = [LOSSES[name](NEW, MASK & columns), LOSSES[name](NEW, MASK & ~columns)]
    assert int(whole.count) == 13 == sum(int(part.count) for part in parts)
    assert float(whole.total) == pytest.approx(sum(float(part.total) for part in parts), rel=1e-12)


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -float("inf"), 1e4])
@pytest.mark.parametrize("side", [(0, 2), (2, 0), (1, 1)])
def test_padding_has_no_effect_on_value_or_gradient(side, fill):
    """Whatever stands there, in any of the inputs: 1e4 overflows if `exp` comes before the mask."""
    width = slice(side[0], side[0] + 5)
    mask = torch.nn.functional.pad(MASK, side)

    def wide(values: torch.Tensor, what: float) -> torch.Tensor:
        full = torch.full(mask.shape, what, dtype=torch.float64)
        full[:, width] = torch.where(MASK, values, what)
        return full

    new, old, advantages, returns = wide(NEW, fill), wide(OLD, 0.0), wide(ADVANTAGES, fill), wide(RETURNS, fill)
    for name, loss in {
        "policy": lambda x: clipped_policy_loss(x, old, advantages, mask, clip=0.2)[0],
        "value": lambda x: clipped_value_loss(x, old, returns, mask, clip=0.2)[0],
        "language model": lambda x: negative_log_likelihood(x, mask),
    }.items():
        padded, plain = new.clone().requires_grad_(True), NEW.clone().requires_grad_(True)
        summed, expected = loss(padded), LOSSES[name](plain, MASK)
        summed.total.backward(), expected.total.backward()
        assert summed.total.item() == pytest.approx(expected.total.item(), rel=1e-13)
        torch.testing.assert_close(padded.grad[mask], plain.grad[MASK], rtol=1e-13, atol=0)
        assert torch.isfinite(padded.grad).all() and not padded.grad[~mask].any()


def test_the_clip_is_never_counted_on_padding():
    _, clipped = clipped_policy_loss(NEW * 9, OLD, ADVANTAGES, MASK, clip=0.2)
    _, held = clipped_value_loss(NEW * 9, OLD, RETURNS, MASK, clip=0.2)
    assert clipped.any() and held.any() and not clipped[~MASK].any() and not held[~MASK].any()


def test_the_pairwise_loss_is_exact_for_pairs_that_are_very_wrong():
    """-log(sigmoid(-100)) = 100, with a gradient of 1: no constant inside the logarithm that flattens it."""
    chosen = torch.tensor([1.0, -100.0], dtype=torch.float64, requires_grad=True)
    loss = pairwise_loss(chosen, torch.zeros(2, dtype=torch.float64))
    loss.total.backward()
    assert loss.total.item() == pytest.approx(np.log1p(np.exp(-1.0)) + 100.0, rel=1e-14) and int(loss.count) == 2
    np.testing.assert_allclose(chosen.grad.numpy(), [-1 / (1 + np.e), -1.0], rtol=1e-12)


def test_a_margin_asks_for_that_much_more():
    chosen, rejected = torch.tensor([2.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    loss = pairwise_loss(chosen, rejected, margin=torch.tensor([1.0], dtype=torch.float64))
    assert float(loss.total) == pytest.approx(np.log1p(np.exp(-0.5)), rel=1e-14)


@pytest.mark.parametrize("clip", [0.0, 1.0, -0.1])
def test_a_clip_out_of_range_is_refused(clip):
    with pytest.raises(ValueError, match="clip must be in"):
        clipped_policy_loss(NEW, OLD, ADVANTAGES, MASK, clip=clip)
    if clip <= 0:
        with pytest.raises(ValueError, match="clip must be positive"):
            clipped_value_loss(NEW, OLD, RETURNS, MASK, clip=clip)


@pytest.mark.parametrize("name", LOSSES)
def test_faults_of_shape_and_mask_are_refused(name):
    with pytest.raises(ValueError, match="expected one shape"):
        LOSSES[name](NEW, MASK[:1])
    with pytest.raises(ValueError, match="must be a bool tensor"):
        LOSSES[name](NEW, MASK.long())


def test_pairs_of_unlike_shape_are_refused():
    with pytest.raises(ValueError, match="expected one shape"):
        pairwise_loss(torch.zeros(3), torch.zeros(3, 1))


def test_a_margin_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="expected one shape"):
        pairwise_loss(torch.zeros(3), torch.zeros(3), margin=torch.zeros(3, 1))
