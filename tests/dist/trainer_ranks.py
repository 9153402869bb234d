"""What the ranks of test_trainers_two_ranks.py do: the TRL stages split and whole, killed and resumed.

python -m torch.distributed.run --standalone --nproc-per-node 2 trainer_ranks.py FOLDER SCENARIO ...

FOLDER holds the base models; each scenario leaves its stages' folders there, and what it found in SCENARIO.json.
"""

import gc
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from trainer_world import RANKED, distance, make_job, ranked_corpus, rows_of, run, run_killed, weights_of
from transformers import TrainerCallback

from alignkit.errors import UserError
from alignkit.runtime.sharding import Cluster
from alignkit.runtime.worker import leave
from alignkit.stages import trainer as stage_trainer

BY_LENGTH = {"train_sampling_strategy": "group_by_length"}  # an order that is drawn on every rank


class Weigh(TrainerCallback):
    """Bytes of this rank at the end of an optimizer step, when weights, gradients and moments are all there."""

    def __init__(self) -> None:
        self.found = []

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:
        if state.global_step != 1:
            return
        gc.collect()
        alive = {}
        for held in gc.get_objects():
            if type(held) in (torch.Tensor, torch.nn.Parameter) and held.is_floating_point():
                storage = held.untyped_storage()
                alive[storage.data_ptr()] = storage.nbytes()
        parts = [part for p in model.parameters() for part in (p, p.grad, *optimizer.state[p].values()) if part.dim()]
        layer = sum(p.nbytes for p in model.base_model.layers[0].parameters())
        mine = sum(local(part).nbytes for part in parts)
        total = sum(part.nbytes for part in parts)
        self.found.append({"mine": mine, "alive": sum(alive.values()), "total": total, "layer": layer})


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def compared(stage: str, architecture: str, peft: str, cluster: Cluster, root: Path, name: str, **more: Any) -> dict:
    """A stage that runs to its end, and the same killed and resumed; the state in which it was killed is kept."""
    base, changes = root / architecture, {"offload": peft == "ia3", **more}
    if (stage, peft) == ("sft", "lora"):
        changes["trainer"] = BY_LENGTH
    straight, broken = (
        make_job(stage, base, root / f"{name}-{kind}", peft, **changes) for kind in ("straight", "broken")
    )
    results = [run(straight, cluster)]
    run_killed(broken, cluster)
    cluster.barrier()
    if cluster.is_main:
        shutil.copytree(broken.out, root / f"{name}-killed")
    cluster.barrier()
    results.append(run(broken, cluster))
    cluster.barrier()
    if not cluster.is_main:
        return {}
    return {
        "distance": distance(weights_of(broken), weights_of(straight)),
        "same_rows": rows_of(broken) == rows_of(straight),
        "same_results": results[0] == results[1],
        "rows": rows_of(straight),
        "keys": sorted(weights_of(straight)),
    }


def resumable(stage: str, architecture: str, peft: str, layout: str):
    def scenario(layouts: dict[str, Cluster], root: Path) -> dict:
        return compared(stage, architecture, peft, layouts[layout], root, f"{layout}-{stage}-{architecture}-{peft}")

    return scenario


def ranked(layout: str, peft: str):
    """Rankings of different sizes on each rank, with early stopping."""

    def scenario(layouts: dict[str, Cluster], root: Path) -> dict:
        name = f"{layout}-ranked-{peft}"
        return compared("reward_model", "llama", peft, layouts[layout], root, name, data=ranked_corpus(), **RANKED)

    return scenario


def encoder(layouts: dict[str, Cluster], root: Path) -> dict:
    job = make_job("reward_model", root / "bert", root / "encoder", every=None, epochs=0.5)
    result = run(job, layouts["fsdp"])
    return {"rows": rows_of(job) if layouts["fsdp"].is_main else None, "result": result}


def moved_here(layouts: dict[str, Cluster], root: Path) -> dict:
    """Go on from a checkpoint that one process has left."""
    cluster, job = layouts["fsdp"], make_job("sft", root / "llama", root / "moved")
    if cluster.is_main:
        shutil.copytree(root / "one-killed", job.out)
    cluster.barrier()
    run(job, cluster)
    return {"distance": distance(weights_of(job), weights_of(replace(job, out=root / "one-straight")))}


