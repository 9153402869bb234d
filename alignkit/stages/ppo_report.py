"""What an iteration tells: metrics, samples, seconds by phase; and what is saved when it cannot go on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from alignkit.algo.control import AdaptiveKL
from alignkit.algo.kl import LOG_RATIO_LIMIT
from alignkit.algo.masked import moments
from alignkit.algo.types import Advantages, Minibatch, Rollout, ScoredRollout, ShapedReward
from alignkit.data.tokens import show
from alignkit.observe.tracking import write_rows
from alignkit.stages.ppo_checks import engine_gap

if TYPE_CHECKING:
    from alignkit.data.corpus import Prompt
    from alignkit.observe.tracking import Tracker
    from alignkit.runtime.config import RunConfig
    from alignkit.stages.actors import Actors
    from alignkit.stages.settings import PPOSettings

HISTOGRAMS = 50


class Timers:
    """Seconds of an iteration by phase; on a GPU also the peak of the memory that torch has allocated, in GiB."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began, cuda = time.perf_counter(), torch.cuda.is_available()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        yield
        if cuda:
            torch.cuda.synchronize()
            self.peaks[phase] = max(self.peaks.get(phase, 0.0), torch.cuda.max_memory_allocated() / 2**30)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began

    def values(self, tokens: int) -> dict[str, float]:
        """seconds/<phase>, seconds/iteration, prompt plus response tokens per second of the iteration; on a GPU
        peak_memory_gib/<phase> of this rank."""
        total = sum(self.seconds.values())
        named = {f"seconds/{phase}": seconds for phase, seconds in self.seconds.items()}
        named |= {f"peak_memory_gib/{phase}": peak for phase, peak in self.peaks.items()}
        return {**named, "seconds/iteration": total, "tokens_per_second": tokens / total}


def iteration_metrics(
    rollout: Rollout, scored: ScoredRollout, shaped: ShapedReward, target: Advantages, entropy: Tensor,
    samples: list[dict[str, Any]], actors: Actors, config: RunConfig,
) -> dict[str, float]:  # fmt: skip
    """What the rollouts of an iteration say, before any update. KL in nats per sequence, entropy in nats per token."""
    mask = rollout.response_mask
    tokens = float(mask.sum())
    kl = float(shaped.kl.sum(dim=1).mean())
    scores = scored.scores.double()
    values = {
        "kl": kl,
        "kl_coef": actors.state.kl_coef,
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std(correction=0)),
        "reward_mean": float(shaped.per_token.sum(dim=1).mean()),
        "entropy": float(entropy.sum()) / tokens,
        "response_length": tokens / len(mask),
        "eos_fraction": float(rollout.finished.double().mean()),
        "learning_rate": actors.policy_optimizer.param_groups[0]["lr"],
    }
    values["engine_gap"], values["engine_gap_max"] = engine_gap(rollout, scored)
    if actors.value_model is not None:
        count, _, squares = moments(target.returns, shaped.mask).tolist()
        values["return_std"] = math.sqrt(squares / count)
        values["explained_variance"] = explained_variance(scored.values, target.returns, shaped.mask)
    if config.shaping.running != "none":
        count, mean, squares = actors.state.score_moments
        values |= {"score_running_mean": mean, "score_running_std": math.sqrt(squares / count)}
    if config.kl.target is not None:
        values["kl_target"] = config.kl.target
    if actors.reward_failures is not None:
        values["reward_failures"] = actors.reward_failures
    if samples and "gold" in samples[0]:
        values["gold_mean"] = math.fsum(row["gold"] for row in samples) / len(samples)
    return values


def five_numbers(values: dict[str, float]) -> list[str]:
    """What to watch while it runs, what matters most first: score, KL (and its target) in nats a sequence, entropy in
    nats a token, tokens a response, seconds an iteration."""
    target = f"/{values['kl_target']:g}" if "kl_target" in values else ""
    return [
        f"score {values['score_mean']:.2f}",
        f"KL {values['kl']:.2f}{target}",
        f"entropy {values['entropy']:.2f}",
        f"length {values['response_length']:.1f}",
        f"{values['seconds/iteration']:.2f} s/iteration",
    ]


def draw_histograms(tracker: Tracker, rows: list[dict[str, Any]], iteration: int, settings: PPOSettings) -> None:
    """How scores, KL and lengths are spread over the responses, at most HISTOGRAMS times in a run."""
    if (iteration - 1) % math.ceil(settings.iterations / HISTOGRAMS) == 0:
        spread = {name: [row[name] for row in rows] for name in ("score", "kl", "length")}
        tracker.histograms(spread, step=iteration * settings.batch)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the masked slots, a constant offset not counted; 1 is perfect, 0 no
    better than a constant."""
    count, _, squares = moments(returns, mask).tolist()
    _, _, residual = moments(returns - values, mask).tolist()
    return 1.0 - residual / squares if count and squares > 0 else 0.0


def sample_rows(
    prompts: list[tuple[Prompt, list[int]]], texts: list[str], rollout: Rollout, scored: ScoredRollout,
    shaped: ShapedReward, gold: Callable[[Prompt, str], float] | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row a response, as a person reads it: prompt, response, score (gold where known), KL in nats, tokens."""
    lengths, kls, scores = (
        rollout.response_mask.sum(dim=1).tolist(),
        shaped.kl.sum(dim=1).tolist(),
        scored.scores.tolist(),
    )
    rows = []
    for (prompt, _), text, length, kl, score, finished in zip(
        prompts, texts, lengths, kls, scores, rollout.finished.tolist()
    ):
        row = {
            "prompt": show(prompt),
            "response": text,
            "score": score,
            "kl": kl,
            "length": length,
            "finished": finished,
        }
        rows.append({**row, "gold": gold(prompt, text)} if gold else row)
    return rows


