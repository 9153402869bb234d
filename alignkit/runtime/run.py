"""A run: a recipe's chain of stages, each made once and reused where the same settings and inputs made it before."""

import fcntl
import hashlib
import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from alignkit import __version__
from alignkit.data.corpus import Corpus, fingerprint_of, load_corpus
from alignkit.errors import UserError
from alignkit.observe.artifacts import places_of
from alignkit.observe.closing import as_typed
from alignkit.observe.wandb_mode import decide_mode
from alignkit.reward.source import chain_key
from alignkit.runtime import lineage
from alignkit.runtime.artifact import (
    MEASURES,
    Artifact,
    Store,
    link,
    link_target,
    open_artifact,
    stage_digest,
    write_json,
    write_whole,
)
from alignkit.runtime.check import keep, preflight, settle
from alignkit.runtime.compose import as_yaml, read_option
from alignkit.runtime.config import RunConfig, load, with_changes
from alignkit.runtime.findings import Finding
from alignkit.runtime.inputs import (
    check_bench,
    check_judge,
    judge_of,
    model_digest,
    num_parameters,
    start_of_reward_model,
)
from alignkit.runtime.launch import run_stage
from alignkit.runtime.machines import Team
from alignkit.runtime.sources import with_sources
from alignkit.runtime.worker import report_reused

Purpose = Literal["new", "resume", "extend", "check"]
"""extend: a stage is added to a run that is there, all else of which stays as it is; check: nothing is begun."""


class Spec(NamedTuple):
    """The settings of a stage; `identity`: what of them, and of the user's own code, its digest covers; `data`: the
    data's fingerprint."""

    raw: dict[str, Any]
    identity: dict[str, Any]
    data: str


