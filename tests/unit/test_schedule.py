"""Learning rates over a run: published schedules by hand, and what every schedule has in common."""

import math

import pytest

from alignkit.algo.schedule import learning_rate_share

SCHEDULES = ["constant", "linear", "cosine", "inverse_sqrt"]


def run(schedule: str, iterations: int, warmup: int) -> list[float]:
    return [learning_rate_share(schedule, iteration, iterations, warmup) for iteration in range(iterations)]


def test_linear_is_ziegler_s_and_never_reaches_0():
    assert run("linear", 4, 0) == [1.0, 0.75, 0.5, 0.25]


def test_warm_up_is_instruct_gpt_s():
    """From a tenth over ten iterations, then constant."""
    assert run("constant", 12, 10) == pytest.approx([k / 10 for k in range(1, 11)] + [1.0, 1.0], rel=1e-15)


def test_cosine_is_half_way_down_in_the_middle():
    assert run("cosine", 4, 0) == pytest.approx([1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)], abs=1e-15)


def test_inverse_square_root_goes_on_where_the_warm_up_ended():
    shares = run("inverse_sqrt", 400, 100)
    assert shares[99] == 1.0 and shares[100] == pytest.approx(math.sqrt(100 / 101)) and shares[399] == 0.5
    assert run("inverse_sqrt", 4, 0) == pytest.approx([1.0, 0.5**0.5, 3**-0.5, 0.5])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("iterations, warmup", [(1, 0), (2, 1), (7, 0), (50, 10), (50, 49)])
def test_every_schedule_rises_to_its_peak_and_then_never_rises(schedule, iterations, warmup):
    shares = run(schedule, iterations, warmup)
    assert all(0 < share <= 1 for share in shares) and max(shares[: warmup + 1]) == pytest.approx(1.0, abs=0.02)
    assert shares[:warmup] == sorted(shares[:warmup]) and shares[warmup:] == sorted(shares[warmup:], reverse=True)
    assert shares[:warmup] == [(k + 1) / warmup for k in range(warmup)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_share_depends_on_the_iteration_alone(schedule):
    """A resumed run asks for iteration 30 first, and gets what an unbroken run got there."""
    assert learning_rate_share(schedule, 30, 50, 5) == run(schedule, 50, 5)[30]


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="polynomial"):
        learning_rate_share("polynomial", 3, 10, 0)
