"""What a reward source is: settings that open into an object with one method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.algo.types import Rollout
    from alignkit.data.corpus import Prompt
    from alignkit.data.tokens import Encoder
    from alignkit.runtime.sharding import Cluster


@dataclass(frozen=True)
class Answers:
    """This rank's finished responses: as tokens, and as the texts that a source with other tokens needs."""

    rollout: Rollout
    prompts: list[Prompt]
    responses: list[str]


class Reward(Protocol):
    """A frozen settings class with this method is a reward: one file and one YAML. What happens to its scores before
    they are paid (clipping, a missing EOS, length) is `shaping`, the same for every source."""

    def open(self, folder: Path, encoder: Encoder, cluster: Cluster) -> RewardSource:
        """Ready to score. folder: the reward model of the chain; sources of another kind need not look at it."""
        ...


class RewardSource(Protocol):
    """Scores whole responses; higher is better. One that has `initial_value() -> nn.Module` gives PPO its value model,
    sharded; otherwise that starts from the policy with a fresh head."""

    def score(self, answers: Answers, microbatch: int) -> Tensor:
        """One score a response, [B] in float32 or better, on the rollout's device. Called on every rank with its own
        rows, under no_grad, equally many rows on each."""
        ...
