"""The W&B workspace of a project as code: what to look at in each stage, in its samples and over a sweep.

It is built without a network; wandb-workspaces (the extra `dashboard`) and wandb are imported once it is asked for. One
W&B run is one stage, so a panel shows the runs that have its metrics, and what is compared in one has to be of one
stage. A run's settings are under "cfg" in its config.
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from alignkit.errors import UserError
from alignkit.observe.tracking import STEP_KEYS, write_report
from alignkit.observe.wandb_mode import decide_mode

TITLE = "alignkit"
SETTINGS = ("kl.coef", "kl.target", "kl.horizon", "ppo.learning_rate", "ppo.value_learning_rate")
"""What the panels of a sweep compare; a run whose kl has no target or horizon has no line there."""


def build(entity: str, project: str) -> Any:
    """The workspace, not saved. Raises UserError without the extra."""
    ws, wr = _library()
    return ws.Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=[
            ws.Section(name=name, panels=panels, is_open=True)
            for name, panels in {
                "SFT": _sft(wr),
                "Reward model": _reward_model(wr),
                "PPO": _ppo(wr),
                "Samples": [
                    wr.WeavePanelSummaryTable(table_name="ppo/samples", layout=wr.Layout(w=24, h=12)),
                ],
                "Sweep": _sweep(wr),
            }.items()
        ],
    )


def _sft(wr: Any) -> list[Any]:
    return [
        _curve(wr, "loss, nats a token; held out at the end", "sft", "loss", "eval_loss"),
        _curve(wr, "share of tokens guessed", "sft", "mean_token_accuracy"),
        _curve(wr, "learning rate", "sft", "learning_rate"),
    ]


def _reward_model(wr: Any) -> list[Any]:
    return [
        _curve(wr, "accuracy, training", "reward_model", "accuracy", range_y=(0, 1)),
        _curve(wr, "margin, training, reward units", "reward_model", "margin"),
        _curve(wr, "loss, training", "reward_model", "loss"),
        _bars(
            wr, "accuracy, held out, 95%, beside a bag of words", "reward_model",
            *("eval_accuracy", "eval_accuracy_low", "eval_accuracy_high", "eval_accuracy_bag_of_words"),
        ),
        _bars(wr, "margin, held out, reward units", "reward_model", "eval_margin"),
        _bars(wr, "calibration error, before and after temperature", "reward_model", "ece", "ece_after_temperature"),
    ]  # fmt: skip


def _ppo(wr: Any) -> list[Any]:
    return [
        _curve(wr, "score and gold score", "ppo", "score_mean", "gold_mean"),
        _curve(wr, "KL and its target, nats a sequence", "ppo", "kl", "kl_target"),
        _curve(wr, "KL coefficient, reward units a nat", "ppo", "kl_coef"),
        _curve(wr, "entropy, nats a token", "ppo", "entropy"),
        _curve(wr, "clipped share, policy and values", "ppo", "clip_fraction", "value_clip_fraction"),
        _curve(wr, "explained variance of the values", "ppo", "explained_variance", range_y=(-1, 1)),
        _curve(wr, "response length, tokens", "ppo", "response_length"),
        _curve(wr, "share that ended by itself", "ppo", "eos_fraction", range_y=(0, 1)),
        _curve(
            wr, "seconds of an iteration by phase", "ppo",
            *("seconds/rollout", "seconds/scoring", "seconds/update"), plot_type="stacked-area",
        ),
        _curve(wr, "tokens a second", "ppo", "tokens_per_second"),
        _bars(
            wr, "win rate over SFT, 95%", "evaluate",
            *("win_rate", "win_rate_low", "win_rate_high"), range_x=(0, 1),
        ),
    ]  # fmt: skip


def _sweep(wr: Any) -> list[Any]:
    """Two of each kind: by the score that PPO climbs, and by the win rate, which is of the run that evaluates."""
    panels = []
    for stage, results in (("ppo", ("kl", "score_mean")), ("evaluate", ("kl", "win_rate"))):
        names = [f"{stage}/{name}" for name in results]
        axes = [(name, wr.Config(f"cfg.{name}")) for name in SETTINGS]
        axes += [(name, wr.SummaryMetric(name)) for name in names]
        columns = [
            wr.ParallelCoordinatesPlotColumn(
                metric=metric, display_name=name, log=name.endswith("learning_rate") or None
            )
            for name, metric in axes
        ]
        panels += [
            wr.ParallelCoordinatesPlot(title=f"settings and {names[1]}", columns=columns, layout=wr.Layout(w=24, h=8)),
            wr.ParameterImportancePlot(with_respect_to=names[1]),
            wr.ScatterPlot(
                title=f"{names[1]} against KL, nats a sequence",
                x=wr.SummaryMetric(names[0]),
                y=wr.SummaryMetric(names[1]),
                z=wr.Config("cfg.kl.coef"),
            ),
        ]
    return panels


def _curve(wr: Any, title: str, stage: str, *names: str, **more: Any) -> Any:
    """Metrics of a stage over its own steps."""
    return wr.LinePlot(title=title, x=STEP_KEYS[stage], y=[f"{stage}/{name}" for name in names], **more)


def _bars(wr: Any, title: str, stage: str, *names: str, **more: Any) -> Any:
    """Figures that a stage has once."""
    return wr.BarPlot(title=title, metrics=[f"{stage}/{name}" for name in names], **more)


def as_json(workspace: Any) -> dict[str, Any]:
    """The workspace as W&B keeps it, with its panels' random ids replaced by their numbers."""
    spec = workspace._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    for number, part in enumerate(_with_id(spec)):
        part["__id__"] = f"panel-{number}"
    return spec


def _with_id(part: Any) -> list[dict[str, Any]]:
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    found = [one for value in inner for one in _with_id(value)]
    return [part, *found] if isinstance(part, dict) and "__id__" in part else found


def push(entity: str | None, project: str, memory: Path) -> tuple[str, str]:
    """Save the workspace in W&B: the one whose address is in the file `memory` is brought up to date, its other
    sections, filters and colours left as they are; without one it is made and noted there. Returns what was done
    (`made` | `updated`) and the address. Raises UserError without the extra, without a key or if W&B fails."""
    ws, _ = _library()
    if decide_mode("online")[0] != "online":
        raise UserError("no W&B API key found: set one with `wandb login` or WANDB_API_KEY, or take --out=FILE")
    known = json.loads(memory.read_text("utf-8")) if memory.exists() else {}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # wandb's own lines; what matters is told by the caller
            entity = entity or _default_entity()
            place, built = f"{entity}/{project}", build(entity, project)
            found = _found(ws, known.get(place))
            if found is not None:
                ours = {section.name for section in built.sections}
                found.sections = [*built.sections, *(s for s in found.sections if s.name not in ours)]
            url = (found or built).save().url
    except UserError:
        raise
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"W&B failed ({type(error).__name__}: {reason}); try again") from None
    memory.parent.mkdir(parents=True, exist_ok=True)
    write_report(memory, {**known, place: url})
    return ("made" if found is None else "updated"), url


def _found(ws: Any, url: str | None) -> Any:
    """The workspace at that address; None where there is none (any more)."""
    try:
        return ws.Workspace.from_url(url) if url else None
    except ValueError as error:
        if "not found" not in str(error):
            raise
        return None


def _default_entity() -> str:
    import wandb

    entity = wandb.Api().default_entity
    if not entity:
        raise UserError("W&B names no default user or team for this key: give one with --entity=NAME")
    return entity


def _library() -> tuple[Any, Any]:
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise UserError("wandb-workspaces is not installed: pip install 'alignkit[dashboard]'") from None
    return workspaces, reports
