"""The evaluation that ends the chain: policy against its starting point on held-out prompts, under a judge."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignkit.algo.statistics import distinct_2, wilson_interval
from alignkit.algo.types import Rollout
from alignkit.data.corpus import Corpus, Prompt
from alignkit.data.tokens import Encoder, show
from alignkit.errors import UserError
from alignkit.models.loading import load_encoder, model_folder
from alignkit.reward.bag_of_words import fit_bag_of_words
from alignkit.reward.source import Answers
from alignkit.stages.actors import load_policy, logprobs_of, sample, sampling_rule
from alignkit.stages.common import encode_demonstrations, heldout_loss, prepare, sample_of

if TYPE_CHECKING:
    from alignkit.observe.tracking import Tracker
    from alignkit.runtime.checkpoint import Checkpoints
    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.job import Job


@dataclass(frozen=True)
class Responses:
    """One model's responses to the held-out prompts: texts, ids, and KL(policy || baseline) in nats where asked for."""

    rollout: Rollout
    texts: list[str]
    ids: list[list[int]]
    finished: list[bool]
    kl: Tensor | None


def run(job: Job, cluster: Cluster, tracker: Tracker, checkpoints: Checkpoints) -> dict[str, float]:
    """Sample from both models with the same noise and judge both. Returns the win rate with its interval."""
    corpus, settings = prepare(job, cluster.is_main), job.config.evaluate
    checkpoints.newest()  # there is none, as this is short; but rows of an earlier attempt go
    encoder = load_encoder(model_folder(job.inputs["policy"]))
    prompts = heldout_prompts(corpus, encoder, job, cluster)
    folders = {name: model_folder(job.inputs[name]) for name in ("policy", "baseline")}
    models = {
        name: cluster.place(functools.partial(load_policy, folder), trainable=False) for name, folder in folders.items()
    }
    tuned = respond(models["policy"], models["baseline"], prompts, encoder, job, cluster)
    before = respond(models["baseline"], None, prompts, encoder, job, cluster)
    name, judge = open_judge(corpus, job, encoder, cluster)
    mine, theirs = judge([p for p, _ in prompts], tuned), judge([p for p, _ in prompts], before)
    wins = float((mine > theirs).double().sum() + 0.5 * (mine == theirs).double().sum())
    low, high = wilson_interval(wins, len(prompts))
    rows = [
        {"prompt": show(prompt), "baseline": b, "policy": p, "judge_baseline": float(s), "judge_policy": float(t)}
        for (prompt, _), b, p, s, t in zip(prompts, before.texts, tuned.texts, theirs, mine)
    ]
    tracker.samples(rows[: settings.show], step=len(prompts))
    result = {
        "win_rate": wins / len(prompts),
        "win_rate_low": low,
        "win_rate_high": high,
        "judge": name,
        "prompts": len(prompts),
        "judge_mean": float(mine.mean()),
        "judge_mean_baseline": float(theirs.mean()),
        "kl": float(tuned.kl.mean()),
    }
    if name == "bag_of_words":  # the judge whose zero means something: as many positive as negative texts lie above it
        result |= {
            "positive": float((mine > 0).double().mean()),
            "positive_baseline": float((theirs > 0).double().mean()),
        }
    for suffix, responses in (("", tuned), ("_baseline", before)):
        result[f"distinct_2{suffix}"] = distinct_2(responses.ids)
        result[f"response_length{suffix}"] = sum(map(len, responses.ids)) / len(responses.ids)
        result[f"eos_fraction{suffix}"] = sum(responses.finished) / len(responses.finished)
    result |= perplexities(models, corpus, encoder, job, cluster)
    tracker.log({key: value for key, value in result.items() if isinstance(value, float)}, step=len(prompts))
    if cluster.is_main:
        (job.out / "comparison.json").write_text(json.dumps(rows[:2], ensure_ascii=False, indent=2), encoding="utf-8")
    return result


