"""Which memory a forward and a backward take, counted without taking any: the real code runs on the meta device, whose
tensors have shapes and no data, and every storage is followed from the operation that makes it until nothing holds it.
Token ids and masks stay on the CPU with their data, as code looks at those.

Counted as on a GPU: attention as a fused kernel (no [heads, T, T] matrix), with the mask that padded rows need wherever
one of padding is given.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, use_gqa_in_sdpa
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from alignkit.models.policy import read_logprobs

ATTENTION = "alignkit_counted"  # the name of the attention below, as `attn_implementation`
KINDS = ("activations", "logits", "gathered")
UNSEEN = {torch.ops.aten.logsumexp.default}  # operations that make a copy of their input inside


class LiveBytes(TorchDispatchMode):
    """Inside, the bytes of all tensors that are alive, but for the weights of `model`: `peak` has them by kind at the
    moment when they were most.

    Kinds: `logits` are tensors with a last dimension among `wide` (the vocabulary); `gathered` what `Gathering` makes
    and gradients of whole weights (tensors of a weight's shape); `activations` all else.
    """

    def __init__(self, model: nn.Module, *wide: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.wide = wide
        self.shapes = {tuple(p.shape) for p in model.parameters() if p.dim() > 1}
        weights = [*model.parameters(), *model.buffers()]
        self.alive: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in weights}
        self.now = dict.fromkeys(KINDS, 0)
        self.total = 0
        self.restart()
        self._kind: str | None = None

    def restart(self) -> None:
        """Forget the peak so far, but not what is alive."""
        self.peak, self.most = dict(self.now), self.total

    @contextmanager
    def kind(self, name: str) -> Iterator[None]:
        """Inside, new tensors are of this kind."""
        before, self._kind = self._kind, name
        try:
            yield
        finally:
            self._kind = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return True  # transformers asks whether positions go up one by one, and so they do
        given = (args, kwargs or {})
        if len({leaf.device for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}) > 1:
            given = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), given)
        out = func(*given[0], **given[1])
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage(), tensor)
        unseen = args[0].nbytes if func in UNSEEN else 0
        if self.total + unseen > self.most:
            self.restart()
            if unseen:
                self.peak[self._kind_of(args[0])] += unseen
                self.most += unseen
        return out

    def _kind_of(self, tensor: Tensor) -> str:
        if self._kind:
            return self._kind
        shape = tuple(tensor.shape)
        if shape in self.shapes or shape[::-1] in self.shapes:
            return "gathered"
        return "logits" if tensor.dim() > 1 and shape[-1] in self.wide else "activations"

    def _follow(self, storage: torch.UntypedStorage, tensor: Tensor) -> None:
        key = storage._cdata
        if key in self.alive:  # a view
            return
        size, kind = storage.nbytes(), self._kind_of(tensor)

        def gone(_: Any) -> None:
            self.now[kind] -= size
            self.total -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, gone)
        self.now[kind] += size
        self.total += size


class Gathering:
    """What FSDP2 makes on each rank besides its shards, made again on the meta device at the same moments.

    A unit is a decoder layer, or the root with all the rest. Before its forward and its backward its weights are
    gathered; the root of a trained model keeps them until its backward. With several ranks a copy of the received bytes
    lives on until the next unit is gathered, and the backward asks for the next unit ahead of time. A unit's gradients
    are copied in float32 to be summed over the ranks; that copy lives until the next unit's.

    shards: ranks over which the weights are split; keep_root: the root of a trained model stays gathered after forward;
    held: the weights are there from the micro-batch before (see `Cluster.accumulate`); more: another one follows, so
    they stay, and the gradients are not summed yet.
    """

    def __init__(
        self, model: nn.Module, live: LiveBytes, shards: int, *,
        keep_root: bool = True, held: bool = False, more: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.live, self.shards = model, live, shards
        self.trained = any(p.requires_grad for p in model.parameters())
        self.keep_root = keep_root and self.trained
        self.held, self.more = held, more
        self.units = units_of(model)
        self.root = len(self.units) - 1
        self.whole: dict[int, Tensor] = {}  # unit -> its gathered weights
        self.ahead: dict[int, Tensor] = {}  # unit -> received and not yet unpacked
        self.received: Tensor | None = None  # of the unit before, in the forward
        self.reduced: Tensor | None = None  # gradients being summed, of the unit before
        self.backward = False
        self.waiting = [sum(p.requires_grad for p in weights) for _, weights in self.units]
        self.hooks: list[Any] = []

    def __enter__(self) -> Gathering:
        self.model.logprobs_at = self._logprobs_at  # type: ignore[assignment]
        for unit in range(len(self.units) if self.held else 0):
            self._gather(unit)
        for unit, (module, weights) in enumerate(self.units):
            self.hooks += [
                module.register_forward_pre_hook(lambda *_, unit=unit: self._gather(unit)),
                module.register_forward_hook(lambda _, __, output, unit=unit: self._after_forward(unit, output)),
            ]
            self.hooks += [
                p.register_post_accumulate_grad_hook(lambda _, unit=unit: self._after_gradient(unit))
                for p in weights
                if p.requires_grad
            ]
        return self

    def __exit__(self, *_: Any) -> None:
        del self.model.logprobs_at
        for hook in self.hooks:
            hook.remove()

    def _logprobs_at(self, *inputs: Any) -> tuple[Tensor, ...]:
        """The method that `Cluster.shard` gives a policy: the root's hooks run around it."""
        self._gather(self.root)
        output = read_logprobs(cast("PreTrainedModel", self.model), *inputs)
        self._after_forward(self.root, output)
        return output

    def _empty(self, unit: int, *, dtype: torch.dtype | None = None, share: int = 1) -> Tensor:
        weights = self.units[unit][1]
        weights = weights if dtype is None else [p for p in weights if p.requires_grad]
        size = sum(p.numel() for p in weights) // share
        with self.live.kind("gathered"):
            return torch.empty(size, dtype=dtype or weights[0].dtype, device="meta")

    def _gather(self, unit: int) -> None:
        if unit in self.whole:
            return
        received = self.ahead.pop(unit, None)
        if received is None and self.shards > 1:
            received = self._empty(unit)
        self.whole[unit] = self._empty(unit)
        if not self.backward:
            self.received = received  # instead of the unit's before

    def _after_forward(self, unit: int, output: Any) -> None:
        if self.backward:  # a layer that is computed again
            return
        if unit == self.root:
            self.received = None
        if unit != self.root or not self.keep_root:
            del self.whole[unit]
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _, unit=unit: self._before_backward(unit))

    def _before_backward(self, unit: int) -> None:
        self.backward = True
        self._gather(unit)
        following = unit - 1 if unit else None
        if self.shards > 1 and following is not None and following not in self.whole | self.ahead:
            self.ahead[following] = self._empty(following)

    def _after_gradient(self, unit: int) -> None:
        self.waiting[unit] -= 1
        if not self.waiting[unit] and unit != self.root:
            self._reduce(unit)
        if not any(self.waiting):
            self._reduce(self.root)

    def _reduce(self, unit: int) -> None:
        if not self.more:
            self.whole.pop(unit, None)
            self.reduced = None
            self.reduced = self._empty(unit, dtype=torch.float32)
        for parameter in self.units[unit][1]:
            parameter.grad = None
        if not self.more:
            mine = self._empty(unit, dtype=torch.float32, share=self.shards)
            if self.shards == 1:
                self._empty(unit, dtype=torch.float32)  # the division by the factor of 1
            del mine


