"""What a rollout engine is: settings, and one method that samples responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from alignkit.algo.sampling import SamplingRule
    from alignkit.algo.types import PromptBatch, Rollout


def check_lengths(engine: RolloutEngine) -> None:
    """Raise ValueError if a response would have to be longer than it may be."""
    if engine.min_response >= engine.max_response:
        least, most = engine.min_response, engine.max_response
        raise ValueError(f"min_response={least} must be below max_response={most} tokens")


def rollout_of(prompts: PromptBatch, response: Tensor, logprobs: Tensor, rule: SamplingRule) -> Rollout:
    """Prompts with what was sampled to them. response, logprobs [B, R]; what follows a stop token is ignored."""
    import torch

    from alignkit.algo.sequence import response_mask
    from alignkit.algo.types import Rollout

    real, finished = response_mask(response, rule.stops(response.device))
    return Rollout(
        tokens=torch.cat([prompts.tokens, response], dim=1),
        mask=torch.cat([prompts.mask, real], dim=1),
        response_mask=real,
        finished=finished,
        engine_logprobs=torch.where(real, logprobs, 0.0),
    )


class RolloutEngine(Protocol):
    """A frozen settings class with these fields and this method is an engine: one file and one YAML.

    temperature > 0; min_response and max_response in tokens; unshard: needs all weights on every rank.
    """

    @property
    def temperature(self) -> float: ...
    @property
    def min_response(self) -> int: ...
    @property
    def max_response(self) -> int: ...
    @property
    def unshard(self) -> bool: ...

    def generate(
        self, model: PreTrainedModel, prompts: PromptBatch, rule: SamplingRule, noise: Tensor,
        go_on: Callable[[bool], bool],
    ) -> Rollout:  # fmt: skip
        """Sample one response to each prompt. noise [B, max_response] in (0, 1) decides every token
        (in an engine that draws by itself, its first column the seed).

        Called with equally many prompts on every rank. With `unshard` all weights of `model` are on this rank, ranks
        may take different numbers of steps and `go_on` is the identity; else a forward is a collective, and
        go_on(running) says, on all ranks alike, whether any rank needs another. Responses have width R = max_response,
        padded on the right.
        """
        ...
