"""`alignkit report RUN`: the report of a run, or of a sweep, written once more."""

from collections.abc import Mapping
from pathlib import Path

from alignkit.errors import UserError
from alignkit.observe.run_report import write_run_report
from alignkit.observe.sweep_report import LEADERBOARD, write_sweep_report
from alignkit.runtime.recipe import report
from alignkit.runtime.report_run import changes
from alignkit.runtime.resume import read_run


def report_command(words: list[str], recipes: Mapping[str, Path]) -> int:
    """`alignkit report RUN`: write the report of a run or of a sweep anew and print its path. Returns the exit code."""
    try:
        if len(words) != 1 or words[0].startswith("-"):
            raise UserError("report: of which run? give its folder, or a sweep's, as in alignkit report runs/NAME")
        print(_anew(words, recipes))
    except UserError as error:
        return report(str(error), 2)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # of leaderboard.json, say
        return report(f"report: {error}", 1)
    return 0


def _anew(words: list[str], recipes: Mapping[str, Path]) -> Path:
    given = Path(words[0]).expanduser()
    for folder in (given, Path("runs", words[0]), Path("runs", ".sweeps", words[0])):
        if (folder / LEADERBOARD).is_file():
            return write_sweep_report(folder)
    recipe, raw = read_run(words, recipes, "report")
    return write_run_report(Path(raw["runs_dir"]) / raw["name"], None, changes(recipe, raw))
