"""The KL controllers' published numbers."""

import pytest
from pydantic import ValidationError

from alignkit.algo.control import AdaptiveKL, FixedKL

ZIEGLER = AdaptiveKL(coef=0.2, target=6.0, horizon=10_000)


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
    assert FixedKL(coef=0.05).next(0.05, observed=100.0, episodes=64) == 0.05
    assert FixedKL(coef=0.05).target is None


@pytest.mark.parametrize("change", [{"coef": 0.0}, {"target": -1.0}, {"target": float("nan")}, {"horizon": 1}])
def test_settings_that_cannot_steer_are_refused(change):
    with pytest.raises(ValidationError):
        AdaptiveKL(**{"coef": 0.1, "target": 6.0, "horizon": 500, **change})
