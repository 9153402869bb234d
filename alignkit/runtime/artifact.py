"""What a stage leaves behind: a folder named by the digest of all that made it, sealed by a manifest.

    runs/.store/<stage>-<digest>/          a finished product; never changed again
    runs/.store/<stage>-<digest>.partial/  being written, or left by a crash; never taken for a product
    runs/<name>/<stage>                    a link to either

The digest covers the stage's own settings, the bytes of its data and the digests of its inputs: not where or how fast
it ran (tracking, launch, sharding, micro-batches), and not the code version, which is only recorded.
"""

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.errors import UserError
from alignkit.models.settings import adapter_facts
from alignkit.models.sound import refuse_broken_files
from alignkit.runtime.trust import refuse_links

SECTIONS = {
    "sft": ("model", "peft", "data", "sft"),
    "reward_model": ("peft", "data", "reward_model"),
    "ppo": ("peft", "data", "ppo", "ptx", "rollout", "reward", "shaping", "advantage", "kl", "judge"),
    "preferences": ("data", "ppo", "rollout", "reward", "judge", "overoptimize"),
    "strength": ("data", "reward_model", "denoise"),
    "evaluate": ("data", "evaluate", "ppo", "rollout", "reward", "judge"),
    "bench": ("data", "bench"),
}
MODEL_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")  # endings of what a model folder is made of
OF_LABELS = ("denoise_by", "_strengths_")  # of the data, but for a reward model alone
STUDIES = ("frontier", "overoptimize", "denoise", "bench")  # sections that the recipe of that name alone has
STAGE_VERSION = {  # raised by hand when a stage's result changes
    "sft": 2,
    "reward_model": 3,
    "ppo": 2,
    "preferences": 1,
    "strength": 1,
    "evaluate": 4,
    "bench": 1,
}
MEASURES = ("bench",)  # stages whose product belongs to one run and is made anew each time
# Of a reward or a judge: how it is asked; a reward model in `path` is an input, or a member, with a digest of its own.
OF_A_REWARD = ("path", "timeout", "retries", "backoff", "concurrency", "token_env")
WITHOUT_EFFECT = {  # settings that change how a result is computed or shown, not the result
    "sft": ("microbatch",),
    "reward_model": ("microbatch", "gate"),
    "ppo": ("microbatch_tokens", "packing", "max_engine_gap", "samples_every", "self_checks"),
    "rollout": ("batch", "unshard", "kv_cache_gib", "gpu_memory_utilization", "sleep", "eager", "compile"),
    "reward": OF_A_REWARD,
    "data": ("path", "denoise"),  # the bytes are in the data's fingerprint, or beside the settings
    "ptx": ("path",),  # likewise
    "judge": OF_A_REWARD,
    "overoptimize": ("proxy_pairs", "gold_model"),
    "model": ("path",),  # a folder's bytes, or a Hub id, are an input with a digest of its own
}


@dataclass(frozen=True)
class Artifact:
    """A model folder that a stage may start from: a finished stage, or a model from elsewhere (metrics then {})."""

    path: Path
    digest: str
    metrics: Mapping[str, Any]


