"""What a reward source is: settings that open into an object with one method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.algo.types import Rollout
    from alignkit.data.corpus import Prompt
    from alignkit.data.tokens import Encoder
    from alignkit.runtime.sharding import Cluster


@dataclass(frozen=True)
class Answers:
    """This rank's finished responses: `responses`, texts without special tokens, each to its place in `prompts` (texts
    or lists of chat messages), and the same as tokens in `rollout`."""

    rollout: Rollout
    prompts: list[Prompt]
    responses: list[str]


class Reward(Protocol):
    """A frozen settings class with this method is a reward: one file and one YAML. (One that needs nothing opened has
    `score` instead: it is a `RewardSource` itself.) What happens to its scores before they are paid (clipping, a
    missing EOS, length) is `shaping`, the same for every source.

    A class may say more of itself, none of which it has to: `needs_reward_model = False`: it makes no use of `folder`,
    so no reward model is trained or asked for; MEMBERS: the field with rewards that it combines; CODE: the field that
    names code as module.name, which must be in `trusted`.
    """

    def open(self, folder: Path | None, encoder: Encoder, cluster: Cluster) -> RewardSource:
        """Ready to score. folder: the reward model of the chain; sources of another kind need not look at it."""
        ...


class RewardSource(ABC):
    """Scores whole responses; higher is better. A frozen dataclass of settings with `score`, which `_target_` names, is
    a reward; so is one whose `open` (see `reward.source.Reward`) gives such an object.

    One that has `initial_value() -> nn.Module` gives PPO its value model, sharded; otherwise that starts from the
    policy with a fresh head.

    What it raises, and scores that are not finite, are failures, which `stages.scoring` handles for all ranks together:
    `on_failure` ("stop" or "mean"; without it "stop") says how, `reasons` (a list) why the last call left rows NaN.
    With `collective = True` the ranks compute a score together, so that none may fail alone: nothing is held back then.
    """

    @abstractmethod
    def score(self, answers: Answers, microbatch: int) -> Tensor:
        """One score a response, [B] in float32 or better, on the rollout's device. Called on every rank with its own
        rows, under no_grad, equally many rows on each. microbatch: the tokens that a model may read at once."""
        ...


@dataclass(frozen=True)
class CombinedSource:
    """Several sources, one score: `combine` takes the scores of all members in the order of their names, [members, n],
    to [n]. Each member is scored, and fails, by itself."""

    members: Mapping[str, RewardSource | CombinedSource]
    combine: Callable[[Tensor], Tensor]


def chain_key(reward: Any, key: str = "reward") -> str | None:
    """The setting that names the reward model of the chain where the reward in `key` scores with one, else None: a
    member that has a path of its own does not, the reward itself does (the chain hands it that folder)."""
    if members := getattr(reward, "members", None):
        parts = {f"{key}.members.{name}": member for name, member in sorted(members.items())}
        found = (chain_key(part, name) for name, part in parts.items() if getattr(part, "path", None) is None)
        return next((name for name in found if name), None)
    return f"{key}.path" if getattr(reward, "needs_reward_model", hasattr(reward, "open")) else None


def opened(reward: Any, *arguments: Any) -> Any:
    """The source that a reward opens into, with the arguments of `Reward.open`; what can only score is one itself."""
    return reward.open(*arguments) if hasattr(reward, "open") else reward
