"""Where a response ends, positions under padding, log-probabilities and entropies of tokens."""

import numpy as np
import pytest
import reference
import torch

from alignkit.algo.sequence import last_token_index, position_ids, response_mask, token_entropy, token_logprobs

STOPS = torch.tensor([1, 9])


def numpy_log_softmax(logits: torch.Tensor) -> np.ndarray:
    x = logits.double().numpy()
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(
    "response, length, finished",
    [
        ([5, 6, 1, 0, 0], 3, True),
        ([5, 6, 7, 8, 4], 5, False),
        ([1, 0, 0, 0, 0], 1, True),
        ([5, 9, 1, 9, 0], 2, True),  # the first of several stop tokens counts
        ([5, 6, 7, 8, 9], 5, True),  # in the last place it still ends the response
        ([0, 0, 1, 0, 0], 3, True),  # PAD sampled by the model is a token like any other
    ],
)
def test_the_stop_token_is_the_last_real_one(response, length, finished):
    mask, ended = response_mask(torch.tensor([response]), STOPS)
    assert mask.tolist() == [[i < length for i in range(5)]]
    assert mask.dtype == ended.dtype == torch.bool and ended.tolist() == [finished]


@pytest.mark.parametrize("mask, last", [([1, 1, 1], 2), ([1, 0, 0], 0), ([0, 0, 1], 2), ([0, 1, 0], 1), ([1, 0, 1], 2)])
def test_the_last_token_is_found_with_padding_on_either_side(mask, last):
    assert last_token_index(torch.tensor([mask], dtype=torch.bool)).tolist() == [last]


def test_an_empty_row_has_no_last_token():
    with pytest.raises(ValueError, match="no True"):
        last_token_index(torch.tensor([[True, False], [False, False]]))
    with pytest.raises(ValueError, match="bool"):
        last_token_index(torch.ones(1, 2))


def test_positions_count_real_tokens_only():
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    positions = position_ids(mask)
    assert positions.dtype == torch.long
    assert positions[0, 2:5].tolist() == [0, 1, 2] and positions[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert (positions >= 0).all()


def test_log_probabilities_equal_numpy_and_survive_large_logits():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)) * 5
    tokens = torch.tensor([[0, 3, 6], [1, 1, 2]])
    expected = np.take_along_axis(numpy_log_softmax(logits), tokens.numpy()[..., None], -1)[..., 0]
    np.testing.assert_allclose(token_logprobs(logits, tokens).numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(token_logprobs(logits.double() + 1e4, tokens).numpy(), expected, rtol=1e-9)
    exact = token_logprobs(logits.double(), tokens)
    assert exact.dtype == torch.float64
    np.testing.assert_allclose(exact.numpy(), expected, rtol=1e-13)


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.randn(1, 4, 500, generator=torch.Generator().manual_seed(1)).bfloat16()
    tokens = torch.tensor([[0, 10, 200, 499]])
    logprobs = token_logprobs(logits, tokens)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), token_logprobs(logits.double(), tokens), rtol=0, atol=2e-6)
    assert token_entropy(logits).dtype == torch.float32


def test_entropy_of_known_distributions():
    inf = float("inf")
    logits = torch.tensor([[[0.0, 0, 0, 0], [0, 0, -inf, -inf], [50, 0, 0, 0], [np.log(3), 0, -inf, -inf]]])
    expected = [np.log(4), np.log(2), 0.0, -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))]
    np.testing.assert_allclose(token_entropy(logits.double())[0].numpy(), expected, atol=1e-12)


def test_the_gradients_of_entropy_and_log_probability_pass_gradcheck():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[0, 3, 4], [1, 1, 2]])
    assert torch.autograd.gradcheck(token_entropy, logits)
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, tokens), logits)


def test_the_gradient_of_entropy_is_the_slope_of_the_numpy_reference():
    logits = torch.randn(1, 1, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    token_entropy(logits).sum().backward()
    for i in range(5):
        moved = [[x + h * (i == j) for j, x in enumerate(logits[0, 0].tolist())] for h in (1e-5, -1e-5)]
        slope = (reference.entropy(moved[0]) - reference.entropy(moved[1])) / 2e-5
        assert float(logits.grad[0, 0, i]) == pytest.approx(slope, abs=1e-9)


def forbidden_token() -> torch.Tensor:
    """Logits whose last token cannot be sampled, as the sampling rule leaves stop tokens before min_response."""
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    logits[..., -1] = -float("inf")
    return logits.requires_grad_(True)


def test_a_token_that_cannot_be_sampled_leaves_the_gradient_of_log_probabilities_finite():
    logits = forbidden_token()
    token_logprobs(logits, torch.zeros(2, 3, dtype=torch.long)).sum().backward()
    assert torch.isfinite(logits.grad).all() and not logits.grad[..., -1].any() and logits.grad[..., :-1].all()


def test_a_token_that_cannot_be_sampled_leaves_the_gradient_of_entropy_finite():
    logits = forbidden_token()
    token_entropy(logits).sum().backward()
    rest = logits.detach()[..., :-1].clone().requires_grad_(True)
    token_entropy(rest).sum().backward()
    torch.testing.assert_close(logits.grad[..., :-1], rest.grad, rtol=0, atol=1e-14)
    assert not logits.grad[..., -1].any()


def test_tokens_must_match_the_positions_of_the_logits():
    with pytest.raises(ValueError, match=r"expected one shape.*\(2, 2\).*\(2, 3\)"):
        token_logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 2, dtype=torch.long))