def stage_digest(stage: str, raw: Mapping[str, Any], data: str, inputs: Mapping[str, str]) -> str:
    """Hex digest of all that decides the stage's product. data: the data's fingerprint; inputs: name -> digest."""
    chosen = {}
    for section in SECTIONS[stage]:
        chosen[section] = _decisive(raw[section], WITHOUT_EFFECT.get(section, ()))
    if stage == "ppo" and raw["ppo"].get("evaluate_every") is None:
        del chosen["judge"]
        chosen["ppo"].pop("evaluate_prompts", None)
    if "ppo" in chosen and not any(chosen["ppo"].get("stop_if", {}).values()):
        chosen["ppo"].pop("stop_if", None)  # nothing stops it
    if stage != "reward_model":
        chosen["data"] = {key: value for key, value in chosen["data"].items() if key not in OF_LABELS}
    if stage == "preferences":
        chosen["ppo"] = {"max_prompt": raw["ppo"]["max_prompt"]}
    identity = {
        "stage": stage,
        "version": STAGE_VERSION[stage],
        "seed": raw["seed"],
        "compute_dtype": raw["compute_dtype"],
        "settings": chosen,
        "data": data,
        "inputs": dict(inputs),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _decisive(settings: Mapping[str, Any], hidden: Sequence[str]) -> dict[str, Any]:
    """The settings that decide a result, of one section; of a combined reward also those of its members."""
    if not str(settings.get("_target_", "alignkit.")).startswith("alignkit."):
        return dict(settings)
    kept = {key: value for key, value in settings.items() if key not in hidden}
    if isinstance(members := kept.get("members"), dict):
        kept["members"] = {name: _decisive(member, hidden) for name, member in members.items()}
    return kept


def open_artifact(path: str, stages: Sequence[str] = (), whole: bool = True) -> Artifact:
    """A model that the user names: a finished stage (or its `model/`) by its manifest, any other folder by the bytes of
    its files. whole: false reads none of these, only sizes, and gives another folder no digest. Raises UserError if it
    is damaged, no model, or of another stage than one of `stages`."""
    folder = Path(path).expanduser()
    if folder.name == "model" and _manifest(folder.parent):
        folder = folder.parent
    if (folder / "manifest.json").is_file() and not (folder / "config.json").is_file():
        manifest = _manifest(folder)
        lost = ["manifest.json"] if manifest is None else damaged_files(folder, manifest, whole)
        if manifest is None or lost:
            raise UserError(f"'{path}' is damaged: {lost[0]} is missing, cut off or changed; make it again")
        if stages and manifest["stage"] not in stages:
            raise UserError(f"'{path}' is the product of {manifest['stage']}; expected one of {' or '.join(stages)}")
        return Artifact(folder.resolve(), manifest["digest"], manifest["metrics"])
    if folder.resolve().name.endswith(".partial"):
        raise UserError(f"'{path}' is an unfinished stage: run the command that makes it again until it ends")
    if not folder.exists():
        raise UserError(f"'{path}' does not exist: expected the folder of a finished stage or of a Hugging Face model")
    facts = adapter_facts(folder)
    if facts is None and not (folder / "config.json").is_file():
        raise UserError(f"'{path}' has neither manifest.json (a finished stage) nor config.json (a Hugging Face model)")
    refuse_broken_files(folder)
    if not whole:
        return Artifact(folder.resolve(), "", {})
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*")):
        if file.suffix in MODEL_FILES:
            digest.update(file.name.encode())
            digest.update(file_digest(file).encode())
    if facts and Path(facts["base_model_name_or_path"]).exists():
        digest.update(open_artifact(facts["base_model_name_or_path"]).digest.encode())
    return Artifact(folder.resolve(), digest.hexdigest()[:12], {})


def fetch(model: str, revision: str | None) -> Path:
    """The folder of a model of the Hub, brought here if it is not yet. Raises UserError with the reason."""
    from huggingface_hub import snapshot_download

    try:
        wanted = [f"*{ending}" for ending in MODEL_FILES]
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"'{model}' is no folder here and could not be had from the Hub: {reason}") from error


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Store:
    """The products of all runs in one folder, each made once."""

    def __init__(self, runs_dir: Path) -> None:
        self.folder = runs_dir / ".store"

    @contextmanager
    def locked(self, stage: str, digest: str) -> Iterator[None]:
        """Hold the product's lock: a second run that wants the same product waits here, then reuses it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{stage}-{digest}.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{stage}: another run is making this product; waiting for it", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def find(self, stage: str, digest: str) -> Artifact | None:
        """The finished product of that digest, if its manifest is there and names files that are all there."""
        folder = self.folder / f"{stage}-{digest}"
        manifest = _manifest(folder)
        if manifest is None or damaged_files(folder, manifest):
            return None
        return Artifact(folder, digest, manifest["metrics"])

    def partial(self, stage: str, digest: str) -> Path:
        """Where the product is written."""
        return self.folder / f"{stage}-{digest}.partial"

    def start(self, stage: str, digest: str, *, anew: bool = False) -> Path:
        """The folder to write the product into: the one that an interrupted attempt left with a checkpoint, unless
        `anew`; else an empty one, and what was left there is kept beside it."""
        partial = self.partial(stage, digest)
        if not anew and any(partial.glob("state/checkpoint-*/sealed.json")):
            refuse_links(partial)
            for left in ("result.json", "stop"):
                (partial / left).unlink(missing_ok=True)
            return partial
        if partial.exists():
            aside = (self.folder / f"{stage}-{digest}.failed-{number}" for number in itertools.count(1))
            partial.rename(next(place for place in aside if not place.exists()))
        (partial / "logs").mkdir(parents=True)
        return partial

    def publish(self, stage: str, digest: str, facts: Mapping[str, Any]) -> Artifact:
        """Seal the partial folder with a manifest and move it into place in one step."""
        partial, final = self.partial(stage, digest), self.folder / f"{stage}-{digest}"
        files = {
            str(file.relative_to(partial)): file_facts(file)
            for folder in ("model", "adapter")
            for file in sorted((partial / folder).rglob("*"))
            if file.is_file()
        }
        manifest = {"stage": stage, "digest": digest, "finished": time.time(), **facts, "files": files}
        write_json(partial / "manifest.json", manifest)
        if final.exists():  # only with force=true, or a product that lost files
            old = final.with_name(f"{final.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
            partial.rename(final)
            shutil.rmtree(old)
        else:
            partial.rename(final)
        sync_folder(self.folder)
        for left in (final / "state").glob("*checkpoint-*"):
            shutil.rmtree(left)  # last, when the product is safe: they are several times its size
        return Artifact(final, digest, facts["metrics"])


def _manifest(folder: Path) -> dict[str, Any] | None:
    """A finished stage's manifest; None where there is none, one that was cut off, or one of another program."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return (
        manifest if isinstance(manifest, dict) and {"stage", "digest", "files", "metrics"} <= manifest.keys() else None
    )


