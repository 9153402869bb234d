"""From a score to the rewards of tokens: what happens to the score, and where it is paid."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from alignkit.algo.advantage import GAE
from alignkit.algo.kl import kl_estimate
from alignkit.algo.masked import merge_moments, moments
from alignkit.algo.sequence import response_mask
from alignkit.algo.shaping import Shaping, reward_slots, shape_reward

PLAIN = {
    "running": "none",
    "clip": None,
    "missing_eos": "subtract",
    "missing_eos_penalty": 0.0,
    "length_penalty": 0.0,
    "score_position": "eos",
    "whiten": False,
}
LENGTHS = [5, 1, 3, 4]
MASK = torch.arange(5)[None, :] < torch.tensor(LENGTHS)[:, None]
KL = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).where(MASK, 0.0)
SCORES = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)


def seen(*scores: float) -> torch.Tensor:
    values = torch.tensor([scores], dtype=torch.float64)
    return moments(values, torch.ones_like(values, dtype=torch.bool))


def paid(scores: torch.Tensor, *, finished=(True,) * 4, history=(0.0, 2.0), **changes) -> list[float]:
    shaping = Shaping(**{**PLAIN, **changes})
    return shaping.scores(scores, torch.tensor(finished), torch.tensor(LENGTHS), seen(*history)).tolist()


# What happens to a score.


def test_without_any_shaping_the_score_is_paid_as_it_is():
    assert paid(SCORES) == SCORES.tolist()


def test_a_missing_end_takes_its_penalty_off_the_score_or_replaces_it():
    finished = (True, False, False, True)
    assert paid(SCORES, finished=finished, missing_eos_penalty=1.0) == [1.0, -3.0, -0.5, 3.0]
    replaced = paid(SCORES, finished=finished, missing_eos="replace", missing_eos_penalty=1.0)
    assert replaced == [1.0, -1.0, -1.0, 3.0]
    assert paid(SCORES, finished=finished, missing_eos="replace") == [1.0, 0.0, 0.0, 3.0], "by 0 if there is no penalty"


def test_each_response_token_costs_the_length_penalty():
    assert paid(SCORES, length_penalty=0.25) == [1.0 - 1.25, -2.25, 0.5 - 0.75, 3.0 - 1.0]


def test_scores_are_divided_by_the_running_deviation():
    """Of 1, 3, 5, 7 so far: mean 4, biased variance 5."""
    history, deviation = (1.0, 3.0, 5.0, 7.0), np.sqrt(5.0 + 1e-8)
    assert paid(SCORES, running="scale", history=history) == pytest.approx((SCORES.numpy() / deviation).tolist())
    shifted = paid(SCORES, running="shift_scale", history=history)
    assert shifted == pytest.approx(((SCORES.numpy() - 4.0) / deviation).tolist())


def test_the_running_moments_do_not_depend_on_how_the_scores_came_in():
    """In one batch, or over iterations and a resume: a sum of squares of its own would lose digits here."""
    all_at_once = seen(1e6, 1e6 + 1, 1e6 + 2, 1e6 + 5, 1e6 + 3)
    parts = [seen(1e6, 1e6 + 1), seen(1e6 + 2), seen(1e6 + 5, 1e6 + 3)]
    one_by_one = torch.zeros(3, dtype=torch.float64)
    for part in parts:
        one_by_one = merge_moments(torch.stack([one_by_one, part]))
    torch.testing.assert_close(one_by_one, all_at_once, rtol=1e-12, atol=0)
    assert all_at_once.tolist() == pytest.approx([5.0, 1e6 + 2.2, 14.8], rel=1e-12)


def test_the_score_is_clipped_after_scaling_and_before_what_is_taken_off():
    """The clip bounds the reward model; a penalty that it could swallow would be no penalty."""
    scores = torch.tensor([10.0, -10.0, 0.1, 10.0], dtype=torch.float64)
    options = {
        "running": "scale",
        "history": (0.0, 4.0),
        "clip": 0.3,
        "missing_eos_penalty": 1.0,
        "length_penalty": 0.1,
    }
    found = paid(scores, finished=(True, True, True, False), **options)
    assert found == pytest.approx([0.3 - 0.5, -0.3 - 0.1, 0.05 - 0.3, 0.3 - 1.0 - 0.4])


def test_scores_keep_their_dtype_and_the_caller_s_numbers():
    scores = SCORES.float()
    shaping = Shaping(**{**PLAIN, "running": "shift_scale", "clip": 0.1, "length_penalty": 0.1})
    found = shaping.scores(scores, torch.ones(4, dtype=torch.bool), torch.tensor(LENGTHS), seen(0.0, 1.0))
    assert found.dtype == torch.float32 and scores.equal(SCORES.float())


@pytest.mark.parametrize(
    "change",
    [
        {"running": "shift"},
        {"clip": 0.0},
        {"clip": -1.0},
        {"missing_eos": "drop"},
        {"missing_eos_penalty": -1.0},
        {"length_penalty": -0.1},
        {"length_penalty": float("inf")},
        {"score_position": "pad"},
        {"whiten": "yes"},
    ],
)
def test_settings_without_a_meaning_are_refused(change):
    with pytest.raises(ValidationError, match=next(iter(change))):
        Shaping(**{**PLAIN, **change})


# Where it is paid.


def test_reward_is_the_penalty_everywhere_and_the_score_on_the_last_token():
    shaped = shape_reward(SCORES, KL, KL, MASK, coef=0.3)
    expected = np.zeros((4, 5))
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            expected[row, t] = -0.3 * float(KL[row, t])
        expected[row, length - 1] += float(SCORES[row])
    np.testing.assert_allclose(shaped.per_token.numpy(), expected, rtol=0, atol=1e-15)
    assert shaped.kl.equal(KL) and shaped.mask.equal(MASK)


def test_the_penalty_is_paid_and_the_k1_estimate_is_only_watched():
    penalty = KL.square()
    shaped = shape_reward(torch.zeros(4, dtype=torch.float64), KL, penalty, MASK, coef=2.0)
    assert shaped.per_token.equal(-2.0 * penalty) and shaped.kl.equal(KL)


def test_the_score_sits_on_the_stop_token_itself():
    """Not one past it, and not before it: whoever reads PAD or treats EOS as PAD misses the decision to stop."""
    stop = 1
    response = torch.tensor([[7, 8, stop, 0, 0], [stop, 0, 0, 0, 0], [7, 8, 9, 8, 7]])
    mask, finished = response_mask(response, torch.tensor([stop]))
    zero = torch.zeros(3, 5)
    shaped = shape_reward(torch.tensor([1.0, 2.0, 3.0]), zero, zero, mask, coef=0.1)
    assert shaped.per_token.nonzero().tolist() == [[0, 2], [1, 0], [2, 4]]
    assert response[finished, shaped.per_token[finished].argmax(dim=1)].tolist() == [stop, stop]


def test_eos_plus_one_adds_a_slot_where_there_is_room():
    slots = reward_slots(MASK, "eos_plus_one")
    assert slots.sum(dim=1).tolist() == [5, 2, 4, 5] and MASK.sum(dim=1).tolist() == LENGTHS
    shaped = shape_reward(SCORES, KL, KL, slots, coef=0.0)
    assert shaped.per_token.nonzero().tolist() == [[0, 4], [1, 1], [2, 3], [3, 4]]
    assert shaped.mask.equal(slots) and reward_slots(MASK, "eos").equal(MASK)


def test_the_score_of_eos_plus_one_reaches_the_stop_token_through_lambda():
    """Without KL, A_EOS = (V' - V) + lambda (s - V'), V' the value of the slot after it: the published N+ code."""
    mask = torch.tensor([[True, False]])
    zero = torch.zeros(1, 2, dtype=torch.float64)
    values = torch.tensor([[0.3, 0.7]], dtype=torch.float64)
    for position, expected in (("eos", 2.0 - 0.3), ("eos_plus_one", (0.7 - 0.3) + 0.95 * (2.0 - 0.7))):
        score = torch.tensor([2.0], dtype=torch.float64)
        shaped = shape_reward(score, zero, zero, reward_slots(mask, position), coef=0.1)
        found = GAE(gamma=1.0, lam=0.95, whiten="none", clip=None)(shaped, values, mask, samples=1)
        assert found.advantages.tolist() == [[pytest.approx(expected, abs=1e-15), 0.0]]
        extra = 0.0 if position == "eos" else 2.0
        assert found.returns.tolist() == [[pytest.approx(expected + 0.3, abs=1e-15), extra]]


