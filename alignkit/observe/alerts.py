"""When a run goes wrong: which figures of a row are beyond which limits. Pure, and used twice: what `tracking.alerts`
finds is told, what `ppo.stop_if` finds ends the run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from alignkit.schema import Positive, Proportion, settings

EARLY = 5
"""Rows by which the later ones are judged: value models begin with large errors, which mean nothing."""
Above1 = Annotated[float, Field(gt=1)]


@settings
class Limits:
    """null (of nan: false) leaves a limit out.

    kl_ratio:           KL over kl.target, where there is one.
    kl:                 KL, nats per sequence, where there is no target.
    entropy:            of the policy, as a share of the first iteration's.
    explained_variance: of the value model, below which it is (1: perfect, 0: no better than a constant).
    value_loss:         over its median in the first EARLY iterations. Both value limits hold from then on.
    nan:                a figure that is no number, or infinite.
    """

    kl_ratio: Above1 | None
    kl: Positive | None
    entropy: Proportion | None
    explained_variance: Annotated[float, Field(lt=0)] | None
    value_loss: Above1 | None
    nan: bool


NOT_A_NUMBER = Limits(kl_ratio=None, kl=None, entropy=None, explained_variance=None, value_loss=None, nan=True)
"""What can be said of every stage; the other limits are PPO's."""


@dataclass
class Watch:
    """Looks at the rows of a stage one after the other. target: nats per sequence; early: its first rows."""

    limits: Limits
    target: float | None = None
    early: list[Mapping[str, float]] = field(default_factory=list)

    def look(self, row: Mapping[str, float]) -> dict[str, str]:
        """What is wrong with this row, by kind: kl, entropy, value, nan; each in words."""
        found = {}
        broken = [name for name, value in row.items() if not math.isfinite(value)]
        if self.limits.nan and broken:
            found["nan"] = f"{', '.join(broken[:3])}: not finite (NaN or infinity)"
        sound = {name: value for name, value in row.items() if name not in broken}
        words = {"kl": self._kl(sound), "entropy": self._entropy(sound), "value": self._value(sound)}
        if len(self.early) < EARLY:
            self.early.append(row)
        return found | {kind: text for kind, text in words.items() if text}

    def _kl(self, row: Mapping[str, float]) -> str:
        limits, kl = self.limits, row.get("kl", 0.0)
        if self.target is not None and limits.kl_ratio is not None and kl > limits.kl_ratio * self.target:
            return f"KL of {kl:.3g} nats is above {limits.kl_ratio:g} times kl.target={self.target:g}"
        if self.target is None and limits.kl is not None and kl > limits.kl:
            return f"KL of {kl:.3g} nats is above {limits.kl:g}"
        return ""

    def _entropy(self, row: Mapping[str, float]) -> str:
        share, first = self.limits.entropy, self.early[0].get("entropy") if self.early else None
        now = row.get("entropy")
        if share is None or first is None or now is None or not now < share * first:
            return ""
        return f"entropy of {now:.3g} nats a token is below {share:g} of the first iteration's {first:.3g}"

    def _value(self, row: Mapping[str, float]) -> str:
        if len(self.early) < EARLY:
            return ""
        limits, variance, loss = self.limits, row.get("explained_variance"), row.get("value_loss")
        if limits.explained_variance is not None and variance is not None and variance < limits.explained_variance:
            return f"explained variance of {variance:.3g} is below {limits.explained_variance:g}"
        losses = sorted(row["value_loss"] for row in self.early if math.isfinite(row.get("value_loss", math.nan)))
        if limits.value_loss is None or loss is None or not losses:
            return ""
        usual = losses[len(losses) // 2]
        return f"value loss of {loss:.3g} is above {limits.value_loss:g} times the first iterations' {usual:.3g}" * (
            loss > limits.value_loss * usual
        )


def alerts_in(figures: Mapping[str, object]) -> list[str]:
    """What the figures of a stage, named without it, say of alerts that were told and of an early end."""
    found = [str(value) for name, value in figures.items() if name.startswith("alert_")]
    return [*found, *([f"ended early: {figures['stopped']}"] if "stopped" in figures else [])]