def intact(file: Path, facts: Mapping[str, Any], whole: bool = True) -> bool:
    """Whether a file has the size and, if it is to be read, the SHA-256 that were written down of it."""
    sized = file.is_file() and file.stat().st_size == facts["bytes"]
    return sized and (not whole or file_digest(file) == facts["sha256"])


def link(place: Path, target: Path) -> None:
    """Make `place` a relative link to `target`, replacing the link that was there, in one step."""
    fresh = place.with_name(f".{place.name}.link")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, place.parent), target_is_directory=True)
    fresh.replace(place)


def link_target(place: Path) -> str | None:
    """The name of the folder that a link points to, whether it is there or not; None if there is no link."""
    return Path(os.readlink(place)).name if place.is_symlink() else None


def write_json(file: Path, content: Any) -> None:
    """Write JSON so that a reader never sees half of it."""
    write_whole(file, json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Write the text beside the file, wait until the disk has it, and move it into place."""
    fresh = file.with_name(f".{file.name}.new")
    fresh.unlink(missing_ok=True)  # it might be a link
    with fresh.open("x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(file)


def file_facts(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file that is on the disk, not only in the system's memory."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    return {"bytes": file.stat().st_size, "sha256": file_digest(file)}


def sync_folder(folder: Path) -> None:
    """Wait until the disk knows which files are in the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damaged_files(place: Path, seal: Mapping[str, Any], whole: bool = True) -> list[str]:
    """The files that a seal or a manifest names and that are missing, cut off or changed."""
    return [name for name, facts in seal["files"].items() if not intact(place / name, facts, whole)]
