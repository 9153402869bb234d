"""What a reward source is: settings that open into an object with one method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.algo.types import Rollout
    from alignkit.data.corpus import Prompt


@dataclass(frozen=True)
class Answers:
    """This rank's finished responses: as tokens, and as the texts that a source with other tokens needs."""

    rollout: Rollout
    prompts: list[Prompt]
    responses: list[str]


class RewardSource(Protocol):
    """Scores whole responses; higher is better."""

    def score(self, answers: Answers, microbatch: int) -> Tensor:
        """One score a response, [B] in float32 or better, on the rollout's device. Called on every rank with its own
        rows, under no_grad, equally many rows on each."""
        ...
