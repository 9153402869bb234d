"""Responses to read in a run's report: SFT beside PPO on held-out prompts, or what PPO sampled while it trained."""

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.observe.page import Cell, Html, html, sorted_table
from alignkit.observe.run_folder import RunFolder, StageFolder, is_number, json_lines

ROWS = 200  # at most
LETTERS = 1200  # of a text at most
BYTES = 1_200_000  # of all rows together, about
OUTCOMES = {1.0: "PPO wins", 0.5: "tie", 0.0: "SFT wins"}
BESIDE = (  # of evaluate/responses.jsonl: column -> key
    ("prompt", "prompt"), ("SFT", "baseline"), ("PPO", "policy"), ("score PPO", "reward_policy"),
    ("score SFT", "reward_baseline"), ("KL", "kl"), ("tokens PPO", "length_policy"), ("tokens SFT", "length_baseline"),
    ("judge", "outcome"),
)  # fmt: skip
ALONE = (  # of ppo/samples.jsonl
    ("episodes", "ppo/episodes"), ("prompt", "prompt"), ("response", "response"), ("score", "score"),
    ("gold score", "gold"), ("KL", "kl"), ("tokens", "length"),
)  # fmt: skip


def samples(run: RunFolder) -> str:
    """A table with a sentence before it; "" where nothing was sampled. The last evaluation is shown, or without one the
    last samples of the last PPO."""
    for stage, file, columns, score, length in (
        ("evaluate", "responses.jsonl", BESIDE, "reward_policy", "length_policy"),
        ("ppo", "samples.jsonl", ALONE, "score", "length"),
    ):
        places = [each for each in run.stages if each.stage == stage]
        rows = json_lines(places[-1].path / file) if places else []
        if stage == "ppo":
            rows.reverse()  # the latest first
        if rows:
            return _table(places[-1], rows, columns, score, length)
    return ""


def _table(
    stage: StageFolder, rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str]], score: str, length: str
) -> str:
    columns = [(name, key) for name, key in columns if any(row.get(key) is not None for row in rows)]
    marks = _marks(rows, score, length)
    order = [*marks, *(number for number in range(len(rows)) if number not in marks)]
    shown: list[list[Cell]] = []
    size = 0
    for number in order[:ROWS]:
        cells = [_cell(key, rows[number].get(key), marks.get(number, ())) for _, key in columns]
        size += sum(len(html(cell.text).encode()) for cell in cells)
        if shown and size > BYTES:
            break
        shown.append(cells)
    told = (
        f"<p>{len(shown):,} of {len(rows):,} responses of {html(stage.title)}: first the best and the worst by score "
        "and the longest, then in the order of their file. A click on a header sorts.</p>"
    )
    return told + sorted_table([name for name, _ in columns], shown, range(len(marks)))


def _marks(rows: Sequence[Mapping[str, Any]], score: str, length: str) -> dict[int, list[str]]:
    """Number of a row -> what it is."""
    marks: dict[int, list[str]] = {}
    for name, key, pick in (("best", score, max), ("worst", score, min), ("longest", length, max)):
        known = [number for number, row in enumerate(rows) if is_number(row.get(key))]
        if known:
            marks.setdefault(pick(known, key=lambda number: rows[number][key]), []).append(name)
    return marks


def _cell(key: str, value: Any, marks: Sequence[str]) -> Cell:
    if key == "outcome" and is_number(value):
        return Cell(OUTCOMES.get(value, f"{value:.2f}"), value, is_number=True)
    if is_number(value):
        return Cell(
            f"{value:,}" if isinstance(value, int) else f"{value:.2f}".replace("-", "\u2212"), value, is_number=True
        )
    if value is None:
        return Cell("", None, is_number=key not in ("prompt", "response", "baseline", "policy"))
    text = str(value).strip()
    text = text if len(text) <= LETTERS else f"{text[:LETTERS]} … ({len(text) - LETTERS:,} more characters)"
    tags = "".join(f'<span class="tag">{mark}</span>' for mark in marks) if key == "prompt" else ""
    return Cell(Html(tags + html(text)))
