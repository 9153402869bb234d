"""The losses of PPO per token and their aggregation; the language-model and pairwise losses as sums. Masked before
`exp`: padding cannot make NaN, and no gradient reaches it."""

from typing import Literal

import torch
from torch import Tensor

from alignkit.algo.kl import LOG_RATIO_LIMIT
from alignkit.algo.types import Summed, require_bool, same_shape

Aggregation = Literal["token_mean", "seq_mean_token_mean"]
Centring = Literal["sum", "squares"]


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, negated, per response token; and where a clip was active.

        ratio_t = exp(logprobs_t - old_logprobs_t)
        gain_t = min(ratio_t * A_t, clamp(ratio_t, 1 - clip, 1 + clip_high) * A_t)
        with dual_clip c, where A_t < 0:  gain_t = max(gain_t, c * A_t);    loss_t = -gain_t

    Shapes:  all [B, R]; mask bool, True on sampled tokens, stop token included. Returns [B, R] and [B, R] bool, 0 and
             False on padding; `aggregate` makes one number of it. clip_high: None means `clip`.
    Units:   log-probabilities in nats at the sampling temperature, their difference cut at 20 nats before exp;
             advantages dimensionless once whitened.
    Raises:  ValueError if shapes differ, if mask is not bool, or unless 0 < clip < 1, clip_high > 0, dual_clip > 1.
    Source:  Schulman et al. 2017, arXiv:1707.06347, eq. 7; two ranges: Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 8;
             dual clip: Ye et al. 2020, arXiv:1912.09729, eq. 5.
    Tests:   test_losses.py::test_the_policy_loss_in_its_cases, test_against_numpy.py::test_the_policy_loss
    """
    same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    require_bool(mask=mask)
    high = clip if clip_high is None else clip_high
    if not (0 < clip < 1 and high > 0 and (dual_clip is None or dual_clip > 1)):
        raise ValueError(f"expected 0 < clip < 1, clip_high > 0, dual_clip > 1, got {clip}, {clip_high}, {dual_clip}")
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    advantages = torch.where(mask, advantages, 0.0)
    free = ratio * advantages
    gain = torch.minimum(free, ratio.clamp(1 - clip, 1 + high) * advantages)
    if dual_clip is not None:
        gain = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    return -gain, gain != free


def truncated_importance(logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Weight of a token that the engine sampled from a slightly different distribution than the policy's.

        w_t = min(exp(logprobs_t - engine_logprobs_t), cap)

    Shapes:  all [B, R]; mask bool. Returns [B, R], 0 on padding, no gradient; it multiplies the clipped surrogate.
    Raises:  ValueError if shapes differ, if mask is not bool, or unless cap >= 1.
    Source:  Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"; truncation:
             Ionides 2008, "Truncated importance sampling".
    Tests:   test_losses.py::test_truncated_importance_by_hand
    """
    same_shape(logprobs=logprobs, engine_logprobs=engine_logprobs, mask=mask)
    require_bool(mask=mask)
    if cap < 1:
        raise ValueError(f"cap must be at least 1, got {cap}")
    log_ratio = torch.where(mask, logprobs - engine_logprobs, 0.0).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.where(mask, log_ratio.exp().clamp(max=cap), 0.0)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error of the values, the larger of plain and clipped; and where the clip was active.

        loss_t = 1/2 max((V_t - G_t)^2, (clamp(V_t, Vold_t - clip, Vold_t + clip) - G_t)^2)

    Shapes:  all [B, R]; mask bool. Returns [B, R] and [B, R] bool, 0 and False on padding.
    Units:   reward-model units; clip likewise (None: no clipping).
    Raises:  ValueError if shapes differ, if mask is not bool, or if clip is not positive.
    Source:  Ziegler et al. 2019 code; Huang et al. 2024, arXiv:2403.17031.
    Tests:   test_losses.py::test_the_value_loss_takes_the_larger_of_plain_and_clipped,
             test_against_numpy.py::test_the_value_loss
    """
    same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    require_bool(mask=mask)
    if clip is not None and clip <= 0:
        raise ValueError(f"clip must be positive, got {clip}")
    free = torch.where(mask, values - returns, 0.0).square()
    if clip is None:
        return 0.5 * free, torch.zeros_like(mask)
    held = torch.where(mask, values.clamp(old_values - clip, old_values + clip) - returns, 0.0).square()
    return 0.5 * torch.maximum(free, held), held > free


def aggregate(per_token: Tensor, mask: Tensor, how: Aggregation, *, tokens: int, rows: int) -> Tensor:
    """This part's share of the loss of an optimizer step; the shares of all micro-batches and ranks add up to it.

        token_mean:           sum_t loss_t / tokens                         every token weighs the same
        seq_mean_token_mean:  sum_rows (mean_t loss_t) / rows               every response weighs the same

    Shapes: per_token, mask [B, R] -> []. tokens, rows: of the whole step, over all micro-batches and ranks.
    Source: the second is what a micro-batch of one row computes in the N+ code (Huang et al. 2024, arXiv:2403.17031).
    Tests:  test_losses.py::test_the_two_aggregations_by_hand,
            test_losses.py::test_micro_batches_add_up_to_the_whole_whatever_the_split
    """
    same_shape(per_token=per_token, mask=mask)
    require_bool(mask=mask)
    per_token = torch.where(mask, per_token, 0.0)
    if how == "token_mean":
        return per_token.sum() / tokens
    if how != "seq_mean_token_mean":
        raise ValueError(f"how must be token_mean or seq_mean_token_mean, got {how!r}")
    return (per_token.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / rows


def negative_log_likelihood(logprobs: Tensor, mask: Tensor) -> Summed:
    """- sum_t mask_t * logprobs_t: the language-model loss that `ptx` mixes in. Shapes: [B, T]; nats.

    Source: Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155, eq. 2, last term.
    Tests:  test_losses.py::test_the_language_model_loss_is_summed_over_the_real_tokens
    """
    same_shape(logprobs=logprobs, mask=mask)
    require_bool(mask=mask)
    return Summed(-torch.where(mask, logprobs, 0.0).sum(), mask.sum())


def preference_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, smoothing: Tensor | None = None
) -> Tensor:
    """Bradley-Terry loss of each pair, if its label is wrong with probability `smoothing`.

        d = chosen - rejected - margin;    loss = - (1 - smoothing) log sigmoid(d) - smoothing log sigmoid(-d)

    Shapes: all [B] -> [B]. Units: scores and margin in reward units, smoothing in [0, 1); None: 0.
    Source: Stiennon et al. 2020, arXiv:2009.01325, section 3.4; margin as in Touvron et al. 2023, arXiv:2307.09288;
            smoothing: Wang et al. 2024 (Secrets of RLHF II), arXiv:2401.06080.
    Tests:  test_losses.py::test_the_pairwise_loss_is_exact_for_pairs_that_are_very_wrong,
            test_losses.py::test_smoothing_by_hand, test_losses.py::test_smoothing_has_its_minimum_at_the_odds_it_names
    """
    same_shape(
        chosen=chosen,
        rejected=rejected,
        margin=chosen if margin is None else margin,
        smoothing=chosen if smoothing is None else smoothing,
    )
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    right = -torch.nn.functional.logsigmoid(difference)
    if smoothing is None:
        return right
    return (1 - smoothing) * right - smoothing * torch.nn.functional.logsigmoid(-difference)


def centring(chosen: Tensor, rejected: Tensor, form: Centring) -> Tensor:
    """What pulls the scores of each pair, of which Bradley-Terry knows the difference alone, towards 0.

        sum:      (chosen + rejected)^2          their mean is to be 0
        squares:  chosen^2 + rejected^2          each is to be 0

    Shapes: [B], [B] -> [B]; reward units, squared.
    Source: Eisenstein et al. 2023, arXiv:2312.09244, eq. 2, as in TRL; the second as in the code of safe-rlhf (Dai et
            al. 2023, arXiv:2310.12773).
    Tests:  test_losses.py::test_both_forms_of_centring_by_hand
    """
    same_shape(chosen=chosen, rejected=rejected)
    if form == "sum":
        return (chosen + rejected).square()
    if form != "squares":
        raise ValueError(f"form must be sum or squares, got {form!r}")
    return chosen.square() + rejected.square()


def mean_by_ranking(per_pair: Tensor, ranking: Tensor) -> Summed:
    """A ranking of many responses weighs as one of two: sum over rankings of the mean over each one's pairs.

        total = sum_r 1/|P_r| sum_{p in P_r} per_pair_p,    |P_r| = K (K - 1) / 2 if K responses are in full order

    Shapes: per_pair [B]; ranking [B] int64: which of the rankings 0 .. n - 1 a pair belongs to, each has one -> n.
    Source: Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155, eq. 1.
    Tests:  test_losses.py::test_a_ranking_weighs_as_a_pair,
            test_losses.py::test_rankings_add_up_whatever_the_split_and_the_order
    """
    same_shape(per_pair=per_pair, ranking=ranking)
    sizes = torch.bincount(ranking)
    return Summed((per_pair / sizes[ranking]).sum(), torch.tensor(len(sizes), device=per_pair.device))
