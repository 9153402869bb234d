"""The plain values of a memory plan: what a model takes, a phase at its peak, how models lie on the ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import torch

from alignkit.runtime.config import RunConfig

WEIGHT = 4  # bytes of a trained weight, of its gradient and of each of Adam's two moments


@dataclass(frozen=True)
class Footprint:
    """Bytes that a model takes on one GPU. weights: its shards; gradients: their shards, in float32; optimizer: Adam's
    moments, and at the optimizer's step its working copy; gathered: weights and gradients of the layers that are put
    together from all shards; activations: what the backward needs and what a layer has in hand; logits: all tensors
    as wide as the vocabulary; kv_cache: keys and values of sampling."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    gathered: int = 0
    activations: int = 0
    logits: int = 0
    kv_cache: int = 0

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(getattr(self, field.name) for field in fields(self))

    def plus(self, **bytes_by_kind: int) -> Footprint:
        """With these bytes more."""
        return replace(self, **{kind: getattr(self, kind) + more for kind, more in bytes_by_kind.items()})


@dataclass(frozen=True)
class Phase:
    """The moment of a phase that takes most: which, and what each model takes then."""

    name: str
    moment: str
    models: dict[str, Footprint]

    @property
    def total(self) -> int:
        """Bytes of one GPU."""
        return sum(footprint.total for footprint in self.models.values())


@dataclass(frozen=True)
class Layout:
    """How models lie on the ranks. shards: ranks over which a model is split; dtype: of forward and backward."""

    ranks: int
    shards: int
    dtype: torch.dtype
    checkpointing: bool
    offload_frozen: bool
    offload_optimizer: bool

    @classmethod
    def of(cls, config: RunConfig) -> Layout:
        """As the settings have it."""
        launch, sharding = config.launch, config.sharding
        sizes: dict[str | int, int] = {"all": launch.ranks, "machine": launch.processes}
        return cls(
            ranks=launch.ranks,
            shards=sizes.get(sharding.shard_size, 0) or int(sharding.shard_size),
            dtype=getattr(torch, config.compute_dtype),
            checkpointing=sharding.activation_checkpointing,
            offload_frozen=sharding.offload_frozen,
            offload_optimizer=sharding.offload_optimizer,
        )

    def share(self, rows: int, most: int) -> int:
        """Rows that a rank computes at once, of `rows` dealt over the ranks."""
        return min(-(-rows // self.ranks), most)


def peak(phases: Iterable[Phase]) -> Phase:
    """The phase that takes most."""
    return max(phases, key=lambda phase: phase.total)


def most(name: str, moments: dict[str, dict[str, Footprint]]) -> Phase:
    """A phase at the moment that takes most."""
    return peak(Phase(name, moment, models) for moment, models in moments.items())
