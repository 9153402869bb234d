"""report.html of a run: what came of it, what ran, its curves, samples and files, in one file that needs no network."""

import base64
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignkit.observe.page import Html, contents, folded, heading, html, link, paragraph, pictures, table, write_page
from alignkit.observe.progress import duration
from alignkit.observe.reward_page import figures_of, pictures_of
from alignkit.observe.run_folder import RunFolder, StageFolder, is_number, read_folder
from alignkit.observe.run_report_curves import stage_pictures, win_rates
from alignkit.observe.run_report_samples import samples
from alignkit.observe.run_report_words import verdict, warnings

REPORT = "report.html"
MANY = 12  # settings from which their table is folded
DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, OSError)
OF_A_STAGE = ("report.html", "metrics.jsonl", "samples.jsonl", "responses.jsonl", "best_of_n.json", "report.json",
              "manifest.json", "model", "logs")  # fmt: skip
OF_THE_RUN = (
    "config.yaml",
    "summary.json",
    "ended.json",
    "lineage.json",
    "preflight.json",
    "frontier.json",
    "overoptimization.json",
)


class Change(NamedTuple):
    """A setting that differs from the recipe's default, as texts; "": not there."""

    key: str
    default: str
    value: str


def write_run_report(folder: Path, error: str | None = None, changes: Sequence[Change] | None = None) -> Path:
    """Write report.html into a run's folder and return its path. error: what ended the run early (None: what its
    ended.json says); changes: the settings that differ from the recipe's defaults (None: not known). Files that are
    missing or damaged cost the sections made of them. Raises OSError if the report cannot be written."""
    run = read_folder(folder)
    error = error if error is not None else run.ended.get("error")
    sections: list[tuple[str, Callable[[], str]]] = [
        ("Verdict", lambda: _verdicts(run)),
        ("Warnings", lambda: _warnings(run)),
        ("What ran", lambda: _what_ran(run, changes)),
        ("Curves", lambda: _curves(run)),
        ("Reliability of the reward model", lambda: _reliability(_last(run, "reward_model"))),
        ("Win rate", lambda: _win_rate(_last(run, "evaluate"))),
        ("Pictures of the recipe", lambda: _drawn(run)),
        ("Samples", lambda: samples(run)),
        ("Files", lambda: _files(run)),
    ]
    made = [(title, content) for title, make in sections if (content := _guarded(make))]
    anchors = [(title, title.lower().replace(" ", "-")) for title, _ in made]
    parts = [paragraph(_opening(run), soft=True)]
    if error:
        parts.append(paragraph(f"This run did not reach its end: {error}", alarm=True))
    parts.append(contents(anchors))
    parts += [heading(title, anchor) + content for (title, anchor), (_, content) in zip(anchors, made)]
    return write_page(folder / REPORT, f"{folder.absolute().name}: alignkit {run.recipe}", parts)


def _guarded(make: Callable[[], str]) -> str:
    try:
        return make()
    except DAMAGE as error:
        return paragraph(f"Not shown: a file of the run is damaged or of another version ({error!r}).", soft=True)


def _last(run: RunFolder, stage: str) -> StageFolder | None:
    """The last finished stage of a kind."""
    return next((each for each in reversed(run.stages) if each.stage == stage and each.manifest), None)


def _opening(run: RunFolder) -> str:
    chain = " → ".join(stage.title for stage in run.stages) or "no stage was begun"
    when = run.ended.get("time") or max((stage.manifest.get("finished", 0.0) for stage in run.stages), default=0.0)
    parts = [chain]
    parts += [time.strftime("%d %B %Y, %H:%M", time.localtime(when))] if when else []
    parts += [f"{duration(run.seconds)} in all"] if is_number(run.seconds) else []
    return " · ".join(parts)


def _verdicts(run: RunFolder) -> str:
    return table(["stage", "verdict"], [[stage.title, verdict(stage)] for stage in run.stages]) if run.stages else ""


