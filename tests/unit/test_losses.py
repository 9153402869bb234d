"""Clipped losses by hand, their gradients, their aggregation, and padding that reaches neither value nor gradient."""

import math

import numpy as np
import pytest
import reference
import torch

from alignkit.algo.kl import kl_loss
from alignkit.algo.losses import (
    aggregate,
    centring,
    clipped_policy_loss,
    clipped_value_loss,
    mean_by_ranking,
    negative_log_likelihood,
    preference_loss,
    truncated_importance,
)

GENERATOR = torch.Generator().manual_seed(0)
NEW, OLD, ADVANTAGES, RETURNS = (torch.randn(4, 5, generator=GENERATOR, dtype=torch.float64) for _ in range(4))
LENGTHS = [5, 1, 3, 4]
MASK = torch.arange(5)[None, :] < torch.tensor(LENGTHS)[:, None]
INPUTS = {"old": OLD, "advantages": ADVANTAGES, "returns": RETURNS}
TERMS = {  # new log-probabilities or values, the other inputs by name, mask -> per token
    "policy": lambda x, g, m: clipped_policy_loss(x, g["old"], g["advantages"], m, clip=0.2)[0],
    "policy, dual clip": lambda x, g, m: clipped_policy_loss(
        x, g["old"], g["advantages"], m, clip=0.2, clip_high=0.3, dual_clip=2.0
    )[0],
    "value": lambda x, g, m: clipped_value_loss(x, g["old"], g["returns"], m, clip=0.2)[0],
    "value unclipped": lambda x, g, m: clipped_value_loss(x, g["old"], g["returns"], m, clip=None)[0],
    "kl k2": lambda x, g, m: kl_loss(x, g["old"], m, estimator="k2"),
    "kl k3": lambda x, g, m: kl_loss(x, g["old"], m, estimator="k3"),
}
AGGREGATIONS = pytest.mark.parametrize("how", ["token_mean", "seq_mean_token_mean"])
EACH_TERM = pytest.mark.parametrize("name", TERMS)


def one(value: float) -> torch.Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


TRUE = one(1.0).bool()


def policy_case(advantage: float, ratio: float, **options) -> tuple[float, float, bool]:
    """Loss, gradient in the new log-probability, and whether a clip held."""
    logprobs = (one(-1.0) + np.log(ratio)).requires_grad_(True)
    loss, clipped = clipped_policy_loss(logprobs, one(-1.0), one(advantage), TRUE, **options)
    loss.sum().backward()
    return loss.item(), float(logprobs.grad), bool(clipped)


# By hand.


@pytest.mark.parametrize(
    "advantage, ratio, loss, gradient, active",
    [
        (1.0, 1.5, -1.2, 0.0, True),
        (-1.0, 1.5, 1.5, 1.5, False),
        (-1.0, 0.5, 0.8, 0.0, True),
        (1.0, 0.5, -0.5, -0.5, False),
        (1.0, 1.0, -1.0, -1.0, False),
        (-1.0, 1.1, 1.1, 1.1, False),
        (0.0, 1.5, 0.0, 0.0, False),  # nothing to gain, nothing to hold back
    ],
)
def test_the_policy_loss_in_its_cases(advantage, ratio, loss, gradient, active):
    """With its gradient in the new log-probability: - ratio * A where the clip is off, 0 where it is on."""
    expected = (pytest.approx(loss, abs=1e-12), pytest.approx(gradient, abs=1e-12), active)
    assert policy_case(advantage, ratio, clip=0.2) == expected


@pytest.mark.parametrize(
    "advantage, ratio, loss, gradient, active",
    [
        (1.0, 1.25, -1.25, -1.25, False),  # within the upper range of 0.28, above that of 0.2
        (1.0, 1.5, -1.28, 0.0, True),
        (-1.0, 0.75, 0.8, 0.0, True),  # the lower range is `clip`
        (-1.0, 1.5, 1.5, 1.5, False),
        (1.0, 0.5, -0.5, -0.5, False),
    ],
)
def test_the_upper_range_may_differ_from_the_lower(advantage, ratio, loss, gradient, active):
    expected = (pytest.approx(loss, abs=1e-12), pytest.approx(gradient, abs=1e-12), active)
    assert policy_case(advantage, ratio, clip=0.2, clip_high=0.28) == expected


