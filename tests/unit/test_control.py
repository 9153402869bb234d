"""The KL controllers' published numbers."""

from functools import partial

import pytest
from pydantic import ValidationError

from alignkit.algo.control import AdaptiveKL, FixedKL

IN_REWARD = {"estimator": "k1", "place": "reward"}
ZIEGLER = AdaptiveKL(coef=0.2, target=6.0, horizon=10_000, **IN_REWARD)


@pytest.mark.parametrize(
    "observed, episodes, factor",
    [
        (9.0, 512, 1.01024),  # error clipped at 0.2
        (6.3, 512, 1.00256),  # error 0.05
        (6.0, 512, 1.0),
        (0.0, 512, 1 - 0.2 * 512 / 10_000),
        (-3.0, 512, 1 - 0.2 * 512 / 10_000),  # k1 over few sequences may be negative
        (1e9, 1024, 1 + 0.2 * 1024 / 10_000),
    ],
)
def test_the_coefficient_follows_kl_per_sequence(observed, episodes, factor):
    assert ZIEGLER.next(0.15, observed=observed, episodes=episodes) == pytest.approx(0.15 * factor, rel=1e-12)


def test_the_step_grows_from_the_coefficient_in_use_not_from_the_first():
    once = ZIEGLER.next(ZIEGLER.coef, observed=9.0, episodes=512)
    assert ZIEGLER.next(once, observed=9.0, episodes=512) == pytest.approx(0.2 * 1.01024**2, rel=1e-12)


def test_a_fixed_coefficient_stays():
    fixed = FixedKL(coef=0.05, **IN_REWARD)
    assert fixed.next(0.05, observed=100.0, episodes=64) == 0.05
    assert fixed.target is None


def test_the_reach_is_the_growth_under_the_largest_error():
    coef = 1.0
    for _ in range(30):
        coef = ZIEGLER.next(coef, observed=1e9, episodes=512)
    assert ZIEGLER.reach(iterations=30, episodes=512) == pytest.approx(coef, rel=1e-12)


def test_the_step_is_the_same_whatever_estimator_is_paid_for():
    """The controller sees k1 in every case; nothing else may reach the number."""
    for estimator, place in [("k2", "reward"), ("k3", "reward"), ("k2", "loss"), ("k3", "loss")]:
        other = AdaptiveKL(coef=0.2, target=6.0, horizon=10_000, estimator=estimator, place=place)
        assert other.next(0.15, observed=6.3, episodes=512) == ZIEGLER.next(0.15, observed=6.3, episodes=512)


@pytest.mark.parametrize(
    "controller", [partial(FixedKL, coef=0.1), partial(AdaptiveKL, coef=0.1, target=6.0, horizon=9)]
)
def test_k1_in_the_loss_is_refused(controller):
    with pytest.raises(ValidationError, match=r"place=loss needs estimator=k2 or k3"):
        controller(estimator="k1", place="loss")


@pytest.mark.parametrize(
    "change",
    [
        {"coef": 0.0},
        {"target": -1.0},
        {"target": float("nan")},
        {"horizon": 0},
        {"estimator": "k4"},
        {"place": "nowhere"},
    ],
)
def test_settings_that_cannot_steer_are_refused(change):
    with pytest.raises(ValidationError, match=next(iter(change))):
        AdaptiveKL(**{"coef": 0.1, "target": 6.0, "horizon": 500, **IN_REWARD, **change})


def test_the_coefficient_never_turns_negative():
    """Below 0 the penalty would pay the policy for leaving the reference."""
    steering = AdaptiveKL(coef=0.1, target=6.0, horizon=100, **IN_REWARD)
    assert steering.next(0.1, observed=0.0, episodes=499) > 0
    with pytest.raises(ValueError, match="horizon=100 must be above a fifth of the 500 episodes"):
        steering.next(0.1, observed=0.0, episodes=500)
