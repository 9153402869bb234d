"""How the stages are started, sharded and saved on the way."""

from typing import Annotated, Any, Literal

from pydantic import Field

from alignkit.schema import Count, CountOrZero, NonNegative, Positive, settings


@settings
class LaunchSettings:
    """processes: ranks of each stage on a machine; machines: how many there are, this one is number `machine` of 0 ..
    machines - 1 and number 0 listens at `rendezvous` (host:port); threads: CPU threads of a rank; inline: run in this
    process (debuggers, tests); grace: seconds that the ranks have for a checkpoint after a signal before they are
    killed; patience: seconds to wait for the other machines at the start."""

    processes: Count
    machines: Count
    machine: CountOrZero
    rendezvous: str | None
    threads: Literal["auto"] | Annotated[int, Field(ge=1)]
    inline: bool
    grace: Positive
    patience: Positive

    def __post_init__(self) -> None:
        if self.inline and self.ranks != 1:
            names = f"processes={self.processes} and machines={self.machines}: set both to 1"
            raise ValueError(f"inline=true runs one process, but {names}")
        if self.machine >= self.machines:
            raise ValueError(f"machine={self.machine} must be below machines={self.machines}: they count from 0")
        if self.machines > 1 and self.rendezvous is None:
            raise ValueError(f"machines={self.machines} need rendezvous=HOST:PORT of machine 0")
        if self.rendezvous is not None and not self.rendezvous.rpartition(":")[2].isdecimal():
            raise ValueError(f"rendezvous={self.rendezvous}: expected HOST:PORT, for example 10.0.0.1:29400")

    @property
    def ranks(self) -> int:
        """Ranks of each stage, over all machines."""
        return self.processes * self.machines


@settings
class ShardingSettings:
    """shard_size: over how many ranks each model is split: all of them, those of a machine, or a number (1: every rank
    holds whole models); the groups hold replicas of each other. activation_checkpointing: keep only the inputs of the
    decoder layers and compute the rest again in the backward pass. offload_frozen: the weights of reference and reward
    model, offload_optimizer: Adam's moments stay in the CPU's memory and visit the GPU when they are used."""

    shard_size: Literal["all", "machine"] | Count
    activation_checkpointing: bool
    offload_frozen: bool
    offload_optimizer: bool


@settings
class CheckpointSettings:
    """When a stage saves what it needs to go on: every so many iterations (PPO), optimizer steps (SFT, reward model) or
    minutes, whichever comes first (null: never for that reason), and after SIGTERM or SIGINT. keep_last: checkpoints
    that are kept; background: write while training goes on."""

    every_iterations: Count | None
    every_steps: Count | None
    every_minutes: Positive | None
    keep_last: Count
    background: bool


@settings
class FrontierSettings:
    """coefs: KL coefficients, reward units per nat, one PPO run each."""

    coefs: Annotated[list[NonNegative], Field(min_length=1)]

    def __post_init__(self) -> None:
        if len(set(self.coefs)) < len(self.coefs):
            raise ValueError(f"coefs={self.coefs}: each may stand there once")


@settings
class BenchSettings:
    """stage: what is measured; prompts: file, glob or list of files with rows {"prompt": TEXT}, for PPO; updates: of
    PPO, or optimizer steps of a trainer, that count; against: JSON file with another system's figures."""

    stage: Literal["ppo", "sft", "reward_model"]
    prompts: str | list[str] | None
    updates: Count
    against: str | None


@settings
class DenoiseSettings:
    """members: reward models, each on a random half of the training pairs; of an even number half have not seen a
    pair."""

    members: Annotated[int, Field(ge=2, multiple_of=2)]


@settings
class OveroptimizeSettings:
    """gold_model: settings of `model` by which the gold model differs from the policy; num_pairs: pairs of sampled
    responses that it orders, both sides of the split together; proxy_pairs: training pairs of each proxy."""

    gold_model: dict[str, Any]
    num_pairs: Count
    proxy_pairs: Annotated[list[Count], Field(min_length=1)]

    def __post_init__(self) -> None:
        if len(set(self.proxy_pairs)) < len(self.proxy_pairs) or max(self.proxy_pairs) > self.num_pairs:
            raise ValueError(
                f"proxy_pairs={self.proxy_pairs}: each may stand there once and be at most num_pairs={self.num_pairs}"
            )

    @property
    def start_of_gold(self) -> dict[str, Any]:
        """The changes of settings by which the gold model's own SFT is made."""
        return {f"model.{key}": value for key, value in self.gold_model.items()}
