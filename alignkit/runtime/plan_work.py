"""What each phase of a run computes, on skeletons: forward, loss and backward as the stages call them, with the largest
batch that the settings allow, full of real tokens, and with a mask of padding wherever the stage gives one. Each
returns bytes by kind at its peak (see `models.memory`)."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from alignkit.algo.sampling import SamplingRule, draw
from alignkit.algo.sequence import position_ids, token_logprobs
from alignkit.models.memory import Gathering, LiveBytes, peak_of
from alignkit.models.policy import response_logprobs
from alignkit.rollout.cache import room_for
from alignkit.runtime.plan_models import Kind, Source, skeleton

Peak = dict[str, int]
TOKENS, WORDS = 4096, 32768  # a tile of logits in TRL's head


@lru_cache(maxsize=256)
def logprobs(
    source: Source, kind: Kind, rows: int, prompt: int, response: int, minimum: int, shards: int,
    *, backward: bool, entropy: bool, several: bool = False,
) -> Peak:  # fmt: skip
    """Log-probabilities of responses. minimum: tokens before which none may stop; several: see `peak_of`."""
    model, rule = skeleton(source, kind), SamplingRule(1.0, (0,), minimum)
    tokens, mask = batch(rows, prompt + response)

    def call() -> None:
        with torch.set_grad_enabled(backward):
            values, spread = response_logprobs(model, tokens, mask, mask[:, -response:], rule, entropy=entropy)
        if backward:
            torch.autograd.backward([values.sum() + (0.0 if spread is None else spread.sum())])

    return peak_of(model, call, shards, source.vocab, several=several)


@lru_cache(maxsize=256)
def scalars(
    source: Source, kind: Kind, rows: int, width: int, shards: int, *, backward: bool, several: bool = False
) -> Peak:
    """A number at every position: values or scores. several: see `peak_of`."""
    model = skeleton(source, kind)
    tokens, mask = batch(rows, width)

    def call() -> None:
        with torch.set_grad_enabled(backward):
            values = model(tokens, mask)
        if backward:
            torch.autograd.backward([values.sum()])

    return peak_of(model, call, shards, source.vocab, several=several)


@lru_cache(maxsize=256)
def heldout(source: Source, kind: Kind, rows: int, width: int, shards: int) -> Peak:
    """SFT's loss on held-out rows."""
    model = skeleton(source, kind)
    tokens, mask = batch(rows, width)

    def call() -> None:
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=mask.long()).logits
            token_logprobs(logits[:, :-1], tokens[:, 1:])

    return peak_of(model, call, shards, source.vocab)


@lru_cache(maxsize=256)
def training(source: Source, kind: Kind, rows: int, width: int, shards: int | None) -> Peak:
    """Loss and gradient of TRL's trainers, padding as a mask: of SFT through TRL's head, all tokens of a row learnt;
    of pairs, each of their sides a row."""
    model = skeleton(source, kind)
    if kind.autocast:
        shorten(model)
    tokens, mask = batch(rows, width)
    inputs = {"input_ids": tokens, "attention_mask": mask.long(), "use_cache": False}
    dtype = torch.bfloat16 if kind.autocast else kind.dtype

    def forward() -> Tensor:
        if kind.task == "scalar":
            return model.classifier(**inputs).logits.sum()
        hidden = model.base_model(**inputs).last_hidden_state
        head = model.get_output_embeddings().weight
        return ChunkedHead.apply(hidden[:, :-1].flatten(0, 1), head, dtype).sum()  # type: ignore[no-untyped-call]

    model.forward = forward  # as TRL does, so that the root's hooks run
    try:
        return peak_of(model, lambda: torch.autograd.backward([model()]), shards, source.vocab, WORDS)
    finally:
        del model.forward


@lru_cache(maxsize=256)
def decoding(
    source: Source, kind: Kind, rows: int, prompt: int, response: int, minimum: int, shards: int | None
) -> list[tuple[str, Peak, int]]:
    """Sampling: (moment, peak, bytes of the key-value cache) of the prompts' forward and of the last token's. shards:
    None where the whole model is on every rank meanwhile."""
    model, rule = skeleton(source, kind).eval(), SamplingRule(1.0, (0,), minimum)

    def step(cache: DynamicCache, width: int, new: int) -> None:
        tokens, mask = batch(rows, width)
        logits = model(
            input_ids=tokens[:, -new:], attention_mask=mask.long(), position_ids=position_ids(mask)[:, -new:],
            past_key_values=cache, use_cache=True, logits_to_keep=1,
        ).logits  # fmt: skip
        noise = torch.empty(rows, dtype=torch.float64, device="meta")
        draw(rule.apply(logits[:, -1], place=width - prompt), noise)

    def prompts(cache: DynamicCache) -> None:
        step(cache, prompt, prompt)

    def last_token(cache: DynamicCache) -> None:
        step(cache, prompt + response - 1, 1)

    found = []
    with torch.no_grad():
        for moment, call, before in (("prompts", prompts, 0), ("last token", last_token, prompt + response - 2)):
            cache = room_for(model.config, prompt + response)
            with LiveBytes(model, source.vocab) as live:
                if before:
                    step(cache, before, before)
                live.restart()
                with Gathering(model, live, shards) if shards else nullcontext():
                    call(cache)
            found.append((moment, live.peak, cache_bytes(cache)))
    model.train(kind.trained)
    return found


def cache_bytes(cache: DynamicCache) -> int:
    """2 * rows * key-value heads * tokens that there is room for * width of a head * bytes of a number, over the
    layers."""
    layers: Any = cache.layers
    kept = (getattr(layer, "buffers", None) or (layer.keys, layer.values) for layer in layers)
    return sum(states.nbytes for pair in kept for states in pair)


def batch(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Token ids and their mask: all are real."""
    return torch.zeros(rows, width, dtype=torch.long), torch.ones(rows, width, dtype=torch.bool)


class ChunkedHead(torch.autograd.Function):
    """What TRL's language-model head makes on a GPU: logits of some tokens by some words at a time, and both
    gradients in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.dtype = dtype
        ChunkedHead.tile(hidden, weight, dtype)
        return hidden.new_empty(hidden.shape[0], dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        gradients = [torch.empty_like(x, dtype=torch.float32) if x.requires_grad else None for x in (hidden, weight)]
        ChunkedHead.tile(hidden, weight, ctx.dtype)
        return *(g if g is None else g.to(x.dtype) for g, x in zip(gradients, (hidden, weight))), None

    @staticmethod
    def tile(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
        """The buffer of a tile, and the words' rows of the weight in its dtype."""
        buffer = hidden.new_empty(min(hidden.shape[0], TOKENS), WORDS, dtype=dtype)
        rows = weight[:WORDS].to(dtype)
        del buffer, rows


class ShortLinear(nn.Linear):
    """A linear layer as bfloat16 autocast runs it: input, weight and bias are cast on the way."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        return nn.functional.linear(x.to(torch.bfloat16), self.weight.to(torch.bfloat16), bias)


def shorten(model: nn.Module) -> None:
    """Let the linear layers of a model run as under autocast."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = ShortLinear