def precision(layouts: dict[str, Cluster], root: Path) -> dict:
    """Both stages in bfloat16 with activations that are computed twice, and SFT with these alone."""
    results = {}
    for stage, name, changes in (
        ("sft", "plain", {}),
        ("sft", "twice", {"activation_checkpointing": True}),
        ("sft", "bfloat16", {"activation_checkpointing": True, "compute_dtype": torch.bfloat16}),
        ("reward_model", "plain", {}),
        ("reward_model", "bfloat16", {"activation_checkpointing": True, "compute_dtype": torch.bfloat16}),
    ):
        cluster = replace(layouts["fsdp"], **changes)
        job = make_job(stage, root / "llama", root / f"{name}-{stage}", every=None, epochs=0.5)
        run(job, cluster)
        results[f"{stage}-{name}"] = {
            "rows": rows_of(job) if cluster.is_main else None,
            "dtypes": sorted({str(value.dtype) for value in weights_of(job).values()}),
        }
    return results


def memory(layouts: dict[str, Cluster], root: Path) -> dict:
    """Bytes in a real step of both stages, of every rank."""
    cluster, weigh, genuine = layouts["fsdp"], Weigh(), stage_trainer.make_callback
    stage_trainer.make_callback = lambda tracker: weigh
    for stage in ("sft", "reward_model"):
        run(make_job(stage, root / "wide", root / f"memory-{stage}", every=None, epochs=0.5), cluster)
    stage_trainer.make_callback = genuine
    everywhere = [None] * cluster.world_size
    torch.distributed.all_gather_object(everywhere, weigh.found)
    return {"ranks": everywhere}


def refused(layouts: dict[str, Cluster], root: Path) -> dict:
    try:
        run(make_job("sft", root / "gpt2", root / "refused", "prompt"), layouts["fsdp"])
    except UserError as error:
        return {"told": str(error)}
    return {"told": None}


def doomed(root: Path, name: str):
    return make_job("sft", root / "gpt2", root / name, "lora", background=True, trainer=BY_LENGTH)


def died(layouts: dict[str, Cluster], root: Path) -> None:
    """Every rank ends at once, in a step after a checkpoint that is written in the background."""
    run_killed(doomed(root, "died"), layouts["fsdp"])
    os._exit(9)


def resumed(layouts: dict[str, Cluster], root: Path) -> dict:
    """What died goes on, and another one runs straight to its end."""
    jobs = [doomed(root, name) for name in ("died", "lived")]
    for job in jobs:
        run(job, layouts["fsdp"])
    layouts["fsdp"].barrier()
    return {"distance": distance(*map(weights_of, jobs)), "same_rows": rows_of(jobs[0]) == rows_of(jobs[1])}


SCENARIOS = {
    "encoder": encoder,
    "moved_here": moved_here,
    "precision": precision,
    "memory": memory,
    "refused": refused,
    "died": died,
    "resumed": resumed,
    **{f"{layout}-ranked-{peft}": ranked(layout, peft) for layout in ("fsdp", "ddp") for peft in ("none", "lora")},
    **{
        f"{layout}-{stage}-{architecture}-{peft}": resumable(stage, architecture, peft, layout)
        for layout in ("fsdp", "ddp", "hsdp")
        for stage in ("sft", "reward_model")
        for architecture in ("llama", "gpt2")
        for peft in ("none", "lora", "ia3", "bitfit", "prompt", "p_tuning")
    },
}


def main(root: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # the stages collect garbage; the modules are none
    world = int(os.environ["WORLD_SIZE"])
    layouts = {"fsdp": Cluster.open(shard_size="all"), "ddp": Cluster.open(shard_size=1)}
    if world == 4:
        layouts["hsdp"] = Cluster.open(shard_size=2)
    for name in names:
        found = SCENARIOS[name](layouts, root)
        if layouts["fsdp"].is_main:
            (root / f"{name}.json").write_text(json.dumps(found))
        layouts["fsdp"].barrier()
    layouts["fsdp"].close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave(0)
