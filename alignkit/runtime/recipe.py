"""The decorator that makes a recipe a program: Hydra composes, one check, then the chain runs."""

import os
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from alignkit.errors import StageFailed, TrainingError, UserError, on_one_line
from alignkit.models.settings import refuse_in_ppo, refuse_thin_chain
from alignkit.observe.closing import as_typed, closing_words
from alignkit.observe.leaderboard import check_objective
from alignkit.runtime.config import RunConfig, conf_dir, load
from alignkit.runtime.failure import of_a_full_disk
from alignkit.runtime.launch import follow
from alignkit.runtime.machines import Team, facts_of
from alignkit.runtime.outer import is_extra_task, with_outer
from alignkit.runtime.report_run import report_at_end
from alignkit.runtime.rules import TRAINS
from alignkit.runtime.run import Purpose, Run
from alignkit.runtime.signals import Stopped, hand_on, raise_stopped, signals_to


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
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from alignkit.runtime.compose import JobFailed, compose_and_call, explain

    try:
        if is_extra_task():
            return 0
        return compose_and_call(
            conf_dir(), name, lambda raw: run_job(name, chain, raw), lambda raw: check_job(name, raw)
        )
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
    except Exception as error:
        code, words = 1, of_a_full_disk(error)
        if not words:
            raise
    except Stopped as stop:
        number, code, words = stop.number, stop.exit_code, f"stopped by {stop}{_what_is_left(run, stop.saved)}"
    except KeyboardInterrupt:  # launch=inline
        code, words = 130, f"stopped by SIGINT{_what_is_left(run, 'finished stages are kept')}"
    finally:
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


def check_job(name: str, raw: dict[str, Any]) -> str:
    """All that can be known of a sweep's job before it is begun, its data and models included; gives the fingerprint of
    its data. Raises UserError for what is wrong."""
    config = checked(name, with_outer(raw))
    check_objective(name, config.objective)
    run = Run(name, config, raw)
    if name == "ppo":
        run.given("policy")
        if run.needs_reward_model:
            run.given("reward.path")
    if name == "reward_model":
        run.start()
    return run.spec.data


def _what_is_left(run: Run | None, saved: str) -> str:
    if run is None or not (run.folder / "config.yaml").is_file():
        return " before anything was begun"
    if run.purpose == "extend":
        return ": the run is as it was; the same command begins again"
    return f": {saved}; `alignkit resume {shlex.quote(as_typed(run.folder))}` goes on"


def report(message: str, code: int) -> int:
    """Print `error: ...`: each line of a list of mistakes, or a failure with what belongs to it indented."""
    first, *rest = message.splitlines() or ["failed"]
    print(f"error: {on_one_line(first)}", file=sys.stderr)
    for line in map(on_one_line, rest):
        print(f"error: {line}" if code == 2 else f"  {line}", file=sys.stderr)
    return code
