"""PPO with KL control: the loop, one iteration, one update. Read from top to bottom.

Rollouts are dealt over the ranks, then joined, so that every rank holds the whole batch of an iteration (a few MB) and
the minibatches are the same whatever the number of ranks; only the models and their arithmetic are divided.
"""

from __future__ import annotations

import time
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignkit.algo.batching import length_order, permutation, prompt_indices
from alignkit.algo.control import AdaptiveKL
from alignkit.algo.kl import shape_reward
from alignkit.algo.losses import clipped_policy_loss, clipped_value_loss
from alignkit.algo.types import Minibatch, Rollout, ScoredRollout
from alignkit.data.corpus import Prompt
from alignkit.errors import TrainingError, UserError
from alignkit.models.policy import response_logprobs
from alignkit.observe.metrics import Max, Mean, Metrics, reduce
from alignkit.observe.progress import Progress
from alignkit.reward.source import Answers
from alignkit.stages.actors import Actors, load_actors, logprobs_of, sample, values_of
from alignkit.stages.common import prepare, save_model, show_example
from alignkit.stages.ppo_report import Timers, iteration_metrics, sample_rows, save_evidence, summary_of
from alignkit.stages.ptx import PtxBatches, ptx_backward

if TYPE_CHECKING:
    from alignkit.observe.tracking import Tracker
    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.job import Job

RATIO_LIMIT = 1e-4  # of |ratio - 1| before the first step of an iteration, float32


def run(job: Job, cluster: Cluster, tracker: Tracker) -> dict[str, float]:
    """Train the policy, save `model/`. Returns means over the last fifth of the iterations."""
    corpus, config = prepare(job, cluster.is_main), job.config
    settings, began = config.ppo, time.monotonic()
    actors = load_actors(job, cluster)
    prompts = encode_prompts(corpus.train.prompts, actors, settings.max_prompt, settings.batch)
    ptx = PtxBatches.open(corpus.train.demonstrations, actors.encoder, config.ptx, config.seed)
    if cluster.is_main:
        tell_before(config, len(prompts))
        show_example("ppo prompt", actors.encoder, prompts[0][1], [])
    progress = Progress("ppo", settings.iterations, cluster.is_main)
    history: list[dict[str, float]] = []
    for iteration in range(settings.iterations):
        chosen = prompt_indices(iteration * settings.batch, settings.batch, len(prompts), config.seed)
        batch = [prompts[i] for i in chosen.tolist()]
        values, rows = ppo_iteration(actors, batch, ptx, job, iteration, corpus.gold)
        values["prompt_passes"] = (iteration + 1) * settings.batch / len(prompts)
        history.append(values)
        tracker.log(values, step=(iteration + 1) * settings.batch)
        if iteration % settings.samples_every == 0 or iteration == settings.iterations - 1:
            tracker.samples(rows[:8], step=(iteration + 1) * settings.batch)
        progress.update(iteration + 1, f"score {values['score_mean']:.2f}  KL {values['kl']:.2f}")
    state = cluster.full_state(actors.policy)
    if cluster.is_main:
        save_policy(actors, state, job)
    return summary_of(history, config, seconds=time.monotonic() - began)


def ppo_iteration(
    actors: Actors, prompts: list[tuple[Prompt, list[int]]], ptx: PtxBatches, job: Job, iteration: int, gold
) -> tuple[dict[str, float], list[dict]]:
    """Roll out, score, estimate advantages, then `epochs` passes of clipped updates. Returns metrics and samples."""
    config, cluster, timers = job.config, actors.cluster, Timers()
    actors.set_learning_rate(1.0 - iteration / config.ppo.iterations, config)
    with timers("rollout"):
        part, rows = sample(
            actors.policy, [ids for _, ids in prompts], iteration * config.ppo.batch, config, actors.rule, cluster,
            actors.encoder.tokenizer.pad_token_id, iteration,
        )  # fmt: skip
    with timers("scoring"):
        rollout, scored, entropy = score(actors, part, [prompts[i][0] for i in rows.tolist()], len(prompts), config)
    penalty = config.reward.missing_eos_penalty * (~rollout.finished).to(scored.scores.dtype)
    shaped = shape_reward(
        scored.scores - penalty, scored.logprobs, scored.ref_logprobs, rollout.response_mask, coef=actors.kl_coef
    )
    target = config.advantage(shaped.per_token, scored.values, rollout.response_mask)
    texts = [actors.encoder.text(row[mask].tolist()) for row, mask in zip(rollout.response, rollout.response_mask)]
    samples = sample_rows(prompts, texts, rollout, scored, shaped, gold)
    batch = Minibatch(
        tokens=rollout.tokens,
        mask=rollout.mask,
        response_mask=rollout.response_mask,
        old_logprobs=scored.logprobs,
        old_values=scored.values,
        advantages=target.advantages,
        returns=target.returns,
    )
    metrics = Metrics()
    try:
        _require_finite("score", scored.scores)
        with timers("update"):
            for number, minibatch in enumerate(minibatches(batch, config, iteration)):
                ppo_update(actors, minibatch, ptx, config, metrics, first=number == 0)
                if number == 0:
                    check_ratio(metrics, cluster)
    except TrainingError as error:
        place = job.out / "state" / f"failed-iteration-{iteration + 1}"
        if cluster.is_main:
            save_evidence(place, batch, scored, samples)
        cluster.barrier()  # every rank fails here alike; none may end before the data is on disk
        raise TrainingError(f"iteration {iteration + 1}: {error}; its data is in {place}") from error
    update = reduce(metrics, cluster.sum, cluster.max).values()
    values = iteration_metrics(rollout, scored, shaped, target, entropy, samples, actors, config)
    values.update(update, **timers.values(int(rollout.mask.sum())))
    actors.kl_coef = config.kl.next(actors.kl_coef, observed=values["kl"], episodes=len(prompts))
    return values, samples


