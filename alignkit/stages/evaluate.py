"""Policy against its starting point on held-out prompts, under a judge, beside best-of-n; and whether the reward was
climbed at the cost of what it stands for."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignkit.algo.comparison import length_controlled, mean_interval, win_rate
from alignkit.algo.statistics import distinct
from alignkit.data.corpus import Corpus
from alignkit.data.tokens import Encoder, show
from alignkit.errors import TrainingError
from alignkit.models.loading import load_encoder, model_folder
from alignkit.observe.hacking import hacking_warnings
from alignkit.observe.tracking import write_report, write_rows
from alignkit.reward.source import opened
from alignkit.stages import best_of_n
from alignkit.stages.actors import load_policy
from alignkit.stages.common import encode_demonstrations, heldout_loss, prepare, sample_of
from alignkit.stages.judging import Judge, Judgement, compare, open_judge, outcomes_of, scorer_of
from alignkit.stages.responses import Responses, heldout_prompts, respond

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from alignkit.observe.tracking import Tracker
    from alignkit.runtime.checkpoint import Checkpoints
    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.job import Job


def run(job: Job, cluster: Cluster, tracker: Tracker, checkpoints: Checkpoints) -> dict[str, float]:
    """Sample from both models with the same noise and judge both. Returns the win rate with its interval, and more."""
    corpus, config = prepare(job, cluster.is_main), job.config
    checkpoints.newest()  # there is none, as this is short; but rows of an earlier attempt go
    encoder = load_encoder(model_folder(job.inputs["policy"]))
    prompts = heldout_prompts(corpus, encoder, config, config.evaluate.prompts, "final", cluster.is_main)
    folders = {name: model_folder(job.inputs[name]) for name in ("policy", "baseline")}
    models = {
        name: cluster.place(functools.partial(load_policy, folder), trainable=False) for name, folder in folders.items()
    }
    tuned, before = (
        respond(models[name], models["baseline"], prompts, encoder, config, cluster) for name in ("policy", "baseline")
    )
    texts = [prompt for prompt, _ in prompts]
    save(job, cluster, rows := side_by_side(texts, tuned, before))  # before a judge can fail
    source = opened(config.reward, job.inputs.get("reward"), encoder, cluster)
    reward, judge = scorer_of(source, job, cluster), open_judge(job, corpus, source, encoder, cluster)
    try:
        scores = reward(texts, tuned), reward(texts, before)
        verdict = compare(judge, texts, tuned, before)
    except TrainingError as error:
        raise TrainingError(f"{error}; all responses are in {job.out / 'responses.jsonl'}") from error
    rows = with_scores(rows, scores, verdict)
    result = comparison(judge, verdict, scores, tuned, before)
    result |= perplexities(models, corpus, encoder, job, cluster)
    if config.evaluate.best_of_samples and verdict.theirs is None and cluster.is_main:
        print(f"evaluate: no best-of-n, as judge {judge.name} gives no scores and would be asked thousands of times")
    if config.evaluate.best_of_samples and verdict.ours is not None:
        few = prompts[: config.evaluate.best_of_prompts]
        drawn = best_of_n.draw(models["baseline"], few, judge, reward, encoder, config, cluster)
        result |= beside_best_of_n(best_of_n.curve(drawn), drawn, verdict.ours[: len(few)], result["kl"], job, cluster)
    warnings = hacking_warnings(result)
    if cluster.is_main:
        print("".join(f"evaluate: warning: {line}\n" for line in warnings), end="")
    result["warnings"] = len(warnings)
    tracker.samples(rows[: config.evaluate.show], step=len(prompts))
    tracker.log({key: value for key, value in result.items() if isinstance(value, float)}, step=len(prompts))
    save(job, cluster, rows, {**result, "warnings": warnings})
    return result


def side_by_side(prompts: list[Any], tuned: Responses, before: Responses) -> list[dict[str, Any]]:
    """One row a prompt, as a person reads it."""
    assert tuned.kl is not None
    return [
        {
            "prompt": show(prompt),
            "baseline": before.texts[i],
            "policy": tuned.texts[i],
            "kl": float(tuned.kl[i]),
            "length_baseline": len(before.ids[i]),
            "length_policy": len(tuned.ids[i]),
        }
        for i, prompt in enumerate(prompts)
    ]


def with_scores(rows: list[dict[str, Any]], scores: tuple[Tensor, Tensor], verdict: Judgement) -> list[dict[str, Any]]:
    """The rows with what reward and judge say of them."""
    columns = {"reward_baseline": scores[1], "reward_policy": scores[0], "outcome": verdict.outcomes}
    if verdict.ours is not None and verdict.theirs is not None:
        columns |= {"judge_baseline": verdict.theirs, "judge_policy": verdict.ours}
    return [{**row, **{name: float(column[i]) for name, column in columns.items()}} for i, row in enumerate(rows)]


def comparison(
    judge: Judge, verdict: Judgement, scores: tuple[Tensor, Tensor], tuned: Responses, before: Responses
) -> dict[str, Any]:
    """Win rate, KL in nats a sequence, scores, lengths in tokens, diversity, perplexity under the reference."""
    assert tuned.kl is not None and tuned.nll is not None and before.nll is not None
    rate = win_rate(verdict.outcomes)
    lengths = [torch.tensor([len(row) for row in side.ids]).double() for side in (tuned, before)]
    result: dict[str, Any] = {
        "win_rate": rate.share, "win_rate_low": rate.low, "win_rate_high": rate.high,
        "wins": rate.wins, "ties": rate.ties, "losses": rate.losses,
        "judge": judge.name, "judge_is_the_reward": judge.optimised, "prompts": len(tuned.texts),
    }  # fmt: skip
    controlled = length_controlled(verdict.outcomes, *lengths)
    result |= dict(zip((f"length_controlled_win_rate{end}" for end in ("", "_low", "_high")), controlled))
    result |= dict(zip(("kl", "kl_low", "kl_high"), mean_interval(tuned.kl)))
    gain = mean_interval(scores[0] - scores[1])
    result |= {"reward_mean": float(scores[0].mean()), "reward_mean_baseline": float(scores[1].mean())}
    result |= dict(zip(("reward_gain", "reward_gain_low", "reward_gain_high"), gain))
    if verdict.ours is not None and verdict.theirs is not None:
        result |= {"judge_mean": float(verdict.ours.mean()), "judge_mean_baseline": float(verdict.theirs.mean())}
        if judge.name == "bag_of_words":  # its zero means something: as many positive as negative texts lie above it
            result["positive"] = float((verdict.ours > 0).double().mean())
            result["positive_baseline"] = float((verdict.theirs > 0).double().mean())
    for suffix, side, nll, length in (
        ("", tuned, tuned.nll, lengths[0]),
        ("_baseline", before, before.nll, lengths[1]),
    ):
        result |= {f"distinct_{n}{suffix}": distinct(side.ids, n) for n in (1, 2, 3)}
        result[f"response_length{suffix}"] = float(length.mean())
        result[f"eos_fraction{suffix}"] = sum(side.finished) / len(side.finished)
        nats = float(nll.sum() / length.sum())
        result[f"reference_perplexity{suffix}"] = math.exp(min(nats, 700.0))
    return result


def beside_best_of_n(
    rows: list[dict[str, float]], drawn: best_of_n.Samples, ours: Tensor, kl: float, job: Job, cluster: Cluster
) -> dict[str, float]:
    """The last point of best-of-n; the policy's win rate over the same samples, on the same prompts; and how far that
    lies above best-of-n's at the policy's KL, where best-of-n reaches so far. (`win_rate` is over a response with the
    same noise, as two policies are best compared, so it is another quantity.)"""
    if cluster.is_main:
        write_report(job.out / "best_of_n.json", rows)
    last, there = rows[-1], best_of_n.at_kl(rows, kl)
    name = f"best_of_{last['n']}"
    found = {f"{name}_{key}": last[key] for key in ("kl", "win_rate", "win_rate_low", "win_rate_high")}
    over = mean_interval(outcomes_of(ours[:, None], drawn.judge).mean(dim=1), share=True)
    found |= dict(zip((f"win_rate_over_samples{end}" for end in ("", "_low", "_high")), over))
    return found if there is None else {**found, "win_rate_above_best_of_n": over[0] - there}


def perplexities(
    models: dict[str, PreTrainedModel], corpus: Corpus, encoder: Encoder, job: Job, cluster: Cluster
) -> dict[str, float]:
    """exp of the mean loss per token on held-out demonstrations: what PPO cost as a language model, and what `ptx` is
    there to keep. {} if the data has none."""
    config = job.config
    longest = config.ppo.max_prompt + config.rollout.max_response
    rows, _ = encode_demonstrations(corpus.heldout.demonstrations, encoder, longest)
    rows, pad = sample_of(rows, config.evaluate.prompts, config.seed), encoder.tokenizer.pad_token_id
    if not rows:
        return {}
    batch = max(config.ppo.microbatch_tokens // longest, 1)
    losses = {name: heldout_loss(model, rows, pad, batch, cluster) for name, model in models.items()}
    return {
        "ptx_perplexity": math.exp(min(losses["policy"], 700.0)),
        "ptx_perplexity_baseline": math.exp(min(losses["baseline"], 700.0)),
    }


def save(job: Job, cluster: Cluster, rows: list[dict[str, Any]], report: dict[str, Any] | None = None) -> None:
    """All responses side by side, two of them for the closing words, and the report."""
    if cluster.is_main:
        write_rows(job.out / "responses.jsonl", rows)
        write_report(job.out / "comparison.json", rows[:2])
        if report is not None:
            write_report(job.out / "report.json", report)
