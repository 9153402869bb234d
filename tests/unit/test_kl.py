"""KL estimators by hand, and the score on the stop token."""

import numpy as np
import pytest
import torch

from alignkit.algo.kl import kl_estimate, shape_reward
from alignkit.algo.sequence import response_mask

HALF = {"k1": (0.5, -0.5), "k2": (0.125, 0.125), "k3": (0.106531, 0.148721)}  # at log-ratio +0.5 and -0.5
GENERATOR = torch.Generator().manual_seed(0)
LOGPROBS = -torch.rand(4, 5, generator=GENERATOR, dtype=torch.float64) * 3
REFERENCE = -torch.rand(4, 5, generator=GENERATOR, dtype=torch.float64) * 3
MASK = torch.arange(5)[None, :] < torch.tensor([5, 1, 3, 4])[:, None]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_estimators_give_the_published_numbers(estimator):
    logprobs = torch.tensor([[-1.0, -1.5]], dtype=torch.float64)
    reference = torch.tensor([[-1.5, -1.0]], dtype=torch.float64)
    kl = kl_estimate(logprobs, reference, torch.ones(1, 2, dtype=torch.bool), estimator=estimator)
    np.testing.assert_allclose(kl[0].numpy(), HALF[estimator], atol=5e-7)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_of_a_policy_with_itself_is_zero_at_every_token(estimator):
    assert not kl_estimate(LOGPROBS, LOGPROBS, MASK, estimator=estimator).any()


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative():
    """Exactly, by summing over a small vocabulary: E_policy[estimate] = sum p log(p / q)."""
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    mask, exact = torch.ones(1, 3, dtype=torch.bool), float((p * (p / q).log()).sum())
    for estimator in ("k1", "k3"):
        estimates = kl_estimate(p.log()[None], q.log()[None], mask, estimator=estimator)[0]
        assert float((p * estimates).sum()) == pytest.approx(exact, abs=1e-12)
    assert (kl_estimate(LOGPROBS, REFERENCE, MASK, estimator="k3") >= 0).all()


def test_k3_keeps_its_digits_near_zero():
    tiny = torch.tensor([[1e-7]], dtype=torch.float64)
    k3 = kl_estimate(tiny, torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool), estimator="k3")
    assert float(k3) == pytest.approx(0.5e-14, rel=1e-6, abs=0)


def test_reward_is_the_penalty_everywhere_and_the_score_on_the_last_token():
    scores = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    shaped = shape_reward(scores, LOGPROBS, REFERENCE, MASK, coef=0.3)
    expected = np.zeros((4, 5))
    for row, length in enumerate([5, 1, 3, 4]):
        for t in range(length):
            expected[row, t] = -0.3 * float(LOGPROBS[row, t] - REFERENCE[row, t])
        expected[row, length - 1] += float(scores[row])
    np.testing.assert_allclose(shaped.per_token.numpy(), expected, atol=1e-14)
    np.testing.assert_allclose(shaped.kl.sum(dim=1).numpy(), ((LOGPROBS - REFERENCE) * MASK).sum(dim=1).numpy())


def test_the_score_sits_on_the_stop_token_itself():
    """Not one past it, and not before it: whoever reads PAD or treats EOS as PAD misses the decision to stop."""
    stop = 1
    response = torch.tensor([[7, 8, stop, 0, 0], [stop, 0, 0, 0, 0], [7, 8, 9, 8, 7]])
    mask, finished = response_mask(response, torch.tensor([stop]))
    zero = torch.zeros(3, 5)
    shaped = shape_reward(torch.tensor([1.0, 2.0, 3.0]), zero, zero, mask, coef=0.1)
    assert shaped.per_token.nonzero().tolist() == [[0, 2], [1, 0], [2, 4]]
    assert response[finished, shaped.per_token[finished].argmax(dim=1)].tolist() == [stop, stop]


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_padding_has_no_effect_on_value_or_gradient(estimator, fill):
    logprobs = torch.where(MASK, LOGPROBS, fill).requires_grad_(True)
    reference = torch.where(MASK, REFERENCE, -fill)
    kl = kl_estimate(logprobs, reference, MASK, estimator=estimator)
    torch.testing.assert_close(kl, kl_estimate(LOGPROBS, REFERENCE, MASK, estimator=estimator), rtol=0, atol=0)
    kl.sum().backward()
    assert torch.isfinite(logprobs.grad).all() and not logprobs.grad[~MASK].any()


def test_faults_are_refused():
    scores = torch.zeros(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="one score a row"):
        shape_reward(scores[:, None], LOGPROBS, REFERENCE, MASK, coef=0.1)
    with pytest.raises(ValueError, match="expected one shape"):
        kl_estimate(LOGPROBS, REFERENCE[:, :4], MASK)
    with pytest.raises(ValueError, match="bool"):
        kl_estimate(LOGPROBS, REFERENCE, MASK.long())
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        kl_estimate(LOGPROBS, REFERENCE, MASK, estimator="abs")
    with pytest.raises(ValueError, match="no True"):
        shape_reward(scores, LOGPROBS, REFERENCE, torch.zeros_like(MASK), coef=0.1)
