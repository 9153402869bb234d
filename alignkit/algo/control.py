"""KL controllers: the coefficient of the penalty in the next iteration, from the KL seen in this one.

Pure: the coefficient itself is one number in the training state, so that a resumed run continues it.
"""

from alignkit.schema import Count, NonNegative, Positive, settings


@settings
class FixedKL:
    """The coefficient never changes. coef: reward units per nat."""

    coef: NonNegative

    target = None

    def next(self, coef: float, *, observed: float, episodes: int) -> float:
        """The same coefficient again."""
        return coef


@settings
class AdaptiveKL:
    """Steer KL(policy || reference) to `target`.

        error = clip(observed / target - 1, -0.2, 0.2);   coef <- coef * (1 + error * episodes / horizon)

    coef:     the first coefficient, reward units per nat.
    target:   nats per sequence: the KL summed over the response's tokens, averaged over sequences.
    horizon:  episodes; larger is slower. One step changes the coefficient by at most 20% * episodes / horizon.
    Source:   Ziegler et al. 2019, arXiv:1909.08593, section 2.2 and its code (episodes in the step, horizon 10,000).
    """

    coef: Positive
    target: Positive
    horizon: Count

    def next(self, coef: float, *, observed: float, episodes: int) -> float:
        """The next coefficient. observed: nats per sequence over all ranks; episodes: sequences of the iteration."""
        error = min(max(observed / self.target - 1.0, -0.2), 0.2)
        return coef * (1.0 + error * episodes / self.horizon)

    def reach(self, *, iterations: int, episodes: int) -> float:
        """By which factor the coefficient can grow in `iterations` of `episodes` sequences each."""
        return (1.0 + 0.2 * episodes / self.horizon) ** iterations

    def __post_init__(self) -> None:
        if self.horizon < 2:
            raise ValueError(
                f"horizon={self.horizon} must be at least 2 episodes, or the coefficient can turn negative"
            )
