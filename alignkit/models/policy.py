"""Log-probabilities of sampled tokens under a causal language model: hidden states of real tokens, and from those that
come before a token that is asked for, logits of a few at a time."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from alignkit.algo.sampling import SamplingRule
from alignkit.algo.sequence import position_ids, spread, token_entropy, token_logprobs
from alignkit.errors import UserError

LOGITS_BYTES = 2**28  # of one piece of logits in float32; its gradient and exponentials take as much each
RECOMPUTED: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing is drawn in between


def response_logprobs(
    model: Any, tokens: Tensor, mask: Tensor, response_mask: Tensor, rule: SamplingRule, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the response tokens, and the entropy at their positions if asked for; 0 on padding.

    Shapes: tokens, mask [B, T], response_mask [B, R] of the last R columns -> [B, R] each; nats, under the distribution
    that was sampled from. What is computed: the real tokens, and logits of the response's alone, LOGITS_BYTES at once.
    """
    wanted = torch.zeros_like(mask)
    wanted[:, mask.shape[1] - response_mask.shape[1] :] = response_mask
    found = logprobs_at(model, tokens, mask, wanted, rule, entropy=entropy)
    joined = [spread(part, response_mask) for part in found]
    return joined[0], joined[1] if entropy else None


def logprobs_at(
    model: Any, tokens: Tensor, mask: Tensor, wanted: Tensor, rule: SamplingRule, *, entropy: bool = False
) -> tuple[Tensor, ...]:
    """Log-probabilities of the n tokens where `wanted` [B, T] is True (never a row's first), row by row, [n]; and the
    entropies where they were drawn, [n]. Through the method of the same name that `runtime.sharding` gave the model, so
    that the hooks of its root run; a model without one is called as it is."""
    method = getattr(model, "logprobs_at", None)
    arguments = (tokens, mask, wanted, rule, entropy)
    return method(*arguments) if method is not None else read_logprobs(model, *arguments)


def read_logprobs(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor, wanted: Tensor, rule: SamplingRule, entropy: bool
) -> tuple[Tensor, ...]:
    """As `logprobs_at`, for a model whose weights are at hand: never more than LOGITS_BYTES of logits. With a gradient
    all pieces but the last are computed again on the way back."""
    before = torch.cat([wanted[:, 1:], torch.zeros_like(wanted[:, :1])], dim=1)
    hidden = hidden_at(model.base_model, tokens, mask, before)
    targets, place = tokens[wanted], (wanted.long().cumsum(dim=1) - 1)[wanted]
    size = max(LOGITS_BYTES // (4 * model.config.get_text_config().vocab_size), 1)
    found = []
    for start in range(0, max(len(targets), 1), size):
        part = slice(start, start + size)
        piece = (model, hidden[part], targets[part], place[part], rule, entropy)
        again = torch.is_grad_enabled() and start + size < len(targets)
        found.append(checkpoint(read_piece, *piece, **RECOMPUTED) if again else read_piece(*piece))
    return tuple(torch.cat(parts) for parts in zip(*found))


def read_piece(
    model: PreTrainedModel, hidden: Tensor, targets: Tensor, place: Tensor, rule: SamplingRule, entropy: bool
) -> tuple[Tensor, ...]:
    """(log-probabilities, entropies if asked for) [n] of the targets, drawn from the hidden states [n, d]."""
    logits = rule.apply(logits_of(model, hidden), place)
    logprobs = token_logprobs(logits, targets)
    return (logprobs, token_entropy(logits)) if entropy else (logprobs,)


def hidden_at(backbone: nn.Module, tokens: Tensor, mask: Tensor, where: Tensor) -> Tensor:
    """Last hidden states [n, d] of the real tokens where `where` [B, T] is True, row by row; padding on any side.

    Rows are moved to the left and as wide as the longest: then no real token looks at padding, which needs no mask, so
    that the kernels for plain causal attention serve. After `pack_rows` they are laid end to end in one row instead;
    from positions that start again transformers knows where a row ends.
    """
    if getattr(backbone, "rows_are_packed", False):
        packed = {"input_ids": tokens[mask][None], "position_ids": position_ids(mask)[mask][None]}
        return backbone(**packed, use_cache=False).last_hidden_state[0][where[mask]]
    front = (~mask).byte().argsort(dim=1, stable=True)[:, : int(mask.sum(dim=1).max())]
    hidden = backbone(input_ids=tokens.gather(1, front), use_cache=False).last_hidden_state
    rows = torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)
    return hidden[rows[where], position_ids(mask)[where]]


def pack_rows(model: Any, backbone: nn.Module, compute: Callable[[Tensor, Tensor], Tensor]) -> None:
    """From now on lay the rows of a micro-batch end to end, without padding; on a GPU by flex attention, which leaves
    out what rows would not see of each other. compute: what the model makes of (tokens, mask), [B, T]. Raises UserError
    where a row's values change with another row before it, or are not what they were."""
    device = next(model.parameters()).device
    tokens = torch.arange(3, 15, device=device).view(2, 6) % model.config.get_text_config().vocab_size
    other = torch.stack([tokens[0].flip(0), tokens[1]])
    mask = torch.arange(6, device=device) < torch.tensor([[6], [4]], device=device)
    with torch.no_grad():
        apart = compute(tokens, mask)
        if device.type == "cuda":
            model.config._attn_implementation = "flex_attention"
        backbone.rows_are_packed = True  # type: ignore[assignment]
        together, beside = compute(tokens, mask), compute(other, mask)[1]
    exact = device.type == "cpu" and next(model.parameters()).dtype in (torch.float32, torch.float64)
    seen = not torch.allclose(together[1], beside, rtol=1e-4, atol=1e-4)  # one kernel, one shape: nearly bit for bit
    if seen or not torch.allclose(apart, together, rtol=1e-4 if exact else 0.1, atol=1e-4 if exact else 0.1):
        backbone.rows_are_packed = False  # type: ignore[assignment]
        raise UserError(
            f"ppo.packing=true: the rows of a {type(model).__name__} cannot be laid end to end, as it does not tell "
            "them apart by their positions; set ppo.packing=false"
        )


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits [n, V] of last hidden states [n, d], by the model's own forward with its backbone left out, whatever it
    makes of them after its head (a scale, a soft cap)."""
    name = model.base_model_prefix
    backbone, model._modules[name] = model._modules[name], _Given(hidden[None])
    try:
        return model.forward(input_ids=None, use_cache=False).logits[0]
    finally:
        model._modules[name] = backbone


class _Given(nn.Module):
    """Stands for a backbone whose output is known."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.output = _Output(last_hidden_state=hidden)

    @property
    def decoder(self) -> "_Given":  # OPT's head calls the decoder inside
        return self

    def forward(self, *_: Any, **__: Any) -> "_Output":
        return self.output


class _Output(SimpleNamespace):
    """A backbone's output: all that it does not hold is None."""

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]
