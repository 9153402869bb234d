"""Moments and whitening see the True entries of a mask and nothing else."""

import numpy as np
import pytest
import torch

from alignkit.algo.masked import merge_moments, moments, whiten

ADVANTAGES, REWARDS = [0.52675, 0.765, 0.7], [-0.1, 0.2, 1.0]
WHITENED = [-1.364081, 1.005243, 0.358838]  # biased variance, eps 1e-8 inside the root
UNBIASED = [-1.113768, 0.820778, 0.292990]  # what a division by n - 1 would give
REWARDS_WHITENED = [-0.638475, 0.007688, 1.730787]  # variance scaled, mean kept


def ragged(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype) * 3 + 7
    return values, torch.arange(5)[None, :] < torch.tensor([5, 1, 3, 2, 4, 5])[:, None]


def padded(values: torch.Tensor, mask: torch.Tensor, left: int, right: int, fill: float):
    """The same entries in a wider rectangle whose new columns hold `fill`."""
    wide = torch.full((values.shape[0], left + values.shape[1] + right), fill, dtype=values.dtype)
    wide[:, left : left + values.shape[1]] = torch.where(mask, values, fill)
    wide_mask = torch.zeros(wide.shape, dtype=torch.bool)
    wide_mask[:, left : left + values.shape[1]] = mask
    return wide, wide_mask


def test_whitening_gives_the_published_numbers():
    mask = torch.ones(1, 3, dtype=torch.bool)
    values = torch.tensor([ADVANTAGES], dtype=torch.float64)
    whitened = whiten(values, mask)[0].numpy()
    np.testing.assert_allclose(whitened, WHITENED, rtol=0, atol=5e-7)
    np.testing.assert_allclose(whitened * (2 / 3) ** 0.5, UNBIASED, rtol=0, atol=5e-7)


def test_whitening_can_keep_the_mean():
    mask = torch.ones(1, 3, dtype=torch.bool)
    values = torch.tensor([REWARDS], dtype=torch.float64)
    whitened = whiten(values, mask, shift_mean=False)[0]
    np.testing.assert_allclose(whitened.numpy(), REWARDS_WHITENED, rtol=0, atol=5e-7)
    assert float(whitened.mean()) == pytest.approx(np.mean(REWARDS), abs=1e-12)


def test_epsilon_is_1e_8_inside_the_root():
    """At variance 1e-8 the root is of 2e-8: the result is 1/sqrt(2); an epsilon elsewhere gives another number."""
    values = torch.tensor([[1e-4, -1e-4]], dtype=torch.float64)
    whitened = whiten(values, torch.ones(1, 2, dtype=torch.bool))
    np.testing.assert_allclose(whitened.numpy(), [[0.5**0.5, -(0.5**0.5)]], rtol=1e-12)


def test_whitening_equals_numpy_over_the_real_entries():
    values, mask = ragged()
    real = values.numpy()[mask.numpy()]
    expected = (real - real.mean()) / np.sqrt(real.var(ddof=0) + 1e-8)
    whitened = whiten(values, mask)
    np.testing.assert_allclose(whitened.numpy()[mask.numpy()], expected, rtol=1e-12)
    assert not whitened[~mask].any()


@pytest.mark.parametrize("fill", [0.0, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("left, right", [(0, 3), (4, 0), (2, 2)])
def test_padding_changes_nothing(left, right, fill):
    values, mask = ragged()
    wide, wide_mask = padded(values, mask, left, right, fill)
    torch.testing.assert_close(whiten(wide, wide_mask)[wide_mask], whiten(values, mask)[mask], rtol=1e-13, atol=0)
    torch.testing.assert_close(moments(wide, wide_mask), moments(values, mask), rtol=1e-13, atol=0)


def test_the_order_of_rows_changes_nothing():
    values, mask = ragged()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(whiten(values[order], mask[order]), whiten(values, mask)[order], rtol=1e-13, atol=0)


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_the_moments_of_two_ranks_merge_into_those_of_one_batch(cut):
    values, mask = ragged()
    both = torch.stack([moments(values[:cut], mask[:cut]), moments(values[cut:], mask[cut:])])
    torch.testing.assert_close(merge_moments(both), moments(values, mask), rtol=1e-13, atol=0)


def test_a_rank_without_a_single_entry_takes_part():
    values, mask = ragged()
    both = torch.stack([moments(values, mask), moments(values, torch.zeros_like(mask))])
    torch.testing.assert_close(merge_moments(both), moments(values, mask), rtol=1e-14, atol=0)
    assert moments(values, torch.zeros_like(mask)).tolist() == [0.0, 0.0, 0.0]


def test_nothing_cancels_when_the_mean_is_large_against_the_spread():
    values = torch.tensor([[1e8, 1e8 + 1, 1e8 + 2, 1e8 + 3]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert moments(values, mask).tolist() == [4.0, 1e8 + 1.5, 5.0]
    halves = torch.stack([moments(values[:, :2], mask[:, :2]), moments(values[:, 2:], mask[:, 2:])])
    assert merge_moments(halves).tolist() == [4.0, 1e8 + 1.5, 5.0]


def test_a_float32_sum_of_many_is_whitened_in_float64():
    values, mask = ragged(torch.float32)
    whitened = whiten(values, mask)
    assert whitened.dtype == torch.float32
    torch.testing.assert_close(whitened.double(), whiten(values.double(), mask), rtol=1e-6, atol=1e-7)


def test_equal_values_whiten_to_0_and_not_to_nan():
    """A batch whose every advantage is the same has nothing to teach."""
    for values in (torch.full((2, 3), 7.0), torch.tensor([[0.1, 0.1, 0.1]])):
        assert not whiten(values, torch.ones_like(values, dtype=torch.bool)).any()
    one = torch.tensor([[True, False, False]])
    assert whiten(torch.tensor([[5.0, 1.0, 2.0]]), one, shift_mean=False).tolist() == [[5.0, 0.0, 0.0]]


def test_an_empty_mask_whitens_to_0():
    assert not whiten(torch.full((2, 3), float("nan")), torch.zeros(2, 3, dtype=torch.bool)).any()


@pytest.mark.parametrize("function", [moments, whiten])
def test_faults_of_shape_and_mask_are_refused(function):
    with pytest.raises(ValueError, match=r"expected one shape.*\(2, 3\).*\(3,\)"):
        function(torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must be a bool tensor, got torch.float32"):
        function(torch.zeros(2, 3), torch.ones(2, 3))
