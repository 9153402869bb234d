"""Moments and whitening over the True entries of a mask."""

import torch
from torch import Tensor

from alignkit.algo.types import require_bool, same_shape


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """[3] float64: (count, mean, sum of squared deviations) over the True entries; (0, 0, 0) if there are none.

    Deviations are taken from this part's own mean, so nothing cancels when the mean is large against the spread.
    Source: the two-pass algorithm in Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance".
    Tests:  test_masked.py::test_nothing_cancels_when_the_mean_is_large_against_the_spread,
            test_masked.py::test_padding_changes_nothing
    """
    same_shape(values=values, mask=mask)
    require_bool(mask=mask)
    count = mask.sum().double()
    mean = torch.where(mask, values, 0.0).double().sum() / count.clamp(min=1)
    deviation = torch.where(mask, values.double() - mean, 0.0)
    return torch.stack([count, mean, (deviation * deviation).sum()])


def merge_moments(parts: Tensor) -> Tensor:
    """[n, 3] moments of n disjoint parts -> [3] moments of their union.

    Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    Tests:  test_masked.py::test_the_moments_of_two_ranks_merge_into_those_of_one_batch,
            test_shaping.py::test_the_running_moments_do_not_depend_on_how_the_scores_came_in
    """
    count, mean, squares = parts.unbind(dim=1)
    total = count.sum()
    merged = (count * mean).sum() / total.clamp(min=1)
    return torch.stack([total, merged, squares.sum() + (count * (mean - merged) ** 2).sum()])


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Scale the masked values to unit variance; 0 where not masked.

        y = (x - mean) / sqrt(variance + 1e-8)  [+ mean  if not shift_mean]

    Shapes:  values, mask [B, R], the rows of all ranks; returns [B, R].
    The variance is the biased one (divided by the count), as in the published code.
    Source:  Ziegler et al. 2019 code `whiten`; Huang et al. 2024 (N+), arXiv:2403.17031, detail on whitening.
    Tests:   test_masked.py::test_whitening_gives_the_published_numbers, test_against_numpy.py::test_whitening
    """
    count, mean, squares = moments(values, mask)
    whitened = (values.double() - mean) * torch.rsqrt(squares / count.clamp(min=1) + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0).to(values.dtype)
