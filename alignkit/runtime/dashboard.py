"""`alignkit dashboard`: makes the W&B workspace of a project, or brings it up to date; with --out only writes it."""

import argparse
from pathlib import Path

import yaml

from alignkit.errors import UserError
from alignkit.observe.dashboard import as_json, build, push
from alignkit.observe.tracking import write_report
from alignkit.runtime.config import conf_dir
from alignkit.runtime.recipe import report

MEMORY = Path("runs", ".dashboard.json")  # where the addresses of workspaces are noted


def dashboard_command(words: list[str]) -> int:
    """The words after `alignkit dashboard`. Returns the exit code: 0, or 2 after a mistake."""
    tracking = yaml.safe_load((conf_dir() / "tracking" / "wandb.yaml").read_text("utf-8"))
    parser = argparse.ArgumentParser("alignkit dashboard", description="A W&B workspace for the runs of a project.")
    parser.add_argument("--project", default=tracking["project"], help="W&B project, as tracking.project")
    parser.add_argument("--entity", default=tracking["entity"], help="W&B user or team; else the account's default")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it there as JSON, without W&B")
    options = parser.parse_args(words)
    try:
        if options.out:
            workspace = build(options.entity or "", options.project)
            write_report(options.out, as_json(workspace))
            panels = sum(len(section.panels) for section in workspace.sections)
            print(f"dashboard: {len(workspace.sections)} sections, {panels} panels in {options.out}")
        else:
            done, url = push(options.entity, options.project, MEMORY)
            print(f"dashboard: {done}: {url}")
    except (UserError, OSError) as error:
        return report(f"dashboard: {error}", 2)
    return 0
