"""How fast a stage is and how much memory it takes, on the user's own models: the real iterations or training steps,
timed, with the machine's limits measured between them.

    share of the arithmetic limit = useful FLOPs of the update / its seconds / FLOPs per second of matrix products

The same of decoding, and its share of the memory bandwidth: (weights + key-value cache read) / seconds / bytes per
second. Decoding is the whole rollout, the forward over the prompts included.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from alignkit import __version__
from alignkit.algo.arithmetic import Network
from alignkit.algo.batching import prompt_indices
from alignkit.observe.progress import Progress
from alignkit.observe.tracking import write_report
from alignkit.stages.actors import Actors, load_actors
from alignkit.stages.bench_limits import WARM_UP, Limits, hardware, network_of, peak_memory, products_of, versions
from alignkit.stages.bench_report import Update, figures_of, ratios, read_against, read_prompts, table
from alignkit.stages.common import prepare
from alignkit.stages.ppo import encode_prompts, ppo_iteration
from alignkit.stages.ppo_checks import sampling_dtype
from alignkit.stages.ppo_report import weight_bytes
from alignkit.stages.ptx import PtxBatches

if TYPE_CHECKING:
    from alignkit.observe.tracking import Tracker
    from alignkit.runtime.checkpoint import Checkpoints
    from alignkit.runtime.config import RunConfig
    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.job import Job


def run(job: Job, cluster: Cluster, tracker: Tracker, checkpoints: Checkpoints) -> dict[str, float]:
    """Measure, write bench.json and print a table. Returns the medians."""
    settings = job.config.bench
    assert settings is not None
    stage, against = settings.stage, read_against(settings.against)
    if stage == "ppo":
        updates, limits, held = measure_ppo(job, cluster)
    else:
        from alignkit.stages.bench_trainer import measure_trainer  # brings TRL, which would add to the memory of PPO

        updates, limits, held = *measure_trainer(replace(job, stage=stage), cluster, tracker, checkpoints), None
    most = limits.around(cluster)
    if not cluster.is_main:
        return {}
    report = {"system": f"alignkit {__version__}", "stage": stage, **figures_of(updates, most)}
    if held is not None:
        report |= {"model_bytes": held, "working_bytes": report["peak_bytes"] - held}
    report["limits"] = {"flops_per_second": limits.flops, "bytes_per_second": limits.bytes}
    report |= {"hardware": hardware(cluster), "versions": versions(), "settings": essentials(job)}
    if against:
        report["against"] = {"system": against["system"], "ratios": ratios(report, against), "figures": against}
    write_report(job.out / "bench.json", report)
    print(table(report))
    figures = {key: value for key, value in report.items() if isinstance(value, int | float)}
    parts = {part: report[part] for part in ("training", "decoding") if part in report}
    shares = {f"{part}_{k}": v for part, found in parts.items() for k, v in found.items() if k.startswith("share_of_")}
    return figures | shares


def measure_ppo(job: Job, cluster: Cluster) -> tuple[list[Update], Limits, int]:
    """Iterations as `alignkit ppo` makes them, on the prompts of bench.prompts; and what `model_bytes` says."""
    set_seed(job.config.seed)
    settings = job.config.bench
    assert settings is not None
    count = settings.updates + WARM_UP
    ppo = job.config.ppo
    ppo = replace(ppo, episodes=max(ppo.episodes, ppo.batch * count))  # the schedule of a run that is long enough
    job = replace(job, config=replace(job.config, ppo=ppo))
    actors, config = load_actors(job, cluster), job.config
    each, asked = ppo.samples_per_prompt, ppo.batch // ppo.samples_per_prompt
    prompts = encode_prompts(read_prompts(settings.prompts), actors, ppo.max_prompt, asked)
    texts = prepare(job, False).train.demonstrations if config.ptx.coef else []
    ptx = PtxBatches.open(texts, actors.encoder, config.ptx, config.seed)
    models = [model for model in (actors.policy, actors.value_model) if model is not None]
    networks = [network_of(model) for model in models]
    limits: Limits | None = None
    updates, progress = [], Progress("bench", count, cluster.is_main)
    for number in range(count):
        chosen = prompt_indices(number * asked, asked, len(prompts), config.seed)
        batch = [prompts[i] for i in chosen.tolist() for _ in range(each)]
        cluster.barrier()
        began, before = time.perf_counter(), time.process_time()
        values, samples = ppo_iteration(actors, batch, ptx, job, None)
        cluster.barrier()
        seconds, cpu = time.perf_counter() - began, time.process_time() - before
        lengths = [len(ids) for _, ids in batch], [row["length"] for row in samples]
        updates.append(update_of(values, (seconds, cpu), *lengths, networks, actors, config))
        if limits is None:
            weights = sum(p.numel() for p in actors.policy.parameters())
            limits = Limits(ppo_products(models, *lengths, config, cluster), weights, cluster)
        limits.measure()
        progress.update(number + 1, f"{seconds:.2f} s")
    assert limits is not None
    return updates[WARM_UP:], limits, model_bytes(actors)


def model_bytes(actors: Actors) -> int:
    """Bytes on this rank that are there whatever the batch: weights, and of trained ones the gradient and Adam's two
    moments. What a peak has beyond them is activations, logits and cache, and on a CPU the libraries themselves."""
    models = (actors.policy, actors.reference, actors.value_model, getattr(actors.reward, "model", None))
    seen: set[int] = set()
    total = 0
    for model in models:
        if isinstance(model, torch.nn.Module):
            trained = [p for p in model.parameters() if p.requires_grad]
            held = sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in trained)
            total += weight_bytes(model, seen) + 3 * held
    return total


def update_of(
    values: dict[str, float], took: tuple[float, float], prompts: list[int], responses: list[int],
    networks: list[Network], actors: Actors, config: RunConfig,
) -> Update:  # fmt: skip
    """What an iteration did. took: seconds by the clock and of the CPU; prompts, responses: tokens of each row;
    networks: policy, and value model."""
    phases = {name: values[f"seconds/{name}"] for name in ("rollout", "scoring", "update")}
    whole = [p + r for p, r in zip(prompts, responses)]
    steps = config.ppo.batch // config.ppo.minibatch  # of an epoch; stop_kl and the value warm-up leave some out
    trained = zip((values["policy_steps"], values["value_steps"]), networks)
    if peaks := [gib for name, gib in values.items() if name.startswith("peak_memory_gib/")]:
        peak = int(max(peaks) * 2**30)
    else:
        peak = peak_memory(actors.cluster.device)
    return Update(
        seconds=took[0],
        cpu=took[1],
        phases={**phases, "rest": took[0] - sum(phases.values())},
        sequences=len(whole),
        tokens=sum(whole),
        training=sum(done / steps * network.training(whole, responses) for done, network in trained),
        decoding=decoding_work(networks[0], prompts, responses, actors, config),
        padding=values.get("padding_fraction"),
        peak=int(actors.cluster.max(torch.tensor(peak))),
    )


def decoding_work(
    network: Network, prompts: list[int], responses: list[int], actors: Actors, config: RunConfig
) -> tuple[float, float]:
    """FLOPs of the rollout, and the bytes that all ranks must read for it, each in batches of `rollout.batch` rows."""
    hand, width = actors.cluster.deal(torch.tensor(prompts)), sampling_dtype(actors, config).itemsize
    read = 0.0
    for rows, real in zip(hand.all_rows.tolist(), hand.all_real.tolist()):
        mine = [row for row, here in zip(rows, real) if here]
        together = getattr(config.rollout, "batch", None) or len(mine) or 1
        for start in range(0, len(mine), together):
            part = mine[start : start + together]
            read += network.decoding_bytes([prompts[i] for i in part], [responses[i] for i in part], width)
    return network.decoding(prompts, responses), read


def ppo_products(
    models: list[Any], prompts: list[int], responses: list[int], config: RunConfig, cluster: Cluster
) -> Counter[tuple[int, int, int]]:
    """The products of a micro-batch: this rank's share of a minibatch, cut into parts of ppo.microbatch_tokens."""
    share = config.ppo.minibatch / len(prompts) / cluster.world_size
    whole, outputs = (share * sum(tokens) for tokens in (prompts + responses, responses))
    parts = max(1, math.ceil(whole / config.ppo.microbatch_tokens))
    products = [products_of(model, max(1, int(whole / parts)), max(1, int(outputs / parts))) for model in models]
    return sum(products[1:], products[0])


def essentials(job: Job) -> dict[str, Any]:
    """The settings that decide what was measured."""
    config = job.config
    assert config.bench is not None
    sections = {"ppo": ("ppo", "rollout", "advantage", "kl"), "sft": ("sft",), "reward_model": ("reward_model",)}
    found = {
        name: asdict(getattr(config, name)) for name in (*sections[config.bench.stage], "bench", "sharding", "launch")
    }
    models = {name: str(place) for name, place in job.inputs.items()}
    return {"compute_dtype": config.compute_dtype, "seed": config.seed, "models": models, **found}