def perplexities(models, corpus: Corpus, encoder: Encoder, job: Job, cluster: Cluster) -> dict[str, float]:
    """exp of the mean loss per token on held-out demonstrations: what PPO cost as a language model, and what `ptx` is
    there to keep. {} if the data has none."""
    config = job.config
    longest = config.ppo.max_prompt + config.rollout.max_response
    rows, _ = encode_demonstrations(corpus.heldout.demonstrations, encoder, longest)
    rows, pad = sample_of(rows, config.evaluate.prompts, config.seed), encoder.tokenizer.pad_token_id
    if not rows:
        return {}
    losses = {name: heldout_loss(model, rows, pad, config.ppo.microbatch, cluster) for name, model in models.items()}
    return {
        "ptx_perplexity": math.exp(min(losses["policy"], 700.0)),
        "ptx_perplexity_baseline": math.exp(min(losses["baseline"], 700.0)),
    }


def heldout_prompts(corpus: Corpus, encoder: Encoder, job: Job, cluster: Cluster) -> list[tuple[Prompt, list[int]]]:
    """At most `evaluate.prompts` held-out prompts with their ids, a fixed draw."""
    encoded = [(prompt, encoder.prompt(prompt)) for prompt in corpus.heldout.prompts]
    kept = [(prompt, ids) for prompt, ids in encoded if 0 < len(ids) <= job.config.ppo.max_prompt]
    if cluster.is_main and len(kept) < len(encoded):
        print(f"evaluate: {len(encoded) - len(kept)} of {len(encoded)} held-out prompts left out: empty or too long")
    if not kept:
        raise UserError(
            f"evaluate: none of the {len(encoded)} held-out prompts has at most ppo.max_prompt="
            f"{job.config.ppo.max_prompt} tokens: raise it, or data.heldout"
        )
    return sample_of(kept, job.config.evaluate.prompts, job.config.seed)


def respond(model, other, prompts, encoder: Encoder, job: Job, cluster: Cluster) -> Responses:
    """One response to each prompt, the same noise for every model; with `other`, KL(model || other) along them."""
    config, rule = job.config, sampling_rule(job.config, encoder)
    ids = [ids for _, ids in prompts]
    whole = sample(model, ids, 0, config, rule, cluster, encoder.tokenizer.pad_token_id, iteration=-1)
    kl = None
    if other is not None:
        hand = cluster.deal(whole.mask.sum(dim=1))
        part = whole.take(hand.rows.to(whole.tokens.device))
        ours, _ = logprobs_of(model, part, rule, config.ppo.microbatch)
        reference, _ = logprobs_of(other, part, rule, config.ppo.microbatch)
        kl = cluster.collect((ours - reference).sum(dim=1), hand)
    rows = [row[mask].tolist() for row, mask in zip(whole.response, whole.response_mask)]
    return Responses(whole, [encoder.text(row) for row in rows], rows, whole.finished.tolist(), kl)


def open_judge(corpus: Corpus, job: Job, encoder: Encoder, cluster: Cluster):
    """The judge's name and (prompts, responses) -> scores [n]. `auto`: gold, else a bag of words, else the reward."""
    wanted = job.config.evaluate.judge
    if wanted == "auto":
        wanted = "gold" if corpus.gold else "bag_of_words" if corpus.judge else "reward_model"
    if wanted == "gold":
        if corpus.gold is None:
            raise UserError("evaluate.judge=gold: this data has no gold score; choose bag_of_words or reward_model")
        return wanted, lambda prompts, r: torch.tensor([corpus.gold(p, t) for p, t in zip(prompts, r.texts)]).double()
    if wanted == "bag_of_words":
        if not corpus.judge:
            raise UserError("evaluate.judge=bag_of_words: needs labelled texts (text+label) and data.judge above 0")
        bag = fit_bag_of_words(corpus.judge, corpus.heldout.contrast)
        if cluster.is_main:
            print(
                f"evaluate: judge is a bag of words on {len(corpus.judge)} texts, accuracy {bag.accuracy:.3f} held out"
            )
        return wanted, lambda prompts, r: bag.scores([f"{show(p)} {t}" for p, t in zip(prompts, r.texts)])
    source = job.config.reward.open(job.inputs["reward"], encoder, cluster)

    def by_reward(prompts: list[Prompt], r: Responses) -> Tensor:
        hand = cluster.deal(r.rollout.mask.sum(dim=1))
        mine = hand.rows.tolist()
        part = r.rollout.take(hand.rows.to(r.rollout.tokens.device))
        with torch.no_grad():
            answers = Answers(part, [prompts[i] for i in mine], [r.texts[i] for i in mine])
            scores = source.score(answers, job.config.ppo.microbatch)
        return cluster.collect(scores, hand).double().cpu()

    return wanted, by_reward
