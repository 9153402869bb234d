"""PPO with KL control: the loop and one iteration; its optimizer steps are in ppo_update. Read from top to bottom.

Rollouts are dealt over the ranks, then joined, so that every rank holds the whole batch of an iteration (a few MB) and
the minibatches are the same whatever the number of ranks; only the models and their arithmetic are divided.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignkit.algo.advantage import normalise
from alignkit.algo.batching import prompt_indices
from alignkit.algo.kl import kl_estimate
from alignkit.algo.losses import truncated_importance
from alignkit.algo.masked import whiten
from alignkit.algo.shaping import reward_slots, shape_reward
from alignkit.algo.types import Minibatch, Rollout, ScoredRollout, ShapedReward
from alignkit.data.corpus import Prompt
from alignkit.errors import Interrupted, NotFinite, TrainingError, UserError
from alignkit.models.adapters import add_adapter
from alignkit.models.loading import load_causal, model_folder, skeletons
from alignkit.observe.metrics import reduce
from alignkit.observe.progress import Progress
from alignkit.reward.source import Answers
from alignkit.stages.actors import Actors, load_actors, logprobs_of, sample, values_of
from alignkit.stages.common import prepare, prompts_within, save_trained, show_example
from alignkit.stages.ppo_checks import check_advantages, check_rollout
from alignkit.stages.ppo_looks import Looks
from alignkit.stages.ppo_report import (
    Timers,
    draw_histograms,
    five_numbers,
    guards,
    iteration_metrics,
    sample_rows,
    save_evidence,
    summary_of,
    tell_before,
    tell_weights,
)
from alignkit.stages.ppo_stop import Stop
from alignkit.stages.ppo_update import train_on
from alignkit.stages.ptx import PtxBatches
from alignkit.stages.reward_gate import check_reward_gate
from alignkit.stages.scoring import reward_scores
from alignkit.stages.settings import PPOSettings
from alignkit.stages.state import PPOState

if TYPE_CHECKING:
    from alignkit.observe.tracking import Tracker
    from alignkit.runtime.checkpoint import Checkpoints
    from alignkit.runtime.config import RunConfig
    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.job import Job


def run(job: Job, cluster: Cluster, tracker: Tracker, checkpoints: Checkpoints) -> dict[str, float | str]:
    """Train the policy, save `model/`. Returns means over the last fifth of the iterations, what was alarming, and why
    it was stopped early, if `ppo.stop_if` did."""
    corpus, config = prepare(job, cluster.is_main), job.config
    check_reward_gate(job, cluster.is_main)
    settings, began = config.ppo, time.monotonic()
    actors = load_actors(job, cluster)
    began -= restore(actors, checkpoints)
    each, asked = settings.samples_per_prompt, settings.batch // settings.samples_per_prompt
    prompts = encode_prompts(corpus.train.prompts, actors, settings.max_prompt, asked)
    ptx = PtxBatches.open(corpus.train.demonstrations, actors.encoder, config.ptx, config.seed)
    if cluster.is_main:
        tell_before(config, len(prompts))
        tell_weights(actors)
        show_example("ppo prompt", actors.encoder, prompts[0][1], [])
    looks, stop = Looks.open(actors, corpus, job), Stop(config, cluster, tracker)
    progress = Progress("ppo", settings.iterations, cluster.is_main, done=actors.state.iteration)
    while actors.state.iteration < settings.iterations and not out_of_patience(actors.state, settings):
        chosen = prompt_indices(actors.state.iteration * asked, asked, len(prompts), config.seed)
        batch = [prompts[i] for i in chosen.tolist() for _ in range(each)]
        try:
            values, rows = ppo_iteration(actors, batch, ptx, job, corpus.gold)
        except NotFinite as error:
            stop.catch(error, actors.state.iteration)
            break
        done = actors.state.iteration
        values["prompt_passes"] = done * asked / len(prompts)
        if looks is not None:
            values |= looks.look(actors, job)
        tracker.log(values, step=done * settings.batch)
        for kind, text in guards(values, settings).items():
            tracker.alert(kind, f"{text}, in iteration {done}")
        stop.look(values)
        if (done - 1) % settings.samples_every == 0 or done == settings.iterations or stop.reason:
            tracker.samples(rows[:8], step=done * settings.batch)
        draw_histograms(tracker, rows, done, settings)
        progress.update(done, *five_numbers(values))
        if stop.reason:
            break
        save_if_asked(actors, checkpoints, config.checkpoint.every_iterations, time.monotonic() - began)
    checkpoints.finish()
    choose(actors)
    state = cluster.full_state(actors.policy)
    if state is None:  # not the main rank
        return {}
    save_policy(actors, state, job)
    summary = summary_of(tracker.history(), config, seconds=time.monotonic() - began) | tracker.alerts()
    return {**summary, "stopped": stop.reason} if stop.reason else summary


def out_of_patience(state: PPOState, settings: PPOSettings) -> bool:
    """Whether the judge has found no better policy for too many looks."""
    return settings.patience is not None and state.looks_since >= settings.patience


def choose(actors: Actors) -> None:
    """Give the policy the weights that are to be saved: the best, the average or, as it has them, the last."""
    state = actors.state
    if actors.best is not None:
        actors.best.put(actors.policy)
        if actors.cluster.is_main:
            untrained = "; no trained one was, so this is the policy as it was before" * (state.best_iteration == 0)
            print(f"ppo: the policy of iteration {state.best_iteration} is kept, the judge's best{untrained}")
    elif actors.ema is not None:
        actors.ema.swap(actors.policy)


def restore(actors: Actors, checkpoints: Checkpoints) -> float:
    """Go back to the newest checkpoint, if there is one. Returns the seconds of training that it holds."""
    found = checkpoints.newest()
    if found is None:
        return 0.0
    place, facts = found
    actors.state = PPOState.from_state_dict(facts["ppo"])
    checkpoints.load(place, actors.tensors())
    if actors.cluster.is_main:
        print(f"ppo: going on from iteration {actors.state.iteration}")
    return facts["seconds"]


def save_if_asked(actors: Actors, checkpoints: Checkpoints, every: int | None, seconds: float) -> None:
    """A checkpoint after the iteration that has just ended, where one is due or the run is to end. Raises Interrupted
    in the latter case."""
    done = actors.state.iteration
    asked = checkpoints.ask(done, every=every)
    if asked != "go on":
        checkpoints.save(done, actors.tensors(), {"ppo": actors.state.state_dict(), "seconds": seconds})
    if asked == "stop":
        checkpoints.finish()
        raise Interrupted(done)


def ppo_iteration(
    actors: Actors, prompts: list[tuple[Prompt, list[int]]], ptx: PtxBatches, job: Job,
    gold: Callable[[Prompt, str], float] | None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:  # fmt: skip
    """Roll out, score, estimate advantages, then `epochs` passes of clipped updates. `prompts`: one for each response.
    Returns metrics and samples."""
    config, cluster, state, timers = job.config, actors.cluster, actors.state, Timers()
    actors.set_learning_rates(config.ppo)
    with timers("rollout"):
        rollout = sample(
            actors.policy, [ids for _, ids in prompts], state.iteration * config.ppo.batch, config, actors.rule,
            cluster, actors.encoder.tokenizer.pad_token_id, state.iteration,
        )  # fmt: skip
    with timers("scoring"):
        rollout, scored, entropy = score(actors, rollout, [prompt for prompt, _ in prompts], job)
    raw, paid = shape(actors, rollout, scored, config)
    shaped = raw
    if config.shaping.whiten:
        shaped = replace(raw, per_token=whiten(raw.per_token, raw.mask, shift_mean=False))
    target = config.advantage(shaped, scored.values, rollout.response_mask, config.ppo.samples_per_prompt)
    check_advantages(target, config.advantage, rollout.response_mask.shape)
    advantages = normalise(
        target.advantages, rollout.response_mask, config.advantage.whiten, config.advantage.clip, over="batch"
    )
    texts = [actors.encoder.text(row[mask].tolist()) for row, mask in zip(rollout.response, rollout.response_mask)]
    samples = sample_rows(prompts, texts, rollout, scored, shaped, gold)
    batch = Minibatch(
        tokens=rollout.tokens,
        mask=rollout.mask,
        response_mask=rollout.response_mask,
        value_mask=shaped.mask,
        old_logprobs=scored.logprobs,
        ref_logprobs=scored.ref_logprobs,
        old_values=scored.values,
        advantages=advantages,
        importance=importance_of(rollout, scored, config.ppo.importance_cap),
        returns=target.returns,
    )
    before = (state.policy_steps, state.value_steps)
    try:
        check_rollout(actors, rollout, scored, raw, paid, config)
        with timers("update"):
            metrics = train_on(actors, batch, ptx, config)
    except TrainingError as error:
        place = job.out / "state" / f"failed-iteration-{state.iteration + 1}"
        if cluster.is_main:
            save_evidence(place, batch, scored, samples)
        cluster.barrier()  # every rank fails here alike; none may end before the data is on disk
        raise type(error)(f"iteration {state.iteration + 1}: {error}; its data is in {place}") from error
    values = iteration_metrics(rollout, scored, raw, target, entropy, samples, actors, config)
    values.update(reduce(metrics, cluster.sum, cluster.max).values(), **timers.values(int(rollout.mask.sum())))
    values.update(policy_steps=state.policy_steps - before[0], value_steps=state.value_steps - before[1])
    if state.policy_steps:  # in the value warm-up the KL is 0 whatever the coefficient
        state.kl_coef = config.kl.next(state.kl_coef, observed=values["kl"], episodes=len(prompts))
    state.iteration += 1
    return values, samples


def score(actors: Actors, rollout: Rollout, prompts: list[Prompt], job: Job) -> tuple[Rollout, ScoredRollout, Tensor]:
    """The rollout as wide as its longest response, its log-probabilities, values and scores, and the policy's entropy:
    each rank computes the rows that it is dealt by their lengths, then they are joined."""
    cluster, config, budget = actors.cluster, job.config, job.config.ppo.microbatch_tokens
    slots = reward_slots(rollout.response_mask, config.shaping.score_position)
    longest = int(slots.sum(dim=1).max())
    kept = slice(0, rollout.prompt_width + longest)
    rollout = replace(
        rollout,
        tokens=rollout.tokens[:, kept],
        mask=rollout.mask[:, kept],
        response_mask=rollout.response_mask[:, :longest],
        engine_logprobs=rollout.engine_logprobs[:, :longest],
    )
    hand = cluster.deal(rollout.mask.sum(dim=1))
    mine = hand.rows.to(rollout.tokens.device)
    part = rollout.take(mine)
    texts = [actors.encoder.text(row[mask].tolist()) for row, mask in zip(part.response, part.response_mask)]
    micros = cluster.microbatches(part.mask.sum(dim=1), budget)
    logprobs, entropy = logprobs_of(actors.policy, part, actors.rule, micros, entropy=True)
    (ref_logprobs,) = logprobs_of(actors.reference, part, actors.rule, micros)
    values = torch.zeros_like(logprobs)
    if actors.value_model is not None:
        values = values_of(actors.value_model, replace(part, response_mask=slots[mine, :longest]), micros)
    answers = Answers(part, [prompts[i] for i in hand.rows.tolist()], texts)
    with torch.no_grad():
        scores, actors.reward_failures = reward_scores(actors.reward, answers, hand, cluster, budget, job.out)
    for model in (actors.policy, actors.value_model):
        if model is not None:
            cluster.rest(model)
    logprobs, ref_logprobs, values, entropy = (
        cluster.collect(x, hand) for x in (logprobs, ref_logprobs, values, entropy)
    )
    return rollout, ScoredRollout(logprobs, ref_logprobs, values, scores), entropy


def shape(actors: Actors, rollout: Rollout, scored: ScoredRollout, config: RunConfig) -> tuple[ShapedReward, Tensor]:
    """The reward of each token before whitening, and the scores that are paid in it."""
    mask, shaping, kl = rollout.response_mask, config.shaping, config.kl
    seen = actors.state.add_scores(scored.scores)
    paid = shaping.scores(scored.scores, rollout.finished, mask.sum(dim=1), seen)
    observed = kl_estimate(scored.logprobs, scored.ref_logprobs, mask)
    penalty = kl_estimate(scored.logprobs, scored.ref_logprobs, mask, estimator=kl.estimator)
    coef = actors.state.kl_coef if kl.place == "reward" else 0.0
    slots = reward_slots(mask, shaping.score_position)
    return shape_reward(paid, observed, penalty, slots, coef=coef), paid


def importance_of(rollout: Rollout, scored: ScoredRollout, cap: float | None) -> Tensor:
    """Each token's weight in the policy's loss, 1 where the engine is taken for the policy."""
    if cap is None:
        return rollout.response_mask.to(scored.logprobs.dtype)
    return truncated_importance(
        scored.logprobs, rollout.engine_logprobs.to(scored.logprobs.dtype), rollout.response_mask, cap
    )


def encode_prompts(prompts: list[Prompt], actors: Actors, longest: int, batch: int) -> list[tuple[Prompt, list[int]]]:
    """Prompts with their ids; those longer than `longest` tokens are left out and counted."""
    kept, left_out = prompts_within(prompts, actors.encoder, longest)
    if actors.cluster.is_main and left_out:
        count = f"{left_out} of {len(prompts)}"
        print(f"ppo: {count} prompts left out: empty or longer than ppo.max_prompt={longest}")
    if len(kept) < batch:
        raise UserError(
            f"an iteration takes {batch} prompts (ppo.batch / ppo.samples_per_prompt), but there are only {len(kept)} "
            f"training prompts of at most ppo.max_prompt={longest} tokens: lower ppo.batch, raise ppo.max_prompt or "
            "give more data"
        )
    return kept


def save_policy(actors: Actors, state: dict[str, Tensor], job: Job) -> None:
    """The trained policy in the format that it came in, or its adapter; `state` is not copied."""
    base = model_folder(job.inputs["policy"])
    with skeletons():
        model = load_causal(base)
        if job.config.peft.method != "none":
            add_adapter(model, job.config.peft, "CAUSAL_LM")
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    save_trained(model, actors.encoder, job, base)
