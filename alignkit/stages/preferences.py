"""Preferences without people: the policy answers each training prompt several times, and a judge orders the answers.
What Gao et al. 2022 (arXiv:2210.10760) train proxies on, with a reward model as the gold standard."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from alignkit.data.tokens import Encoder
from alignkit.errors import UserError
from alignkit.models.loading import load_encoder, model_folder
from alignkit.observe.tracking import write_rows
from alignkit.reward.source import opened
from alignkit.stages.actors import load_policy
from alignkit.stages.common import prepare, prompts_within
from alignkit.stages.judging import compare, open_judge
from alignkit.stages.responses import respond

if TYPE_CHECKING:
    from alignkit.data.corpus import Prompt
    from alignkit.observe.tracking import Tracker
    from alignkit.runtime.checkpoint import Checkpoints
    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.job import Job


def run(job: Job, cluster: Cluster, tracker: Tracker, checkpoints: Checkpoints) -> dict[str, float]:
    """Write `pairs.jsonl`: pairs of two sampled responses, chosen by the judge, and as many demonstrations, which are
    single samples: what a corpus needs. Prompts of both sides of the held-out split are used, in random order."""
    corpus, config = prepare(job, cluster.is_main), job.config
    checkpoints.newest()
    encoder = load_encoder(model_folder(job.inputs["policy"]))
    policy = cluster.place(lambda: load_policy(model_folder(job.inputs["policy"])), trainable=False)
    prompts = drawn(corpus.train.prompts + corpus.heldout.prompts, encoder, job)
    first, second = (respond(policy, None, prompts, encoder, config, cluster, noise) for noise in ("one", "many"))
    source = opened(config.reward, job.inputs.get("reward"), encoder, cluster)
    judge = open_judge(job, corpus, source, encoder, cluster)
    texts = [prompt for prompt, _ in prompts]
    outcomes = compare(judge, texts, first, second).outcomes
    rows, left_out = [], 0
    for prompt, a, b, outcome in zip(texts, first.texts, second.texts, outcomes.tolist()):
        if outcome == 0.5 or a == b or not (a.strip() and b.strip()):  # no row of a file may be empty
            left_out += 1
            continue
        chosen, rejected = (a, b) if outcome == 1 else (b, a)
        rows += [{"prompt": prompt, "chosen": chosen, "rejected": rejected}, {"prompt": prompt, "response": a}]
    if cluster.is_main:
        write_rows(job.out / "pairs.jsonl", rows)
        left = f"{left_out} left out (ties, or a side is empty)"
        print(f"preferences: {len(rows) // 2} pairs, {left}; {judge.name} decided")
    cluster.barrier()
    return {"pairs": len(rows) // 2, "left_out": left_out}


def drawn(prompts: list[Prompt], encoder: Encoder, job: Job) -> list[tuple[Prompt, list[int]]]:
    """As many prompts as pairs are wanted, each used equally often (one more at most), in random order."""
    fitting, left_out = prompts_within(prompts, encoder, job.config.ppo.max_prompt)
    if not fitting:
        raise UserError(
            f"preferences: none of {left_out} prompts has at most ppo.max_prompt={job.config.ppo.max_prompt} "
            "tokens: raise it"
        )
    settings = job.config.overoptimize
    assert settings is not None
    order = random.Random(f"preferences-{job.config.seed}")
    result: list[tuple[Prompt, list[int]]] = []
    while len(result) < settings.num_pairs:
        result += order.sample(fitting, len(fitting))
    return result[: settings.num_pairs]
