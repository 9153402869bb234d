"""From the score of a response to the reward of each of its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from alignkit.schema import NonNegative, Positive, settings

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.algo.types import ShapedReward


@settings
class Shaping:
    """What happens to a score, in this order.

    running:       divide by the standard deviation of all scores so far (scale), and first subtract their mean
                   (shift_scale); none: take the scores as the reward source gives them.
    clip:          cut to +-clip, reward units (null: not). Of the score alone: the KL penalty is never cut.
    missing_eos:   subtract missing_eos_penalty from the score of a response that did not end by itself, or replace the
                   score by its negative.
    length_penalty: subtracted for each response token, reward units.
    score_position: eos: paid on the last response token; eos_plus_one: on a slot after it, with a value of its own (of
                   a response with max_response tokens: on the last token), as the published N+ code does.
    whiten:        scale the rewards of all tokens, KL included, to variance 1, and keep their mean.
    """

    running: Literal["none", "scale", "shift_scale"]
    clip: Positive | None
    missing_eos: Literal["subtract", "replace"]
    missing_eos_penalty: NonNegative
    length_penalty: NonNegative
    score_position: Literal["eos", "eos_plus_one"]
    whiten: bool

    def scores(self, scores: Tensor, finished: Tensor, lengths: Tensor, seen: Tensor) -> Tensor:
        """The scores that are paid. scores [B], finished [B] bool, lengths [B] tokens -> [B].

        seen: [3] moments (see `masked.moments`) of all scores of the run, these included, before any shaping.
        Source: Zheng et al. 2023 (Secrets of RLHF I), arXiv:2307.04964, on score reparameterization (running, clip);
                Huang et al. 2024 (N+), arXiv:2403.17031, on the missing EOS (replace by -1).
        Tests:  test_against_numpy.py::test_the_scores_that_are_paid,
                test_shaping.py::test_the_score_is_clipped_after_scaling_and_before_what_is_taken_off
        """
        import torch

        if self.running != "none":
            count, mean, squares = seen.to(scores.dtype)
            shift = mean if self.running == "shift_scale" else 0.0
            spread = squares / count
            scale = torch.where(spread > 1e-8, torch.rsqrt(spread + 1e-8), 1.0)  # scores that are all alike say nothing
            scores = (scores - shift) * scale
        if self.clip is not None:
            scores = scores.clamp(-self.clip, self.clip)
        kept = 0.0 if self.missing_eos == "replace" else scores
        scores = torch.where(finished, scores, kept - self.missing_eos_penalty)
        return scores - self.length_penalty * lengths.to(scores.dtype)


def reward_slots(mask: Tensor, position: Literal["eos", "eos_plus_one"]) -> Tensor:
    """Where rewards and values live: the response tokens, and for eos_plus_one the slot after them if there is one.

    mask [B, R] bool, True on a prefix of each row -> [B, R] bool.
    Source: eos_plus_one: the code of Huang et al. 2024 (N+), arXiv:2403.17031.
    Tests:  test_shaping.py::test_eos_plus_one_adds_a_slot_where_there_is_room
    """
    if position == "eos":
        return mask
    slots = mask.clone()
    slots[:, 1:] |= mask[:, :-1]
    return slots


def shape_reward(scores: Tensor, kl: Tensor, penalty: Tensor, slots: Tensor, *, coef: float) -> ShapedReward:
    """The reward of each token: the KL penalty everywhere, the score on the last slot.

        r_t = - coef * penalty_t + [t is the last slot] * score

    Shapes:  scores [B]; kl (the k1 estimate, for whoever watches), penalty (the estimate that is paid) [B, R], 0 on
             padding; slots [B, R] bool from `reward_slots`, at least one True a row.
    Units:   reward-model units; coef in reward units per nat.
    Source:  Ziegler et al. 2019, arXiv:1909.08593, eq. 2; the score sits on the stop token (as OpenRLHF and verl
             place it) unless asked otherwise, so that its credit does not pass through a value of padding.
    Tests:   test_shaping.py::test_reward_is_the_penalty_everywhere_and_the_score_on_the_last_token,
             test_against_numpy.py::test_the_reward_of_each_token_and_its_slots
    """
    from alignkit.algo.sequence import last_token_index
    from alignkit.algo.types import ShapedReward, same_shape

    same_shape(kl=kl, penalty=penalty, slots=slots)
    if scores.shape != slots.shape[:1]:
        raise ValueError(f"expected one score a row, {tuple(slots.shape[:1])}, got {tuple(scores.shape)}")
    last = last_token_index(slots)[:, None]
    per_token = (-coef * penalty).scatter_add(1, last, scores[:, None].to(kl.dtype))
    return ShapedReward(per_token=per_token, kl=kl, mask=slots)
