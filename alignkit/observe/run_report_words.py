"""What a run's report says in sentences: a verdict on each stage, and what to be careful of."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alignkit.observe.alerts import alerts_in
from alignkit.observe.closing import ROWS
from alignkit.observe.run_folder import RunFolder, StageFolder, is_number

NEAR, FAR = 1.25, 1.5  # times the KL target: up to here it is met, from here it is far above
FEWEST = 10  # iterations below which a fall of the gold score is not told from noise


def verdict(stage: StageFolder) -> str:
    """One sentence on what the stage came to."""
    if not stage.manifest:
        step = stage.metrics[-1].get(stage.step_key) if stage.metrics else None
        how_far = f"its last row of metrics is at {stage.step_key} {step:,}" if is_number(step) else "no row of metrics"
        return f"Not finished: {how_far}."
    try:
        return VERDICTS.get(stage.stage, _figures)(stage.figures, stage)
    except (KeyError, TypeError):  # of an older version, which knew fewer figures
        return _figures(stage.figures, stage)


def _sft(found: Mapping[str, Any], stage: StageFolder) -> str:
    held_out = f"Held-out loss {found['eval_loss']:.3f} nats a token, a perplexity of {found['eval_perplexity']:.4g}"
    _, losses = stage.column("loss")
    began = f"; training began at a loss of {losses[0]:.3f}" if losses else ""
    return f"{held_out}, after {found['train_rows']:,} texts{began}."


def _reward_model(found: Mapping[str, Any], stage: StageFolder) -> str:
    accuracy, bag = found["eval_accuracy"], found["eval_accuracy_bag_of_words"]
    beside = (
        "better than" if found["eval_accuracy_low"] > bag else "no better than" if accuracy <= bag else "hardly above"
    )
    gate = {True: "; it passed the gate", False: "; the gate FAILED"}.get(stage.report["gate"]["passes"], "")
    return (
        f"It orders {accuracy:.1%} of {found['eval_pairs']:,} held-out pairs rightly (95% "
        f"{found['eval_accuracy_low']:.1%} to {found['eval_accuracy_high']:.1%}), {beside} a bag of words "
        f"({bag:.1%}){gate}."
    )


def _ppo(found: Mapping[str, Any], _: StageFolder) -> str:
    text = f"The score went from {found['score_first']:.2f} to {found['score_mean']:.2f} (mean of the last fifth)"
    if "gold_mean" in found:
        text += f", the gold score ended at {found['gold_mean']:.2f}"
    kl, target = found["kl"], found.get("kl_target")
    if not target:
        return f"{text}, at a KL of {kl:.2f} nats a sequence, which has no target."
    place = (
        "below"
        if kl * NEAR < target
        else "near"
        if kl <= target * NEAR
        else "above"
        if kl < target * FAR
        else "FAR above"
    )
    return f"{text}, at a KL of {kl:.2f} nats a sequence, {place} its target of {target:g}."


def _evaluate(found: Mapping[str, Any], _: StageFolder) -> str:
    rate, low, high = (found[f"win_rate{end}"] for end in ("", "_low", "_high"))
    word = "better than" if low > 0.5 else "worse than" if high < 0.5 else "not to be told apart from"
    judge = f"judge {found['judge']}" + ", the very score that PPO climbed" * bool(found["judge_is_the_reward"])
    return (
        f"PPO is {word} its start: it wins {rate:.1%} of {found['prompts']:,} held-out prompts (95% {low:.1%} to "
        f"{high:.1%}; {judge})."
    )


def _figures(found: Mapping[str, Any], stage: StageFolder) -> str:
    labels = {
        key.partition("/")[2]: (label.strip(), form) for _, label, key, form in ROWS if key.startswith(stage.stage)
    }
    told = [f"{label} {form.format(found[key])}" for key, (label, form) in labels.items() if is_number(found.get(key))]
    return f"{'; '.join(told) or 'Finished'}."


VERDICTS: dict[str, Callable[[Mapping[str, Any], StageFolder], str]] = {
    "sft": _sft,
    "reward_model": _reward_model,
    "ppo": _ppo,
    "evaluate": _evaluate,
}


def warnings(run: RunFolder) -> list[str]:
    """What a person should know before using the model, each with the stage it is of."""
    told = [f"Before the start: {text}" for text in run.preflight]
    for stage in run.stages:
        found = [str(text) for text in stage.report.get("warnings") or ()]
        found += alerts_in(stage.figures)
        found += [*_not_finite(stage.metrics), *_far_from_target(stage), *_over_optimised(stage)]
        told += [f"{stage.title}: {text}" for text in found]
    return told


def _not_finite(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [row["nonfinite"] for row in metrics if row.get("nonfinite")]
    names = ", ".join(sorted({str(name) for row in rows for name in row})[:6])
    return [f"{len(rows):,} rows of metrics hold NaN or infinity, in {names}"] if rows else []


def _far_from_target(stage: StageFolder) -> list[str]:
    kl, (_, targets) = last_fifth(stage.column("kl")[1]), stage.column("kl_target")
    if stage.stage != "ppo" or not kl or not targets or statistics.fmean(kl) < FAR * targets[-1]:
        return []
    return [
        f"KL is {statistics.fmean(kl):.1f} nats a sequence over the last fifth, far above its target of "
        f"{targets[-1]:g}: raise kl.coef, lower kl.horizon or ppo.learning_rate"
    ]


def _over_optimised(stage: StageFolder) -> list[str]:
    """Gold scores known while training: whether they fell from their best fifth to the last, by more than twice the
    standard error of the difference, while the score that is optimised rose."""
    found = ((row.get("ppo/score_mean"), row.get("ppo/gold_mean"), row.get("ppo/kl")) for row in stage.metrics)
    rows = [(s, g, k) for s, g, k in found if is_number(s) and is_number(g) and is_number(k)]
    if len(rows) < FEWEST:
        return []
    size = max(len(rows) // 5, 2)
    fifths = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
    means = [[statistics.fmean(column) for column in zip(*fifth)] for fifth in fifths]
    errors = [statistics.stdev([gold for _, gold, _ in fifth]) / math.sqrt(size) for fifth in fifths]
    best = max(range(len(means)), key=lambda number: means[number][1])
    fell = means[best][1] - means[-1][1]
    if fell <= 2 * math.hypot(errors[best], errors[-1]) or means[-1][0] <= means[best][0]:
        return []
    return [
        f"over-optimised: the score rose to {means[-1][0]:.2f}, but the gold score fell from {means[best][1]:.2f} (at "
        f"a KL of {means[best][2]:.1f}) to {means[-1][1]:.2f} (at {means[-1][2]:.1f}): raise kl.coef, lower kl.target, "
        "or stop earlier (ppo.keep=best)"
    ]


def last_fifth(values: Sequence[float]) -> Sequence[float]:
    """Of a column, at least one value; none of an empty one."""
    return values[-max(1, len(values) // 5) :]
