"""The seal of a checkpoint: size and SHA-256 of every file and what else is to be remembered, with a digest of itself.
It is written last; without it a folder was never finished."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from alignkit.runtime.artifact import write_json

SEAL = "sealed.json"


def write_seal(place: Path, seal: dict[str, Any]) -> None:
    """Seal the folder `place`; seal["files"]: the facts of every file in it."""
    write_json(place / SEAL, seal | {"sha256": _digest(seal)})


def read_seal(place: Path) -> dict[str, Any]:
    """What the seal says. Raises ValueError or OSError if it is not as it was written."""
    seal = json.loads((place / SEAL).read_text("utf-8"))
    if not isinstance(seal, dict) or seal.pop("sha256", None) != _digest(seal):
        raise ValueError(f"{place / SEAL} was changed")
    return seal


def _digest(seal: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(json.loads(json.dumps(seal)), sort_keys=True).encode()).hexdigest()
