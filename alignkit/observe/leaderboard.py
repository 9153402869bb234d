"""The leaderboard of a sweep: its jobs, best first, by figures of their summary.json."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.errors import UserError

OBJECTIVES = {  # recipe -> what its jobs are compared by where `objective` says nothing
    "rlhf": "evaluate/win_rate",
    "ppo": "evaluate/win_rate",
    "evaluate": "evaluate/win_rate",
    "sft": "sft/eval_loss",
    "reward_model": "reward_model/eval_accuracy",
    "bench": "bench/sequences_per_second",
}
LOWER_IS_BETTER = ("loss", "perplexity", "ece", "ece_after_temperature", "kl", "seconds")  # ends of names
STAGES = {"rlhf": ("sft", "reward_model", "ppo", "evaluate"), "ppo": ("ppo", "evaluate")}  # others: the recipe's own
SHOWN = ("evaluate/win_rate", "ppo/gold_mean", "ppo/score_mean", "ppo/kl")  # beside the objective, where there


def objectives_of(recipe: str, asked: str | Sequence[str] | None) -> list[str]:
    """Names of the figures by which the jobs of a recipe are compared; none for a recipe that has no usual one."""
    if asked is None:
        return [OBJECTIVES[recipe]] if recipe in OBJECTIVES else []
    return [asked] if isinstance(asked, str) else list(asked)


def check_objective(recipe: str, asked: str | Sequence[str] | None) -> None:
    """Raise UserError for an objective that no summary of the recipe can have."""
    stages = STAGES.get(recipe, (recipe,))
    for name in objectives_of(recipe, asked) if recipe in OBJECTIVES else ():
        if name.partition("/")[0] not in (*stages, "seconds"):
            first = f"{', '.join(stages)} or seconds, as in {OBJECTIVES[recipe]}"
            raise UserError(
                f"objective={name}: expected a name in the summary of alignkit {recipe}: it begins with {first}"
            )


def lower_is_better(name: str) -> bool:
    """Whether less of a figure is better, by the end of its name: sft/eval_loss, seconds/total."""
    last = name.rpartition("/")[2]
    return name.startswith("seconds/") or any(last == end or last.endswith(f"_{end}") for end in LOWER_IS_BETTER)


def check_directions(names: Sequence[str], directions: Sequence[str]) -> None:
    """Raise UserError if a sweeper would look for the worst. directions: minimize or maximize, one for each name."""
    right = ["minimize" if lower_is_better(name) else "maximize" for name in names]
    if list(directions) != right:
        asked, mend = (each[0] if len(each) == 1 else f"[{','.join(each)}]" for each in (directions, right))
        raise UserError(
            f"hydra.sweeper.direction={asked}: the objective is {' and '.join(names) or 'not set'}; set "
            + (f"hydra.sweeper.direction={mend}" if names else "objective=NAME")
        )


def objective_values(summary: Mapping[str, Any], names: Sequence[str]) -> list[float]:
    """The figures of these names. Raises UserError for a name that is not there, or a value that is no number."""
    for name in names:
        if name not in summary:
            near = difflib.get_close_matches(name, summary, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(summary)}"
            raise UserError(f"objective={name}: not in the summary of the job; {hint}")
        if not isinstance(summary[name], int | float) or not math.isfinite(summary[name]):
            raise UserError(f"objective={name}: is {summary[name]!r}, not a number")
    return [float(summary[name]) for name in names]


def ranked(jobs: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Jobs in the order of their first objective, best first; those without one last, by their numbers."""

    def place(job: dict[str, Any]) -> tuple[bool, float, int]:
        value = job["objective"][0] if job["objective"] else None
        sign = 1.0 if names and lower_is_better(names[0]) else -1.0
        return value is None, 0.0 if value is None else sign * value, job["number"]

    return sorted(jobs, key=place)


def leaderboard_words(board: Mapping[str, Any]) -> list[str]:
    """The leaderboard as lines of text: rank, objectives, a few more figures, seconds, and what each job changes."""
    names = list(board["objective"])
    more = [name for name in SHOWN if name not in names and any(name in job["summary"] for job in board["jobs"])]
    head = ["", *names, *more, "seconds", "job", "changes"]
    rows = [head]
    for rank, job in enumerate(board["jobs"], start=1):
        done = job["status"] == "done"
        figures = job["objective"] or [math.nan] * len(names)
        rest = [job["summary"].get(name, math.nan) for name in more]
        cells = [f"{value:.4g}" if math.isfinite(value) else "-" for value in (*figures, *rest)]
        seconds = f"{job['seconds']:.0f}" if job["seconds"] is not None else "-"
        changes = " ".join(f"{key}={value}" for key, value in job["changes"].items())
        rows.append([str(rank) if done else job["status"], *cells, seconds, str(job["number"]), changes])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
