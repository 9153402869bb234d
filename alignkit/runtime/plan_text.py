"""`alignkit plan RECIPE`: the plan of a run's memory as a table, whether it fits, and what to change if it does not.

Nothing is written, no data is read and no weights are loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from alignkit.errors import UserError
from alignkit.observe.progress import amount
from alignkit.runtime.config import load
from alignkit.runtime.outer import with_outer
from alignkit.runtime.recipe import ask, checked, report
from alignkit.runtime.rules import TRAINS

if TYPE_CHECKING:
    from alignkit.runtime.config import RunConfig
    from alignkit.runtime.plan_models import Source
    from alignkit.runtime.plan_types import Footprint, Phase

GIB, MIB = 2**30, 2**20
FREE = 0.1  # share of a GPU's memory that the plan leaves alone
KINDS = ("weights", "gradients", "optimizer", "gathered", "activations", "logits", "kv_cache", "total")
MICROBATCH = {  # phase -> the setting that its activations and logits grow with
    "sft": "sft.microbatch",
    "reward_model": "reward_model.microbatch",
    "rollout": "rollout.batch",
    "scoring": "ppo.microbatch_tokens",
    "policy update": "ppo.microbatch_tokens",
    "value update": "ppo.microbatch_tokens",
}


def plan_command(words: list[str], recipes: Iterable[str]) -> int:
    """The words after `alignkit plan`. Returns the exit code: 0; 1 it does not fit --gpu-memory; 2 a mistake."""
    try:
        words, memory = gpu_memory(words)
    except UserError as error:
        return report(str(error), 2)
    return ask("plan", words, [n for n in recipes if TRAINS[n]], lambda recipe, raw: tell(recipe, raw, memory))


def gpu_memory(words: list[str]) -> tuple[list[str], float | None]:
    """The words without --gpu-memory, and its value in GiB. Raises UserError."""
    rest, value, words = [], None, list(words)
    while words:
        word = words.pop(0)
        name, sign, text = word.partition("=")
        if name != "--gpu-memory":
            rest.append(word)
            continue
        text = text if sign else (words.pop(0) if words else "")
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise UserError(f"--gpu-memory={text}: expected the GiB of one GPU, as in --gpu-memory=80")
    return rest, value


def tell(recipe: str, raw: dict[str, Any], memory: float | None) -> int:
    """Print the plan of one composed configuration. Returns the exit code."""
    try:
        config = checked(recipe, raw := with_outer(raw))
        from alignkit.runtime.plan import plan
        from alignkit.runtime.plan_models import find_sources

        sources = find_sources(recipe, config)
        phases = plan(recipe, config, sources)
        print(f"{headline(recipe, config, sources[0])}\n\n{table(phases)}\n", flush=True)
        usable = None if memory is None else memory * GIB * (1 - FREE)
        print(verdict(phases, memory))
        if usable is None or max(phase.total for phase in phases) <= usable:
            return 0
        for line in advice(recipe, raw, phases, sources, usable):
            print(line, flush=True)
    except UserError as error:
        return report(str(error), 2)
    return 1


def headline(recipe: str, config: RunConfig, source: Source) -> str:
    """What is planned: recipe, model, dtype, GPUs."""
    from alignkit.runtime.plan_models import Kind, skeleton
    from alignkit.runtime.plan_types import Layout

    layout = Layout.of(config)
    weights = skeleton(source, Kind("causal", False, layout.dtype)).parameters()
    count = sum(p.numel() for p in weights)
    size = f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"
    gpus = f"{layout.ranks} GPU{'s' * (layout.ranks > 1)}"
    split = f", models split over {layout.shards}" if layout.ranks > 1 else ""
    return f"{recipe}: {source.name}, {size} parameters, {config.compute_dtype}, {gpus}{split}"


def table(phases: list[Phase]) -> str:
    """One block a phase, one row a model."""
    biggest = max(phase.total for phase in phases)
    unit, name = (GIB, "GiB") if biggest >= GIB else (MIB, "MiB")
    heads = [kind.replace("kv_", "KV ").replace("_", " ") for kind in KINDS]
    width = max(len(f"{phase.name}: {phase.moment}") for phase in phases) + 2

    def cell(number: int, head: str) -> str:
        return f"{number / unit:.2f}".rjust(len(head) + 2) if number else "-".rjust(len(head) + 2)

    def row(label: str, footprint: Footprint) -> str:
        return f"  {label}".ljust(width) + "".join(cell(getattr(footprint, k), h) for k, h in zip(KINDS, heads))

    lines = [f"{name} on each GPU".ljust(width) + "".join(f"  {head}" for head in heads)]
    empty = " " * sum(len(head) + 2 for head in heads[:-1])
    for phase in phases:
        mark = "  <- peak" if phase.total == biggest else ""
        lines.append(f"{phase.name}: {phase.moment}".ljust(width) + empty + cell(phase.total, heads[-1]) + mark)
        lines += [row(model, footprint) for model, footprint in phase.models.items()]
    return "\n".join(lines)


def verdict(phases: list[Phase], memory: float | None) -> str:
    """Which phase peaks, and whether that fits."""
    top = max(phases, key=lambda phase: phase.total)
    peaks = f"peak: {top.name} ({top.moment}), {amount(top.total)} on each GPU"
    if memory is None:
        return f"{peaks}; --gpu-memory=GIB says whether it fits"
    usable = memory * GIB * (1 - FREE)
    rule = (
        f"{amount(usable)} of {memory:g} GiB can be planned; a tenth is left for the CUDA context, communication and "
        "fragmentation"
    )
    return f"{peaks}\n{'fits' if top.total <= usable else 'does not fit'}: {rule}"


def advice(
    recipe: str, raw: dict[str, Any], phases: list[Phase], sources: tuple[Source, Source], usable: float
) -> Iterator[str]:
    """What would help: each change with the peak that it leads to, best first, and if none is enough some together."""
    from alignkit.runtime.plan import plan

    def peak(change: dict[str, Any]) -> float:
        try:
            return max(phase.total for phase in plan(recipe, load(changed(raw, change)), sources))
        except UserError:  # the change breaks a rule between settings
            return float("inf")

    def line(change: dict[str, Any], size: float) -> str:
        words = " ".join(f"{key}={str(value).lower()}" for key, value in change.items())
        return f"  {words}: {amount(size)}{', fits' * (size <= usable)}"

    now = max(phase.total for phase in phases)
    found = [(peak(change), change) for change in changes(raw, phases, usable)]
    found = [(size, change) for size, change in found if size < 0.995 * now]
    found.sort(key=lambda item: (item[0] > usable, "launch.processes" in item[1], item[0]))  # more GPUs come last
    if not found:
        yield "no single setting brings it down: choose a smaller model, shorter sequences or peft=lora"
        return
    yield "what would help, each alone:"
    yield from (line(change, size) for size, change in found)
    if found[0][0] <= usable:
        return
    together: dict[str, Any] = {}
    size: float = now
    for _, change in found:
        together = {**change, **together}
        size = min(size, peak(together))
        if size <= usable:
            break
    yield "together:"
    yield line(together, size)


def changes(raw: dict[str, Any], phases: list[Phase], usable: float) -> Iterator[dict[str, Any]]:
    """Settings that could make the phases fit that do not."""
    over = [phase for phase in phases if phase.total > usable]
    smaller: dict[str, int] = {}
    for phase in over:
        key = MICROBATCH[phase.name]
        group, name = key.split(".")
        rows = smaller.get(key, raw[group].get(name, 1))
        grows = sum(f.activations + f.logits + f.kv_cache for f in phase.models.values())
        share = max(usable - (phase.total - grows), 0) / max(grows, 1)
        least = raw["ppo"]["max_prompt"] + raw["rollout"]["max_response"] if name == "microbatch_tokens" else 1
        fitting = max(2 ** max(int(raw[group].get(name, 1) * share).bit_length() - 1, 0), least)
        if fitting < rows:
            smaller[key] = fitting
    if smaller:
        yield smaller
    sharding, launch = raw["sharding"], raw["launch"]
    yield {"compute_dtype": "bfloat16"}
    yield {"sharding.activation_checkpointing": True}
    yield {"sharding.shard_size": "all"}
    if any(phase.name not in ("sft", "reward_model") for phase in over):
        yield {"sharding.offload_optimizer": True}
        yield {"sharding.offload_frozen": True}
    native = raw["rollout"]["_target_"].endswith(".Native")  # the other engines need whole weights
    if native and any(phase.name == "rollout" for phase in over) and sharding["shard_size"] != 1:
        yield {"rollout.unshard": False}
    held = max(sum(f.weights + f.gradients + f.optimizer for f in phase.models.values()) for phase in over)
    more = [times for times in (2, 4, 8) if max(p.total for p in over) - held * (1 - 1 / times) <= usable]
    yield {"launch.processes": launch["processes"] * (more or [2])[0]}


def changed(raw: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """The settings with some of them set."""
    result = copy.deepcopy(raw)
    for key, value in change.items():
        *path, last = key.split(".")
        node = result
        for name in path:
            node = node[name]
        node[last] = value
    return result
