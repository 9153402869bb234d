"""Two policies compared: win rates with intervals, best-of-n from one set of samples, and Gao's curves of
over-optimisation."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.algo.statistics import Z95, wilson_interval

RIDGE = 0.1  # of the summed log-likelihood; keeps the fit finite where one side always wins


@dataclass(frozen=True)
class WinRate:
    """Share of comparisons won, a tie counting half, with its 95% interval."""

    share: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int


def win_rate(outcomes: Tensor) -> WinRate:
    """outcomes [n]: 1 won, 0.5 tie, 0 lost -> the share won and Wilson's interval (which is wide for ties: it treats
    half a win as if it could have been a whole one).

    Source: Wilson 1927.
    Tests:  test_comparison.py::test_a_win_rate_counts_ties_half
    """
    won = float(outcomes.double().sum())
    low, high = wilson_interval(won, len(outcomes))
    counts = [int((outcomes == value).sum()) for value in (1.0, 0.5, 0.0)]
    return WinRate(won / max(len(outcomes), 1), low, high, *counts)


def length_controlled(outcomes: Tensor, ours: Tensor, theirs: Tensor) -> tuple[float, float, float]:
    """The win rate that is left where both responses are equally long, with its 95% interval.

        logit P(win) = theta + phi * tanh((ours - theirs) / s),    s = standard deviation of ours - theirs
        length-controlled win rate = sigmoid(theta)

    fitted by maximum likelihood (Newton) with a ridge of 0.1 (theta^2 + phi^2) / 2 on the sum; the interval is theta's
    by the inverse of the observed information.

    Shapes: outcomes [n] in {0, 0.5, 1}; lengths [n], tokens. Returns (share, low, high).
    Source: Dubois et al. 2024 (AlpacaEval, length-controlled), arXiv:2404.04475, section 4, for one pair of models.
    Tests:  test_comparison.py::test_the_length_controlled_win_rate_takes_planted_length_out,
            test_comparison.py::test_without_a_difference_of_length_it_is_the_plain_win_rate
    """
    outcomes, difference = outcomes.double(), (ours - theirs).double()
    spread = difference.std(correction=0)
    length = torch.tanh(difference / spread) if float(spread) > 0 else torch.zeros_like(difference)
    table = torch.stack([torch.ones_like(length), length], dim=1)
    weights, penalty = torch.zeros(2, dtype=torch.float64), RIDGE * torch.eye(2, dtype=torch.float64)
    for _ in range(50):
        chance = torch.sigmoid(table @ weights)
        slope = table.T @ (outcomes - chance) - penalty @ weights
        curve = (table * (chance * (1 - chance))[:, None]).T @ table + penalty
        step = torch.linalg.solve(curve, slope)
        weights = weights + step
        if float(step.abs().max()) < 1e-12:
            break
    theta, error = float(weights[0]), math.sqrt(float(torch.linalg.inv(curve)[0, 0]))
    low, middle, high = (1 / (1 + math.exp(-value)) for value in (theta - Z95 * error, theta, theta + Z95 * error))
    return middle, low, high


def mean_interval(values: Tensor, *, share: bool = False) -> tuple[float, float, float]:
    """Mean of independent values [n] with its 95% interval (normal approximation; `calibration.mean_interval` is for
    values that hang together). n = 1 knows no interval: (v, v, v). share: of values in [0, 1], where the interval ends.

    Tests: test_comparison.py::test_a_mean_has_the_interval_of_its_standard_error
    """
    mean = float(values.double().mean())
    half = Z95 * float(values.double().std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return (mean, max(mean - half, 0.0), min(mean + half, 1.0)) if share else (mean, mean - half, mean + half)


def best_of_n(score: Tensor, value: Tensor, n: int) -> Tensor:
    """Expected `value` of the response with the highest `score` among n, for each prompt, from N >= n samples.

        sum_i C(i - 1, n - 1) / C(N, n) * value of the i-th lowest score,    i = 1 .. N

    which averages over all C(N, n) subsets, so that it is unbiased; equal scores share their weights.

    Shapes: score, value [prompts, N] -> [prompts] float64.
    Raises: ValueError unless 1 <= n <= N.
    Source: Nakano et al. 2021 (WebGPT), arXiv:2112.09332, appendix I; Gao et al. 2022, arXiv:2210.10760, section 2.
    Tests:  test_comparison.py::test_best_of_n_is_the_mean_over_all_subsets,
            test_comparison.py::test_equal_scores_share_their_weights
    """
    samples = score.shape[1]
    if not 1 <= n <= samples:
        raise ValueError(f"best of {n} needs at least that many samples a prompt, got {samples}")
    weights = torch.tensor([math.comb(i, n - 1) / math.comb(samples, n) for i in range(samples)], dtype=torch.float64)
    ordered, order = score.sort(dim=1)
    result = torch.zeros(len(score), dtype=torch.float64)
    for row in range(len(score)):
        _, group, size = ordered[row].unique_consecutive(return_inverse=True, return_counts=True)
        shared = torch.zeros(len(size), dtype=torch.float64).index_add_(0, group, weights) / size
        result[row] = (shared[group] * value[row, order[row]].double()).sum()
    return result


def best_of_n_win_rate(score: Tensor, value: Tensor, n: int) -> Tensor:
    """Probability that the response with the highest `score` among n has a higher `value` than one more sample, a tie
    counting half, for each prompt, from N > n samples.

        sum_{i, j} w_ij [v_i > v_j] / (C(N, n) (N - n)),   w_ij = C(i - 1, n - 1) if j > i, C(i - 2, n - 1) if j < i

    with samples in the order of `score`: an average over all subsets of n and all samples outside of them, so unbiased,
    and exactly 1/2 at n = 1. (One opponent a prompt would have its luck in every n alike.) Equal scores stand in the
    order in which they were drawn.

    Shapes: score, value [prompts, N] -> [prompts] float64.
    Raises: ValueError unless 1 <= n < N.
    Source: as `best_of_n`; the opponent outside of the subset is a U-statistic of degree n + 1 (Hoeffding 1948).
    Tests:  test_comparison.py::test_the_win_rate_of_best_of_n_is_the_mean_over_subsets_and_opponents
    """
    samples = score.shape[1]
    if not 1 <= n < samples:
        raise ValueError(f"best of {n} against one more needs more samples a prompt than that, got {samples}")
    subsets = [math.comb(i, n - 1) / math.comb(samples, n) for i in range(samples)]
    above = torch.tensor(subsets, dtype=torch.float64)[:, None]  # the opponent is not among the lower ones
    below = torch.tensor([0.0, *subsets[:-1]] if n > 1 else [*subsets], dtype=torch.float64)[:, None]
    weights = torch.where(torch.ones(samples, samples).triu(1).bool(), above, below) / (samples - n)
    weights.fill_diagonal_(0.0)
    ordered = value.gather(1, score.argsort(dim=1, stable=True)).double()
    left, right = ordered[:, :, None], ordered[:, None, :]
    won = (left > right).double() + 0.5 * (left == right).double()
    return (won * weights).sum(dim=(1, 2))


def best_of_n_kl(n: int) -> float:
    """KL(best-of-n policy || its start) in nats a sequence: ln n - (n - 1) / n, an upper bound where responses repeat.

    Source: Stiennon et al. 2020, arXiv:2009.01325, appendix G.3; that it is a bound: Beirami et al. 2024,
            arXiv:2401.01879.
    Tests:  test_comparison.py::test_the_kl_of_best_of_n
    """
    return math.log(n) - (n - 1) / n


@dataclass(frozen=True)
class GoldCurve:
    """R(d) = d (alpha - beta x), x = d (best-of-n) or ln d (PPO); peak: the d of its maximum, None if it has none;
    r_squared: share of the variance of R that it explains."""

    kind: str
    alpha: float
    beta: float
    peak: float | None
    r_squared: float

    def __call__(self, d: float) -> float:
        """The gold score's gain at d = sqrt(KL)."""
        return d * (self.alpha - self.beta * (d if self.kind == "best_of_n" else math.log(d))) if d > 0 else 0.0


