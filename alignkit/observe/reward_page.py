"""report.html of a reward model: its report.json as a page with pictures."""

import math
from typing import Any

from alignkit.observe.page import folded, heading, page, paragraph, pictures, table
from alignkit.observe.plot import Series, line_chart


def reward_page(report: dict[str, Any]) -> str:
    """The whole page from the content of report.json."""
    warnings = [paragraph(f"Warning: {text}", alarm=True) for text in report["warnings"]]
    return page(
        "Reward model",
        [
            *(warnings or [paragraph("Nothing to warn of was found.")]),
            heading("On pairs that it has not seen"),
            table(["figure", "value", "95% interval"], figures_of(report)),
            paragraph(f"Intervals: {report['interval']}."),
            pictures(pictures_of(report)),
            heading("Scores"),
            table(["responses", "number", "mean", "deviation"], _scores(report["scores"])),
            *_subsets(report["subsets"]),
            folded("Accuracy by margin, in numbers", _bins(report)),
        ],
    )


def figures_of(report: dict[str, Any]) -> list[list[str]]:
    """Rows of figure, value and interval."""
    length, temperature = report["length"], report["temperature"]
    verdict = {True: "passed", False: "FAILED", None: "not applied"}[report["gate"]["passes"]]
    bound = {None: "", "lowest": " (the lowest tried)", "highest": " (the highest tried)"}[temperature["bound"]]
    return [
        _row("accuracy", report["accuracy"]),
        ["gate: is its order better than chance?", verdict, ""],
        ["a bag of words reaches", _share(report["accuracy_bag_of_words"]), ""],
        ["calibration error (ECE)", _number(report["ece"]), ""],
        ["calibration error after temperature (on pairs it was not fitted on)",
         _number(report["ece_after_temperature"]), ""],
        ["temperature", _number(temperature["value"]) + bound, ""],
        _row("claimed less seen accuracy", report["overconfidence"]),
        _row("accuracy where the better response is shorter", length["shorter_better"]),
        _row("accuracy where the better response is longer", length["longer_better"]),
        _row("difference of the two", length.get("difference")),
        _row("pairs in which it prefers the longer response", length["model"]),
        _row("pairs in which people prefer the longer response", length["people"]),
        ["correlation of score and length (ranks)", _number(length["spearman"]), ""],
        ["correlation of score and length (Pearson)", _number(length["pearson"]), ""],
    ]  # fmt: skip


def _row(name: str, estimate: dict[str, Any] | None) -> list[str]:
    if estimate is None or estimate["value"] is None:
        return [name, "not known", ""]
    interval = f"{_share(estimate['low'])} to {_share(estimate['high'])} ({estimate['count']:,} pairs)"
    return [name, _share(estimate["value"]), interval]


def pictures_of(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Reliability, accuracy by margin, scores and score against length, as (SVG, caption)."""
    before, after = report["reliability"], report["reliability_after_temperature"] or []
    scale = report["temperature"]["value"]
    reliability = [
        Series("perfect", [0.5, 1.0], [0.5, 1.0], kind="guide"),
        _curve("as it is", "confidence", before),
        *([_curve("with temperature", "confidence", after)] if after else []),
    ]
    most = max(b["margin"] for b in before) or 1.0
    margins = [most * i / 40 for i in range(41)]
    by_margin = [
        Series("claimed", margins, [_sigmoid(m) for m in margins], kind="guide"),
        _curve("seen", "margin", before),
        Series("claimed with temperature", margins, [_sigmoid(m / scale) for m in margins], kind="line"),
    ]
    points = [
        Series(name, [x for x, _ in rows], [y for _, y in rows], kind="points")
        for name, rows in report["points"].items()
    ]
    steps = [Series(**series) for series in report["histogram"]]
    return [
        (line_chart(reliability, "claimed probability of the order", "share of pairs in that order"),
         "Reliability: on the line a claim of 80% is right in 80% of pairs; below it the model claims too much."),
        (line_chart(by_margin, "margin: difference of the two scores", "share of pairs in the right order"),
         "Accuracy by margin, bins of equally many pairs."),
        (line_chart(steps, "score", "share of each kind"),
         "Scores of held-out responses by side, and of responses sampled from the model that PPO will start from."),
        (line_chart(points, "tokens of the response", "score"), "Score against length."),
    ]  # fmt: skip


def _curve(name: str, key: str, bins: list[dict[str, Any]]) -> Series:
    columns = {end: [b[end] for b in bins] for end in (key, "accuracy", "low", "high")}
    return Series(name, columns[key], columns["accuracy"], columns["low"], columns["high"])


def _scores(scores: dict[str, dict[str, float]]) -> list[list[str]]:
    rows = []
    for name, facts in scores.items():
        if "finished" in facts:
            name += f" ({facts['finished']:.0%} ended by themselves, {facts['length']:.1f} tokens on average)"
        count = f"{facts['count']:,}" if "count" in facts else ""
        rows.append([name, count, _number(facts["mean"]), _number(facts["std"])])
    return rows


def _subsets(subsets: dict[str, dict[str, Any]]) -> list[str]:
    if not subsets:
        return []
    rows = [_row(name, estimate) for name, estimate in subsets.items()]
    return [heading("Subsets"), table(["subset", "accuracy", "95% interval"], rows)]


def _bins(report: dict[str, Any]) -> str:
    rows = [
        [f"{b['count']:,}", _number(b["margin"]), _share(b["confidence"]), _share(b["accuracy"]),
         f"{_share(b['low'])} to {_share(b['high'])}"]
        for b in report["reliability"]
    ]  # fmt: skip
    return table(["pairs", "mean margin", "claimed", "right", "95% interval"], rows)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-min(x, 700.0)))


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"
