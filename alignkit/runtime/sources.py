"""What a run is made of besides its settings: the user's code, models and texts, each by its digest."""

import hashlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignkit.data.files import Files, files_digest, resolve
from alignkit.data.strength import read_strengths, strengths_file
from alignkit.runtime.artifact import MODEL_FILES, open_artifact
from alignkit.runtime.config import STRATEGIES, RunConfig
from alignkit.runtime.inputs import named_models

PARTS, PART = 16, 2**20  # of a file that is larger than both together, so many parts of so many bytes are compared


def with_sources(raw: dict[str, Any]) -> dict[str, Any]:
    """The settings, and beside each strategy from outside alignkit (or function that one names) the digest of its file,
    beside a combined reward's models that of their folders, beside ptx.path that of its files: when the user's code,
    models or texts change, so does what is made from them. Raises UserError where one cannot be read."""
    result = dict(raw)
    for name in STRATEGIES:
        result[name] = _with_code(raw[name])
    if raw["data"].get("denoise"):
        file = strengths_file(raw["data"]["denoise"])
        read_strengths(str(file))
        result["data"] = {**result["data"], "_strengths_": files_digest(str(file), "data.denoise")}
    if raw["ptx"]["path"]:
        result["ptx"] = {**raw["ptx"], "_files_": files_digest(raw["ptx"]["path"], "ptx.path")}
    return result


def _with_code(strategy: dict[str, Any]) -> dict[str, Any]:
    """One strategy with what it is made of; its members too, each with the digest of the model that it names."""
    module, _, name = strategy["_target_"].rpartition(".")
    cls, result = getattr(importlib.import_module(module), name), dict(strategy)
    code = [strategy["_target_"], strategy.get(getattr(cls, "CODE", ""))]
    outside = [place for named in code if named and (place := _source(named.rpartition(".")[0]))]
    if outside:
        result["_code_"] = outside[0] if len(outside) == 1 else outside
    if members := strategy.get(getattr(cls, "MEMBERS", "")):
        result[cls.MEMBERS] = {name: _with_code(member) for name, member in members.items()}
        for member in result[cls.MEMBERS].values():
            if member.get("path"):
                member["_model_"] = open_artifact(member["path"], ("reward_model",)).digest
    return result


def files_of(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Setting and name of each file of the data and of the models that lie in folders here, and what it holds, in
    short: its size and a digest, of a large one that of some parts. Raises UserError where one is missing."""
    texts = {"ptx.path": config.ptx.path} | ({"data.path": config.data.path} if isinstance(config.data, Files) else {})
    files = [(key, Path(file), file) for key, path in texts.items() if path for file in resolve(path, key)]
    for key, path, _ in named_models(("reward_model", "ppo"), config):
        folder = Path(path).expanduser()
        inside = sorted([*folder.glob("*"), *folder.glob("model/*")])
        files += [(key, file, str(file)) for file in inside if file.suffix in MODEL_FILES]
    for key, file, name in files:
        size, digest = file.stat().st_size, hashlib.sha256()
        with file.open("rb") as stream:
            for part in range(PARTS):
                stream.seek(part * max(size // PARTS, PART))
                digest.update(stream.read(PART))
        yield f"{key}={name}", f"{size:,} bytes, SHA-256 {digest.hexdigest()[:8]}"


def _source(module: str) -> str | None:
    """SHA-256 of the file of a module that is not alignkit's; None for alignkit, and for what has no file."""
    file = getattr(importlib.import_module(module), "__file__", None)
    if module.split(".")[0] == "alignkit" or file is None:
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
