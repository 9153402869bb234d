"""What a recipe of several PPO runs draws from their products: `run.draw(...)`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.observe.plot import Series, line_chart, side_by_side
from alignkit.observe.tracking import write_report

KL_AXIS = "√KL to the start (KL in nats a sequence)"


def frontier(folder: Path, products: Mapping[str, Path]) -> dict[str, Any]:
    """products: label -> folder of each stage, of which `evaluate-<coef>` are drawn. Writes frontier.svg and
    frontier.json: win rate under the judge and gain in reward against KL, PPO's runs beside best-of-n's."""
    runs = []
    for label, place in products.items():
        if label.startswith("evaluate-"):
            found = read(place / "report.json")
            if "win_rate_over_samples" in found:  # what best-of-n's win rate can be compared with
                found |= {f"win_rate{end}": found[f"win_rate_over_samples{end}"] for end in ("", "_low", "_high")}
            names = ("kl", "win_rate", "reward_gain")
            row = {key: found.get(key) for name in names for key in (name, f"{name}_low", f"{name}_high")}
            runs.append({"coef": float(label.removeprefix("evaluate-")), "judge": found["judge"], **row})
            best = place / "best_of_n.json"
    runs.sort(key=lambda row: row["kl"])
    yardstick = read(best) if best.is_file() else []
    start = yardstick[0] if yardstick else {}
    curves = {
        "win rate over SFT": [points("PPO", runs, "win_rate"), points("best-of-n", yardstick, "win_rate")],
        "gain in reward": [points("PPO", runs, "reward_gain"), points("best-of-n", yardstick, "reward", start)],
    }
    pictures = [line_chart([s for s in series if s.x], KL_AXIS, name) for name, series in curves.items()]
    (folder / "frontier.svg").write_text(side_by_side(pictures, columns=1), encoding="utf-8")
    found = {"ppo": runs, "best_of_n": yardstick}
    write_report(folder / "frontier.json", found)
    return found


def points(name: str, rows: list[dict[str, Any]], key: str, start: Mapping[str, float] | None = None) -> Series:
    """A key of the rows against sqrt(KL), less its value at the start, with intervals."""
    less = start[key] if start else 0.0
    x = [math.sqrt(max(row["kl"], 0.0)) for row in rows]
    value, low, high = ([row[k] - less for row in rows] for k in (key, f"{key}_low", f"{key}_high"))
    return Series(name, x, value, low, high, kind="line+points")


def overoptimization(folder: Path, products: Mapping[str, Path]) -> dict[str, Any]:
    """products: label -> folder of each stage, of which `ppo-<pairs>` and `evaluate-<pairs>` are drawn. Writes
    overoptimization.svg and .json: proxy and gold score against sqrt(KL) for PPO and best-of-n (for PPO also the true
    score, where the data knows it), Gao's curves fitted to the gold scores, and where they peak."""
    found: dict[str, Any] = {}
    for label, place in products.items():
        size = label.removeprefix("evaluate-")
        if size != label:
            series = {"ppo": ppo_points(products[f"ppo-{size}"]), "best_of_n": best_points(place)}
            found[size] = {kind: {"points": rows, **fitted(rows, kind)} for kind, rows in series.items() if rows}
    pictures = [drawn(size, kind, kinds[kind]) for size, kinds in found.items() for kind in kinds]
    (folder / "overoptimization.svg").write_text(side_by_side(pictures, columns=2), encoding="utf-8")
    write_report(folder / "overoptimization.json", found)
    return found


def drawn(size: str, kind: str, found: dict[str, Any]) -> str:
    """One proxy's scores, with the curve through the gold ones."""
    rows = sorted(found["points"], key=lambda row: row["kl"])
    x = [math.sqrt(row["kl"]) for row in rows]
    names = {"proxy": "proxy", "gold": "gold model", "true": "true score"}
    series = [Series(name, x, [row[key] for row in rows]) for key, name in names.items() if key in rows[0]]
    if "alpha" in found:
        from alignkit.algo.comparison import GoldCurve

        curve = GoldCurve(kind, found["alpha"], found["beta"], found["peak_kl"], found["r_squared"])
        d = [x[0] + (x[-1] - x[0]) * i / 60 for i in range(61)]
        series.append(Series("fitted to gold", d, list(map(curve, d)), kind="guide"))
    title = f"{'PPO' if kind == 'ppo' else 'best-of-n'}, proxy of {size} pairs: gain"
    return line_chart(series, KL_AXIS, title)


def ppo_points(place: Path) -> list[dict[str, float]]:
    """The looks of a PPO run: KL, and gains of the proxy's and the gold score over the start."""
    rows = [json.loads(line) for line in (place / "metrics.jsonl").read_text("utf-8").splitlines()]
    looks = [row for row in rows if "ppo/eval_judge_mean" in row and (row["ppo/eval_kl"] or 0) > 0]
    return [
        {
            "kl": row["ppo/eval_kl"],
            "proxy": row["ppo/eval_reward_mean"] - row["ppo/eval_reward_start"],
            "gold": row["ppo/eval_judge_mean"] - row["ppo/eval_judge_start"],
        }
        | ({"true": row["ppo/eval_gold_mean"] - row["ppo/eval_gold_start"]} if "ppo/eval_gold_mean" in row else {})
        for row in looks
    ]


def best_points(place: Path) -> list[dict[str, float]]:
    """The points of best-of-n, as gains over a single sample."""
    if not (place / "best_of_n.json").is_file():
        return []
    first, *rows = read(place / "best_of_n.json")
    return [
        {"kl": r["kl"], "proxy": r["reward"] - first["reward"], "gold": r["judge"] - first["judge"], "n": r["n"]}
        for r in rows
    ]


def fitted(rows: list[dict[str, float]], kind: str) -> dict[str, Any]:
    """Gao's curve through the gold scores, its peak and the highest gold score that was seen, KL in nats."""
    import torch

    from alignkit.algo.comparison import fit_gold_curve

    best = max(rows, key=lambda row: row["gold"])
    found = {"best_gold": best["gold"], "best_gold_kl": best["kl"], "last_gold": rows[-1]["gold"]}
    if len(rows) < 3:
        return found
    d = torch.tensor([row["kl"] for row in rows], dtype=torch.float64).sqrt()
    curve = fit_gold_curve(d, torch.tensor([row["gold"] for row in rows], dtype=torch.float64), kind)
    fit = {"alpha": curve.alpha, "beta": curve.beta, "r_squared": curve.r_squared}
    return {**found, **fit, "peak_kl": None if curve.peak is None else curve.peak**2}


def read(file: Path) -> Any:
    """A JSON file."""
    return json.loads(file.read_text("utf-8"))