@pytest.mark.parametrize(
    "advantage, ratio, loss, gradient, active",
    [
        (-1.0, 5.0, 3.0, 0.0, True),  # the published number
        (-2.0, 5.0, 6.0, 0.0, True),
        (-1.0, 2.9, 2.9, 2.9, False),
        (-1.0, 0.5, 0.8, 0.0, True),
        (1.0, 5.0, -1.2, 0.0, True),  # where A > 0 the dual clip has no part
    ],
)
def test_the_dual_clip_bounds_the_loss_of_what_became_too_probable(advantage, ratio, loss, gradient, active):
    expected = (pytest.approx(loss, abs=1e-12), pytest.approx(gradient, abs=1e-12), active)
    assert policy_case(advantage, ratio, clip=0.2, dual_clip=3.0) == expected


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
    found, clipped = clipped_value_loss(values, one(old), one(target), TRUE, clip=0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss, abs=1e-12)
    assert float(values.grad) == pytest.approx(gradient, abs=1e-12)
    assert bool(clipped) is active


def test_the_value_loss_without_clip_is_half_the_squared_error():
    loss, clipped = clipped_value_loss(NEW, OLD, RETURNS, MASK, clip=None)
    torch.testing.assert_close(loss, torch.where(MASK, 0.5 * (NEW - RETURNS) ** 2, 0.0), rtol=1e-15, atol=0)
    assert not clipped.any()


def test_a_value_within_the_clip_is_never_called_clipped():
    values, old, returns = torch.randn(3, 100, 100, generator=torch.Generator().manual_seed(0))
    within = (values - old).abs() < 0.19
    _, clipped = clipped_value_loss(values, old, returns, within, clip=0.2)
    assert not clipped.any()


def test_the_clip_is_never_counted_on_padding():
    _, clipped = clipped_policy_loss(NEW * 9, OLD, ADVANTAGES, MASK, clip=0.2)
    _, held = clipped_value_loss(NEW * 9, OLD, RETURNS, MASK, clip=0.2)
    assert clipped.any() and held.any() and not clipped[~MASK].any() and not held[~MASK].any()


def test_before_the_first_step_the_loss_is_minus_the_advantage_and_nothing_is_clipped():
    """With the gradient of plain policy gradient: - A on each log-probability."""
    logprobs = OLD.clone().requires_grad_(True)
    loss, clipped = clipped_policy_loss(logprobs, OLD, ADVANTAGES, MASK, clip=0.2, dual_clip=3.0)
    loss.sum().backward()
    expected = torch.where(MASK, -ADVANTAGES, 0.0)
    assert loss.equal(expected) and logprobs.grad.equal(expected) and not clipped.any()


# Gradients.


@pytest.mark.parametrize("name", [name for name in TERMS if name != "kl k3"])
def test_the_gradient_of_a_term_passes_gradcheck(name):
    """k3 has the gradient of k2 by intention: see test_kl."""
    assert torch.autograd.gradcheck(lambda x: TERMS[name](x, INPUTS, MASK), NEW.clone().requires_grad_(True))


@AGGREGATIONS
def test_the_gradient_of_the_aggregation_passes_gradcheck(how):
    per_token = torch.where(MASK, NEW, 0.0).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: aggregate(x, MASK, how, tokens=13, rows=4), per_token)