def save_evidence(folder: Path, batch: Minibatch, scored: ScoredRollout, samples: list[dict[str, Any]]) -> None:
    """All tensors and texts of an iteration that failed, for a person to look at."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {field.name: getattr(batch, field.name) for field in fields(Minibatch)}
    tensors["scores"] = scored.scores
    save_file(
        {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()},
        folder / "batch.safetensors",
    )
    write_rows(folder / "samples.jsonl", samples)


def tell_before(config: RunConfig, num_prompts: int) -> None:
    """How often each prompt will be used, and a warning if the KL coefficient cannot even double within the run."""
    settings = config.ppo
    uses = settings.episodes / settings.samples_per_prompt / num_prompts
    many = "; above 4 the policy may learn them by heart: watch the held-out win rate" if uses > 4 else ""
    print(f"ppo: {num_prompts} prompts for {settings.episodes} episodes: each is used {uses:.1f} times{many}")
    if isinstance(config.kl, AdaptiveKL):
        reach = config.kl.reach(iterations=settings.iterations, episodes=settings.batch)
        if reach < 2:
            print(
                f"ppo: warning: with kl.horizon={config.kl.horizon} the KL coefficient can change {reach:.2f}-fold at "
                f"most in {settings.iterations} iterations; lower it to reach kl.target={config.kl.target}"
            )


def tell_weights(actors: Actors) -> None:
    """The bytes of weights that this rank holds, each base once however many models compute with it."""
    seen: set[int] = set()
    parts = []
    owners = {"reference": actors.reference, "policy": actors.policy, "value": actors.value_model}
    for name, model in {**owners, "reward": getattr(actors.reward, "model", None)}.items():
        if isinstance(model, torch.nn.Module):
            parts.append(f"{name} {weight_bytes(model, seen) / 2**20:.1f} MiB")
        elif model is not None:
            parts.append(f"{name} shared")
    print(f"ppo: weights on this rank: {', '.join(parts)}")


def weight_bytes(model: torch.nn.Module, seen: set[int]) -> int:
    """Bytes of the parameters (this rank's shards) that are not in `seen` yet; they are afterwards."""
    total = 0
    for parameter in model.parameters():
        here = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        place = here.untyped_storage().data_ptr()
        if place not in seen:
            seen.add(place)
            total += here.nbytes
    return total


def guards(values: dict[str, float], settings: PPOSettings) -> dict[str, str]:
    """Which limits on numbers have acted so that a person should know, by kind, in words. (How often each of them acts
    is in every row: clip_fraction, value_clip_fraction, *_grad_clip_fraction, ratio_cut_fraction.)"""
    acted = {}
    if cut := values.get("ratio_cut_fraction", 0.0):
        acted["log_ratio"] = (
            f"new and old policy differ by over {LOG_RATIO_LIMIT:g} nats at {cut:.1%} of the tokens, whose ratio was "
            "cut: the policy moves too far in an iteration; lower ppo.learning_rate or ppo.epochs, or set ppo.stop_kl"
        )
    spread, clip = values.get("return_std", 0.0), settings.value_clip
    if clip is not None and spread > 10 * clip:
        acted["value_clip"] = (
            f"returns spread by {spread:.2g} (standard deviation), but ppo.value_clip={clip} holds values within that "
            "of the old ones: raise it, set it to null or normalise rewards"
        )
    return acted


def looks_of(history: list[dict[str, float]], settings: PPOSettings) -> dict[str, float]:
    """What the judge said of the policy that is saved: in the last look, or with keep=best in the best; {} without."""
    looks = [(number, row) for number, row in enumerate(history, start=1) if "eval_best_iteration" in row]
    if not looks:
        return {}
    best = int(looks[-1][1]["eval_best_iteration"])
    found: dict[str, float] = {"best_iteration": best}
    if settings.keep == "best":  # nothing was looked at before the first iteration but the start itself
        looks = [(number, row) for number, row in looks if number == best]
    return (
        {**found, **{key: value for key, value in looks[-1][1].items() if key.startswith("eval_")}} if looks else found
    )


def summary_of(history: list[dict[str, float]], config: RunConfig, seconds: float) -> dict[str, float]:
    """Means over the last fifth of the iterations (at least one): what the run settled at."""
    last = history[-max(1, len(history) // 5) :]
    names = ("kl", "kl_coef", "score_mean", "gold_mean", "entropy", "response_length", "eos_fraction", "clip_fraction")
    result = {name: math.fsum(row[name] for row in last) / len(last) for name in names if name in last[0]}
    if config.kl.target is not None:
        result["kl_target"] = config.kl.target
    result.update(looks_of(history, config.ppo))
    result.update(
        iterations=len(history),
        episodes=len(history) * config.ppo.batch,
        score_first=history[0]["score_mean"],
        seconds_training=round(seconds, 1),
    )
    return result
