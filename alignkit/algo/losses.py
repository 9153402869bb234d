"""The clipped losses of PPO and the language-model loss, as sums over tokens. Masked before `exp`: padding cannot
make NaN, and no gradient reaches it."""

import torch
from torch import Tensor

from alignkit.algo.types import Summed, require_bool, same_shape


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip: float
) -> tuple[Summed, Tensor]:
    """PPO's clipped surrogate, negated, summed over response tokens; and where the clip was active.

        loss = - sum_t mask_t * min(ratio_t * A_t, clamp(ratio_t, 1 - clip, 1 + clip) * A_t)
        ratio_t = exp(logprobs_t - old_logprobs_t)

    Shapes:  all [B, R]; mask bool, True on sampled tokens, stop token included. Returns Summed and [B, R] bool.
    Units:   log-probabilities in nats at the sampling temperature; advantages dimensionless once whitened.
    Raises:  ValueError if shapes differ, if mask is not bool, or unless 0 < clip < 1.
    Source:  Schulman et al. 2017, arXiv:1707.06347, eq. 7.
    """
    same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    require_bool(mask=mask)
    if not 0 < clip < 1:
        raise ValueError(f"clip must be in (0, 1), got {clip}")
    ratio = torch.where(mask, logprobs - old_logprobs, 0.0).exp()
    advantages = torch.where(mask, advantages, 0.0)
    free, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    gain = torch.minimum(free, clipped)
    return Summed(-gain.sum(), mask.sum()), clipped < free


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None
) -> tuple[Summed, Tensor]:
    """Half the squared error of the values, the larger of plain and clipped, summed; and where the clip was active.

        loss = 1/2 sum_t mask_t * max((V_t - G_t)^2, (clamp(V_t, Vold_t - clip, Vold_t + clip) - G_t)^2)

    Shapes:  all [B, R]; mask bool. Returns Summed and [B, R] bool.
    Units:   reward-model units; clip likewise (None: no clipping).
    Raises:  ValueError if shapes differ, if mask is not bool, or if clip is not positive.
    Source:  Ziegler et al. 2019 code; Huang et al. 2024, arXiv:2403.17031.
    """
    same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    require_bool(mask=mask)
    if clip is not None and clip <= 0:
        raise ValueError(f"clip must be positive, got {clip}")
    free = torch.where(mask, values - returns, 0.0).square()
    if clip is None:
        return Summed(0.5 * free.sum(), mask.sum()), torch.zeros_like(mask)
    held = torch.where(mask, old_values + (values - old_values).clamp(-clip, clip) - returns, 0.0).square()
    return Summed(0.5 * torch.maximum(free, held).sum(), mask.sum()), held > free


def negative_log_likelihood(logprobs: Tensor, mask: Tensor) -> Summed:
    """- sum_t mask_t * logprobs_t: the language-model loss that `ptx` mixes in. Shapes: [B, T]; nats.

    Source: Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155, eq. 2, second term.
    """
    same_shape(logprobs=logprobs, mask=mask)
    require_bool(mask=mask)
    return Summed(-torch.where(mask, logprobs, 0.0).sum(), mask.sum())


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Summed:
    """Bradley-Terry: - sum log sigmoid(chosen - rejected - margin). Shapes: all [B]; reward units.

    Source: Stiennon et al. 2020, arXiv:2009.01325, section 3.4; margin as in Touvron et al. 2023, arXiv:2307.09288.
    """
    same_shape(chosen=chosen, rejected=rejected, margin=chosen if margin is None else margin)
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    total = -torch.nn.functional.logsigmoid(difference).sum()
    return Summed(total, torch.tensor(chosen.numel(), device=chosen.device))
