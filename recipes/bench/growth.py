"""How the cost of PPO grows with the batch, the response, the vocabulary and the ranks: a table and a picture.

    python recipes/bench/growth.py --data hh_harmless.jsonl.gz --out growth
    python recipes/bench/growth.py --data hh_harmless.jsonl.gz --out growth --only vocabulary --updates 1

One `alignkit bench` a point, on the 5.5 M model of prepare.py; responses have exactly the length asked for. Writes
growth.json, growth.md and growth.svg. The exponent of a series is the slope of the least-squares line through
log(cost) against log(size): 1 is linear, 0 is flat. "Less models" is the peak without weights, gradients and
Adam's moments, which grow with the vocabulary by nature.
"""

import argparse
import math
import sys
from pathlib import Path

from runs import bench, run, save

from alignkit.observe.plot import Series, line_chart, side_by_side

GRID = {  # series -> sizes; batch in sequences, response and prompt in tokens, vocabulary in words
    "batch": (16, 32, 64, 128),
    "response": (16, 32, 64, 128),
    "vocabulary": (2048, 8192, 32768, 131072),
    "ranks": (1, 2),
}
BASE = {"batch": 32, "response": 32, "vocabulary": 2048, "ranks": 1}
UNITS = {
    "batch": "sequences an update", "response": "tokens of a response", "vocabulary": "words",
    "ranks": "ranks, the same batch", "tokens": "tokens an update, batch and response varied",
}  # fmt: skip
PROMPT, TOKENS = 64, 2048  # longest prompt; words of the tokenizer at every vocabulary, so that tokens are the same
COSTS = {
    "seconds_per_update": "seconds",
    "cpu_seconds_per_update": "CPU seconds",
    "update": "update",
    "rollout": "rollout",
    "peak_bytes": "peak memory",
    "working_bytes": "peak less models",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="hh_harmless.jsonl.gz")
    parser.add_argument("--out", required=True, type=Path, help="folder for all that is measured")
    parser.add_argument("--only", nargs="+", choices=list(GRID), default=list(GRID))
    parser.add_argument("--updates", type=int, default=2, help="that count, of each point")
    options, words = parser.parse_known_args()
    if wrong := [word for word in words if "=" not in word or word.startswith("-")]:
        parser.error(f"unknown: {' '.join(wrong)}")
    series: dict[str, list[dict]] = {}
    measured: dict[tuple, dict] = {}
    for name in options.only:
        for size in GRID[name]:
            point = {**BASE, name: size}
            key = tuple(point.values())
            if key not in measured:
                measured[key] = measure(point, options, words)
            series.setdefault(name, []).append({"size": size, **measured[key]})
            print(f"{name} {size}: {measured[key]['seconds_per_update']:.3g} s an update", flush=True)
    both = [row for name in ("batch", "response") for row in series.get(name, ())]
    if both:
        unique = {row["tokens"]: {**row, "size": row["tokens"]} for row in both}
        series["tokens"] = [unique[count] for count in sorted(unique)]
    exponents = {
        name: {key: exponent([row["size"] for row in rows], [row[key] for row in rows]) for key in COSTS}
        for name, rows in series.items()
    }
    save(options.out / "growth.json", {"series": series, "exponents": exponents, "base": BASE})
    (options.out / "growth.md").write_text(as_table(series, exponents), encoding="utf-8")
    (options.out / "growth.svg").write_text(picture(series, exponents), encoding="utf-8")
    print(as_table(series, exponents))


def measure(point: dict[str, int], options: argparse.Namespace, words: list[str]) -> dict[str, float]:
    """The figures of one point that the table and the picture need."""
    models = options.out / f"models-{point['vocabulary']}"
    if not models.exists():
        script = str(Path(__file__).with_name("prepare.py"))
        sizes = ["--vocabulary", str(point["vocabulary"]), "--tokens", str(TOKENS)]
        command = [sys.executable, script, "--data", options.data, "--out", str(models), *sizes]
        run(command, options.out / f"models-{point['vocabulary']}.log")
    settings = {
        "bench.updates": options.updates,
        "ppo.batch": point["batch"],
        "ppo.minibatch": point["batch"],
        "ppo.epochs": 2,
        "ppo.max_prompt": PROMPT,
        "rollout.max_response": point["response"],
        "rollout.min_response": point["response"] - 1,
        "launch.processes": point["ranks"],
        "launch.threads": 1,
    }
    name = "-".join(f"{key}{value}" for key, value in point.items())
    found = bench(options.out, models, name, *(f"{key}={value}" for key, value in settings.items()), *words)
    figures = {**found, **found["seconds"]}
    shares = {"padding": found["padding_fraction"], "arithmetic": found["training"]["share_of_arithmetic_limit"]}
    return {**{key: figures[key] for key in COSTS}, **shares, "tokens": found["non_pad_tokens_per_update"]}


def exponent(x: list[float], y: list[float]) -> float | None:
    """Slope of log y against log x by least squares; None for fewer than two points."""
    points = [(math.log(a), math.log(b)) for a, b in zip(x, y)]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points))
    return sum((a - mean_x) * (b - mean_y) for a, b in points) / sum((a - mean_x) ** 2 for a, _ in points)


def as_table(series: dict[str, list[dict]], exponents: dict[str, dict]) -> str:
    """Markdown: a row a point, and the exponents of each series."""
    heads = ("series", "size", "tokens", *COSTS.values(), "share of arithmetic")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, rows in series.items():
        for row in rows if name != "tokens" else ():
            costs = [shown(key, row[key]) for key in COSTS]
            cells = (name, str(row["size"]), f"{row['tokens']:.0f}", *costs, f"{row['arithmetic']:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"| exponent against | {' | '.join(COSTS.values())} |", f"|{'---|' * (1 + len(COSTS))}"]
    for name, found in exponents.items():
        cells = ["" if found[key] is None else f"{found[key]:.2f}" for key in COSTS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shown(key: str, value: float) -> str:
    return f"{value / 2**30:.3f} GiB" if key.endswith("_bytes") else f"{value:.3g}"


def picture(series: dict[str, list[dict]], exponents: dict[str, dict]) -> str:
    """A chart a series: each cost as a multiple of its first point's, beside what it should be at best."""
    charts = []
    for name, rows in series.items():
        x = [row["size"] for row in rows]
        drawn = [
            Series(f"{title} (exponent {exponents[name][key]:.2f})", x, [row[key] / rows[0][key] for row in rows])
            for key, title in COSTS.items()
            if len(rows) > 1
        ]
        ideal, power = {"vocabulary": ("flat", 0), "ranks": ("1 / ranks", -1)}.get(name, ("linear", 1))
        guide = Series(ideal, x, [(size / x[0]) ** power for size in x], kind="guide")
        charts.append(line_chart([guide, *drawn], UNITS[name], "times the first point", f"{name}: growth of the cost"))
    return side_by_side(charts, columns=2)


if __name__ == "__main__":
    main()
