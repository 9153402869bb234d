"""What the ranks of test_checkpoint_two_ranks.py do: save, load what another number of ranks saved, go on.

python -m torch.distributed.run --standalone --nproc-per-node N checkpoint_ranks.py FOLDER SAVED ... [--facts]

SAVED: checkpoints in FOLDER to be loaded. What these N ranks save is FOLDER/<N>; with --facts they also check what only
several ranks can. The results are FOLDER/<N>.json.
"""

import json
import os
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from ranks import IN_REWARD, LOOP, LORA, RULE, SHAPING, MeanId, Settings, Silent, fresh_policy, fresh_scalar, untimed
from torch.distributed.checkpoint import FileSystemWriter

from alignkit.algo.advantage import GAE
from alignkit.errors import Interrupted, UserError
from alignkit.models.adapters import add_adapter
from alignkit.models.settings import PeftSettings
from alignkit.observe.tracking import Tracker
from alignkit.rollout.native import Native
from alignkit.runtime import checkpoint
from alignkit.runtime.checkpoint import Checkpoints
from alignkit.runtime.settings import CheckpointSettings
from alignkit.runtime.sharding import Cluster
from alignkit.runtime.worker import leave
from alignkit.stages.actors import Actors, WithoutAdapter, adam
from alignkit.stages.job import Job
from alignkit.stages.ppo import ppo_iteration, restore, save_if_asked
from alignkit.stages.ptx import PtxBatches
from alignkit.stages.state import AveragedWeights, PPOState

WHEN = CheckpointSettings(every_iterations=1, every_steps=None, every_minutes=None, keep_last=9, background=True)
ITERATIONS = 3
KINDS = {"full": None, "lora": PeftSettings(method="lora", settings=LORA, quantization={}, merge=False)}


class Noisy(MeanId):
    """Scores with noise from each rank's own generator."""

    def score(self, answers, microbatch):
        scores = super().score(answers, microbatch)
        return scores + torch.randn(len(scores))


def config_of(kind):
    batch, steps = LOOP.batch, {"schedule": "linear", "value_warmup": 1, "ema": 0.9}
    return SimpleNamespace(
        seed=0,
        ppo=replace(LOOP, episodes=ITERATIONS * batch, epochs=1, **steps),
        ptx=replace(Settings.ptx, coef=0.5),
        shaping=replace(SHAPING, running="scale"),
        kl=IN_REWARD,
        peft=KINDS[kind],
        rollout=Native(temperature=0.9, min_response=0, max_response=8, batch=3, unshard=True),
        advantage=GAE(gamma=1.0, lam=0.95, whiten="batch", clip=None),
    )


def actors_of(cluster, kind):
    """Fresh policy, value model, optimizers and average."""
    config, policy = config_of(kind), fresh_policy()
    settings = config.ppo
    if config.peft:
        torch.manual_seed(2)
        add_adapter(policy, config.peft, "CAUSAL_LM")
    policy = cluster.shard(policy, trainable=True)
    value = cluster.shard(fresh_scalar(), trainable=True)
    return Actors(
        cluster=cluster,
        encoder=Silent(),
        rule=replace(RULE, stop_ids=tuple(range(1, 9))),
        policy=policy,
        reference=WithoutAdapter(policy) if config.peft else cluster.shard(fresh_policy(), trainable=False),
        value_model=value,
        reward=Noisy(),
        policy_optimizer=adam(policy, settings.learning_rate, settings),
        value_optimizer=adam(value, settings.value_learning_rate, settings),
        state=PPOState(kl_coef=config.kl.coef),
        ema=AveragedWeights(policy, settings.ema),
    )


def step(actors, times=2):
    """Optimizer steps whose gradient is a function of the weights, with which every weight becomes a number of its own
    whatever the number of ranks."""
    for _ in range(times):
        pairs = ((actors.policy, actors.policy_optimizer), (actors.value_model, actors.value_optimizer))
        for model, optimizer in pairs:
            for place, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                parameter.grad = parameter.detach() * 0.3 + 0.01 * place
            optimizer.step()
            optimizer.zero_grad()
        actors.ema.update(actors.policy)
    actors.state.policy_steps = actors.state.value_steps = times