def _warnings(run: RunFolder) -> str:
    found = warnings(run)
    if not found:
        return paragraph("Nothing to warn of was found.")
    counted = f"{len(found)} in all, {len(run.preflight)} of them before the start."
    return "".join([paragraph(counted), *(paragraph(text, alarm=True) for text in found)])


def _what_ran(run: RunFolder, changes: Sequence[Change] | None) -> str:
    rows = []
    for stage in run.stages:
        seconds = (stage.manifest.get("metrics") or {}).get("seconds")
        elsewhere = stage.made_by not in ("", run.path.absolute().name)
        state = f"reused from run {stage.made_by}" if elsewhere else "made here" if stage.manifest else "not finished"
        version = stage.manifest.get("alignkit", "")
        rows.append([stage.title, duration(seconds) if is_number(seconds) else "", state, version])
    if is_number(run.seconds):
        rows.append(["total", duration(run.seconds), "", ""])
    parts = [table(["stage", "time", "", "alignkit"], rows), heading("Settings that differ from the defaults", level=3)]
    if changes is None:
        parts.append(f"<p>Not known here; {link('config.yaml', 'config.yaml')} has all settings.</p>")
    else:
        listed = table(["setting", "default", "this run"], changes)
        named = f"{len(changes)} settings"
        parts.append(folded(named, listed) if len(changes) > MANY else listed if changes else paragraph("None."))
    facts = [(name, _listed(value)) for name, value in (run.ended.get("machine") or {}).items()]
    versions = run.ended.get("versions") or {}
    facts += [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))] * bool(versions)
    parts.append(heading("Machine and versions", level=3))
    parts.append(table(["", ""], facts) if facts else paragraph("Not recorded.", soft=True))
    return "".join(parts)


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _curves(run: RunFolder) -> str:
    drawn = [(stage.title, stage_pictures(stage)) for stage in run.stages]
    return "".join(heading(title, level=3) + pictures(figures) for title, figures in drawn if figures)


def _reliability(stage: StageFolder | None) -> str:
    if stage is None or not stage.report:
        return ""
    more = f"<p>{link('The whole report', f'{stage.label}/report.html')} has subsets and scores too.</p>"
    shown = table(["figure", "value", "95% interval"], figures_of(stage.report))
    return pictures(pictures_of(stage.report)) + folded("In numbers", shown) + more


def _win_rate(stage: StageFolder | None) -> str:
    """The picture, and the figures that are known of PPO and of its start."""
    figures = stage.figures if stage else {}
    drawn = win_rates(figures)
    if not drawn:
        return ""
    caption = f"Win rates, judge {figures.get('judge', 'unknown')}; the dashed line is no difference."
    both = [(key, figures[f"{key}_baseline"], value) for key, value in figures.items() if f"{key}_baseline" in figures]
    rows = [(key.replace("_", " "), f"{start:.4g}", f"{value:.4g}") for key, start, value in both if is_number(start)]
    return pictures([(drawn, caption)]) + folded("SFT and PPO in numbers", table(["figure", "SFT", "PPO"], rows))


def _drawn(run: RunFolder) -> str:
    """Pictures that the recipe drew of several stages; as images, in which nothing can run."""
    files = [file for file in sorted(run.path.glob("*.svg")) if file.stat().st_size < 400_000]
    images = [base64.b64encode(file.read_bytes()).decode() for file in files]
    return (
        pictures(
            [
                (f'<img alt="{html(f.stem)}" src="data:image/svg+xml;base64,{i}"/>', f.name)
                for f, i in zip(files, images)
            ]
        )
        if files
        else ""
    )


def _files(run: RunFolder) -> str:
    rows = [("run", _links(run.path, "", OF_THE_RUN))]
    rows += [(stage.title, _links(stage.path, f"{stage.label}/", OF_A_STAGE)) for stage in run.stages]
    return table(["", "files"], rows)


def _links(folder: Path, start: str, names: Sequence[str]) -> Html:
    return Html(" · ".join(link(name, start + name) for name in names if (folder / name).exists()))