def units_of(model: nn.Module) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """What is split and gathered as one: each decoder layer, in the order of the forward, and last the root with the
    weights outside of all layers."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    inside = {id(p) for layer in layers for p in layer.parameters()}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [*((layer, list(layer.parameters())) for layer in layers), (model, rest)]


def peak_of(
    model: nn.Module, call: Callable[[], Any], shards: int | None, *wide: int, several: bool = False
) -> dict[str, int]:
    """Bytes by kind at the peak of `call`, which runs `model` (on the meta device) forward, and backward if it wants
    to. shards: see `Gathering`; None: the model is not sharded, and the gradients of its weights are kept elsewhere;
    wide: see `LiveBytes`; several: it is called once for each of several micro-batches."""
    if several and shards == 1:
        peaks = []
        for more in (True, False):
            with LiveBytes(model, *wide) as live, Gathering(model, live, 1, held=True, more=more):
                call()
            peaks.append(live.peak)
        return max(peaks, key=lambda peak: sum(peak.values()))
    with LiveBytes(model, *wide) as live:
        if shards is None:
            hooks = [p.register_post_accumulate_grad_hook(drop) for p in model.parameters() if p.requires_grad]
            call()
            for hook in hooks:
                hook.remove()
        else:
            with Gathering(model, live, shards):
                call()
    return live.peak


def drop(parameter: nn.Parameter) -> None:
    """Forget a gradient: it is added to the one that is counted with the weights."""
    parameter.grad = None


class _Fused(torch.autograd.Function):
    """What a fused attention kernel leaves for the backward pass: inputs, output and a number for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        bias = None if mask is None else torch.empty(mask.shape, dtype=query.dtype, device=query.device)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        rows, heads, width = query.shape[:3]
        out = query.new_empty(rows, width, heads, value.shape[-1]).transpose(1, 2)  # in this order, as the kernels
        ctx.save_for_backward(query, key, value, bias, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> Any:
    """transformers' scaled-dot-product attention, the kernel itself apart: for several queries the key-value heads are
    repeated for the heads that share them, unless the kernel can do without (as it can if there is no mask)."""
    if query.shape[2] > 1 and not use_gqa_in_sdpa(attention_mask, key, value):
        key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    query, key = (x.to(value.dtype) for x in (query, key))  # where autocast has made only the values short
    out = _Fused.apply(query, key, value, attention_mask)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


def _mask(*, attention_mask: Tensor | None, allow_is_causal_skip: bool, **options: Any) -> Tensor | None:
    """transformers' mask; where one of padding is given, there is taken to be some."""
    skip = allow_is_causal_skip and attention_mask is None
    return sdpa_mask(attention_mask=attention_mask, allow_is_causal_skip=skip, **options)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)
