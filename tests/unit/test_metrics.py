"""Metrics reduce to what one process with one big batch would have reported."""

import math

import pytest
import torch

from alignkit.observe.metrics import Max, Mean, Metrics, reduce


def over_ranks(ranks: list[Metrics]) -> list[Metrics]:
    """What each rank holds after `reduce`, with collectives played by hand; each may be used once a rank."""
    packed = [metrics.pack() for metrics in ranks]
    total = torch.stack([sums for sums, _ in packed]).sum(0)
    largest = torch.stack([maxima for _, maxima in packed]).amax(0)
    sums_seen, maxima_seen = [], []
    reduced = [
        reduce(metrics, lambda sums: sums_seen.append(sums) or total, lambda maxima: maxima_seen.append(1) or largest)
        for metrics in ranks
    ]
    assert len(sums_seen) == len(maxima_seen) == len(ranks)
    assert all(sums.dtype == torch.float64 for sums in sums_seen)
    return reduced


def one_process(metrics: Metrics) -> dict[str, float]:
    return reduce(metrics, lambda sums: sums, lambda maxima: maxima).values()


def test_a_mean_is_not_a_mean_of_means():
    """Three tokens of mean 1 and one token of 5: (3 + 5) / 4 = 2, while the mean of the two means is 3."""
    metrics = Metrics({"kl": Mean(3.0, 3)}) + Metrics({"kl": Mean(5.0, 1)})
    assert one_process(metrics) == {"kl": 2.0}


def test_ranks_and_micro_batches_equal_one_batch():
    values = torch.tensor([0.5, -1.0, 4.0, 2.0, 3.5, 1.0, -2.0], dtype=torch.float64)

    def of(part: torch.Tensor) -> Metrics:
        return Metrics({"mean": Mean(part.sum(), part.numel()), "max": Max(part.max())})

    expected = {"mean": 8.0 / 7, "max": 4.0}
    assert one_process(of(values)) == expected
    for reduced in over_ranks([of(values[:1]) + of(values[1:4]), of(values[4:])]):
        assert reduced.values() == expected
        assert all(type(value) is float for value in reduced.values().values())


def test_a_rank_without_values_changes_nothing():
    full = Metrics({"reward": Mean(6.0, 4), "largest": Max(-3.0)})
    empty = Metrics({"reward": Mean(0, 0), "largest": Max(-math.inf)})
    for reduced in over_ranks([empty, full, empty]):
        assert reduced.values() == {"reward": 1.5, "largest": -3.0}


def test_a_mean_over_nothing_is_left_out():
    metrics = Metrics({"kl": Mean(0.0, 0), "largest": Max(0.0)})
    assert one_process(metrics) == {"largest": 0.0}


def test_ranks_may_meet_names_in_different_orders():
    first = Metrics({"a": Mean(1.0, 1), "b": Mean(10.0, 1)})
    second = Metrics({"b": Mean(20.0, 1), "a": Mean(3.0, 1)})
    for reduced in over_ranks([first, second]):
        assert reduced.values() == {"a": 2.0, "b": 15.0}
    assert list(over_ranks([first, second])[1]) == ["b", "a"]


def test_different_names_on_ranks_are_refused():
    with pytest.raises(RuntimeError, match="ranks hold different metrics; this one has a: Mean"):
        over_ranks([Metrics({"a": Mean(1.0, 1)}), Metrics({"b": Mean(1.0, 1)})])


def test_max_keeps_the_largest():
    metrics = Metrics({"max": Max(1.0)})
    metrics.add("max", Max(torch.tensor(0.5)))
    assert metrics.values() == {"max": 1.0}


@pytest.mark.parametrize("order", [(math.nan, 1.0), (1.0, math.nan)])
def test_nan_is_not_hidden_by_a_sound_value(order):
    metrics = Metrics({"x": Max(order[0])}) + Metrics({"x": Max(order[1])})
    assert math.isnan(metrics.values()["x"])


def test_one_name_has_one_kind():
    with pytest.raises(TypeError, match="metric 'kl' is a Mean, not a Max"):
        Metrics({"kl": Mean(1.0, 1)}).add("kl", Max(1.0))


def test_merging_leaves_both_sides_as_they_were():
    left, right = Metrics({"kl": Mean(1.0, 1)}), Metrics({"kl": Mean(3.0, 1), "n": Max(2)})
    assert (left + right).values() == {"kl": 2.0, "n": 2.0}
    assert left.values() == {"kl": 1.0} and right.values() == {"kl": 3.0, "n": 2.0}


def test_tensors_stay_tensors_without_graph_until_reduced():
    """A float() per micro-batch would wait for the GPU; a kept graph would hold every micro-batch's activations."""
    weight = torch.ones((), requires_grad=True)
    metrics = Metrics({"loss": Mean(weight * 2, torch.tensor(1))})
    metrics.add("loss", Mean(weight * 4, torch.tensor(1)))
    assert isinstance(metrics["loss"].total, torch.Tensor) and not metrics["loss"].total.requires_grad
    assert one_process(metrics) == {"loss": 3.0}


def test_long_totals_do_not_lose_counts():
    """In float32, 2**24 + 1 is 2**24."""
    metrics = Metrics({"tokens": Mean(torch.tensor(2.0**24), 1)})
    for _ in range(3):
        metrics.add("tokens", Mean(torch.tensor(1.0), 0))
    assert one_process(metrics) == {"tokens": 2.0**24 + 3}


def test_no_metrics_at_all():
    assert one_process(Metrics()) == {}
