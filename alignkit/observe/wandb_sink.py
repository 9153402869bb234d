"""Weights & Biases: the only file that imports wandb, and only once a run is to be opened.

One W&B run per stage: group = the whole run's name, job_type = the stage, an id that the caller derives from the run.
The x-axis is the stage's step key. `log(step=...)` is never used: it drops every row whose step is behind the last one,
so that a resumed run or a second kind of row would lose data without a word.
"""

import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from alignkit.observe.artifacts import Item, references
from alignkit.observe.secrets import redacted
from alignkit.observe.settings import TrackingSettings
from alignkit.observe.tracking import STEP_KEYS, without_nonfinite

logger = logging.getLogger(__name__)

INIT_SECONDS = 20
"""How long a silent server may hold up the start of a stage (wandb's own limit is 90, and then training dies)."""
LOGIN_SECONDS = 5
"""How long of it the key may be asked about, which is not part of the 20."""
FINISH_SECONDS = 60
"""How long it may hold up the end. What is not uploaded by then is on disk and `wandb sync` sends it."""
ASKING_SECONDS = 10
"""How long the end waits for an answer about each artifact."""
UPLOAD_SECONDS = 3600
"""The same where models are uploaded."""
AGENT = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")
"""What a W&B agent tells the run that it has started. One stage takes it; the others would overwrite that one."""


class WandbSink:
    """An open W&B run of one stage. Names and step keys arrive complete; see `alignkit.observe.tracking.Tracker`."""

    def __init__(
        self, run: Any, stage: str, mode: str, environment: Mapping[str, str | None], artifacts: str = "reference"
    ) -> None:
        self.mode = mode
        self._run = run
        self._artifacts = artifacts
        self._asking: list[threading.Thread] = []
        self._step_key = STEP_KEYS[stage]
        self._samples_key = f"{stage}/samples"
        self._table: Any = None
        self._environment = environment
        run.define_metric(self._step_key)
        run.define_metric(f"{stage}/*", step_metric=self._step_key)

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log(dict(row))

    def samples(self, rows: list[dict[str, Any]], step: int) -> None:
        """Add rows to the table. Its columns are those of the first rows; `samples.jsonl` has any that come later.

        Incremental: each call uploads the new rows alone. (An ordinary table keeps only the first call's rows, a
        mutable one writes everything again each time.)
        """
        if self._table is None:
            import wandb

            columns: list[str | int] = list(dict.fromkeys(name for row in rows for name in row))
            self._table = wandb.Table(columns=columns, log_mode="INCREMENTAL", allow_mixed_types=True)
        for row in rows:
            self._table.add_data(*(_cell(row.get(name)) for name in self._table.columns))
        self._run.log({self._samples_key: self._table, self._step_key: step})

    def histograms(self, values: Mapping[str, list[float]], step: int) -> None:
        import wandb

        drawn = {f"{name}_histogram": wandb.Histogram(numbers) for name, numbers in values.items()}
        self._run.log({**drawn, self._step_key: step})

    def alert(self, title: str, text: str) -> None:
        """A message that W&B sends to whoever has asked for such ones."""
        self._run.alert(title=title, text=text, level="WARN")

    def summarise(self, figures: Mapping[str, float | str]) -> None:
        self._run.summary.update(dict(figures))

    def facts(self) -> dict[str, str | None]:
        """Which run this is, for lineage.json and `alignkit sync`."""
        run = self._run
        return {"id": run.id, "mode": self.mode, "project": run.project, "entity": run.entity or None}

    def inputs(self, items: Sequence[Item]) -> None:
        """Draw the lines from what the stage takes, as far as there is a server: `alignkit sync` does it later."""
        if self._artifacts != "none" and self.mode == "online":
            self._aside(lambda: [self._run.use_artifact(make_artifact(item)) for item in items])

    def product(self, item: Item) -> None:
        """The model that the stage has made. Offline an upload waits for `alignkit sync`, as the model still moves."""
        upload = self._artifacts == "upload"
        if self._artifacts == "none" or (upload and self.mode == "offline"):
            return
        self._aside(lambda: self._run.log_artifact(make_artifact(item, upload), aliases=["latest", item.digest]))

    def _aside(self, ask: Callable[[], Any]) -> None:
        """Ask in a thread: these calls wait for the server's answer, which training must not."""

        def work() -> None:
            try:
                ask()
            except Exception as error:
                reason = str(error).split("\n")[0]
                logger.warning("tracking: W&B has no artifact (%s: %s)", type(error).__name__, reason)

        self._asking.append(threading.Thread(target=work, daemon=True))
        self._asking[-1].start()

    def finish(self, exit_code: int) -> None:
        """Finish and tear down: `finish` alone may return before the last records are in the run's file."""
        import wandb

        for thread in self._asking:
            thread.join(timeout=ASKING_SECONDS)
        try:
            self._run.finish(exit_code=exit_code)
            wandb.teardown()
        finally:
            _set_environment(self._environment)


