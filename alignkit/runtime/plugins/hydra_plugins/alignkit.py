"""The launcher through which Hydra's sweepers run jobs: hydra/launcher=alignkit, the default of every recipe.

Hydra takes launchers only from the namespace package `hydra_plugins`, of which this folder is a part (see compose.py).
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf, open_dict

from alignkit.errors import UserError
from alignkit.runtime.compose import JobFailed, job_name, own_words, plain
from alignkit.runtime.sweep import Job


class Ended(JobReturn):
    """What a job returns; of one that failed the sweepers get the reason, without a further line on the terminal."""

    @property
    def return_value(self) -> Any:
        """The objective, a tuple of several. Raises JobFailed."""
        if isinstance(self._return_value, JobFailed):
            raise self._return_value
        return self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


class SweepLauncher(Launcher):
    """at_once, gpus: see `sweep.slots_for`. The task function has a `Sweep` as its attribute `sweep`."""

    def __init__(self, at_once: int | None = None, gpus: Sequence[Any] | None = None) -> None:
        self.at_once, self.gpus = at_once, gpus

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Keep what Hydra gives."""
        self.config, self.context, self.task = config, hydra_context, task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run all of these jobs; what is returned of one that failed raises JobFailed when it is looked at."""
        # Hydra's own sweeper has written all settings there before anything was checked; N.yaml holds them.
        (Path(self.config.hydra.sweep.dir) / "multirun.yaml").unlink(missing_ok=True)
        sweep, jobs = self.task.sweep, []
        returns: list[JobReturn] = []
        sweep.directions = directions_of(self.config.hydra.sweeper)
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id, config.hydra.job.num = str(number), number
            HydraConfig.instance().set_config(config)
            settings = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
            done = Ended(overrides=list(overrides), cfg=config, hydra_cfg=config, status=JobStatus.COMPLETED)
            returns.append(done)
            if settings.launch.inline or sweep.check is None:
                done.return_value = self.task(settings)
                continue
            raw = plain(settings)
            sweep.name = raw["name"] or sweep.name
            raw["name"] = job_name(sweep.name, sweep.typed)
            changes = dict(word.split("=", 1) for word in own_words(list(overrides), sweep.typed))
            jobs.append(Job(number, raw["name"], changes, raw))
        self._run(jobs, returns)
        return returns

    def _run(self, jobs: list[Job], returns: list[JobReturn]) -> None:
        try:
            found = self.task.sweep.run(jobs, self.at_once, self.gpus) if jobs else []
        except UserError:
            for folder in (Path(self.config.hydra.sweep.dir), Path(self.config.hydra.sweep.dir).parent):
                with suppress(OSError):  # which Hydra made; not if there is something in it
                    folder.rmdir()
            raise
        for done, entry in zip(returns, found):
            figures = entry["objective"] or [None]
            done.return_value = figures[0] if len(figures) == 1 else tuple(figures)
            if entry["status"] != "done":
                done.status, done.return_value = JobStatus.FAILED, JobFailed(*self.task.sweep.failure)


def directions_of(sweeper: Any) -> list[str]:
    """Of a sweeper that optimises: minimize or maximize for each objective; of others none."""
    asked = plain(sweeper, resolve=False).get("direction") or []
    several: list[Any] = asked if isinstance(asked, list) else [asked]
    return [getattr(each, "name", each) for each in several]
