"""The decorator that makes a recipe a program: Hydra composes, one check, then the chain runs."""

import os
import runpy
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from alignkit.errors import StageFailed, TrainingError, UserError, on_one_line
from alignkit.models.settings import refuse_in_ppo, refuse_thin_chain
from alignkit.observe.closing import as_typed, closing_words
from alignkit.observe.leaderboard import check_objective
from alignkit.observe.secrets import without_secrets
from alignkit.observe.wandb_mode import decide_mode
from alignkit.runtime.check import Checked, preflight
from alignkit.runtime.config import RunConfig, conf_dir, load
from alignkit.runtime.failure import of_a_full_disk
from alignkit.runtime.findings import lines, refuse
from alignkit.runtime.launch import follow
from alignkit.runtime.machines import Team, facts_of
from alignkit.runtime.outer import is_extra_task, with_outer
from alignkit.runtime.report_run import report_at_end
from alignkit.runtime.rules import TRAINS
from alignkit.runtime.run import Purpose, Run
from alignkit.runtime.signals import Stopped, hand_on, raise_stopped, signals_to
from alignkit.runtime.trust import words_of_trust


def recipe(name: str) -> Callable[[Callable[[Run], None]], Callable[[], None]]:
    """Turn `main(run)` into a program whose settings are conf/<name>.yaml and the words of the command line."""

    def decorate(chain: Callable[[Run], None]) -> Callable[[], None]:
        def program() -> None:
            sys.exit(run_program(name, chain))

        program.__doc__ = chain.__doc__
        vars(program)["chain"] = chain
        return program

    return decorate


def run_program(name: str, chain: Callable[[Run], None]) -> int:
    """Compose, then run each job. Returns the exit code: 0; 1 a stage failed; 2 a mistake; 128 + n after a signal."""
    return composed(name, lambda raw: run_job(name, chain, raw), lambda raw: check_job(name, chain, raw))