def open_wandb(
    settings: TrackingSettings,
    *,
    mode: str,
    folder: Path,
    run_name: str,
    stage: str,
    label: str,
    config: Mapping[str, Any],
    run_id: str,
    tags: Sequence[str],
    facts: Mapping[str, Any] = MappingProxyType({}),
    of_agent: bool = False,
) -> WandbSink | None:
    """Open the W&B run of a stage. None where W&B is disabled or cannot be had: that never stops a run.

    mode:     the first half of what `decide_mode` returned: online | offline | disabled.
    folder:   W&B's own files, staged tables and cache included, go to `wandb/` inside it. Its path must last until an
              offline run is synced: W&B's log names the staged tables by their absolute paths.
    run_name: the name of the whole run, which groups its stages. The stage's run is called <run_name>/<label>.
    config:   the resolved configuration. It has one key of its own, "cfg", as a W&B sweep locks the keys that it sweeps
              and drops a nested value of the same name.
    tags:     all labels of the run, those of the settings included where the caller wants them.
    facts:    a few small values to filter by (recipe, digest), stored under "alignkit" with the stage.
    of_agent: it takes the run that a W&B agent has begun, if there is one; every other stage is a run beside it, in the
              sweep's project.
    """
    if mode == "disabled":
        return None
    swept = bool(os.environ.get("WANDB_SWEEP_ID"))
    identity = {
        "project": (swept and os.environ.get("WANDB_PROJECT")) or settings.project,
        "entity": (swept and os.environ.get("WANDB_ENTITY")) or settings.entity,
        "tags": redacted(tags),
        "notes": redacted(settings.notes),
        "group": run_name,
        "job_type": stage,
        "id": run_id,
        "name": f"{run_name}/{label}",
        "config": {"alignkit": {**facts, "stage": stage}, "cfg": redacted(config)},
        "dir": str(folder),
    }
    held = _set_environment({**_self_contained(folder), **({} if of_agent else dict.fromkeys(AGENT))})
    for attempt in ("online", "offline") if mode == "online" else ("offline",):
        try:
            run = _init(attempt, identity, upload=settings.artifacts == "upload")
            return WandbSink(run, stage, attempt, held, settings.artifacts)
        except Exception as error:
            reason = str(error).split("\n")[0]
            outcome = "going on offline" if attempt == "online" else "going on without it"
            logger.warning("tracking: W&B %s failed (%s: %s); %s", attempt, type(error).__name__, reason, outcome)
    _set_environment(held)
    return None


def make_artifact(item: Item, upload: bool = False) -> Any:
    """W&B's own object. A reference names each file by its address and, instead of a checksum of gigabytes, by the
    digest of the product: the same product is the same version, whoever names it."""
    import wandb

    made = wandb.Artifact(item.name, type=item.kind, metadata=item.metadata)
    if upload and item.kind == "model":
        made.add_dir(str(item.here or item.places[0]), policy="immutable")
        return made
    for name, address, now in references(item):
        for entry in made.add_reference(now, name=name, checksum=False):
            entry.ref, entry.digest = address, f"{item.digest}/{name}"
    return made


def draw_lines(run: Mapping[str, str | None], folder: Path, items: Sequence[Item], product: Item | None) -> None:
    """Take up a run that W&B has (its `facts`), draw the lines from what it took, and upload what it made. folder: for
    W&B's own files. Raises whatever W&B does."""
    import wandb

    wandb.teardown()
    held = _set_environment(_self_contained(folder))
    place: dict[str, Any] = {name: run[name] for name in ("id", "project", "entity")}
    settings = _supported(wandb.Settings, upload=product is not None)
    try:
        taken_up = wandb.init(**place, dir=str(folder), mode="online", resume="must", settings=settings)
        for item in items:
            taken_up.use_artifact(make_artifact(item))
        if product is not None:
            taken_up.log_artifact(make_artifact(product, upload=True), aliases=["latest", product.digest])
        taken_up.finish()
    finally:
        _set_environment(held)


def _init(mode: str, identity: Mapping[str, Any], upload: bool = False) -> Any:
    """Start a W&B run, on a session of its own: an earlier one would ignore this stage's folders and mode."""
    import wandb

    wandb.teardown()
    (Path(identity["dir"]) / "wandb").mkdir(parents=True, exist_ok=True)
    words = sys.argv
    sys.argv = redacted(words)  # wandb notes the command line
    try:
        # `resume` continues the run of this id where an interrupted stage is taken up again; offline it has no effect.
        options: dict[str, Any] = {"mode": mode, "resume": "allow", "reinit": "finish_previous"}
        return wandb.init(**identity, **options, settings=_supported(wandb.Settings, upload))
    finally:
        sys.argv = words


def _supported(settings_class: Any, upload: bool = False) -> Any:
    """Our W&B settings, without those that this version of wandb does not know: it would refuse them all."""
    wanted = {
        "console": "off",
        "silent": True,
        "init_timeout": INIT_SECONDS,
        "login_timeout": LOGIN_SECONDS,
        "finish_timeout": UPLOAD_SECONDS if upload else FINISH_SECONDS,
        # The default of 15 s loses everything that a killed process logged in its last 15 s.
        "x_transaction_log_flush_interval": 1.0,
    }
    return settings_class(**{name: value for name, value in wanted.items() if name in settings_class.model_fields})


def _self_contained(folder: Path) -> dict[str, str | None]:
    """Environment that keeps W&B's files in the stage's folder; by default tables are staged in the home folder.

    The run's own folder is an argument of `wandb.init`, not WANDB_DIR: that would also move the place where wandb looks
    for the working folder's settings, and with them the address of a server of one's own.
    """
    inside = folder.resolve() / "wandb"
    return {
        "WANDB_DATA_DIR": str(inside / "data"),
        "WANDB_CACHE_DIR": str(inside / "cache"),
        "WANDB_SILENT": "true",
    }


def _set_environment(values: Mapping[str, str | None]) -> dict[str, str | None]:
    """Set variables (None: unset) and return what they were."""
    held = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return held


def _cell(value: Any) -> Any:
    """A table cell: text, number or null as they are, chat messages and other structure as JSON."""
    value = without_nonfinite(value)
    return value if value is None or isinstance(value, (str, int, float)) else json.dumps(value, ensure_ascii=False)