@pytest.mark.parametrize(
    "name, formula",
    [
        (
            "policy",
            lambda x, i, t: reference.policy_loss(
                [x], [float(OLD[i, t])], [float(ADVANTAGES[i, t])], clip=0.2, clip_high=None, dual_clip=None
            ),
        ),
        ("value", lambda x, i, t: reference.value_loss([x], [float(OLD[i, t])], [float(RETURNS[i, t])], clip=0.2)),
    ],
)
def test_the_gradient_is_the_slope_of_the_numpy_reference(name, formula):
    x = NEW.clone().requires_grad_(True)
    TERMS[name](x, INPUTS, MASK).sum().backward()
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            above, below = (formula(float(NEW[i, t]) + shift, i, t)[0][0] for shift in (1e-5, -1e-5))
            assert float(x.grad[i, t]) == pytest.approx((above - below) / 2e-5, rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [100.0, -100.0, 20.1, -20.1, float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_beyond_20_nats_the_policy_loss_is_finite_and_its_gradient_0(dtype, log_ratio, advantage):
    for dual_clip in (None, 3.0):
        logprobs = torch.tensor([[log_ratio]], dtype=dtype, requires_grad=True)
        zero, weight = torch.zeros(1, 1, dtype=dtype), torch.full((1, 1), advantage, dtype=dtype)
        loss, _ = clipped_policy_loss(logprobs, zero, weight, TRUE, clip=0.2, dual_clip=dual_clip)
        loss.sum().backward()
        expected, _ = reference.policy_loss(
            [log_ratio], [0.0], [advantage], clip=0.2, clip_high=None, dual_clip=dual_clip
        )
        assert loss.item() == pytest.approx(expected[0], rel=1e-5) and float(logprobs.grad) == 0.0


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -float("inf"), 1e4, 1e30])
@pytest.mark.parametrize("side", [(0, 2), (2, 0), (1, 1)])
@EACH_TERM
def test_padding_has_no_effect_on_value_or_gradient(name, side, fill):
    """Whatever stands there, in any of the inputs: 1e4 overflows if `exp` comes before the mask."""
    mask = torch.nn.functional.pad(MASK, side)

    def wide(values: torch.Tensor, what: float) -> torch.Tensor:
        full = torch.full(mask.shape, what, dtype=torch.float64)
        full[:, side[0] : side[0] + 5] = torch.where(MASK, values, what)
        return full

    padded, plain = wide(NEW, fill).requires_grad_(True), NEW.clone().requires_grad_(True)
    others = {"old": wide(OLD, 0.0), "advantages": wide(ADVANTAGES, fill), "returns": wide(RETURNS, fill)}
    loss, expected = TERMS[name](padded, others, mask), TERMS[name](plain, INPUTS, MASK)
    loss.sum().backward(), expected.sum().backward()
    assert loss[mask].equal(expected[MASK]) and not loss[~mask].any()
    assert padded.grad[mask].equal(plain.grad[MASK]) and plain.grad[MASK].any()
    assert torch.isfinite(padded.grad).all() and not padded.grad[~mask].any()


# Aggregation.


