"""KL between policy and reference: the estimators, and the KL term of the loss. (In the reward: `shaping`.)"""

import torch
from torch import Tensor

from alignkit.algo.control import Estimator
from alignkit.algo.types import require_bool, same_shape

LOG_RATIO_LIMIT = 20.0  # nats, before exp: beyond it float32 overflows, and nothing can be learnt from such a token


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, estimator: Estimator = "k1") -> Tensor:
    """Single-sample estimates of KL(policy || reference) per token, 0 on padding.

        x = logprobs - ref_logprobs
        k1 = x;    k2 = x^2 / 2;    k3 = exp(-x) - 1 + x    (-x cut at 20 nats before exp)

    Shapes:  all [B, R]; mask bool.   Units: nats.
    k1 is unbiased and may be negative; k3 is unbiased and never negative; k2 is biased, its gradient is not.
    Source:  Schulman 2020, "Approximating KL divergence"; in the reward, k1: Ziegler et al. 2019,
             arXiv:1909.08593, eq. 2.
    Tests:   test_kl.py::test_estimators_give_the_published_numbers, test_kl.py::test_k1_and_k3_are_unbiased
    """
    same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    require_bool(mask=mask)
    x = torch.where(mask, logprobs - ref_logprobs, 0.0)
    if estimator == "k1":
        return x
    if estimator == "k2":
        return 0.5 * x * x
    if estimator == "k3":
        return torch.expm1((-x).clamp(max=LOG_RATIO_LIMIT)) + x
    raise ValueError(f"estimator must be k1, k2 or k3, got {estimator!r}")


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, estimator: Estimator) -> Tensor:
    """The KL term of a loss, per token [B, R], 0 on padding; shapes and units as in `kl_estimate`.

    k2: as it is; its gradient, x * grad logprobs, is in expectation that of KL(policy || reference).
    k3: its value, with the gradient of k2 (straight-through), since its own gradient is that of another divergence.
    Raises ValueError for k1, whose gradient is 0 in expectation.
    Source: Schulman 2020 (the values); Tang and Munos 2025, arXiv:2506.09477, on the gradients of the three.
    Tests:  test_kl.py::test_the_expected_gradient_of_the_kl_loss_is_that_of_the_exact_kl,
            test_kl.py::test_k3_by_itself_would_follow_the_gradient_of_the_reverse_kl
    """
    if estimator == "k1":
        raise ValueError("k1 in the loss has no gradient in expectation; choose k2 or k3")
    half_square = kl_estimate(logprobs, ref_logprobs, mask, estimator="k2")
    if estimator == "k2":
        return half_square
    value = kl_estimate(logprobs, ref_logprobs, mask, estimator="k3")
    return half_square + (value - half_square).detach()
