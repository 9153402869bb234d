"""A key-value cache with room for the whole response: a new token is written into it, where transformers' own one
copies all keys and values of a layer for every token."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.configuration_utils import PreTrainedConfig


def room_for(config: PreTrainedConfig, tokens: int) -> DynamicCache:
    """An empty cache for sequences of at most `tokens` tokens. Layers of another kind than full attention (a sliding
    window) stay as transformers has them."""
    cache = DynamicCache(config=config)
    if not cache.layers:  # a config that says nothing of its layers: all alike, made as they come
        return cache
    cache.layers = [RoomyLayer(tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):
    """Keys and values [B, heads, tokens so far, width] as the first columns of buffers with room for `room` tokens."""

    keys: Tensor
    values: Tensor

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new columns; returns all so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.buffers = [self._buffer(states) for states in (key_states, value_states)]
            self.filled = 0
        start, self.filled = self.filled, self.filled + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states)):
            buffer[..., start : self.filled, :] = states
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only keep the given rows."""
        del self.keys, self.values
        for place in (0, 1):  # one after the other, so that only one is there twice
            kept = self._buffer(self.buffers[place], rows=len(indices))
            kept[..., : self.filled, :] = self.buffers[place][..., : self.filled, :][indices]
            self.buffers[place] = kept
        self._show()

    def _buffer(self, states: Tensor, rows: int | None = None) -> Tensor:
        batch, heads, _, width = states.shape
        return torch.empty(
            batch if rows is None else rows, heads, self.room, width, dtype=self.dtype, device=self.device
        )

    def _show(self) -> None:
        self.keys, self.values = (buffer[..., : self.filled, :] for buffer in self.buffers)
