"""KL between policy and reference: the estimators, and the per-token reward that carries its penalty."""

from typing import Literal

import torch
from torch import Tensor

from alignkit.algo.sequence import last_token_index
from alignkit.algo.types import ShapedReward, require_bool, same_shape

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, estimator: Estimator = "k1") -> Tensor:
    """Single-sample estimates of KL(policy || reference) per token, 0 on padding.

        x = logprobs - ref_logprobs
        k1 = x;    k2 = x^2 / 2;    k3 = exp(-x) - 1 + x

    Shapes:  all [B, R]; mask bool.   Units: nats.
    k1 is unbiased and may be negative; k3 is unbiased and never negative; k2 is biased, its gradient is not.
    Source:  Schulman 2020, "Approximating KL divergence"; Ziegler et al. 2019, section 2.2 uses k1 in the reward.
    """
    same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    require_bool(mask=mask)
    x = torch.where(mask, logprobs - ref_logprobs, 0.0)
    if estimator == "k1":
        return x
    if estimator == "k2":
        return 0.5 * x * x
    if estimator == "k3":
        return torch.expm1(-x) + x
    raise ValueError(f"estimator must be k1, k2 or k3, got {estimator!r}")


def shape_reward(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, coef: float) -> ShapedReward:
    """The reward of each token: the KL penalty everywhere, the score on the last response token.

        r_t = - coef * (logprobs_t - ref_logprobs_t) + [t is the last response token] * score

    Shapes:  scores [B]; the rest [B, R]; mask bool with at least one True a row.
    Units:   reward-model units; coef in reward units per nat.
    Source:  Ziegler et al. 2019, arXiv:1909.08593, eq. 2; the score sits on the stop token (as OpenRLHF and verl
             place it), not one past it (N+), so that its credit does not pass through a value of padding.
    """
    kl = kl_estimate(logprobs, ref_logprobs, mask)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"expected one score a row, {tuple(mask.shape[:1])}, got {tuple(scores.shape)}")
    last = last_token_index(mask)[:, None]
    per_token = (-coef * kl).scatter_add(1, last, scores[:, None].to(kl.dtype))
    return ShapedReward(per_token=per_token, kl=kl)
