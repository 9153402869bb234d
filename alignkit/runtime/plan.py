"""What a run will take of each GPU's memory, phase by phase and model by model, before anything is loaded.

Weights, gradients and Adam's moments follow from the shapes; activations, logits and the key-value cache are counted
on a run of the same code with tensors that have no data. Bytes of one rank, all ranks being alike. Not counted: the
CUDA context, buffers of NCCL and cuBLAS, fragmentation, a few MB of token ids and losses, and the closing evaluation,
which takes less than training.
"""

from __future__ import annotations

from typing import Any

import torch

from alignkit.runtime import plan_work as work
from alignkit.runtime.config import RunConfig
from alignkit.runtime.plan_models import Kind, Source, Task, find_sources
from alignkit.runtime.plan_ppo import Member, ppo_phases
from alignkit.runtime.plan_types import Footprint, Layout, Phase, most
from alignkit.runtime.rules import TRAINS


def plan(recipe: str, config: RunConfig, sources: tuple[Source, Source] | None = None) -> list[Phase]:
    """The phases of a recipe in their order, each at its peak. sources: of `find_sources`, where they are known."""
    policy, reward = sources or find_sources(recipe, config)
    layout = Layout.of(config)
    phases = []
    if "sft" in TRAINS[recipe]:
        phases.append(sft_phase(config, policy, layout))
    if "reward_model" in TRAINS[recipe]:
        phases.append(reward_model_phase(config, policy, layout))
    if "ppo" in TRAINS[recipe]:
        phases += ppo_phases(config, policy, reward, layout)
    return phases


def sft_phase(config: RunConfig, source: Source, layout: Layout) -> Phase:
    """SFT: TRL's training steps, then our loss on held-out rows with what was saved."""
    settings, width = config.sft, config.sft.max_length
    kind, shards, rest = trainer_set_up("causal", source, layout, settings)
    step = work.training(source, kind, micro(settings, layout), width, shards)
    saved = Member(source, Kind("causal", False, layout.dtype), layout)
    heldout = work.heldout(source, saved.kind, settings.microbatch, width, layout.shards)
    moments = {
        "training step": {"policy": rest.plus(**step)},
        **optimizer_step("policy", source, kind, layout, rest),
        "held-out loss": {"policy": saved.rest.plus(**heldout)},
    }
    return most("sft", moments)


def reward_model_phase(config: RunConfig, source: Source, layout: Layout) -> Phase:
    """The reward model: chosen and rejected responses of a micro-batch in one forward."""
    settings = config.reward_model
    kind, shards, rest = trainer_set_up("scalar", source, layout, settings)
    step = work.training(source, kind, 2 * micro(settings, layout), settings.max_length, shards)
    moments = {"training step": {"reward model": rest.plus(**step)}}
    return most("reward_model", {**moments, **optimizer_step("reward model", source, kind, layout, rest)})


def trainer_set_up(task: Task, source: Source, layout: Layout, settings: Any) -> tuple[Kind, int | None, Footprint]:
    """How TRL's trainers hold a model: split by FSDP2 over several ranks, else whole, with float32 weights that
    autocast shortens on the way; and its weights, gradients and moments."""
    shards = layout.shards if layout.shards > 1 else None
    autocast = shards is None and layout.dtype != torch.float32
    kind = Kind(
        task=task,
        trained=True,
        dtype=torch.float32 if autocast else layout.dtype,
        checkpointing=settings.trainer.get("gradient_checkpointing", layout.checkpointing),
        autocast=autocast,
        dropout=task == "causal",
    )
    member = Member(source, kind, layout)
    buckets = member.gradients if shards is None and layout.ranks > 1 else 0  # DDP sends copies of the gradients
    return kind, shards, member.rest.plus(gradients=member.gradients + buckets)


def optimizer_step(name: str, source: Source, kind: Kind, layout: Layout, rest: Footprint) -> dict[str, Any]:
    """The trainers' own AdamW makes no copies; one whose moments stay in the CPU's memory brings them."""
    if not layout.offload_optimizer:
        return {}
    return {"optimizer step": {name: rest.plus(optimizer=Member(source, kind, layout).step)}}


def micro(settings: Any, layout: Layout) -> int:
    """Rows of a trainer's micro-batch: it divides a rank's share of the batch."""
    share = max(settings.batch // layout.ranks, 1)
    return max(size for size in range(1, min(settings.microbatch, share) + 1) if share % size == 0)
