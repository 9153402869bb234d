"""The optimizer steps of an iteration: minibatches, the losses, the gradient, the step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alignkit.algo.advantage import normalise
from alignkit.algo.batching import permutation
from alignkit.algo.kl import LOG_RATIO_LIMIT, kl_loss
from alignkit.algo.losses import aggregate, clipped_policy_loss, clipped_value_loss
from alignkit.algo.types import Minibatch
from alignkit.errors import NotFinite
from alignkit.models.policy import response_logprobs
from alignkit.observe.metrics import Max, Mean, Metrics, reduce
from alignkit.stages.ppo_checks import check_ratio, computing_dtype
from alignkit.stages.ptx import PtxBatches, ptx_backward

if TYPE_CHECKING:
    from alignkit.runtime.config import RunConfig
    from alignkit.stages.actors import Actors
    from alignkit.stages.settings import PPOSettings


def train_on(actors: Actors, batch: Minibatch, ptx: PtxBatches, config: RunConfig) -> Metrics:
    """`epochs` passes over the rows of an iteration; ends early where the policy has moved by `stop_kl`."""
    metrics, state = Metrics(), actors.state
    train_policy = state.iteration >= config.ppo.value_warmup
    for number, minibatch in enumerate(minibatches(batch, config, state.iteration)):
        if config.advantage.whiten == "minibatch":
            advantages, options = minibatch.advantages, config.advantage
            whitened = normalise(advantages, minibatch.response_mask, options.whiten, options.clip, over="minibatch")
            minibatch = replace(minibatch, advantages=whitened)
        if not ppo_update(actors, minibatch, ptx, config, metrics, first=number == 0, train_policy=train_policy):
            break
    return metrics


def minibatches(batch: Minibatch, config: RunConfig, iteration: int) -> Iterator[Minibatch]:
    """`epochs` passes over the rows, each in a fresh order, cut into minibatches: the same on every rank."""
    for epoch in range(config.ppo.epochs):
        order = permutation(len(batch), config.seed, iteration, epoch).to(batch.tokens.device)
        for rows in order.split(config.ppo.minibatch):
            yield batch.rows(rows)


def ppo_update(
    actors: Actors, minibatch: Minibatch, ptx: PtxBatches, config: RunConfig, metrics: Metrics, *,
    first: bool, train_policy: bool = True,
) -> bool:  # fmt: skip
    """One optimizer step of the policy and one of the value model; False if `stop_kl` was reached and none was taken.

    Losses are divided by the number of tokens (or rows) of the whole minibatch, so that the gradient depends on neither
    `microbatch_tokens`, nor padding, nor the order of rows, nor the number of ranks.
    """
    settings, cluster = config.ppo, actors.cluster
    hand, device = cluster.deal(minibatch.mask.sum(dim=1)), minibatch.tokens.device
    local = minibatch.rows(hand.rows.to(device)).only(hand.real.to(device))
    lengths, budget = local.mask.sum(dim=1), settings.microbatch_tokens
    micros = [local.rows(rows) for rows in cluster.microbatches(lengths, budget)]
    for micro in micros:
        real = micro.mask.sum()
        held = real if settings.packing else micro.mask.shape[0] * micro.mask.sum(dim=1).max()
        metrics.add("padding_fraction", Mean(held - real, held))

    if train_policy:  # the policy first, then the value model: their activations never live together
        moved = policy_backward(actors, micros, minibatch, config, metrics, first=first)
        if settings.stop_kl is not None and moved > settings.stop_kl:
            actors.policy_optimizer.zero_grad()
            return False
        ptx_backward(actors, ptx, config.ptx, budget, metrics)
        if not settings.joint:
            step(actors, ["policy"], settings.max_grad_norm, metrics)
    if actors.value_model is not None:
        value_backward(actors, actors.value_model, micros, minibatch, settings, metrics)
        step(
            actors,
            ["policy", "value"] if settings.joint and train_policy else ["value"],
            settings.max_grad_norm,
            metrics,
        )
    return True


def policy_backward(
    actors: Actors, micros: list[Minibatch], whole: Minibatch, config: RunConfig, metrics: Metrics, *, first: bool
) -> float:
    """Add up the policy's gradient over micro-batches. Returns the mean of (log ratio)^2 / 2 over the minibatch and all
    ranks (0 where neither `stop_kl` nor a check asks for it)."""
    settings, kl = config.ppo, config.kl
    counts = {"tokens": int(whole.response_mask.sum()), "rows": len(whole)}
    here = Metrics()
    for number, micro in enumerate(micros, start=1):
        actors.cluster.accumulate(actors.policy, last=number == len(micros))
        mask = micro.response_mask
        logprobs, entropy = response_logprobs(
            actors.policy, micro.tokens, micro.mask, mask, actors.rule, entropy=settings.entropy_coef > 0
        )
        loss, clipped = clipped_policy_loss(
            logprobs, micro.old_logprobs, micro.advantages * micro.importance, mask,
            clip=settings.clip, clip_high=settings.clip_high, dual_clip=settings.dual_clip,
        )  # fmt: skip
        metrics.add("policy_loss", Mean(loss.detach().sum(), mask.sum()))
        if kl.place == "loss":
            penalty = kl_loss(logprobs, micro.ref_logprobs, mask, estimator=kl.estimator)
            metrics.add("kl_loss", Mean(penalty.detach().sum(), mask.sum()))
            loss = loss + actors.state.kl_coef * penalty
        if entropy is not None:
            loss = loss - settings.entropy_coef * torch.where(mask, entropy, 0.0)
        aggregate(loss, mask, settings.loss_aggregation, **counts).backward()
        _ratio_metrics(metrics, here, clipped, logprobs.detach(), micro)
    if not (settings.stop_kl is not None or (first and settings.self_checks)):
        return 0.0
    ratio = reduce(here, actors.cluster.sum, actors.cluster.max).values()
    if first and settings.self_checks:
        metrics.add("ratio_error", Max(torch.tensor(ratio["largest"])))
        check_ratio(ratio["mean"], ratio["largest"], computing_dtype(actors))
    return ratio["approx_kl"]


def _ratio_metrics(metrics: Metrics, here: Metrics, clipped: Tensor, logprobs: Tensor, micro: Minibatch) -> None:
    mask = micro.response_mask
    count = mask.sum()
    log_ratio = torch.where(mask, logprobs - micro.old_logprobs, 0.0)
    approx_kl = Mean(0.5 * log_ratio.square().sum(), count)
    metrics.add("approx_kl", approx_kl)
    metrics.add("clip_fraction", Mean(clipped.sum(), count))
    metrics.add("ratio_cut_fraction", Mean((log_ratio.abs() > LOG_RATIO_LIMIT).sum(), count))
    here.add("approx_kl", approx_kl)
    here.add("mean", Mean(log_ratio.abs().sum(), count))
    here.add("largest", Max(log_ratio.abs().max()))


def value_backward(
    actors: Actors, model: nn.Module, micros: list[Minibatch], whole: Minibatch, settings: PPOSettings, metrics: Metrics
) -> None:
    """Add up the value model's gradient over micro-batches."""
    counts = {"tokens": int(whole.value_mask.sum()), "rows": len(whole)}
    for number, micro in enumerate(micros, start=1):
        actors.cluster.accumulate(model, last=number == len(micros))
        width, mask = micro.value_mask.shape[1], micro.value_mask
        values = model(micro.tokens, micro.mask)[:, -width - 1 : -1]
        loss, clipped = clipped_value_loss(values, micro.old_values, micro.returns, mask, clip=settings.value_clip)
        (settings.value_coef * aggregate(loss, mask, settings.loss_aggregation, **counts)).backward()
        metrics.add("value_loss", Mean(loss.detach().sum(), mask.sum()))
        metrics.add("value_clip_fraction", Mean(clipped.sum(), mask.sum()))


def step(actors: Actors, names: list[str], max_norm: float | None, metrics: Metrics) -> None:
    """Clip the gradient over the named models together, and let their optimizers step."""
    models: dict[str, Any] = {"policy": actors.policy, "value": actors.value_model}
    optimizers: dict[str, Any] = {"policy": actors.policy_optimizer, "value": actors.value_optimizer}
    norm = actors.cluster.clip_gradient([models[name] for name in names], max_norm)
    if not bool(torch.isfinite(norm)):
        raise NotFinite(f"{' and '.join(names)} gradient is not finite (NaN or infinity)")
    for name in names:
        optimizers[name].step()
        optimizers[name].zero_grad()
        metrics.add(f"{name}_grad_norm", Mean(norm, 1))
        if max_norm is not None:
            metrics.add(f"{name}_grad_clip_fraction", Mean((norm > max_norm).double(), 1))
    actors.state.policy_steps += "policy" in names
    actors.state.value_steps += "value" in names
    if actors.ema is not None and "policy" in names:
        actors.ema.update(actors.policy)
