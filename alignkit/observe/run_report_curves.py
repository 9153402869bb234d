"""The curves of a run's report: what each stage logged, as pictures."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from alignkit.observe.charts import interval_chart
from alignkit.observe.plot import Series, line_chart
from alignkit.observe.run_folder import StageFolder

POINTS = 300  # of a curve at most
SMOOTH = 25  # means of this many stretches, drawn over a curve that has many more points
RATES = {
    "win_rate": "win rate over SFT",
    "length_controlled_win_rate": "at equal length",
    "win_rate_over_samples": "over many samples of SFT",
    "best_of_32_win_rate": "best of 32 of SFT",
}


class Curve(NamedTuple):
    """One picture. names: metric -> its name in the legend; held_out: those that are drawn as points; smooth: draw a
    running mean beside the noise."""

    y_label: str
    names: dict[str, str]
    caption: str
    held_out: tuple[str, ...] = ()
    smooth: bool = False


CURVES = {
    "sft": (
        Curve("loss, nats a token", {"loss": "batch", "eval_loss": "held out"}, "Loss.", ("eval_loss",), True),
        Curve("share of tokens", {"mean_token_accuracy": "batch"}, "Tokens that the model puts first.", (), True),
        Curve("norm", {"grad_norm": "gradient"}, "Norm of the gradient before it is cut.", (), True),
    ),
    "reward_model": (
        Curve("loss, nats a pair", {"loss": "batch", "eval_loss": "held out"}, "Loss.", ("eval_loss",), True),
        Curve("share of pairs", {"accuracy": "batch", "eval_accuracy": "held out"}, "Pairs in the right order.",
              ("eval_accuracy",), True),
        Curve("score", {"margin": "batch", "eval_margin": "held out"}, "Margin: chosen less rejected.",
              ("eval_margin",), True),
        Curve("norm", {"grad_norm": "gradient"}, "Norm of the gradient before it is cut.", (), True),
    ),
    "ppo": (
        Curve("score", {"score_mean": "score", "gold_mean": "gold score"},
              "Score that PPO climbs, and where the data knows it the gold score, which it does not see."),
        Curve("nats a sequence", {"kl": "KL to the start"}, "KL; the dashed line is its target."),
        Curve("coefficient", {"kl_coef": "KL coefficient"}, "Price of a nat of KL."),
        Curve("nats a token", {"entropy": "entropy"}, "Entropy of the policy; a sudden fall is a collapse."),
        Curve("share of tokens", {"clip_fraction": "policy", "value_clip_fraction": "values"},
              "Tokens whose update is clipped."),
        Curve("share", {"explained_variance": "explained variance"},
              "How much of the returns the value model foresees: 1 is all, 0 nothing."),
        Curve("tokens", {"response_length": "length"}, "Length of responses."),
        Curve("share of responses", {"eos_fraction": "ended"}, "Responses that end by themselves."),
        Curve("loss", {"policy_loss": "policy", "value_loss": "values"}, "Losses."),
        Curve("norm", {"policy_grad_norm": "policy", "value_grad_norm": "values"}, "Norms of the gradients."),
        Curve("win rate", {"eval_win_rate": "win rate"}, "Win rate over the start in looks at held-out prompts."),
    ),
}  # fmt: skip


def stage_pictures(stage: StageFolder) -> list[tuple[str, str]]:
    """(SVG, caption) of all that the stage logged and CURVES knows."""
    drawn = []
    for curve in CURVES.get(stage.stage, ()):
        series = list(_series(stage, curve))
        if series:
            drawn.append((line_chart(series, stage.step, curve.y_label, curve.caption), curve.caption))
    return [*drawn, *_seconds(stage), *_score_against_kl(stage)]


def _series(stage: StageFolder, curve: Curve) -> Iterator[Series]:
    for name, label in curve.names.items():
        x, y = stage.column(name)
        if name == "kl":
            yield from _target(stage)
        if not x:
            continue
        if name in curve.held_out:
            yield Series(label, *thinned(x, y), kind="points")
        elif curve.smooth and len(x) > 3 * SMOOTH:
            yield Series(label, *thinned(x, y), kind="faint")
            yield Series("running mean", *thinned(x, y, SMOOTH), kind="line")
        else:
            yield Series(label, *thinned(x, y), kind="line")


def _target(stage: StageFolder) -> Iterator[Series]:
    x, y = stage.column("kl_target")
    if x:
        yield Series(f"target {y[-1]:g}", [x[0], x[-1]], [y[0], y[-1]], kind="guide")


def _seconds(stage: StageFolder) -> Iterator[tuple[str, str]]:
    """Seconds of an iteration by phase."""
    start = f"{stage.stage}/seconds/"
    keys = dict.fromkeys(key for row in stage.metrics for key in row if key.startswith(start))
    phases = [key.removeprefix(start) for key in keys if not key.endswith("/iteration")]
    series = [Series(phase, *thinned(*stage.column(f"seconds/{phase}")), kind="line") for phase in phases[:5]]
    if series := [s for s in series if s.x]:
        caption = "Seconds of an iteration by phase."
        yield line_chart(series, stage.step, "seconds", caption), caption


def _score_against_kl(stage: StageFolder) -> Iterator[tuple[str, str]]:
    """One point an iteration; gold scores, where known, show when the climb goes on at their cost."""
    rows = [row for row in stage.metrics if row.get("ppo/kl") is not None]
    names = {"ppo/score_mean": "score", "ppo/gold_mean": "gold score"}
    series = []
    for key, label in names.items():
        found = [(row["ppo/kl"], row[key]) for row in rows if row.get(key) is not None]
        found = found[:: math.ceil(len(found) / POINTS) or 1]
        if found:
            series.append(Series(label, [x for x, _ in found], [y for _, y in found], kind="points"))
    if not series:
        return
    ys = [y for s in series for y in s.y]
    targets = stage.column("kl_target")[1]
    guide = [Series(f"target {targets[-1]:g}", [targets[-1]] * 2, [min(ys), max(ys)], kind="guide")] if targets else []
    caption = "Score against KL, one point an iteration; the dashed line is the target."
    yield line_chart([*guide, *series], "KL, nats a sequence", "score", caption), caption


def thinned(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> tuple[list[float], list[float]]:
    """Means of at most so many stretches of equally many rows; the rows themselves where there are no more."""
    size = math.ceil(len(x) / points) if x else 1
    cut = range(0, len(x), size)
    return [statistics.fmean(x[i : i + size]) for i in cut], [statistics.fmean(y[i : i + size]) for i in cut]


def win_rates(figures: Mapping[str, Any]) -> str:
    """The win rates of an evaluation with their intervals, as SVG; "" without."""
    rows = [
        (name, figures[key], figures.get(f"{key}_low", math.nan), figures.get(f"{key}_high", math.nan))
        for key, name in RATES.items()
        if figures.get(key) is not None
    ]
    return interval_chart(rows, "share of prompts won, and 95% interval") if rows else ""
