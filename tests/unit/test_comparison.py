"""Win rates, best-of-n and over-optimisation curves against numbers by hand and by enumeration."""

import itertools
import math
import random

import pytest
import torch

from alignkit.algo.comparison import (
    best_of_n,
    best_of_n_kl,
    best_of_n_win_rate,
    fit_gold_curve,
    length_controlled,
    mean_interval,
    win_rate,
)


def test_a_win_rate_counts_ties_half():
    rate = win_rate(torch.tensor([1.0, 1.0, 0.5, 0.0]))
    assert (rate.wins, rate.ties, rate.losses) == (2, 1, 1)
    assert rate.share == 0.625
    # Wilson by hand: centre (.625 + z2/8) / (1 + z2/4), z2 = 3.8414588
    square = 1.959963984540054**2
    centre, half = (0.625 + square / 8) / (1 + square / 4), math.sqrt(0.625 * 0.375 / 4 + square / 64)
    assert rate.low == pytest.approx(centre - math.sqrt(square) * half / (1 + square / 4), abs=1e-12)
    assert rate.high == pytest.approx(centre + math.sqrt(square) * half / (1 + square / 4), abs=1e-12)


def test_the_length_controlled_win_rate_takes_planted_length_out():
    """A judge who likes length alone, and a policy that is longer: it wins often, and length-controlled it does not."""
    draw = random.Random(0)
    outcomes, ours, theirs = [], [], []
    for _ in range(4000):
        mine, other = draw.gauss(30, 8), draw.gauss(22, 8)
        chance = 1 / (1 + math.exp(-3 * math.tanh((mine - other) / math.hypot(8, 8))))
        outcomes.append(float(draw.random() < chance))
        ours.append(mine)
        theirs.append(other)
    share, low, high = length_controlled(torch.tensor(outcomes), torch.tensor(ours), torch.tensor(theirs))
    assert sum(outcomes) / len(outcomes) > 0.7
    assert low < 0.5 < high and high - low < 0.06
    assert low < share < high


def test_without_a_difference_of_length_it_is_the_plain_win_rate():
    """The ridge draws it towards one half: theta solves 10 (p - sigmoid(theta)) = 0.1 theta."""
    outcomes, same = torch.tensor([1.0] * 7 + [0.5, 0.0, 0.0]), torch.full((10,), 20.0)
    share, low, high = length_controlled(outcomes, same, same)
    theta = math.log(share / (1 - share))
    assert 10 * (0.75 - share) == pytest.approx(0.1 * theta, abs=1e-9)
    error = 1 / math.sqrt(10 * share * (1 - share) + 0.1)
    assert high == pytest.approx(1 / (1 + math.exp(-(theta + 1.959963984540054 * error))), abs=1e-9)
    assert low == pytest.approx(1 / (1 + math.exp(-(theta - 1.959963984540054 * error))), abs=1e-9)


def test_one_side_that_always_wins_has_a_finite_fit():
    share, low, high = length_controlled(torch.ones(50), torch.arange(50.0), torch.zeros(50))
    assert 0.9 < share < 1 and low < share < high <= 1


def test_a_mean_has_the_interval_of_its_standard_error():
    mean, low, high = mean_interval(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    spread = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + 0 + 3**2) / 3)
    assert mean == 3.0
    assert high - mean == pytest.approx(1.959963984540054 * spread / 2, rel=1e-12)
    assert mean_interval(torch.tensor([2.0])) == (2.0, 2.0, 2.0)
    assert mean_interval(torch.tensor([1.0, 1.0, 0.4]), share=True)[2] == 1.0


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    score, value = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    found = best_of_n(score, value, n)
    for row in range(3):
        picked = [
            value[row, max(subset, key=lambda i: score[row, i])] for subset in itertools.combinations(range(6), n)
        ]
        assert float(found[row]) == pytest.approx(float(sum(picked)) / len(picked), abs=1e-12)


def test_equal_scores_share_their_weights():
    """Of two equal best ones either is taken: best of 2 from scores 1, 1, 0 and values 10, 20, 90."""
    found = best_of_n(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[10.0, 20.0, 90.0]]), 2)
    assert float(found) == pytest.approx((15 + 10 + 20) / 3, abs=1e-12)
    assert float(best_of_n(torch.zeros(1, 4), torch.tensor([[1.0, 2.0, 3.0, 6.0]]), 3)) == pytest.approx(3.0)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_win_rate_of_best_of_n_is_the_mean_over_subsets_and_opponents(n):
    score = torch.randn(3, 6, dtype=torch.float64)
    value = torch.randn(3, 6, dtype=torch.float64).round(decimals=0)  # some are alike
    found = best_of_n_win_rate(score, value, n)
    for row in range(3):
        won = []
        for subset in itertools.combinations(range(6), n):
            best = value[row, max(subset, key=lambda i: score[row, i])]
            won += [
                float(best > value[row, j]) + 0.5 * float(best == value[row, j]) for j in set(range(6)) - set(subset)
            ]
        assert float(found[row]) == pytest.approx(sum(won) / len(won), abs=1e-12)
        if n == 1:
            assert float(found[row]) == pytest.approx(0.5, abs=1e-12)
    with pytest.raises(ValueError, match="best of 6"):
        best_of_n_win_rate(score, value, 6)


def test_more_than_there_are_samples_is_refused():
    with pytest.raises(ValueError, match="best of 5"):
        best_of_n(torch.zeros(1, 4), torch.zeros(1, 4), 5)


def test_the_kl_of_best_of_n():
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(2) == pytest.approx(0.6931471805599453 - 0.5, abs=1e-15)
    assert best_of_n_kl(32) == pytest.approx(2.4969859, abs=1e-7)
    # the bound is reached where no response repeats: best of n of a continuous score has density n u^(n-1)
    steps, n = 200_000, 8
    grid = [(i + 0.5) / steps for i in range(steps)]
    assert best_of_n_kl(n) == pytest.approx(
        sum(n * u ** (n - 1) * math.log(n * u ** (n - 1)) for u in grid) / steps, abs=1e-6
    )


def test_gaos_curves_are_found_again():
    d = torch.linspace(0.3, 6.0, 12, dtype=torch.float64)
    curve = fit_gold_curve(d, d * (1.2 - 0.3 * d), "best_of_n")
    assert (curve.alpha, curve.beta, curve.peak) == pytest.approx((1.2, 0.3, 2.0), abs=1e-9)
    assert curve.r_squared == pytest.approx(1.0, abs=1e-12)
    curve = fit_gold_curve(d, d * (0.9 - 0.5 * d.log()), "ppo")
    assert (curve.alpha, curve.beta) == pytest.approx((0.9, 0.5), abs=1e-9)
    assert curve.peak == pytest.approx(math.exp(0.9 / 0.5 - 1), rel=1e-9)
    grid = [0.01 * i for i in range(1, 1000)]
    assert max(grid, key=curve) == pytest.approx(curve.peak, abs=0.01)


def test_a_curve_that_only_rises_has_no_peak():
    d = torch.linspace(0.5, 3.0, 6, dtype=torch.float64)
    assert fit_gold_curve(d, d * (0.5 + 0.2 * d), "best_of_n").peak is None
    assert fit_gold_curve(d, d * (0.5 + 0.2 * d.log()), "ppo").peak is None
    with pytest.raises(ValueError, match="at least two points"):
        fit_gold_curve(d[:1], d[:1], "ppo")
