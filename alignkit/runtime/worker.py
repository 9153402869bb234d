"""One rank of one stage: reads the job file, opens cluster and tracker, runs the stage, writes its result.

    python -m alignkit.runtime.worker JOB.json      (started by alignkit.runtime.group)

What goes wrong is written to logs/rank<r>.error.json, from which the launcher tells the cause.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from alignkit.errors import Interrupted, NotFinite, TrainingError, UserError
from alignkit.observe.secrets import without_secrets
from alignkit.runtime.artifact import write_json
from alignkit.runtime.config import RunConfig, load
from alignkit.runtime.failure import of_a_full_disk
from alignkit.runtime.group import die_with_parent
from alignkit.runtime.lineage import WANDB
from alignkit.stages.job import Job


def main() -> None:
    """Run the job that the command line names; never returns."""
    die_with_parent(signal.SIGKILL)
    bind_threads(int(os.environ.get("LOCAL_RANK", 0)))
    job_file, rank = Path(sys.argv[1]), int(os.environ.get("RANK", 0))
    logs = job_file.parent / "logs"
    if rank > 0:
        _send_output_to(logs / f"rank{rank}.log")
    try:
        run_job(job_file)
    except BaseException as error:
        kinds: dict[type, str] = {UserError: "user", TrainingError: "training", NotFinite: "training"}
        full = of_a_full_disk(error)
        kind = "training" if full else kinds.get(type(error), "crash")
        text = without_secrets(traceback.format_exc())
        message = full or (str(error) if kind != "crash" else f"{type(error).__name__}: {error}".splitlines()[0])
        message = without_secrets(message)
        report = {"rank": rank, "kind": kind, "message": message, "traceback": text, "time": time.time()}
        try:
            write_json(logs / f"rank{rank}.error.json", report)
        except OSError:  # a full disk may not take even that
            print(message, flush=True)
        if kind == "crash" and rank == 0:
            (logs / "rank0.traceback.txt").write_text(text, encoding="utf-8")
        leave(1)  # no clean-up that could wait for the other ranks
    leave(0)


def leave(code: int) -> NoReturn:
    """End this process here, without the interpreter's own end: gloo's threads may still hold the tensors of the last
    collective, and one that asks for the interpreter while it goes takes the process down with it (SIGABRT)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def bind_threads(local_rank: int) -> None:
    """Give this rank's OpenMP threads cores of their own, before torch is imported: unbound, two can be a hundred times
    slower than one on small products. (Bound in the process that starts the ranks they would all inherit one core.)"""
    threads = int(os.environ.get("OMP_NUM_THREADS", 1))
    if threads == 1 or not hasattr(os, "sched_setaffinity"):
        return
    cores, ranks = sorted(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if ranks * threads <= len(cores):
        os.sched_setaffinity(0, cores[local_rank * threads : (local_rank + 1) * threads])
        os.environ.update(OMP_PROC_BIND="true", OMP_PLACES="threads")


def run_job(job_file: Path) -> None:
    """Run the stage; rank 0 writes result.json last, when the product is whole."""
    spec = json.loads(job_file.read_text("utf-8"))
    config = load(spec["config"])
    job = Job(
        stage=spec["stage"],
        config=config,
        inputs={name: Path(path) for name, path in spec["inputs"].items()},
        out=job_file.parent,
        first=spec["first"],
    )
    quiet_libraries()
    from alignkit.observe.alerts import NOT_A_NUMBER, Watch
    from alignkit.observe.tracking import Tracker
    from alignkit.runtime.checkpoint import Checkpoints
    from alignkit.runtime.sharding import Cluster

    stage = importlib.import_module(f"alignkit.stages.{job.stage}")
    cluster = Cluster.of(config)
    if cluster.is_main and cluster.device.type == "cpu":
        warn_of_slow_threads()
    limits = config.tracking.alerts
    watch = Watch(limits if job.stage == "ppo" else replace(NOT_A_NUMBER, nan=limits.nan), config.kl.target)
    sink = _open_sink(spec, config) if cluster.is_main else None
    if cluster.is_main:
        write_json(job.out / WANDB, sink.facts() if sink else None)
    tracker = Tracker(job.out, job.stage, cluster.is_main, sink, watch)
    identity = {"stage": job.stage, "digest": spec["digest"], "settings": spec["config"]}
    checkpoints = Checkpoints(job.out, cluster, tracker, config.checkpoint, identity)
    code = 1
    try:
        metrics = stage.run(job, cluster, tracker, checkpoints)
        if cluster.is_main:
            tracker.summarise(metrics)
            tracker.hand_on(_product(spec, job.out), spec["figures"])
            write_json(job.out / "result.json", metrics)
        cluster.barrier()
        code = 0
    except Interrupted as end:
        if cluster.is_main:
            write_json(job.out / "logs" / "interrupted.json", {"step": end.step})
        cluster.barrier()
    except Exception as error:
        if isinstance(error, NotFinite):
            tracker.alert("nan", str(error))
        checkpoints.salvage()
        raise
    finally:
        tracker.close(exit_code=code)
    cluster.close()


def warn_of_slow_threads() -> None:
    """Say so when a small matrix product takes over 1 ms: OpenMP threads then wait for each other, not for work."""
    import torch

    a, b = torch.randn(32, 256), torch.randn(256, 256)
    seconds = []
    for _ in range(25):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    median = sorted(seconds)[len(seconds) // 2]
    if median > 1e-3:
        print(
            f"warning: a small matrix product takes {median * 1e3:.1f} ms on {torch.get_num_threads()} threads; "
            "set launch.threads=1 or stop other jobs on this machine"
        )


def _open_sink(spec: dict[str, Any], config: RunConfig) -> Any:
    """The W&B run of this stage, unless tracking is off."""
    if spec["tracking_mode"] == "disabled":
        return None
    from alignkit.observe.artifacts import taken
    from alignkit.observe.wandb_sink import open_wandb

    sink = open_wandb(
        config.tracking,
        mode=spec["tracking_mode"],
        folder=Path(spec["run_folder"]),  # it must not move: W&B records absolute paths
        run_name=spec["run"],
        label=spec["label"],
        stage=spec["stage"],
        config=spec["config"],
        run_id=spec["run_id"],
        tags=[spec["recipe"], spec["stage"], *config.tracking.tags],
        facts={**spec["facts"], "recipe": spec["recipe"], "digest": spec["digest"]},
        of_agent=spec["last"],
    )
    if sink is not None:
        sink.inputs(taken(spec["data"], spec["made_from"]))
    return sink


def _product(spec: dict[str, Any], out: Path) -> Any:
    """The model that the stage has made, by the place that the launcher will give it; None if it makes none."""
    from alignkit.observe.artifacts import model

    if not (out / "model").is_dir():
        return None
    final = out.with_name(f"{spec['stage']}-{spec['digest']}")
    return model(final, spec["digest"], out / "model", run=spec["run"], stage=spec["label"])


def report_reused(spec: dict[str, Any], config: RunConfig, figures: dict[str, Any]) -> None:
    """A W&B agent waits for the run that it has begun, also where its last stage was made before: give it figures."""
    if not (spec["last"] and os.environ.get("WANDB_SWEEP_ID")):
        return
    sink = _open_sink(spec, config)
    if sink is not None:
        with contextlib.suppress(Exception):  # W&B never stops a run
            sink.summarise(figures)
            sink.finish(0)


def quiet_libraries() -> None:
    """Leave warnings about what cannot be mended here out of the person's terminal."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    with contextlib.suppress(ImportError):
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _send_output_to(file: Path) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


if __name__ == "__main__":
    main()
