"""What a stage takes and makes, as W&B's artifacts: models and data by where they lie, so that nothing is copied."""

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from alignkit.observe.secrets import redacted


@dataclass(frozen=True)
class Item:
    """name: of the collection, whose versions are told apart by `digest`; place: where it is to be found, a folder or
    an address; here: the folder that holds it now, if that is another one."""

    name: str
    kind: Literal["model", "dataset"]
    digest: str
    places: tuple[str, ...]
    here: Path | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def model(path: str | Path, digest: str, here: Path | None = None, **facts: Any) -> Item:
    """The model of a finished stage, or one from elsewhere. facts: what W&B shows beside it."""
    path = Path(path)
    name, _, known = path.name.rpartition("-")
    stage = name if known == digest else "model"
    folder = path / "model" if stage != "model" else path
    return Item(stage, "model", digest, (str(folder),), here, redacted({"digest": digest, **facts}))


def places_of(settings: Mapping[str, Any]) -> list[str]:
    """Where data lies, by the settings that name it: local files by their paths, anything else by an address."""
    named = settings.get("path")
    patterns = [named] if isinstance(named, str) else list(named or [])
    files = sorted(str(Path(file).resolve()) for pattern in patterns for file in glob.glob(pattern, recursive=True))
    elsewhere = [f"hf://datasets/{pattern}@{settings.get('revision')}" for pattern in patterns]
    return redacted(files or elsewhere or [f"alignkit://{settings.get('_target_')}"])


def taken(data: Mapping[str, Any], inputs: Mapping[str, Mapping[str, str]]) -> list[Item]:
    """All that a stage takes, as its lineage has it: `data` (fingerprint, places) and each model of `inputs` (digest,
    path) once."""
    rows = Item("data", "dataset", data["fingerprint"][:12], tuple(data["places"]), None, {**data})
    return [rows, *{item["digest"]: model(item["path"], item["digest"]) for item in inputs.values()}.values()]


def references(item: Item) -> Iterator[tuple[str, str, str]]:
    """(path inside the artifact, address, address at this moment) of each file, those of a folder one by one."""
    for place in item.places:
        folder = item.here or Path(place)
        if "://" in place:
            yield place.partition("://")[2], place, place
        elif folder.is_dir():
            for file in sorted(file for file in folder.rglob("*") if file.is_file()):
                name = file.relative_to(folder)
                yield str(name), (Path(place) / name).as_uri(), file.resolve().as_uri()
        else:
            yield Path(place).name, Path(place).as_uri(), Path(place).as_uri()