def fit_gold_curve(d: Tensor, gain: Tensor, kind: str) -> GoldCurve:
    """Least squares fit of the gold score's gain over the start, against d = sqrt(KL(policy || start)).

        best_of_n:  R = d (alpha - beta d),      peak at alpha / (2 beta)
        ppo:        R = d (alpha - beta ln d),   peak at exp(alpha / beta - 1)

    Both are linear in alpha and beta, so the fit is exact; a peak exists where beta > 0 (for best_of_n, alpha too).

    Shapes: d, gain [n], n >= 2, d > 0, sqrt(nats) and gold units.
    Raises: ValueError for fewer points or another kind.
    Source: Gao et al. 2022, arXiv:2210.10760, section 3.
    Tests:  test_comparison.py::test_gaos_curves_are_found_again
    """
    if kind not in ("best_of_n", "ppo") or len(d) < 2:
        raise ValueError(f"expected best_of_n or ppo and at least two points, got {kind!r} and {len(d)}")
    d, gain = d.double(), gain.double()
    table = torch.stack([d, -d * (d if kind == "best_of_n" else d.log())], dim=1)
    alpha, beta = torch.linalg.lstsq(table, gain[:, None]).solution.squeeze(1).tolist()
    rest = gain - table @ torch.tensor([alpha, beta], dtype=torch.float64)
    spread = float((gain - gain.mean()).square().sum())
    explained = 1 - float(rest.square().sum()) / spread if spread > 0 else 0.0
    peak = None
    if kind == "best_of_n" and beta > 0 and alpha > 0:
        peak = alpha / (2 * beta)
    elif kind == "ppo" and beta > 0:
        peak = math.exp(min(alpha / beta - 1, 700.0))
    return GoldCurve(kind, alpha, beta, peak, explained)
