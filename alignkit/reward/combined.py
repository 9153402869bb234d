"""What rewards share that are made of other rewards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.errors import UserError
from alignkit.models.settings import stage_folder
from alignkit.reward.source import opened

if TYPE_CHECKING:
    from alignkit.data.tokens import Encoder
    from alignkit.reward.source import CombinedSource, Reward, RewardSource
    from alignkit.runtime.sharding import Cluster


def open_members(
    members: Mapping[str, Reward], folder: Path | None, encoder: Encoder, cluster: Cluster
) -> dict[str, RewardSource | CombinedSource]:
    """All members, opened in the order of their names on every rank, as models are sharded over all of them together.
    A member with a path reads that folder, one without the reward model of the chain. Raises UserError."""
    sources: dict[str, RewardSource | CombinedSource] = {}
    for name in sorted(members):
        path = getattr(members[name], "path", None)
        try:
            sources[name] = opened(members[name], folder if path is None else stage_folder(path), encoder, cluster)
        except UserError as error:
            raise UserError(f"member {name}: {error}") from error
    return sources
