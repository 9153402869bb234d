"""KL estimators by hand and in exact expectation, and the gradients of the KL term of a loss."""

import numpy as np
import pytest
import reference
import torch

from alignkit.algo.kl import LOG_RATIO_LIMIT, kl_estimate, kl_loss

HALF = {"k1": (0.5, -0.5), "k2": (0.125, 0.125), "k3": (0.106531, 0.148721)}  # at log-ratio +0.5 and -0.5
GENERATOR = torch.Generator().manual_seed(0)
LOGPROBS = -torch.rand(4, 5, generator=GENERATOR, dtype=torch.float64) * 3
REFERENCE = -torch.rand(4, 5, generator=GENERATOR, dtype=torch.float64) * 3
LENGTHS = [5, 1, 3, 4]
MASK = torch.arange(5)[None, :] < torch.tensor(LENGTHS)[:, None]
ESTIMATORS = pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
IN_LOSS = pytest.mark.parametrize("estimator", ["k2", "k3"])


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


@ESTIMATORS
def test_estimators_give_the_published_numbers(estimator):
    kl = kl_estimate(row(-1.0, -1.5), row(-1.5, -1.0), torch.ones(1, 2, dtype=torch.bool), estimator=estimator)
    np.testing.assert_allclose(kl[0].numpy(), HALF[estimator], rtol=0, atol=5e-7)


@IN_LOSS
def test_the_loss_has_the_value_of_its_estimator(estimator):
    """k3's passes through k2's and back, which may cost the last digits and no more."""
    loss = kl_loss(LOGPROBS, REFERENCE, MASK, estimator=estimator)
    torch.testing.assert_close(loss, kl_estimate(LOGPROBS, REFERENCE, MASK, estimator=estimator), rtol=0, atol=1e-15)
    published = kl_loss(row(-1.0, -1.5), row(-1.5, -1.0), torch.ones(1, 2, dtype=torch.bool), estimator=estimator)
    np.testing.assert_allclose(published[0].numpy(), HALF[estimator], rtol=0, atol=5e-7)


@ESTIMATORS
def test_kl_of_a_policy_with_itself_is_zero_at_every_token(estimator):
    assert not kl_estimate(LOGPROBS, LOGPROBS, MASK, estimator=estimator).any()


def test_k2_and_k3_are_never_negative_and_k1_may_be():
    for estimator, lowest in (("k1", -3.0), ("k2", 0.0), ("k3", 0.0)):
        assert float(kl_estimate(LOGPROBS, REFERENCE, MASK, estimator=estimator).min()) >= lowest
    assert (kl_estimate(LOGPROBS, REFERENCE, MASK) < 0).any()


def test_k3_keeps_its_digits_near_zero():
    k3 = kl_estimate(row(1e-7), row(0.0), torch.ones(1, 1, dtype=torch.bool), estimator="k3")
    assert float(k3) == pytest.approx(0.5e-14, rel=1e-6, abs=0)


# In exact expectation: every token of a vocabulary of four, weighted by its probability.

THETA = torch.tensor([0.3, -1.1, 0.8, 0.1], dtype=torch.float64)
Q = torch.tensor([0.1, 0.2, 0.15, 0.55], dtype=torch.float64)


def expected_gradient(term) -> torch.Tensor:
    """sum_a p(a) grad term(log p(a), log q(a)): the mean over endless samples of the gradient of a sampled term."""
    theta = THETA.clone().requires_grad_(True)
    logp = theta.log_softmax(dim=0)
    per_token = term(logp[None], Q.log()[None], torch.ones(1, 4, dtype=torch.bool))
    (logp.detach().exp() * per_token[0]).sum().backward()
    return theta.grad


def gradient_of(exact) -> torch.Tensor:
    theta = THETA.clone().requires_grad_(True)
    exact(theta.softmax(dim=0), Q).backward()
    return theta.grad


def forward_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    p = THETA.softmax(dim=0)
    mask = torch.ones(1, 4, dtype=torch.bool)
    estimates = kl_estimate(p.log()[None], Q.log()[None], mask, estimator=estimator)[0]
    assert float((p * estimates).sum()) == pytest.approx(float(forward_kl(p, Q)), abs=1e-14)


