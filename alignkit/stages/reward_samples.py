"""Responses of the model that a reward model starts from, scored by it: where PPO will begin."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from alignkit.algo.sampling import SamplingRule
from alignkit.data.corpus import Prompt
from alignkit.data.tokens import Encoder
from alignkit.models.loading import model_folder
from alignkit.models.settings import adapter_facts
from alignkit.rollout.native import Native
from alignkit.stages.actors import load_policy, sample
from alignkit.stages.common import sample_of
from alignkit.stages.heldout import Scores

if TYPE_CHECKING:
    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.job import Job

NOISE = -2  # the iteration whose noise they are sampled with: PPO counts from 0, the evaluation takes -1


@dataclass(frozen=True)
class Samples:
    """Score and tokens of each response, [n] each, and the share that ended by itself."""

    scores: Tensor
    lengths: Tensor
    finished: float


def score_samples(
    prompts: list[Prompt], longest: int, scores: Scores, encoder: Encoder, job: Job, cluster: Cluster
) -> Samples | None:
    """One response to each of at most `reward_model.sft_samples` held-out prompts, as long as the longest held-out
    response (at most half of max_length); None where there is nothing to sample. Collective.

    Temperature 1 and these lengths, not those of `rollout`: the reward model would have to be trained again whenever
    PPO is to sample in another way.
    """
    settings, folder = job.config.reward_model, model_folder(job.inputs["init"])
    most = max(1, min(longest, settings.max_length // 2))
    encoded = [encoder.prompt(prompt) for prompt in prompts]
    kept = [ids for ids in encoded if 0 < len(ids) <= settings.max_length - most]
    kept = sample_of(kept, settings.sft_samples, job.config.seed)
    if len(kept) < 2 or not is_causal(folder):
        return None
    policy = cluster.place(functools.partial(load_policy, folder), trainable=False)
    alone = cluster.world_size == 1  # else layer by layer: there may be no room for the whole model on a rank
    engine = Native(temperature=1.0, min_response=0, max_response=most, batch=4 * settings.microbatch, unshard=alone)
    config: Any = SimpleNamespace(seed=job.config.seed, rollout=engine)
    rule = SamplingRule(engine.temperature, encoder.stop_ids)
    rollout = sample(policy, kept, 0, config, rule, cluster, encoder.tokenizer.pad_token_id, iteration=NOISE)
    del policy
    rows = [row[mask].tolist() for row, mask in zip(rollout.tokens, rollout.mask)]
    return Samples(
        scores=scores(rows).double(),
        lengths=rollout.response_mask.sum(dim=1).cpu(),
        finished=float(rollout.finished.double().mean()),
    )


def is_causal(folder: Path) -> bool:
    """Whether the folder holds a language model that can continue a prompt: not an encoder, not a classifier."""
    facts = adapter_facts(folder)
    if facts is not None:
        return facts.get("task_type") == "CAUSAL_LM"
    file = folder / "config.json"
    names = json.loads(file.read_text("utf-8")).get("architectures") if file.is_file() else None
    return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names or [])