class Run:
    """What a recipe works with: `run.stage(...)` for each step, `run.given(...)` for models from outside."""

    def __init__(
        self, recipe: str, config: RunConfig, raw: dict[str, Any], purpose: Purpose = "new", team: Team | None = None
    ) -> None:
        self.recipe, self.config, self.raw, self.purpose, self.team = recipe, config, raw, purpose, team
        self.spec = Spec(raw, with_sources(raw), fingerprint_of(config.data, config.seed))
        self.corpus: Corpus | None = load_corpus(config.data, config.seed)  # what cannot be read is told first
        check_judge(recipe, config, self.corpus)
        check_bench(config)
        self.name = config.name or f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        runs = Path(config.runs_dir).absolute()
        self.folder, self.store = runs / self.name, Store(runs)
        self.mode, note = decide_mode(config.tracking.mode)
        self.products: dict[str, Artifact] = {}
        self.made: list[str] = []  # stages that this run made itself, in order
        self.summary: dict[str, Any] = {}
        self.started = time.monotonic()
        self.facts = lineage.facts_of_work()
        self._note = note
        self._lock: IO[str] | None = None
        self.findings: list[Finding] = []

    def _look(self) -> None:
        """Preflight, once. Raises UserError with every error that it found, Checked where no more was asked for."""
        self.findings, self.corpus = preflight(self.recipe, self.config, self.mode, self.corpus), None
        settle(self.findings, self.purpose != "check")

    def _open(self) -> None:
        """Make the run's folder, once a stage is to be run: until then a mistake leaves nothing behind."""
        self._lock = self._claim()
        if self.purpose == "extend":
            self.summary = json.loads((self.folder / "summary.json").read_text("utf-8"))
            _say(f"run {self.name} in {as_typed(self.folder)}")
            return
        for old in list(self.folder.iterdir()) if self.purpose == "new" else ():  # of another run of this name
            if old.is_symlink() or old.name in ("summary.json", lineage.FILE):
                old.unlink()
        write_whole(self.folder / "config.yaml", f"# alignkit {self.recipe}\n{as_yaml(self.raw)}")
        keep(self.findings, self.folder)
        _say(f"run {self.name} ({self.recipe}) in {as_typed(self.folder)}")
        if self._note:
            _say(self._note)

    def stage(
        self, name: str, *, label: str | None = None, changes: Mapping[str, Any] | None = None, **inputs: Artifact
    ) -> Artifact:
        """The product of a stage: reused if the store has it, else made now. Raises StageFailed with the cause.

        A chain that has a stage several times gives each a `label`, by which folder and summary name it, and its
        `changes` of settings, {"ppo.episodes": 640, "kl": {...}}. An input that is None is left out.
        """
        label, spec = label or name, self._spec(changes or {})
        inputs = {key: item for key, item in {**inputs, **judge_of(name, spec.raw)}.items() if item is not None}
        self._refuse_what_is_not_used(name)
        if self._lock is None:
            self._look()
        made_from = {key: item.digest for key, item in inputs.items()} | (
            model_digest(spec.raw) if name == "sft" else {}
        )
        made_from |= {"run": self.name} if name in MEASURES else {}
        if self._lock is None:
            self._open()
        digest = stage_digest(name, spec.identity, spec.data, made_from)
        if self.purpose == "resume" and name != "evaluate":  # `alignkit evaluate` may have put another one there
            self._refuse_other_start(name, label, digest)
        with self.store.locked(name, digest):
            anew = self.config.force or name in MEASURES
            product = None if anew else self.store.find(name, digest)
            job, reused = self._job(name, label, digest, inputs, spec), product is not None
            if product is None:
                product = self._make(job, inputs, spec)
            else:
                _say(f"{label}: reused {as_typed(product.path)} (same settings and inputs; force=true runs it again)")
        link(self.folder / label, product.path)
        self.products[label] = product
        self.summary = {key: value for key, value in self.summary.items() if not key.startswith(f"{label}/")}
        self.summary.update({f"{label}/{key}": value for key, value in product.metrics.items() if key != "seconds"})
        self.summary[f"seconds/{label}"] = product.metrics["seconds"]
        if self.purpose != "extend":
            self.summary["seconds/total"] = round(time.monotonic() - self.started, 1)
        write_json(self.folder / "summary.json", self.summary)
        lineage.add_stage(self.folder, self.facts, job, product, reused)
        if reused:
            report_reused(job, self.config, self.summary)
        return product

    def _spec(self, changes: Mapping[str, Any]) -> Spec:
        """The settings of one stage. Raises UserError if a change makes them unsound."""
        if not changes:
            return self.spec
        raw = with_changes(self.raw, changes)
        config = load(raw)
        data = fingerprint_of(config.data, config.seed) if raw["data"] != self.raw["data"] else self.spec.data
        return Spec(raw, with_sources(raw), data)

    @property
    def needs_reward_model(self) -> bool:
        """Whether the reward scores with a reward model that the chain hands it."""
        return chain_key(self.config.reward) is not None

    def given(self, key: str) -> Artifact:
        """The model that the user named: `policy` or `reward.path`. Raises UserError if it is not set."""
        path = self.config.policy if key == "policy" else self._reward_path()
        key = key if key == "policy" else chain_key(self.config.reward) or key
        if path is None:
            raise UserError(
                f"{key}: missing; alignkit {self.recipe} needs the folder of a finished stage, "
                f"for example {key}=runs/NAME/{'sft' if key == 'policy' else 'reward_model'}"
            )
        return open_artifact(path, ("sft", "ppo") if key == "policy" else ("reward_model",), self.purpose != "check")

    def start(self) -> Artifact:
        """What a reward model starts from: `model.path` or `policy`. Raises UserError unless one of them is set."""
        return start_of_reward_model(self.config, self.purpose != "check") or self.given("policy")

    def finished(self, label: str, key: str | None = None) -> Artifact | None:
        """What a stage of this folder made before, or, by its key, what it was made from (None: nothing of that name).
        Raises UserError if the stage has not ended."""
        if not (self.folder / label / "manifest.json").is_file():
            raise UserError(
                f"{as_typed(self.folder)}: has no finished stage named {label}, which is what is judged once more; "
                "`alignkit resume` goes on with a run that was interrupted"
            )
        if key is None:
            return open_artifact(str(self.folder / label))
        inputs = json.loads((self.folder / label / "manifest.json").read_text("utf-8"))["inputs"]
        if key not in inputs:
            return None
        place = Path(inputs[key]["path"])
        here = self.store.folder / place.name  # where it is if all runs were moved since
        return open_artifact(str(place if place.exists() else here))

    def rows_of(self, product: Artifact, file: str) -> dict[str, Any]:
        """Changes of settings by which a stage reads its data from a file that another stage made."""
        held_out = self.raw["data"].get("heldout", 0.1)
        files = read_option("data", "jsonl")
        return {"data": {**files, "path": str(product.path / file), "heldout": held_out}}

    def draw(self, name: str) -> None:
        """Draw what the stages so far say together into the run's folder: `frontier` or `overoptimization`."""
        from alignkit.runtime import pictures

        getattr(pictures, name)(self.folder, {label: item.path for label, item in self.products.items()})
        _say(f"{name}: {as_typed(self.folder)}/{name}.svg and .json")

    def _refuse_what_is_not_used(self, name: str) -> None:
        """A model from outside for what the recipe makes itself is a mistake, not a hint."""
        given = {"sft": ("policy", self.config.policy), "reward_model": ("reward.path", self._reward_path())}
        key, path = given.get(name, ("", None))
        if path is not None:
            raise UserError(
                f"{key}={path} is not used by alignkit {self.recipe}, which trains its own; use alignkit ppo"
            )

    def _refuse_other_start(self, name: str, label: str, digest: str) -> None:
        """A stage that was begun from other data or another model would silently begin again."""
        begun = link_target(self.folder / label)
        if begun is not None and begun.removesuffix(".partial") != f"{name}-{digest}":
            raise UserError(
                f"resume: {label} was begun as {begun.removesuffix('.partial')}, but is {name}-{digest} now: its data, "
                "the model that it starts from or alignkit itself has changed since; put it back, or start another run"
            )

    def _job(self, name: str, label: str, digest: str, inputs: dict[str, Artifact], spec: Spec) -> dict[str, Any]:
        """What the ranks of a stage are told."""
        last = label == lineage.last_stage(self.recipe, self.config)
        partial, base = self.store.partial(name, digest), hashlib.sha256(str(self.folder).encode()).hexdigest()[:6]
        return {
            "stage": name,
            "label": label,
            "recipe": self.recipe,
            "run": self.name,
            "digest": digest,
            "run_id": lineage.wandb_id(self.folder, partial, f"{digest}-{base}", last),
            "run_folder": str(self.folder),
            "inputs": {key: str(item.path) for key, item in inputs.items()},
            "made_from": {key: {"digest": item.digest, "path": str(item.path)} for key, item in inputs.items()},
            "data": {"fingerprint": spec.data, "places": places_of(spec.raw["data"])},
            "config": spec.raw,
            "tracking_mode": self.mode,
            "facts": self.facts,
            "last": last,
            "figures": self.summary if last else {},
            "first": not self.made,
        }

    def _make(self, job: dict[str, Any], inputs: dict[str, Artifact], spec: Spec) -> Artifact:
        began, name, label, digest = time.monotonic(), job["stage"], job["label"], job["digest"]
        partial = self.store.start(name, digest, anew=self.config.force)
        if self.purpose != "extend":  # what is there stays until there is another
            link(self.folder / label, partial)
        ranks = self.config.launch.ranks
        begun = "taken up again" if (partial / "job.json").exists() else "started"
        _say(f"{label}: {begun}" + f" on {ranks} processes" * (ranks > 1))
        write_json(partial / "job.json", job)
        self.made.append(label)
        size = num_parameters(inputs, spec.raw["model"])
        stopped = run_stage(partial / "job.json", self.config.launch, size, self.team)
        self.mode = (lineage.wandb_run(partial) or {}).get("mode", self.mode)  # one stage alone waits for a dead server
        metrics = json.loads((partial / "result.json").read_text("utf-8"))
        metrics["seconds"] = round(time.monotonic() - began, 1)
        facts = {
            "metrics": metrics,
            "inputs": job["made_from"],
            "data": spec.data,
            "settings": spec.raw,
            "alignkit": __version__,
        }
        product = self.store.publish(name, digest, facts)
        _say(f"{label}: done in {metrics['seconds']:.0f} s")
        if stopped:
            raise stopped
        return product

    def _reward_path(self) -> str | None:
        return getattr(self.config.reward, "path", None)

    def _claim(self) -> IO[str]:
        """The run's folder, held by this process alone until it ends."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise UserError(
                f"runs_dir={self.config.runs_dir}: no folder {self.folder} can be written: {error.strerror}"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"name={self.name}: another process is writing {self.folder}; choose another name=..."
            ) from None
        return lock


def _say(text: str) -> None:
    print(text, flush=True)
