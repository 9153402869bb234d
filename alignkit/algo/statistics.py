"""Shares with their uncertainty: Wilson intervals, and accuracy over all pairs of two groups."""

import math

import torch
from torch import Tensor

Z95 = 1.959963984540054  # two-sided 95% of the normal distribution


def wilson_interval(successes: float, count: float) -> tuple[float, float]:
    """95% interval of a share. count 0 gives (0, 1): nothing is known.

    Source: Wilson 1927; Newcombe 1998, method 3.
    Tests:  test_statistics.py::test_wilson_intervals_equal_the_published_table
    """
    if count == 0:
        return 0.0, 1.0
    share, square = successes / count, Z95**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    half = Z95 * math.sqrt(share * (1 - share) / count + square / (4 * count**2)) / (1 + square / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def contrast_accuracy(positive: Tensor, negative: Tensor) -> tuple[float, float, float]:
    """Share of (positive, negative) pairs in order, ties counting half, with its 95% interval.

    Shapes: scores [m] and [n] -> (share, low, high). The m * n pairs are not independent, so the spread is that of
    the two samples of texts, not of the pairs.
    Source: Mann and Whitney 1947; DeLong et al. 1988 (variance).
    Tests:  test_statistics.py::test_contrast_accuracy_counts_all_pairs,
            test_statistics.py::test_the_contrast_interval_has_the_width_of_delong
    """
    difference = positive.double()[:, None] - negative.double()[None, :]
    order = torch.where(difference > 0, 1.0, torch.where(difference == 0, 0.5, 0.0)).double()
    share = float(order.mean())
    by_positive, by_negative = order.mean(dim=1), order.mean(dim=0)
    if min(len(positive), len(negative)) < 2:
        return share, 0.0, 1.0
    variance = float(by_positive.var() / len(by_positive) + by_negative.var() / len(by_negative))
    half = Z95 * math.sqrt(variance)
    return share, max(0.0, share - half), min(1.0, share + half)


def ranking_auc(scores: list[float], positive: list[bool]) -> float:
    """Probability that a positive has a higher score than a negative, ties counting half: the area under the ROC curve.

    Source: Mann and Whitney 1947.
    Tests:  test_statistics.py::test_the_area_under_the_curve_by_hand
    """
    sides = [torch.tensor([s for s, p in zip(scores, positive) if bool(p) == side]) for side in (True, False)]
    return contrast_accuracy(*sides)[0]


def distinct(responses: list[list[int]], n: int) -> float:
    """Share of distinct runs of n tokens among all such runs, over all responses (distinct-n); 0 if there are none.

    It falls with the number of responses: compare equal numbers only.
    Source: Li et al. 2016, arXiv:1510.03055, who divide by the number of tokens rather than of runs.
    Tests:  test_statistics.py::test_distinct_n_by_hand
    """
    runs = [run for row in responses for run in zip(*(row[start:] for start in range(n)))]
    return len(set(runs)) / len(runs) if runs else 0.0