def composed(
    name: str, call: Callable[[dict[str, Any]], int], check: Callable[[dict[str, Any]], str] | None = None
) -> int:
    """`compose_and_call` with whatever goes wrong told in short. Returns the exit code."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from alignkit.runtime.compose import JobFailed, compose_and_call, explain

    try:
        return 0 if is_extra_task() else compose_and_call(conf_dir(), name, call, check)
    except (HydraException, OmegaConfBaseException) as error:
        return report(explain(error, conf_dir(), name), 2)
    except UserError as error:
        return report(str(error), 2)
    except JobFailed as failed:
        return report(failed.words, failed.code)
    except Stopped as stop:  # of a sweep
        return report(f"stopped by {stop}: {stop.saved}", stop.exit_code)
    except KeyboardInterrupt:
        return report("stopped by SIGINT; a job that was handed to Slurm goes on until scancel ends it", 130)
    except BrokenPipeError:  # `alignkit rlhf --cfg job | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def ask(verb: str, words: list[str], recipes: Iterable[str], call: Callable[[str, dict[str, Any]], int]) -> int:
    """`alignkit VERB RECIPE [KEY=VALUE ...]`: `call` with the recipe and its composed settings, of a sweep for each of
    its jobs. Returns the exit code."""
    recipe = words[0] if words else ""
    if recipe not in recipes:
        said = f"'{recipe}' is no recipe that trains" if recipe else "which recipe?"
        return report(f"{verb}: {said}; as in `alignkit {verb} rlhf ppo.batch=32`, of {', '.join(recipes)}", 2)
    with tempfile.TemporaryDirectory() as aside:  # Hydra makes a folder for a sweep
        sys.argv = [f"alignkit {verb} {recipe}", *words[1:], f"hydra.sweep.dir={aside}"]
        return composed(recipe, lambda raw: call(recipe, raw))


def run_job(name: str, chain: Callable[[Run], None], raw: dict[str, Any], purpose: Purpose = "new") -> int:
    """Check one composed configuration and run the chain; a person's mistake or a failed stage is told in short.
    purpose: see `run.py`. On several machines only machine 0 runs the chain."""
    run, team, number, code, words = None, Team(), 0, 1, "an error in alignkit itself"
    try:
        if is_extra_task():  # of a job that submitit composed elsewhere and started here
            return 0
        config = checked(name, full := with_outer(raw))
        facts = facts_of(config, full) if config.launch.machines > 1 else {}
        if config.launch.machine > 0:
            follow(config.launch, facts)
            return 0
        with nullcontext() if config.launch.inline else signals_to(raise_stopped):
            team.gather(config.launch, facts)
            run = Run(name, config, raw, purpose, team)
            chain(run)
        code, words = 0, ""
    except UserError as error:
        code, words = 2, str(error)
    except TrainingError as error:  # launch=inline
        code, words = 1, str(error)
    except StageFailed as error:
        code, words = error.exit_code, str(error)
    except Stopped as stop:
        number, code, words = stop.number, stop.exit_code, f"stopped by {stop}{_what_is_left(run, stop.saved)}"
    except KeyboardInterrupt:  # launch=inline
        code, words = 130, f"stopped by SIGINT{_what_is_left(run, 'finished stages are kept')}"
    except Exception as error:
        code, words = 1, of_a_full_disk(error)
        if not words:
            raise
    finally:
        words = without_secrets(words)
        team.close(code, words)
        told = _report(run, words)
    if code:
        report(words, code)
        if told:
            print(told, flush=True)
        hand_on(number)
        return code
    assert run is not None
    print(closing_words(run.summary, run.folder, list(run.products), told), flush=True)
    return 0


def _report(run: Run | None, error: str) -> str:
    """Write report.html of a run that got as far as a stage, and return the line that tells of it, else "". A run that
    is there already keeps its own when an evaluation beside it fails."""
    if run is None or not (run.made or run.products) or (run.purpose == "extend" and error):
        return ""
    return report_at_end(run.folder, run.recipe, run.raw, error)


def checked(name: str, raw: dict[str, Any]) -> RunConfig:
    """The configuration of a recipe. Raises UserError for one that cannot be run."""
    config = load(raw)
    if "ppo" in TRAINS[name]:
        refuse_in_ppo(config.peft)
    if len(TRAINS[name]) > 1:
        refuse_thin_chain(config.peft)
    return config


def check_job(name: str, chain: Callable[[Run], None], raw: dict[str, Any]) -> str:
    """All that can be known of a sweep's job before it is begun; gives the fingerprint of its data. Raises UserError
    for what is wrong."""
    config = checked(name, full := with_outer(raw))
    check_objective(name, config.objective)
    run = looked_at(name, chain, config, full)
    refuse(run.findings)
    return run.spec.data


def looked_at(name: str, chain: Callable[[Run], None], config: RunConfig, raw: dict[str, Any]) -> Run:
    """A run whose preflight was made and of which nothing is begun. Raises UserError where that came to no end."""
    run = Run(name, config, raw, "check")
    with suppress(Checked):
        chain(run)
    return run


def check_command(words: list[str], recipes: Mapping[str, Path]) -> int:
    """`alignkit check RECIPE`: the preflight alone; nothing is begun or written. Returns the exit code: 0, or 2."""
    fresh = {name: file for name, file in recipes.items() if name != "evaluate"}  # which is of a run that is there

    def call(recipe: str, raw: dict[str, Any]) -> int:
        chain = runpy.run_path(str(fresh[recipe]), run_name="alignkit.recipe")["main"].chain
        config, mistakes = checked(recipe, raw := with_outer(raw)), []
        try:
            found = looked_at(recipe, chain, config, raw).findings
        except UserError as mistake:
            mistakes = str(mistake).splitlines()
            found = preflight(recipe, config, decide_mode(config.tracking.mode)[0], None)
        mistakes += lines(found, "error")
        warnings = [f"warning: {line}" for line in lines(found, "warning")]
        counted = f", with {len(warnings)} warning{'s' * (len(warnings) > 1)}" * bool(warnings)
        facts = [f"{f.where:<12} {f.what}" for f in found if f.level == "fact" and not mistakes]
        for line in [*warnings, *facts, *([] if mistakes else [f"alignkit {recipe} can start{counted}"])]:
            print(line, flush=True)
        return report("\n".join(mistakes), 2) if mistakes else 0

    return ask("check", words, fresh, call)


def _what_is_left(run: Run | None, saved: str) -> str:
    if run is None or not (run.folder / "config.yaml").is_file():
        return " before anything was begun"
    if run.purpose == "extend":
        return ": the run is as it was; the same command begins again"
    words = shlex.join([as_typed(run.folder), *words_of_trust(run.raw)])
    return f": {saved}; `alignkit resume {words}` goes on"


def report(message: str, code: int) -> int:
    """Print `error: ...`: each line of a list of mistakes, or a failure with what belongs to it indented."""
    first, *rest = without_secrets(message).splitlines() or ["failed"]
    print(f"error: {on_one_line(first)}", file=sys.stderr)
    for line in map(on_one_line, rest):
        print(f"error: {line}" if code == 2 else f"  {line}", file=sys.stderr)
    return code
