"""The decorator that makes a recipe a program: Hydra composes, one check, then the chain runs."""

import os
import sys
from collections.abc import Callable

from alignkit.errors import StageFailed, TrainingError, UserError
from alignkit.models.settings import refuse_in_ppo, refuse_thin_chain
from alignkit.observe.closing import closing_words
from alignkit.runtime.config import conf_dir, load
from alignkit.runtime.launch import Stopped
from alignkit.runtime.run import Run


def recipe(name: str) -> Callable[[Callable[[Run], None]], Callable[[], None]]:
    """Turn `main(run)` into a program whose settings are conf/<name>.yaml and the words of the command line."""

    def decorate(chain: Callable[[Run], None]) -> Callable[[], None]:
        def program() -> None:
            sys.exit(run_program(name, chain))

        program.__doc__ = chain.__doc__
        return program

    return decorate


def run_program(name: str, chain: Callable[[Run], None]) -> int:
    """Compose, then run each job. Returns the exit code: 0; 1 a stage failed; 2 a mistake; 128 + n after a signal."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from alignkit.runtime.compose import compose_and_call, explain

    if is_extra_rank():
        return 0
    try:
        return compose_and_call(conf_dir(), name, lambda raw: run_job(name, chain, raw))
    except (HydraException, OmegaConfBaseException) as error:
        return _report(explain(error, conf_dir(), name), 2)
    except BrokenPipeError:  # `alignkit rlhf --cfg job | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run_job(name: str, chain: Callable[[Run], None], raw: dict) -> int:
    """Check one composed configuration and run the chain; a person's mistake or a failed stage is told in short."""
    try:
        raw = with_outer_ranks(raw)
        config = load(raw)
        if name in ("rlhf", "ppo"):
            refuse_in_ppo(config.peft)
        if name == "rlhf":
            refuse_thin_chain(config.peft)
        run = Run(name, config, raw)
        chain(run)
    except UserError as error:
        return _report(str(error), 2)
    except TrainingError as error:  # launch=inline
        return _report(str(error), 1)
    except StageFailed as error:
        return _report(str(error), error.exit_code)
    except Stopped as stop:
        return _report(f"stopped by {stop}; finished stages are kept and will be reused", stop.exit_code)
    except KeyboardInterrupt:
        return _report("stopped by SIGINT; finished stages are kept and will be reused", 130)
    print(closing_words(run.summary, run.folder, list(run.products)), flush=True)
    return 0


def is_extra_rank() -> bool:
    """Whether this process is a further rank of a torchrun or Slurm job around the launcher: it has nothing to do,
    since the first one starts all ranks itself."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    return int(rank) > 0


def with_outer_ranks(raw: dict) -> dict:
    """Started by torchrun or srun with several ranks, this first one starts as many itself, unless launch.processes
    says otherwise. Raises UserError if they are spread over several machines."""
    ranks = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or ranks)
    if ("RANK" not in os.environ and "SLURM_PROCID" not in os.environ) or ranks == 1:
        return raw
    if here != ranks or int(os.environ.get("SLURM_NNODES", 1)) > 1:
        raise UserError(f"{ranks} ranks on several machines: alignkit runs on one machine; start it there by itself")
    launch = raw["launch"]
    return {**raw, "launch": {**launch, "processes": ranks}} if launch["processes"] == 1 else raw


def _report(message: str, code: int) -> int:
    """Print `error: ...`: each line of a list of mistakes, or a failure with what belongs to it indented."""
    first, *rest = message.splitlines() or ["failed"]
    print(f"error: {first}", file=sys.stderr)
    for line in rest:
        print(f"error: {line}" if code == 2 else f"  {line}", file=sys.stderr)
    return code
