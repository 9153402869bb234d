"""The engine `native`: a decoding loop over the model's own forward with a key-value cache.

Log-probabilities come from the training engine afterwards; those of this loop only say how far the two agree.
Rows that are finished leave the batch as soon as a quarter of it is done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from alignkit.rollout.engine import check_lengths, rollout_of
from alignkit.schema import Count, CountOrZero, Positive, settings

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from alignkit.algo.sampling import SamplingRule
    from alignkit.algo.types import PromptBatch, Rollout


@settings
class Native:
    """temperature: divides the logits, in sampling and in every log-probability; min_response: tokens before a
    response may stop; max_response: tokens, stop token included; batch: sequences decoded at once on a rank; unshard:
    all weights of the policy are on every rank meanwhile, else its layers are gathered for every token (both: memory
    and time only, never the result)."""

    temperature: Positive
    min_response: CountOrZero
    max_response: Count
    batch: Count
    unshard: bool

    def __post_init__(self) -> None:
        check_lengths(self)

    def generate(
        self, model: PreTrainedModel, prompts: PromptBatch, rule: SamplingRule, noise: Tensor,
        go_on: Callable[[bool], bool],
    ) -> Rollout:  # fmt: skip
        """Sample one response to each prompt; see `RolloutEngine.generate`."""
        import torch

        parts = zip(*(whole.split(self.batch) for whole in (prompts.tokens, prompts.mask, noise)))
        with torch.no_grad():
            decoded = [decode(model, tokens, mask, rule, part, go_on) for tokens, mask, part in parts]
        response, logprobs = (torch.cat(whole) for whole in zip(*decoded))
        return rollout_of(prompts, response, logprobs, rule)


def decode(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor, rule: SamplingRule, noise: Tensor,
    go_on: Callable[[bool], bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Responses [B, R] to prompts [B, P], R = noise.shape[1], and their log-probabilities; after its stop token a row
    holds PAD. go_on: whether there is another step, from whether a row here is still running."""
    import torch

    from alignkit.algo.sampling import draw
    from alignkit.algo.sequence import position_ids
    from alignkit.rollout.cache import room_for

    width, steps = tokens.shape[1], noise.shape[1]
    stops = rule.stops(tokens.device)
    response = torch.full((tokens.shape[0], steps), model.config.pad_token_id, dtype=torch.long, device=tokens.device)
    logprobs = torch.zeros(response.shape, dtype=torch.float64, device=tokens.device)
    rows = torch.arange(tokens.shape[0], device=tokens.device)  # rows of `response` that are still being written
    running = torch.ones_like(rows, dtype=torch.bool)
    whole = torch.cat([mask, mask.new_ones(len(rows), steps)], dim=1).long()
    positions = position_ids(mask)
    cache, step_tokens = room_for(model.config, width + steps), tokens
    reads, copies = distinct_rows(tokens, mask)  # a prompt with several responses is read once
    for step in range(steps):
        some = slice(None) if step else reads
        logits = model(
            input_ids=step_tokens[some],
            attention_mask=whole[some, : width + step],
            position_ids=positions[some],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        if step == 0 and len(reads) < len(copies):
            logits = logits[copies]
            cache.batch_select_indices(copies)
        token, logprob = draw(rule.apply(logits, place=step), noise[rows, step])
        response[rows[running], step], logprobs[rows[running], step] = token[running], logprob[running]
        running = running & ~torch.isin(token, stops)
        if not go_on(bool(running.any())):
            break
        if 0.0 < float(running.float().mean()) <= 0.75:  # with none left, the others need this rank to keep step
            keep = running.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            rows, whole, token, positions = rows[keep], whole[keep], token[keep], positions[keep]
            running = torch.ones_like(rows, dtype=torch.bool)
        step_tokens, positions = token[:, None], positions[:, -1:] + 1
    return response, logprobs


def distinct_rows(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The first row of each distinct prompt, in their order, and for every row which of these it is alike. [D], [B]"""
    import torch

    prompts: dict[tuple[int, ...], int] = {}
    found = [prompts.setdefault(tuple(row), len(prompts)) for row in tokens.masked_fill(~mask, -1).tolist()]
    first = [found.index(number) for number in range(len(prompts))]
    return torch.tensor(first, device=tokens.device), torch.tensor(found, device=tokens.device)
