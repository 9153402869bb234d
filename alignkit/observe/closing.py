"""The last words of a run: a short table of results, two samples before and after, and where to look next."""

import json
import os
from pathlib import Path
from typing import Any

from alignkit.observe.alerts import alerts_in
from alignkit.observe.progress import duration

ROWS = (
    ("SFT", "held-out loss (nats a token)", "sft/eval_loss", "{:.3f}"),
    ("reward model", "held-out accuracy", "reward_model/eval_accuracy", "{:.3f}"),
    ("reward model", "a bag of words reaches", "reward_model/eval_accuracy_bag_of_words", "{:.3f}"),
    ("reward model", "calibration error (ECE)", "reward_model/ece", "{:.3f}"),
    ("reward model", "  after temperature", "reward_model/ece_after_temperature", "{:.3f}"),
    ("labels", "believed", "strength/keep_share", "{:.3f}"),
    ("labels", "in doubt", "strength/smooth_share", "{:.3f}"),
    ("labels", "that look wrong", "strength/flip_share", "{:.3f}"),
    ("labels", "wrong by the gold score", "strength/wrong_labels", "{:.3f}"),
    ("labels", "  doubt tells these, AUC", "strength/auc", "{:.3f}"),
    ("PPO", "score, first iteration", "ppo/score_first", "{:.2f}"),
    ("PPO", "score, last fifth", "ppo/score_mean", "{:.2f}"),
    ("PPO", "gold score, last fifth", "ppo/gold_mean", "{:.2f}"),
    ("PPO", "KL to SFT (nats a sequence)", "ppo/kl", "{:.2f}"),
    ("PPO", "KL target", "ppo/kl_target", "{:.2f}"),
    ("evaluation", "win rate over SFT", "evaluate/win_rate", "{:.3f}"),
    ("evaluation", "  at equal length", "evaluate/length_controlled_win_rate", "{:.3f}"),
    ("evaluation", "  over many samples of SFT", "evaluate/win_rate_over_samples", "{:.3f}"),
    ("evaluation", "  less best-of-n's at equal KL", "evaluate/win_rate_above_best_of_n", "{:+.3f}"),
    ("evaluation", "best of 32 of SFT, at KL 2.5", "evaluate/best_of_32_win_rate", "{:.3f}"),
    ("evaluation", "judged positive, SFT", "evaluate/positive_baseline", "{:.3f}"),
    ("evaluation", "judged positive, PPO", "evaluate/positive", "{:.3f}"),
    ("evaluation", "distinct-2, SFT", "evaluate/distinct_2_baseline", "{:.3f}"),
    ("evaluation", "distinct-2, PPO", "evaluate/distinct_2", "{:.3f}"),
)
INTERVALS = {f"evaluate/{start}win_rate" for start in ("", "length_controlled_", "best_of_32_")}
INTERVALS.add("evaluate/win_rate_over_samples")
INTERVALS.add("reward_model/eval_accuracy")
TITLES = {"reward_model": "reward model", "evaluate": "evaluation"}


def closing_words(summary: dict[str, Any], folder: Path, stages: list[str], report: str = "") -> str:
    """Plain text for the terminal; `stages`: those of this run, in order; `report`: a line on its report.html."""
    lines = ["", *table(summary)]
    comparison = folder / "evaluate" / "comparison.json"
    if "evaluate" in stages and comparison.is_file():
        for row in json.loads(comparison.read_text("utf-8")):
            lines += ["", f"prompt  {_one_line(row['prompt'])}"]
            lines += [f"  SFT   {_one_line(row['baseline'])}", f"  PPO   {_one_line(row['policy'])}"]
    for stage, title in TITLES.items():
        found = folder / stage / "report.json"
        if stage in stages and found.is_file():
            warnings = json.loads(found.read_text("utf-8"))["warnings"]
            lines += [""] * bool(warnings) + [f"{title}: warning: {text}" for text in warnings]
    if "ppo" in stages:
        told = {name.removeprefix("ppo/"): value for name, value in summary.items() if name.startswith("ppo/")}
        lines += [f"PPO: warning: {text}" for text in alerts_in(told)]
    place = as_typed(folder)
    last = next((s for s in ("ppo", "reward_model", "sft") if s in stages), None)
    lines += ["", f"total {duration(summary.get('seconds/total', 0))}; results in {place}/summary.json"]
    lines += [report] * bool(report)
    if "reward_model" in stages and (folder / "reward_model" / "report.html").is_file():
        lines.append(f"what is known of the reward model in {place}/reward_model/report.html")
    if last:
        lines.append(f"model in {place}/{last}/model (Hugging Face format), curves in {place}/{last}/metrics.jsonl")
    return "\n".join(lines)


def as_typed(path: Path) -> str:
    """A path as a person would type it from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def table(summary: dict[str, Any]) -> list[str]:
    """The rows that this run has, aligned."""
    rows = []
    for stage, label, key, form in ROWS:
        if key in summary:
            text = form.format(summary[key])
            if key in INTERVALS and f"{key}_low" in summary:
                text += f"  (95% {summary[key + '_low']:.3f} to {summary[key + '_high']:.3f})"
            if key == "evaluate/win_rate":
                judge = summary.get("evaluate/judge", "gold")
                label = f"{label}, judge {judge}"
                if summary.get("evaluate/judge_is_the_reward"):
                    text += "  (the very score that PPO optimised)"
            rows.append((stage, label, text))
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    return [f"{stage:<{widths[0]}}  {label:<{widths[1]}}  {text}" for stage, label, text in rows]


def _one_line(text: str, width: int = 200) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())  # no escape codes for the terminal
    return text if len(text) <= width else text[: width - 3] + "..."
