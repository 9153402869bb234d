"""The values that one PPO iteration passes from step to step, each frozen, each with its shapes.

Axes: B sequences, P prompt tokens (left-padded), R response tokens (right-padded), T = P + R, V vocabulary.
Units: log-probabilities in nats at the sampling temperature; scores, rewards, values in (normalised) reward-model
units. Masks are bool, True on real tokens. Padding is known by its mask alone: no value in the data stands for it.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptBatch:
    """tokens [B, P] left-padded int64, mask [B, P]; index [B]: each prompt's number in the data, which with the seed
    and the iteration fixes the sampling noise, whatever rank or batch the prompt lands in."""

    tokens: Tensor
    mask: Tensor
    index: Tensor


@dataclass(frozen=True)
class Rollout:
    """tokens [B, T] and mask [B, T] of prompt and response together; response_mask [B, R] is True up to and
    including the stop token; finished [B]: a stop token was sampled within R tokens; engine_logprobs [B, R]: of the
    sampled tokens, as whatever sampled them says, 0 on padding."""

    tokens: Tensor
    mask: Tensor
    response_mask: Tensor
    finished: Tensor
    engine_logprobs: Tensor

    @property
    def prompt_width(self) -> int:
        return self.tokens.shape[1] - self.response_mask.shape[1]

    @property
    def response(self) -> Tensor:
        """Response tokens [B, R]."""
        return self.tokens[:, self.prompt_width :]

    def take(self, index: Tensor) -> "Rollout":
        """The given rows, as wide as all."""
        return Rollout(*(getattr(self, field.name)[index] for field in fields(self)))

    def rows(self, index: Tensor) -> "Rollout":
        """The given rows, trimmed to the longest prompt and response among them."""
        keep, length = _trimmed(self.mask[index], self.response_mask[index])
        return Rollout(
            tokens=self.tokens[index][:, keep],
            mask=self.mask[index][:, keep],
            response_mask=self.response_mask[index][:, :length],
            finished=self.finished[index],
            engine_logprobs=self.engine_logprobs[index][:, :length],
        )


@dataclass(frozen=True)
class ScoredRollout:
    """logprobs, ref_logprobs, values [B, R] of the sampled tokens, 0 on padding; scores [B], one a sequence."""

    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor


@dataclass(frozen=True)
class ShapedReward:
    """per_token [B, R]: -coef * kl plus the score on the last slot; kl [B, R]: the k1 estimate, nats; mask [B, R]: the
    slots, which are the response tokens and with `eos_plus_one` one more."""

    per_token: Tensor
    kl: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Advantages:
    """advantages [B, R] of the response tokens; returns [B, R], the value model's target on the slots of the reward."""

    advantages: Tensor
    returns: Tensor

    @classmethod
    def of_responses(cls, gained: Tensor, mask: Tensor) -> "Advantages":
        """One advantage a response on all of its tokens, and nothing for a value model to learn. gained: B numbers, in
        the order of the rows of mask [B, R]."""
        advantages = torch.where(mask, gained.reshape(-1, 1), 0.0)
        return cls(advantages, torch.zeros_like(advantages))


@dataclass(frozen=True)
class Minibatch:
    """The rows of one optimizer step (or of one micro-batch of it) on this rank; fields as above, value_mask the slots
    that have a value, importance [B, R] the weight of each token in the policy's loss."""

    tokens: Tensor
    mask: Tensor
    response_mask: Tensor
    value_mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    importance: Tensor
    returns: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def rows(self, index: Tensor) -> "Minibatch":
        """The given rows, trimmed to the longest prompt and response among them."""
        picked = {field.name: getattr(self, field.name)[index] for field in fields(self)}
        keep, length = _trimmed(picked["mask"], picked["value_mask"])
        for name, value in picked.items():
            picked[name] = value[:, keep] if name in ("tokens", "mask") else value[:, :length]
        return Minibatch(**picked)

    def only(self, real: Tensor) -> "Minibatch":
        """The same rows, nothing to learn in those where `real` [B] is False: ranks with fewer rows stay in step."""
        kept = real[:, None]
        return replace(self, response_mask=self.response_mask & kept, value_mask=self.value_mask & kept)


@dataclass(frozen=True)
class Summed:
    """A loss as its sum over tokens and the number of tokens: divide by the count of the whole optimizer batch, over
    all micro-batches and ranks. (A mean of micro-batch means would weigh the tokens of short responses more.)"""

    total: Tensor
    count: Tensor


def _trimmed(mask: Tensor, response_mask: Tensor) -> tuple[slice, int]:
    """Columns of [B, T] that any row needs, and the length of the longest response (at least 1)."""
    first = int(mask.long().argmax(dim=1).min())
    length = max(int(response_mask.sum(dim=1).max()), 1)
    return slice(first, mask.shape[1] - response_mask.shape[1] + length), length


def same_shape(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors have one shape: nothing in this package broadcasts silently."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"expected one shape, got {shapes}")


def require_bool(**masks: Tensor) -> None:
    """Raise ValueError unless every mask is a bool tensor (an int mask would multiply instead of select)."""
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise ValueError(f"{name} must be a bool tensor, got {mask.dtype}")
