"""What a stage is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alignkit.runtime.config import RunConfig


@dataclass(frozen=True)
class Job:
    """stage: its name; config: the checked settings; inputs: name -> folder of an earlier stage (or of a model);
    out: the folder that the stage writes, `model/` in it for the model that it hands on; first: no stage ran before it
    in this run."""

    stage: str
    config: RunConfig
    inputs: Mapping[str, Path]
    out: Path
    first: bool