def test_the_sum_of_a_row_does_not_depend_on_where_the_score_is():
    sums = [
        shape_reward(SCORES, KL, KL, reward_slots(MASK, position), coef=0.3).per_token.sum(dim=1)
        for position in ("eos", "eos_plus_one")
    ]
    torch.testing.assert_close(*sums, rtol=0, atol=1e-15)


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("position", ["eos", "eos_plus_one"])
def test_garbage_in_the_padding_of_the_log_probabilities_reaches_no_reward(position, fill):
    logprobs, ref = (torch.where(MASK, x, fill) for x in (KL, KL * 0.5))
    kl = kl_estimate(logprobs, ref, MASK)
    shaped = shape_reward(SCORES, kl, kl, reward_slots(MASK, position), coef=0.3)
    clean = shape_reward(SCORES, KL * 0.5, KL * 0.5, reward_slots(MASK, position), coef=0.3)
    torch.testing.assert_close(shaped.per_token, clean.per_token, rtol=0, atol=1e-15)


def test_faults_are_refused():
    with pytest.raises(ValueError, match=r"one score a row, \(4,\), got \(4, 1\)"):
        shape_reward(SCORES[:, None], KL, KL, MASK, coef=0.1)
    with pytest.raises(ValueError, match=r"one score a row, \(4,\), got \(3,\)"):
        shape_reward(SCORES[:3], KL, KL, MASK, coef=0.1)
    with pytest.raises(ValueError, match=r"expected one shape.*\(4, 5\).*\(4, 4\)"):
        shape_reward(SCORES, KL, KL[:, :4], MASK, coef=0.1)
    with pytest.raises(ValueError, match="must be a bool tensor, got torch.int64"):
        shape_reward(SCORES, KL, KL, MASK.long(), coef=0.1)
    with pytest.raises(ValueError, match="no True"):
        shape_reward(SCORES, KL, KL, torch.zeros_like(MASK), coef=0.1)


@pytest.mark.parametrize("running", ["scale", "shift_scale"])
def test_scores_that_are_all_alike_are_not_blown_up(running):
    """A reward of 0 or 1 may begin with nothing but ones: their deviation is 0, and they stay of the size they are."""
    scores = torch.ones(8)
    seen = moments(scores, torch.ones(8, dtype=torch.bool))
    shaping = Shaping(
        running=running, clip=None, missing_eos="subtract", missing_eos_penalty=0.0, length_penalty=0.0,
        score_position="eos", whiten=False,
    )  # fmt: skip
    paid = shaping.scores(scores, torch.ones(8, dtype=torch.bool), torch.full((8,), 3), seen)
    assert paid.tolist() == [1.0 if running == "scale" else 0.0] * 8