def test_the_two_aggregations_by_hand():
    """Rows of losses (1, 2, 3) and (10): 16 / 4 tokens, and (2 + 10) / 2 responses."""
    per_token = torch.tensor([[1.0, 2.0, 3.0], [10.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert float(aggregate(per_token, mask, "token_mean", tokens=4, rows=2)) == 4.0
    assert float(aggregate(per_token, mask, "seq_mean_token_mean", tokens=4, rows=2)) == 6.0


def test_equal_lengths_make_the_aggregations_equal():
    mask, counts = torch.ones(4, 5, dtype=torch.bool), {"tokens": 20, "rows": 4}
    parts = [aggregate(NEW, mask, how, **counts) for how in ("token_mean", "seq_mean_token_mean")]
    torch.testing.assert_close(*parts, rtol=1e-14, atol=0)


def whole(name: str, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = NEW.clone().requires_grad_(True)
    loss = aggregate(TERMS[name](x, INPUTS, MASK), MASK, how, tokens=13, rows=4)
    loss.backward()
    return loss.detach(), x.grad


@AGGREGATIONS
@EACH_TERM
@pytest.mark.parametrize("rows", [[[0], [1], [2], [3]], [[0, 1, 2], [3]], [[3, 1], [2, 0]], [[0, 1], [], [2, 3]]])
def test_micro_batches_add_up_to_the_whole_whatever_the_split(name, how, rows):
    """Each trimmed to its longest response, in any order, on ranks with unlike numbers of rows: value and gradient."""
    x = NEW.clone().requires_grad_(True)
    total = 0.0
    for index in rows:
        width = max([LENGTHS[i] for i in index], default=1)
        others = {key: value[index, :width] for key, value in INPUTS.items()}
        mask = MASK[index, :width]
        total = total + aggregate(TERMS[name](x[index, :width], others, mask), mask, how, tokens=13, rows=4)
    total.backward()
    loss, gradient = whole(name, how)
    torch.testing.assert_close(total.detach(), loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, gradient, rtol=1e-12, atol=1e-12)


@AGGREGATIONS
@EACH_TERM
def test_the_order_of_rows_and_more_padding_change_nothing(name, how):
    order = torch.tensor([2, 0, 3, 1])
    x = torch.nn.functional.pad(NEW[order], (0, 3), value=float("nan")).requires_grad_(True)
    others = {key: torch.nn.functional.pad(value[order], (0, 3), value=1e30) for key, value in INPUTS.items()}
    mask = torch.nn.functional.pad(MASK[order], (0, 3))
    total = aggregate(TERMS[name](x, others, mask), mask, how, tokens=13, rows=4)
    total.backward()
    loss, gradient = whole(name, how)
    torch.testing.assert_close(total.detach(), loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad[:, :5], gradient[order], rtol=1e-12, atol=1e-12)
    assert not x.grad[:, 5:].any()


@AGGREGATIONS
def test_a_row_with_nothing_to_learn_adds_nothing(how):
    """Ranks with fewer rows stay in step with a row whose mask is empty."""
    mask = MASK.clone()
    mask[1] = False
    with_it = aggregate(TERMS["policy"](NEW, INPUTS, mask), mask, how, tokens=12, rows=3)
    keep = [0, 2, 3]
    others = {key: value[keep] for key, value in INPUTS.items()}
    without = aggregate(TERMS["policy"](NEW[keep], others, MASK[keep]), MASK[keep], how, tokens=12, rows=3)
    torch.testing.assert_close(with_it, without, rtol=1e-14, atol=0)
    nothing = aggregate(NEW * 0.0, torch.zeros_like(MASK), how, tokens=12, rows=3)
    assert float(nothing) == 0.0


@AGGREGATIONS
def test_garbage_on_the_padding_of_a_per_token_loss_is_left_out(how):
    clean = torch.where(MASK, NEW, 0.0)
    found = aggregate(torch.where(MASK, NEW, torch.nan), MASK, how, tokens=13, rows=4)
    torch.testing.assert_close(found, aggregate(clean, MASK, how, tokens=13, rows=4), rtol=0, atol=0)


# Language model and pairs.


def test_the_language_model_loss_is_summed_over_the_real_tokens():
    loss = negative_log_likelihood(torch.where(MASK, NEW, torch.nan), MASK)
    assert float(loss.total) == pytest.approx(-float(NEW[MASK].sum()), rel=1e-13) and int(loss.count) == 13


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -float("inf")])
def test_no_gradient_of_the_language_model_loss_reaches_padding(fill):
    logprobs = torch.where(MASK, NEW, fill).requires_grad_(True)
    negative_log_likelihood(logprobs, MASK).total.backward()
    assert logprobs.grad.equal(torch.where(MASK, -1.0, 0.0).double())


def test_sums_and_counts_of_parts_add_up_to_the_whole():
    """Tokens, not rows, are counted: 13 of them; a split by columns is as good as one by rows."""
    columns = torch.arange(5)[None, :] < 2
    parts = [negative_log_likelihood(NEW, MASK & columns), negative_log_likelihood(NEW, MASK & ~columns)]
    together = negative_log_likelihood(NEW, MASK)
    assert int(together.count) == 13 == sum(int(part.count) for part in parts)
    assert float(together.total) == pytest.approx(sum(float(part.total) for part in parts), rel=1e-12)


def test_the_pairwise_loss_is_exact_for_pairs_that_are_very_wrong():
    """-log(sigmoid(-100)) = 100, with a gradient of 1: no constant inside the logarithm that flattens it."""
    chosen = torch.tensor([1.0, -100.0], dtype=torch.float64, requires_grad=True)
    loss = preference_loss(chosen, torch.zeros(2, dtype=torch.float64))
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([np.log1p(np.exp(-1.0)), 100.0], rel=1e-14)
    np.testing.assert_allclose(chosen.grad.numpy(), [-1 / (1 + np.e), -1.0], rtol=1e-12)


def test_a_margin_asks_for_that_much_more():
    chosen, rejected = torch.tensor([2.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    loss = preference_loss(chosen, rejected, margin=torch.tensor([1.0], dtype=torch.float64))
    assert loss.item() == pytest.approx(np.log1p(np.exp(-0.5)), rel=1e-14)


def test_smoothing_by_hand():
    """d = 2 - 0.5 - 1 = 0.5: 0.9 log(1 + e^-0.5) + 0.1 log(1 + e^0.5); without smoothing the first alone."""
    chosen, rejected, margin, smoothing = (one(x)[0] for x in (2.0, 0.5, 1.0, 0.1))
    right, wrong = np.log1p(np.exp(-0.5)), np.log1p(np.exp(0.5))
    loss = preference_loss(chosen, rejected, margin, smoothing)
    assert loss.item() == pytest.approx(0.9 * right + 0.1 * wrong, rel=1e-14)
    assert preference_loss(chosen, rejected, margin, 0 * smoothing).item() == pytest.approx(right, rel=1e-14)
    assert preference_loss(chosen, rejected, margin).item() == pytest.approx(right, rel=1e-14)


def test_smoothing_has_its_minimum_at_the_odds_it_names():
    """A label that is wrong one time in five is worth a difference of log 4, and no more."""
    difference = torch.tensor([np.log(4.0), 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    preference_loss(
        difference, torch.zeros(3).double(), smoothing=torch.full_like(difference, 0.2).detach()
    ).sum().backward()
    np.testing.assert_allclose(difference.grad.numpy()[0], 0.0, atol=1e-15)
    assert difference.grad[1] < 0 < difference.grad[2]


def test_both_forms_of_centring_by_hand():
    chosen, rejected = torch.tensor([3.0, -1.0]), torch.tensor([-1.0, -2.0])
    assert centring(chosen, rejected, "sum").tolist() == [4.0, 9.0]
    assert centring(chosen, rejected, "squares").tolist() == [10.0, 5.0]
    with pytest.raises(ValueError, match="form must be sum or squares, got 'mean'"):
        centring(chosen, rejected, "mean")


def test_a_ranking_weighs_as_a_pair():
    """Three pairs of one ranking and a pair of its own: (1 + 2 + 6) / 3 + 5, over 2."""
    mean = mean_by_ranking(torch.tensor([1.0, 2.0, 6.0, 5.0]).double(), torch.tensor([0, 0, 0, 1]))
    assert (mean.total.item(), int(mean.count)) == (8.0, 2)


def test_rankings_add_up_whatever_the_split_and_the_order():
    generator = torch.Generator().manual_seed(1)
    ranking = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 3])
    per_pair = torch.randn(len(ranking), generator=generator, dtype=torch.float64)
    whole, order = mean_by_ranking(per_pair, ranking), torch.randperm(len(ranking), generator=generator)
    parts = [mean_by_ranking(per_pair[cut], ranking[cut] - ranking[cut].min()) for cut in (slice(4), slice(4, None))]
    torch.testing.assert_close(parts[0].total + parts[1].total, whole.total, rtol=1e-13, atol=0)
    assert int(parts[0].count + parts[1].count) == int(whole.count) == 4
    torch.testing.assert_close(mean_by_ranking(per_pair[order], ranking[order]).total, whole.total, rtol=1e-13, atol=0)


# Faults.


@pytest.mark.parametrize(
    "options",
    [
        {"clip": 0.0},
        {"clip": 1.0},
        {"clip": -0.1},
        {"clip": float("nan")},
        {"clip": 0.2, "clip_high": 0.0},
        {"clip": 0.2, "clip_high": -0.3},
        {"clip": 0.2, "dual_clip": 1.0},
        {"clip": 0.2, "dual_clip": -3.0},
    ],
)
def test_a_clip_out_of_range_is_refused(options):
    given = f"got {options['clip']}, {options.get('clip_high')}, {options.get('dual_clip')}"
    with pytest.raises(ValueError, match=f"expected 0 < clip < 1, clip_high > 0, dual_clip > 1, {given}"):
        clipped_policy_loss(NEW, OLD, ADVANTAGES, MASK, **options)


@pytest.mark.parametrize("clip", [0.0, -0.1])
def test_a_value_clip_that_is_not_positive_is_refused(clip):
    with pytest.raises(ValueError, match=f"clip must be positive, got {clip}"):
        clipped_value_loss(NEW, OLD, RETURNS, MASK, clip=clip)


@EACH_TERM
def test_faults_of_shape_and_mask_are_refused(name):
    with pytest.raises(ValueError, match=r"expected one shape.*\(4, 5\).*\(1, 5\)"):
        TERMS[name](NEW, INPUTS, MASK[:1])
    with pytest.raises(ValueError, match=r"expected one shape.*\(4, 4\).*\(4, 5\)"):
        TERMS[name](NEW[:, :4], INPUTS, MASK)
    with pytest.raises(ValueError, match="mask must be a bool tensor, got torch.int64"):
        TERMS[name](NEW, INPUTS, MASK.long())


def test_faults_of_the_language_model_loss_are_refused():
    with pytest.raises(ValueError, match=r"expected one shape.*\(4, 5\).*\(1, 5\)"):
        negative_log_likelihood(NEW, MASK[:1])
    with pytest.raises(ValueError, match="mask must be a bool tensor, got torch.int64"):
        negative_log_likelihood(NEW, MASK.long())


@pytest.mark.parametrize("margin", [None, torch.zeros(3)])
def test_pairs_of_unlike_shape_are_refused(margin):
    with pytest.raises(ValueError, match=r"expected one shape.*\(3,\).*\(3, 1\)"):
        preference_loss(torch.zeros(3), torch.zeros(3, 1), margin)


def test_a_margin_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"expected one shape.*\(3,\).*\(3, 1\)"):
        preference_loss(torch.zeros(3), torch.zeros(3), margin=torch.zeros(3, 1))


@pytest.mark.parametrize(
    "mask, how, message",
    [
        (MASK[:1], "token_mean", "expected one shape"),
        (MASK.long(), "token_mean", "must be a bool tensor"),
        (MASK, "mean", "token_mean.*'mean'"),
    ],
)
def test_faults_of_the_aggregation_are_refused(mask, how, message):
    with pytest.raises(ValueError, match=message):
        aggregate(NEW, mask, how, tokens=13, rows=4)


def test_truncated_importance_by_hand():
    policy = torch.tensor([[-1.0, -2.0, -0.5, -3.0]]).double().requires_grad_()
    engine = torch.tensor([[-1.0, -2.5, -2.5, 7.0]]).double()
    mask = torch.tensor([[True, True, True, False]])
    weights = truncated_importance(policy, engine, mask, cap=2.0)
    assert weights.tolist() == [[1.0, pytest.approx(math.exp(0.5)), 2.0, 0.0]] and not weights.requires_grad
    with pytest.raises(ValueError, match="cap must be at least 1"):
        truncated_importance(policy, engine, mask, cap=0.5)