def score(
    actors: Actors, part: Rollout, prompts: list[Prompt], count: int, config
) -> tuple[Rollout, ScoredRollout, Tensor]:
    """Log-probabilities (and entropy), values and scores of this rank's rows; then all rows of all ranks, in order."""
    microbatch = config.ppo.microbatch
    texts = [actors.encoder.text(row[mask].tolist()) for row, mask in zip(part.response, part.response_mask)]
    logprobs, entropy = logprobs_of(actors.policy, part, actors.rule, microbatch)
    ref_logprobs, _ = logprobs_of(actors.reference, part, actors.rule, microbatch)
    values = values_of(actors.value_model, part, microbatch)
    with torch.no_grad():
        scores = actors.reward.score(Answers(part, prompts, texts), microbatch)

    def join(tensor: Tensor) -> Tensor:
        return actors.cluster.collect(tensor, count)

    whole = Rollout(**{field.name: join(getattr(part, field.name)) for field in fields(Rollout)})
    scored = ScoredRollout(join(logprobs), join(ref_logprobs), join(values), join(scores))
    longest = int(whole.response_mask.sum(dim=1).max())
    drop = whole.response_mask.shape[1] - longest
    keep = slice(0, whole.tokens.shape[1] - drop)
    whole = Rollout(whole.tokens[:, keep], whole.mask[:, keep], whole.response_mask[:, :longest], whole.finished)
    scored = ScoredRollout(
        scored.logprobs[:, :longest], scored.ref_logprobs[:, :longest], scored.values[:, :longest], scored.scores
    )
    return whole, scored, join(entropy)[:, :longest]


def minibatches(batch: Minibatch, config, iteration: int):
    """`epochs` passes over the rows, each in a fresh order, cut into minibatches: the same on every rank."""
    for epoch in range(config.ppo.epochs):
        order = permutation(len(batch), config.seed, iteration, epoch).to(batch.tokens.device)
        for rows in order.split(config.ppo.minibatch):
            yield batch.rows(rows)


