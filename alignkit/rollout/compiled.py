"""The engine `compiled`: a decoding loop in which no shape changes, so that its step is compiled once and, on a GPU, is
replayed as CUDA graphs instead of being launched kernel by kernel.

It samples from a copy of the policy, in a dtype of its own, into which the weights are copied at every call: their
place in memory stays, as a recorded graph needs it, and the trained weights keep their digits.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from alignkit.rollout.engine import check_lengths, rollout_of
from alignkit.schema import Count, CountOrZero, Positive, settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, StaticCache

    from alignkit.algo.sampling import SamplingRule
    from alignkit.algo.types import PromptBatch, Rollout

SHAPES = 256  # that may be compiled in one process
BLOCK = 64  # tokens: room for prompt and response is rounded up to it, so that there are few shapes to compile


@settings
class Compiled:
    """temperature, min_response, max_response, batch: as `Native`; unshard: true, its weights are whole; dtype: that of
    the copy which samples, null: as the policy computes, auto: bfloat16 where the device has instructions for it;
    compile: false leaves the step as it is, for a look at what compiling brings."""

    temperature: Positive
    min_response: CountOrZero
    max_response: Count
    batch: Count
    unshard: bool
    dtype: Literal["auto", "float32", "bfloat16"] | None
    compile: bool

    def __post_init__(self) -> None:
        check_lengths(self)
        if not self.unshard:
            raise ValueError(f"unshard={self.unshard}: the copy that samples is whole on every rank; native is not")

    def generate(
        self, model: PreTrainedModel, prompts: PromptBatch, rule: SamplingRule, noise: Tensor,
        go_on: Callable[[bool], bool],
    ) -> Rollout:  # fmt: skip
        """Sample one response to each prompt; see `RolloutEngine.generate`."""
        import torch

        with torch.no_grad():
            copy = copy_of(model, self)
            copy.take(model)
            parts = zip(*(whole.split(self.batch) for whole in (prompts.tokens, prompts.mask, noise)))
            rows = min(self.batch, len(noise))
            decoded = [copy.decode(tokens, mask, rule, part, rows) for tokens, mask, part in parts]
        response, logprobs = (torch.cat(whole) for whole in zip(*decoded))
        return rollout_of(prompts, response, logprobs, rule)


@dataclass
class Copy:
    """A model of its own with one step that is compiled, and the cache of the last shape (rows, room)."""

    model: PreTrainedModel
    step: Callable[..., Tensor]
    cache: StaticCache | None = None
    shape: tuple[int, int] = (0, 0)

    def take(self, model: PreTrainedModel) -> None:
        """Copy the weights of `model`, in place."""
        from alignkit.rollout.handover import merged_weights

        mine = dict(self.model.named_parameters(remove_duplicate=False))
        for name, value in merged_weights(model):
            mine.pop(name).copy_(value)
        if mine:
            raise RuntimeError(f"weights that were not handed over: {', '.join(mine)}")

    def decode(
        self, tokens: Tensor, mask: Tensor, rule: SamplingRule, noise: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        """Responses [B, R] to prompts [B, P], and their log-probabilities, decoded as `rows` rows whatever B is."""
        import torch

        from alignkit.algo.sampling import draw
        from alignkit.algo.sequence import position_ids

        given, steps = noise.shape
        room = -(-(tokens.shape[1] + steps) // BLOCK) * BLOCK
        fill = (room - steps - tokens.shape[1], 0, 0, rows - given)  # columns before the prompt, rows below
        pad = self.model.config.pad_token_id
        tokens, mask = (torch.nn.functional.pad(x, fill, value=v) for x, v in ((tokens, pad), (mask, False)))
        mask[given:, -1] = True  # a row must see something
        noise = torch.nn.functional.pad(noise, (0, 0, 0, rows - given), value=0.5)
        whole, positions = torch.cat([mask, mask.new_ones(rows, steps)], dim=1), position_ids(mask)
        response = torch.full((rows, steps), pad, dtype=torch.long, device=tokens.device)
        logprobs = torch.zeros(response.shape, dtype=torch.float64, device=tokens.device)
        running, stops = torch.arange(rows, device=tokens.device) < given, rule.stops(tokens.device)
        cache, at = self._cache(rows, room), room - steps
        for step in range(steps):
            forward = self.step if step else last_logits
            masks = self._masks(tokens, whole[:, : at + step], cache, positions)
            logits = forward(self.model, tokens, masks, positions, cache)
            token, logprob = draw(rule.apply(logits, place=step), noise[:, step])
            response[running, step], logprobs[running, step] = token[running], logprob[running]
            running = running & ~torch.isin(token, stops)
            if not bool(running.any()):
                break
            tokens, positions = token[:, None], positions[:, -1:] + 1
        return response[:given], logprobs[:given]

    def _cache(self, rows: int, room: int) -> StaticCache:
        from transformers import StaticCache

        if self.cache is None or self.shape != (rows, room):
            self.cache = None  # before there is another
            self.cache, self.shape = StaticCache(config=self.model.config, max_cache_len=room), (rows, room)
        else:
            self.cache.reset()
        return self.cache

    def _masks(self, tokens: Tensor, whole: Tensor, cache: StaticCache, positions: Tensor) -> Any:
        """Who sees whom, made outside of what is compiled: a tensor, or one for each kind of layer."""
        from transformers.masking_utils import create_masks_for_generate

        like = next(self.model.parameters()).new_empty(*tokens.shape, 1)
        return create_masks_for_generate(self.model.config, like, whole, cache, positions)


def last_logits(model: PreTrainedModel, tokens: Tensor, masks: Any, positions: Tensor, cache: StaticCache) -> Tensor:
    """Logits [B, V] of the next token."""
    return model(
        input_ids=tokens,
        attention_mask=masks,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


@functools.lru_cache(maxsize=1)
def _copy(config: str, kind: type[PreTrainedModel], device: torch.device, dtype: torch.dtype, compiled: bool) -> Copy:
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        model = kind._from_config(
            cast("type[PreTrainedConfig]", kind.config_class).from_dict(json.loads(config)), dtype=dtype
        )
    model.requires_grad_(False).eval()
    # Each shape (rows, room) is compiled once; after torch's own limit of 8 it would go on uncompiled without a word.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return Copy(model, torch.compile(last_logits, mode=mode, dynamic=False) if compiled else last_logits)


def copy_of(model: PreTrainedModel, options: Compiled) -> Copy:
    """The copy for models of this class and config, made at the first call; one at a time in a process."""
    kind = next(each for each in type(model).__mro__ if not each.__name__.startswith("FSDP"))
    weight = next(model.parameters())
    return _copy(
        model.config.to_json_string(use_diff=False),
        kind,
        weight.device,
        dtype_of(options.dtype, weight),
        options.compile,
    )


def dtype_of(name: str | None, weight: Tensor) -> torch.dtype:
    """The dtype that a setting names; see `Compiled`."""
    import torch

    if name == "auto":
        on_gpu = weight.device.type == "cuda"
        short = torch.cuda.is_bf16_supported() if on_gpu else torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if short else weight.dtype
    return weight.dtype if name is None else getattr(torch, name)
