"""How the stages are started and sharded."""

from typing import Annotated, Literal

from pydantic import Field

from alignkit.schema import Count, Positive, settings


@settings
class LaunchSettings:
    """processes: ranks of each stage; threads: CPU threads of a rank; inline: run in this process (debuggers, tests);
    grace: seconds that the ranks have to end after a signal before they are killed."""

    processes: Count
    threads: Literal["auto"] | Annotated[int, Field(ge=1)]
    inline: bool
    grace: Positive

    def __post_init__(self) -> None:
        if self.inline and self.processes != 1:
            raise ValueError(f"inline=true runs one process, but processes={self.processes}: set launch.processes=1")


@settings
class ShardingSettings:
    """shard_size: over how many ranks each model is split; null: over all. Ranks beyond it hold replicas."""

    shard_size: Count | None
