"""Held-out prompts, and what a model answers to them: shared by the evaluation and by PPO's looks at itself."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignkit.algo.types import Rollout
from alignkit.data.corpus import Corpus, Prompt, split_fraction
from alignkit.data.tokens import Encoder, show
from alignkit.errors import UserError
from alignkit.models.adapters import adapters_off
from alignkit.stages.actors import WithoutAdapter, logprobs_of, sample, sampling_rule
from alignkit.stages.common import prompts_within, sample_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from alignkit.runtime.config import RunConfig
    from alignkit.runtime.sharding import Cluster

NOISE = {"one": -1, "many": -3}  # counters of the sampling noise; training has 0, 1, ..., the reward model's report -2


@dataclass(frozen=True)
class Responses:
    """One model's responses: texts, ids, whether each ended by itself. kl: log-ratio of the model to the reference
    along each, whose mean is the KL; nll: minus the reference's log-probability of each, nats a sequence, both [n]
    float64 on the CPU; None where no reference was given."""

    rollout: Rollout
    texts: list[str]
    ids: list[list[int]]
    finished: list[bool]
    kl: Tensor | None = None
    nll: Tensor | None = None


def heldout_prompts(
    corpus: Corpus, encoder: Encoder, config: RunConfig, count: int, part: str, is_main: bool
) -> list[tuple[Prompt, list[int]]]:
    """At most `count` held-out prompts with their ids, a fixed draw. part: "final", or "validation" for those by which
    PPO picks its best checkpoint, a third by hash that the final evaluation then leaves out: a policy that was picked
    by some prompts would look better on them than it is."""
    prompts = corpus.heldout.prompts
    if config.ppo.evaluate_every is not None:
        prompts = [prompt for prompt in prompts if _is_validation(prompt) == (part == "validation")]
    kept, left_out = prompts_within(prompts, encoder, config.ppo.max_prompt)
    if is_main and left_out:
        print(f"evaluate: {left_out} of {len(prompts)} held-out prompts left out: empty or too long")
    if not kept:
        raise UserError(
            f"evaluate: none of the {len(prompts)} held-out prompts has at most ppo.max_prompt="
            f"{config.ppo.max_prompt} tokens: raise it, or data.heldout"
        )
    return sample_of(kept, count, config.seed)


def respond(
    model: PreTrainedModel | WithoutAdapter, reference: PreTrainedModel | WithoutAdapter | None,
    prompts: list[tuple[Prompt, list[int]]], encoder: Encoder, config: RunConfig, cluster: Cluster, noise: str = "one",
) -> Responses:  # fmt: skip
    """One response to each prompt, the same noise for every model; with a reference, the log-ratio to it."""
    rule = sampling_rule(config, encoder)
    ids, pad = [ids for _, ids in prompts], encoder.tokenizer.pad_token_id
    inner = model.model if isinstance(model, WithoutAdapter) else model
    with nullcontext() if inner is model else adapters_off(inner):
        whole = sample(inner, ids, 0, config, rule, cluster, pad, iteration=NOISE[noise])
    kl = nll = None
    if reference is not None:
        hand = cluster.deal(whole.mask.sum(dim=1))
        part = whole.take(hand.rows.to(whole.tokens.device))
        micros = cluster.microbatches(part.mask.sum(dim=1), config.ppo.microbatch_tokens)
        (theirs,) = logprobs_of(reference, part, rule, micros)
        ours = theirs if model is reference else logprobs_of(model, part, rule, micros)[0]
        kl = cluster.collect((ours - theirs).sum(dim=1), hand).double().cpu()
        nll = -cluster.collect(theirs.sum(dim=1), hand).double().cpu()
        for each in (model, reference):
            if isinstance(each, torch.nn.Module):
                cluster.rest(each)
    rows = [row[mask].tolist() for row, mask in zip(whole.response, whole.response_mask)]
    return Responses(whole, [encoder.text(row) for row in rows], rows, whole.finished.tolist(), kl, nll)


def _is_validation(prompt: Prompt) -> bool:
    return split_fraction(f"validation: {show(prompt)}") < 1 / 3
