"""What a rollout engine is: settings, and one method that samples responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

    from alignkit.algo.sampling import SamplingRule
    from alignkit.algo.types import PromptBatch, Rollout


class RolloutEngine(Protocol):
    """A frozen settings class with these fields and this method is an engine: one file and one YAML.

    temperature > 0; min_response and max_response in tokens.
    """

    temperature: float
    min_response: int
    max_response: int

    def generate(self, model: nn.Module, prompts: PromptBatch, rule: SamplingRule, noise: Tensor) -> Rollout:
        """Sample one response to each prompt. noise [B, max_response] in (0, 1) decides every token.

        Called under no_grad with all weights of `model` on this rank; ranks may take different numbers of steps, so
        there must be no collective inside. Responses have width R = max_response, padded on the right.
        """
        ...