def whole(tensors):
    """Nested dicts of tensors, gathered from all ranks."""
    if isinstance(tensors, dict):
        return {name: whole(value) for name, value in tensors.items()}
    return (tensors.full_tensor() if hasattr(tensors, "full_tensor") else tensors).detach().clone()


def differing(found, expected, prefix=""):
    """Names of tensors that are not the same to the last bit."""
    if not isinstance(expected, dict):
        return [] if torch.equal(found, expected) else [prefix]
    if found.keys() != expected.keys():
        return [f"{prefix}: {sorted(found.keys() ^ expected.keys())}"]
    return [name for key in expected for name in differing(found[key], expected[key], f"{prefix}.{key}")]


def checkpoints_of(place, cluster, when=WHEN, digest="abc"):
    tracker = Tracker(place, "ppo", cluster.is_main)
    return Checkpoints(place, cluster, tracker, when, {"stage": "ppo", "digest": digest, "settings": {"seed": 0}})


def save(place, cluster):
    """A checkpoint of each kind, and beside it all of its tensors in one piece."""
    for kind in KINDS:
        actors = actors_of(cluster, kind)
        step(actors)
        checkpoints = checkpoints_of(place / kind, cluster)
        checkpoints.save(1, actors.tensors(), {"ppo": actors.state.state_dict(), "seconds": 1.0})
        tensors = whole(actors.tensors())
        checkpoints.finish()
        if cluster.is_main:
            torch.save(tensors, place / f"{kind}.pt")


def loaded(place, cluster):
    """kind -> tensors that differ from what was saved in `place`, by whatever number of ranks."""
    found = {}
    for kind in KINDS:
        actors = actors_of(cluster, kind)
        restore(actors, checkpoints_of(place / kind, cluster))
        found[kind] = differing(whole(actors.tensors()), torch.load(place / f"{kind}.pt"))
    return found


# ----------------------------------------------------------------------------------------------- facts of several ranks


def train(place, cluster, stop_after=None):
    """PPO as the stage runs it, a checkpoint after each iteration. Metrics of each, and all tensors at the end."""
    config, actors = config_of("full"), actors_of(cluster, "full")
    checkpoints = checkpoints_of(place, cluster)
    torch.manual_seed(cluster.rank)
    restore(actors, checkpoints)
    prompts = [("", [9 + i] * (1 + i % 3)) for i in range(config.ppo.batch)]
    ptx = PtxBatches([([5, 6, 7, 8], 1), ([9, 10, 11], 2), ([12, 13, 14, 15, 16], 1)], 3, 0)
    job, history = Job("ppo", config, {}, Path(os.devnull), first=True), []
    while actors.state.iteration < ITERATIONS:
        history.append(untimed(ppo_iteration(actors, prompts, ptx, job, None)[0]))
        if cluster.is_main and actors.state.iteration == stop_after:
            checkpoints.stop_file.touch()
        if actors.state.iteration < ITERATIONS:
            save_if_asked(actors, checkpoints, 1, 0.0)
    checkpoints.finish()
    return history, whole(actors.tensors())


def went_on(place, cluster):
    """A run that was asked to end after each iteration in turn, against one that was not."""
    expected, weights = train(place / "whole", cluster)
    found = []
    for stop_after in range(1, ITERATIONS):
        out = place / f"stopped{stop_after}"
        try:
            train(out, cluster, stop_after)
        except Interrupted as end:
            if cluster.is_main:
                (out / "stop").unlink()
                shutil.copytree(out, place / f"stopped{stop_after}_for_one_rank")
            cluster.barrier()
            history, again = train(out, cluster)
            rest = [history[i] == expected[i + end.step] for i in range(len(history))]
            found.append([end.step, rest, differing(again, weights)])
    return found


def generators(place, cluster):
    """What each rank draws after a checkpoint, and after going back to it."""
    checkpoints = checkpoints_of(place, cluster)
    torch.manual_seed(100 + cluster.rank)
    checkpoints.save(1, {"weight": torch.zeros(3)}, {})
    drawn = torch.rand(2)
    checkpoints.finish()
    checkpoints_of(place, cluster).newest()
    return [cluster.gather(x).tolist() for x in (drawn, torch.rand(2))]


