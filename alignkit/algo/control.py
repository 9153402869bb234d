"""KL controllers: the coefficient of the penalty in the next iteration, from the KL seen in this one.

Pure: the coefficient itself is one number in the training state, so that a resumed run continues it. `estimator` and
`place` say how the penalty is paid: per token in the reward, or as a term of the policy's loss.
"""

from typing import Literal

from alignkit.schema import Count, NonNegative, Positive, settings

Estimator = Literal["k1", "k2", "k3"]
Place = Literal["reward", "loss"]


@settings
class FixedKL:
    """The coefficient never changes. coef: reward units per nat; estimator: of the KL that is paid for; place: in the
    reward or in the loss (k2, k3 only)."""

    coef: NonNegative
    estimator: Estimator
    place: Place

    target = None

    def __post_init__(self) -> None:
        _can_be_in_the_loss(self)

    def next(self, coef: float, *, observed: float, episodes: int) -> float:
        """The same coefficient again."""
        return coef


@settings
class AdaptiveKL:
    """Steer KL(policy || reference) to `target`.

        error = clip(observed / target - 1, -0.2, 0.2);   coef <- coef * (1 + error * episodes / horizon)

    coef:     the first coefficient, reward units per nat.
    target:   nats per sequence: the KL summed over the response's tokens, averaged over sequences, by k1 whatever is
              paid for.
    horizon:  episodes; larger is slower. One step changes the coefficient by at most 20% * episodes / horizon.
    estimator, place: as in FixedKL.
    Source:   Ziegler et al. 2019, arXiv:1909.08593, section 2.2 and its code (episodes in the step, horizon 10,000).
    Tests:    test_control.py::test_the_coefficient_follows_kl_per_sequence, test_against_numpy.py::test_kl_controllers
    """

    coef: Positive
    target: Positive
    horizon: Count
    estimator: Estimator
    place: Place

    def next(self, coef: float, *, observed: float, episodes: int) -> float:
        """The next coefficient. observed: nats per sequence over all ranks; episodes: sequences of the iteration."""
        if 0.2 * episodes >= self.horizon:
            raise ValueError(
                f"horizon={self.horizon} must be above a fifth of the {episodes} episodes of an iteration, or the "
                "coefficient could turn negative"
            )
        error = min(max(observed / self.target - 1.0, -0.2), 0.2)
        return coef * (1.0 + error * episodes / self.horizon)

    def reach(self, *, iterations: int, episodes: int) -> float:
        """By which factor the coefficient can grow in `iterations` of `episodes` sequences each."""
        return (1.0 + 0.2 * episodes / self.horizon) ** iterations

    def __post_init__(self) -> None:
        _can_be_in_the_loss(self)


def _can_be_in_the_loss(kl: FixedKL | AdaptiveKL) -> None:
    if kl.place == "loss" and kl.estimator == "k1":
        raise ValueError("place=loss needs estimator=k2 or k3: the gradient of k1 is 0 in expectation")