@IN_LOSS
def test_the_expected_gradient_of_the_kl_loss_is_that_of_the_exact_kl(estimator):
    expected = gradient_of(forward_kl)
    found = expected_gradient(lambda *given: kl_loss(*given, estimator=estimator))
    assert expected.abs().max() > 0.1, "something to compare"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_k1_would_have_no_gradient_in_expectation():
    """So it is refused in the loss."""
    found = expected_gradient(lambda *given: kl_estimate(*given, estimator="k1"))
    torch.testing.assert_close(found, torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-14)


def test_k3_by_itself_would_follow_the_gradient_of_the_reverse_kl():
    """So its value is given the gradient of k2."""
    found = expected_gradient(lambda *given: kl_estimate(*given, estimator="k3"))
    torch.testing.assert_close(found, gradient_of(lambda p, q: forward_kl(q, p)), rtol=0, atol=1e-14)


# Gradients.


def gradient(estimator: str, logprobs: torch.Tensor, ref: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    logprobs = logprobs.clone().requires_grad_(True)
    kl_loss(logprobs, ref, mask, estimator=estimator).sum().backward()
    return logprobs.grad


def test_the_gradient_of_k2_passes_gradcheck():
    assert torch.autograd.gradcheck(
        lambda x: kl_loss(x, REFERENCE, MASK, estimator="k2"), LOGPROBS.clone().requires_grad_(True)
    )


def test_the_gradient_of_k3_is_exactly_that_of_k2():
    k2 = gradient("k2", LOGPROBS, REFERENCE, MASK)
    assert gradient("k3", LOGPROBS, REFERENCE, MASK).equal(k2) and k2[MASK].abs().min() > 0


def test_the_gradient_of_k2_is_the_slope_of_the_numpy_reference():
    found = gradient("k2", LOGPROBS, REFERENCE, MASK)
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            p, q, h = float(LOGPROBS[i, t]), float(REFERENCE[i, t]), 1e-5
            above, below = (sum(reference.kl([p + shift], [q], "k2")) for shift in (h, -h))
            assert float(found[i, t]) == pytest.approx((above - below) / (2 * h), abs=1e-9)


@pytest.mark.parametrize("x", [100.0, -100.0, 1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@IN_LOSS
def test_log_ratios_far_beyond_the_cut_stay_finite(estimator, dtype, x):
    logprobs, ref = torch.tensor([[x]], dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, slope = kl_loss(logprobs, ref, mask, estimator=estimator), gradient(estimator, logprobs, ref, mask)
    assert torch.isfinite(loss).all() and loss >= 0 and float(slope) == x
    estimate = kl_estimate(logprobs, ref, mask, estimator=estimator)
    assert float(estimate) == pytest.approx(reference.kl([x], [0.0], estimator)[0], rel=1e-5)
    assert LOG_RATIO_LIMIT == 20.0


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -float("inf"), 1e30])
@ESTIMATORS
def test_padding_has_no_effect_on_value_or_gradient(estimator, fill):
    terms = [lambda *given: kl_estimate(*given, estimator=estimator)]
    if estimator != "k1":
        terms.append(lambda *given: kl_loss(*given, estimator=estimator))
    for term in terms:
        logprobs = torch.where(MASK, LOGPROBS, fill).requires_grad_(True)
        kl = term(logprobs, torch.where(MASK, REFERENCE, -fill), MASK)
        assert kl.equal(term(LOGPROBS, REFERENCE, MASK))
        kl.sum().backward()
        assert torch.isfinite(logprobs.grad).all() and not logprobs.grad[~MASK].any() and logprobs.grad[MASK].all()


def test_faults_are_refused():
    with pytest.raises(ValueError, match=r"expected one shape.*\(4, 5\).*\(4, 4\)"):
        kl_estimate(LOGPROBS, REFERENCE[:, :4], MASK)
    with pytest.raises(ValueError, match="mask must be a bool tensor, got torch.int64"):
        kl_estimate(LOGPROBS, REFERENCE, MASK.long())
    with pytest.raises(ValueError, match="k1, k2 or k3, got 'abs'"):
        kl_estimate(LOGPROBS, REFERENCE, MASK, estimator="abs")
    with pytest.raises(ValueError, match="k1 in the loss.*choose k2 or k3"):
        kl_loss(LOGPROBS, REFERENCE, MASK, estimator="k1")
    with pytest.raises(ValueError, match=r"expected one shape.*\(4, 5\).*\(5,\)"):
        kl_loss(LOGPROBS, REFERENCE, MASK[0], estimator="k2")