def faults_of_one_rank(place, cluster):
    """Only one rank's disk is full: that of the last one when it writes its part and when it reads it again, that of
    rank 0 when it seals. What is on the disk then, and after one more checkpoint."""
    checkpoints, last = checkpoints_of(place, cluster, replace(WHEN, background=False)), cluster.world_size - 1
    moments = [(FileSystemWriter, "write_data", last), (checkpoint, "file_facts", last), (checkpoint, "write_seal", 0)]
    tensors, left = {f"weight{i}": torch.zeros(3) for i in range(8)}, []  # each rank writes some of them

    def fail(*_):
        raise OSError(28, "No space left on device")

    for number, (owner, name, rank) in enumerate(moments):
        sound = getattr(owner, name)
        if cluster.rank == rank:
            setattr(owner, name, fail)
        checkpoints.save(number, tensors, {})
        setattr(owner, name, sound)
        left.append(names(place))
    checkpoints.save(9, tensors, {})
    return [*left, names(place)]


def names(place):
    return sorted(entry.name for entry in (place / "state").glob("*"))


def damaged(place, cluster):
    """The part of rank 1 of the newest checkpoint was changed: what each rank goes on from."""
    if cluster.is_main:
        shutil.copytree(place / "whole", place / "harmed")
        file = place / "harmed" / "state" / f"checkpoint-{ITERATIONS - 1}" / "__1_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    cluster.barrier()
    checkpoints = checkpoints_of(place / "harmed", cluster)
    found = [None] * cluster.world_size
    dist.all_gather_object(found, checkpoints.newest()[0].name)
    return found


def refused(place, cluster):
    """What each rank is told of a checkpoint of another run."""
    try:
        checkpoints_of(place / "whole", cluster, digest="abd").newest()
    except UserError as error:
        said = [None] * cluster.world_size
        dist.all_gather_object(said, str(error).split(" (")[0])
        return said


def asked(place, cluster):
    """Rank 0's answer on every rank: steps 1 and 2 of every 2, then with a file named stop."""
    checkpoints, told = checkpoints_of(place, cluster), []
    for number in (1, 2, 3):
        if number == 3 and cluster.is_main:
            checkpoints.stop_file.touch()
        said = [None] * cluster.world_size
        dist.all_gather_object(said, checkpoints.ask(number, every=2))
        told.append(said)
    return told


def unchanged_meanwhile(place, cluster):
    """Tensors of a checkpoint that differ from the weights as they were when it was asked for."""
    actors, other, write = actors_of(cluster, "full"), actors_of(cluster, "full"), FileSystemWriter.write_data
    step(actors)
    before, go = whole(actors.tensors()), threading.Event()

    def waiting(*arguments):
        go.wait()
        return write(*arguments)

    FileSystemWriter.write_data = waiting
    checkpoints = checkpoints_of(place, cluster)
    checkpoints.save(1, actors.tensors(), {"ppo": actors.state.state_dict(), "seconds": 1.0})
    step(actors)
    moved = differing(whole(actors.tensors()), before)
    go.set()
    checkpoints.finish()
    FileSystemWriter.write_data = write
    restore(other, checkpoints_of(place, cluster))
    return {"moved": len(moved), "differing": differing(whole(other.tensors()), before)}


FACTS = (went_on, damaged, refused, generators, faults_of_one_rank, asked, unchanged_meanwhile)


def main(folder, *words):
    torch.set_num_threads(1)
    cluster = Cluster.open()
    folder, size = Path(folder), str(cluster.world_size)
    results = {"world": cluster.world_size}
    results["loaded"] = {name: loaded(folder / name, cluster) for name in words if name != "--facts"}
    results["into_replicas"] = loaded(folder / words[0], Cluster.open(shard_size=1))
    save(folder / size, cluster)
    if "--facts" in words:
        shared = folder / "facts"
        for fact in FACTS:
            place = shared if fact in (went_on, damaged, refused) else folder / fact.__name__
            results[fact.__name__] = fact(place, cluster)
    if cluster.is_main:
        (folder / f"{size}.json").write_text(json.dumps(results))
    cluster.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