def ppo_update(actors: Actors, minibatch: Minibatch, ptx: PtxBatches, config, metrics: Metrics, *, first: bool) -> None:
    """One optimizer step of the policy and one of the value model.

    Losses are divided by the number of response tokens of the whole minibatch, so that the gradient depends on neither
    `microbatch`, nor padding, nor the order of rows, nor the number of ranks.
    """
    settings, cluster = config.ppo, actors.cluster
    tokens = int(minibatch.response_mask.sum())
    mine, real = cluster.deal(len(minibatch))
    local = minibatch.rows(mine.to(minibatch.tokens.device)).only(real.to(minibatch.tokens.device))
    micros = [local.rows(rows) for rows in length_order(local.mask).split(settings.microbatch)]

    for micro in micros:  # the policy first, then the value model: their activations never live together
        width = micro.response_mask.shape[1]
        logprobs, _ = response_logprobs(actors.policy, micro.tokens, micro.mask, width, actors.rule)
        loss, clipped = clipped_policy_loss(
            logprobs, micro.old_logprobs, micro.advantages, micro.response_mask, clip=settings.clip
        )
        (loss.total / tokens).backward()
        _add_policy_metrics(metrics, loss, clipped, logprobs.detach(), micro, first)
    ptx_backward(actors, ptx, config.ptx, settings.microbatch, metrics)
    norm = cluster.clip_gradient(actors.policy, settings.max_grad_norm)
    _require_finite("policy gradient", norm)
    actors.policy_optimizer.step()
    actors.policy_optimizer.zero_grad()
    metrics.add("policy_grad_norm", Mean(norm, 1))

    for micro in micros:
        width = micro.response_mask.shape[1]
        values = actors.value_model(micro.tokens, micro.mask)[:, -width - 1 : -1]
        loss, clipped = clipped_value_loss(
            values, micro.old_values, micro.returns, micro.response_mask, clip=settings.value_clip
        )
        (loss.total / tokens).backward()
        metrics.add("value_loss", Mean(loss.total.detach(), loss.count))
        metrics.add("value_clip_fraction", Mean((clipped & micro.response_mask).sum(), loss.count))
    norm = cluster.clip_gradient(actors.value_model, settings.max_grad_norm)
    _require_finite("value gradient", norm)
    actors.value_optimizer.step()
    actors.value_optimizer.zero_grad()
    metrics.add("value_grad_norm", Mean(norm, 1))


def _add_policy_metrics(
    metrics: Metrics, loss, clipped: Tensor, logprobs: Tensor, micro: Minibatch, first: bool
) -> None:
    log_ratio = torch.where(micro.response_mask, logprobs - micro.old_logprobs, 0.0)
    metrics.add("policy_loss", Mean(loss.total, loss.count))
    metrics.add("clip_fraction", Mean((clipped & micro.response_mask).sum(), loss.count))
    metrics.add("approx_kl", Mean(0.5 * log_ratio.square().sum(), loss.count))
    if first:
        metrics.add("ratio_error", Max(log_ratio.expm1().abs().max()))


def check_ratio(metrics: Metrics, cluster: Cluster) -> None:
    """Before the first step of an iteration the new policy is the old one: the ratio must be 1 at every token."""
    error = float(reduce(metrics, cluster.sum, cluster.max).values()["ratio_error"])
    if not error <= RATIO_LIMIT:
        raise TrainingError(
            f"the ratio of new to old policy is off by {error:.2g} before the first step (limit {RATIO_LIMIT}): "
            "scoring and training do not see the same network. Usual causes: dropout left on, another dtype, "
            "padding side, sampling settings that the log-probabilities do not share"
        )


def encode_prompts(prompts: list[Prompt], actors: Actors, longest: int, batch: int) -> list[tuple[Prompt, list[int]]]:
    """Prompts with their ids; those longer than `longest` tokens are left out and counted."""
    encoded = [(prompt, actors.encoder.prompt(prompt)) for prompt in prompts]
    kept = [(prompt, ids) for prompt, ids in encoded if 0 < len(ids) <= longest]
    if actors.cluster.is_main and len(kept) < len(encoded):
        count = f"{len(encoded) - len(kept)} of {len(encoded)}"
        print(f"ppo: {count} prompts left out: empty or longer than ppo.max_prompt={longest}")
    if len(kept) < batch:
        raise UserError(
            f"ppo.batch={batch} prompts are needed for one iteration, but there are only {len(kept)} training prompts "
            f"of at most ppo.max_prompt={longest} tokens: lower ppo.batch, raise ppo.max_prompt or give more data"
        )
    return kept


def tell_before(config, num_prompts: int) -> None:
    """How often each prompt will be used, and a warning if the KL coefficient cannot even double within the run."""
    settings = config.ppo
    print(
        f"ppo: {num_prompts} prompts for {settings.episodes} episodes: {settings.episodes / num_prompts:.1f} for each"
    )
    if isinstance(config.kl, AdaptiveKL):
        reach = config.kl.reach(iterations=settings.iterations, episodes=settings.batch)
        if reach < 2:
            print(
                f"ppo: warning: with kl.horizon={config.kl.horizon} the KL coefficient can change {reach:.2f}-fold at "
                f"most in {settings.iterations} iterations; lower it to reach kl.target={config.kl.target}"
            )


def save_policy(actors: Actors, state: dict[str, Tensor], job: Job) -> None:
    """The trained policy in the format that it came in."""
    from alignkit.models.loading import load_causal, model_folder

    model = load_causal(model_folder(job.inputs["policy"]))
    model.load_state_dict(state)
    save_model(model, actors.encoder, job.out / "model")


def _require_finite(what: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise TrainingError(f"{what} is not finite (NaN or infinity)")
