"""The counter-based noise is uniform and independent of layout; a draw follows the probabilities it is given."""

import math

import numpy as np
import pytest
import torch

from alignkit.algo.sampling import SamplingRule, draw, uniform_noise

INF = float("inf")
WORD = (1 << 64) - 1


def reference_mix(x: int) -> int:
    """SplitMix64's finaliser after its increment, in Python's own integers."""
    x = (x + 0x9E3779B97F4A7C15) & WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def reference_noise(seed: int, iteration: int, index: int, position: int) -> float:
    state = reference_mix(seed & WORD)
    state = reference_mix(state ^ reference_mix((iteration + 0x51) & WORD))
    state = reference_mix(state ^ reference_mix((index + 0xA3) & WORD))
    bits = reference_mix(state ^ reference_mix(position + 0xE7))
    return ((bits >> 11) + 0.5) * 2.0**-53


def inverse_mix(y: int) -> int:
    def unshift(x: int, bits: int) -> int:
        result = x
        for _ in range(64 // bits):
            result = x ^ (result >> bits)
        return result

    y = unshift(y, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & WORD
    y = unshift(y, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & WORD
    return (unshift(y, 30) - 0x9E3779B97F4A7C15) & WORD


def index_of_extreme(bits: int) -> torch.Tensor:
    """The prompt index whose first position, with seed 0 in iteration 0, has exactly these 64 random bits."""
    state = inverse_mix(bits) ^ reference_mix(0xE7)
    before = reference_mix(reference_mix(0) ^ reference_mix(0x51))
    index = (inverse_mix(inverse_mix(state) ^ before) - 0xA3) & WORD
    return torch.tensor([index - (1 << 64) if index >> 63 else index])


def kolmogorov_smirnov(sample: np.ndarray) -> float:
    ordered, n = np.sort(sample), len(sample)
    return max(np.abs(ordered - np.arange(n) / n).max(), np.abs(ordered - np.arange(1, n + 1) / n).max())


def test_the_generator_is_the_published_one():
    """First outputs of SplitMix64 with seed 0 (Vigna's reference program), then all four coordinates chained."""
    assert reference_mix(0) == 0xE220A8397B1DCDAF and reference_mix(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4
    for seed, iteration, index in [(0, 0, 0), (1, 2, 3), (12345, 99, 10**9), (-1, 0, 7)]:
        noise = uniform_noise(seed, iteration, torch.tensor([index]), 5)[0]
        expected = [reference_noise(seed, iteration, index, position) for position in range(5)]
        assert noise.tolist() == pytest.approx(expected, rel=0, abs=2.0**-52)


@pytest.mark.parametrize("rows, positions", [(1_000, 100), (100_000, 1), (10, 10_000)])
def test_noise_is_uniform_along_rows_and_positions(rows, positions):
    sample = uniform_noise(0, 3, torch.arange(rows), positions).flatten().numpy()
    assert len(sample) == 100_000 and sample.min() > 0 and sample.max() < 1
    assert abs(sample.mean() - 0.5) < 4 / math.sqrt(12 * len(sample))
    assert abs(sample.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / len(sample))
    assert kolmogorov_smirnov(sample) < 1.95 / math.sqrt(len(sample))  # p = 0.001


def test_neighbouring_places_are_not_correlated():
    noise = uniform_noise(0, 0, torch.arange(1_001), 101) - 0.5
    following = uniform_noise(0, 1, torch.arange(1_001), 101) - 0.5
    for a, b in [(noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise, following)]:
        assert abs(float((a * b).mean())) * 12 < 4 / math.sqrt(a.numel())


def test_every_place_has_a_number_of_its_own():
    seen = [uniform_noise(seed, it, torch.arange(50), 20) for seed in range(4) for it in range(4)]
    assert torch.stack(seen).unique().numel() == 4 * 4 * 50 * 20
    swapped = uniform_noise(1, 2, torch.tensor([3]), 1), uniform_noise(2, 1, torch.tensor([3]), 1)
    assert float(swapped[0]) != float(swapped[1])


def test_noise_does_not_depend_on_the_layout_of_the_batch():
    whole = uniform_noise(7, 5, torch.arange(40), 12)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert uniform_noise(7, 5, order, 12).equal(whole[order])
    assert torch.cat([uniform_noise(7, 5, part, 12) for part in torch.arange(40).split(7)]).equal(whole)
    assert uniform_noise(7, 5, torch.arange(40), 4).equal(whole[:, :4]), "a shorter response is a prefix of a longer"


def test_the_smallest_number_is_above_0():
    assert float(uniform_noise(0, 0, index_of_extreme(0), 1)) > 0


def test_the_largest_number_is_below_1():
    assert float(uniform_noise(0, 0, index_of_extreme(WORD), 1)) < 1


def test_a_draw_follows_the_probabilities():
    """Chi-square over 50,000 draws; 5 degrees of freedom exceed 20.5 once in a thousand."""
    p = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.04, 0.01])
    noise = uniform_noise(0, 0, torch.arange(50_000), 1)[:, 0]
    counts = draw(p.log().expand(50_000, -1), noise)[0].bincount(minlength=6).double()
    expected = p.double() * 50_000
    assert float(((counts - expected) ** 2 / expected).sum()) < 20.5


def test_a_draw_is_the_inverse_of_the_cumulative_probability():
    logits = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    noise = torch.tensor([1e-12, 0.1999, 0.2001, 0.6999, 0.7001, 1 - 1e-12], dtype=torch.float64)
    assert draw(logits.expand(6, -1), noise)[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert draw(torch.zeros(1, 2), torch.tensor([0.5], dtype=torch.float64))[0].tolist() == [1], "halves are exact"


def test_a_token_of_probability_0_is_never_drawn():
    """First, between two others, last; forbidden (-inf) or too improbable for float64; at noise next to 0 and 1."""
    logits = torch.tensor([-INF, 0.0, -INF, -INF, 1.0, -2000.0, 0.5, -INF, -INF])
    edges = [2.0**-54, 2.0**-53, 0.5, 1 - 2.0**-52, 1 - 2.0**-53]
    noise = torch.cat([torch.tensor(edges, dtype=torch.float64), uniform_noise(0, 0, torch.arange(20_000), 1)[:, 0]])
    assert set(draw(logits.expand(len(noise), -1), noise)[0].tolist()) == {1, 4, 6}


def test_the_last_probable_token_is_drawn_at_the_upper_edge_of_many_distributions():
    logits = torch.randn(3_000, 300, generator=torch.Generator().manual_seed(0)) * 4
    logits[:, -50:] = -INF
    tokens, _ = draw(logits, torch.full((3_000,), 1 - 2.0**-53, dtype=torch.float64))
    assert torch.isfinite(logits.gather(1, tokens[:, None])).all()


def test_a_draw_does_not_depend_on_the_other_rows():
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    noise = uniform_noise(0, 0, torch.arange(64), 1)[:, 0]
    alone = torch.cat([draw(logits[i : i + 1], noise[i : i + 1])[0] for i in range(64)])
    assert draw(logits, noise)[0].equal(alone)


def test_temperature_divides_the_logits():
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    rule = SamplingRule(temperature=0.7, stop_ids=(1,))
    torch.testing.assert_close(rule.apply(logits, place=torch.arange(logits.shape[1])), logits / 0.7)
    assert rule.apply(logits.bfloat16(), place=0).dtype == torch.float32
    assert rule.apply(logits.double(), place=0).dtype == torch.float64


def test_stop_tokens_are_forbidden_before_min_response_and_only_there():
    logits = torch.zeros(2, 5, 7)
    whole = SamplingRule(temperature=1.0, stop_ids=(1, 4), min_response=3).apply(
        logits, place=torch.arange(logits.shape[1])
    )
    assert whole.isneginf().nonzero().tolist() == [
        [row, t, stop] for row in range(2) for t in range(3) for stop in (1, 4)
    ]
    assert not logits.isneginf().any(), "the caller's logits are left as they were"


@pytest.mark.parametrize("min_response", [0, 1, 3, 9])
def test_the_sampler_step_by_step_and_the_log_probabilities_at_once_apply_one_rule(min_response):
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    rule = SamplingRule(temperature=1.3, stop_ids=(2, 6), min_response=min_response)
    steps = torch.cat([rule.apply(logits[:, t : t + 1], place=t) for t in range(5)], dim=1)
    assert rule.apply(logits, place=torch.arange(logits.shape[1])).equal(steps)
