"""What the ranks of test_any_number_of_ranks.py do; results as JSON from rank 0.

python -m torch.distributed.run --standalone --nproc-per-node N scale_ranks.py OUT.json
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import LOOP, ROWS, RULE, Settings, alone, compared, config, distance, fresh_policy, fresh_scalar, loop
from ranks import minibatch as rows_of_a_minibatch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignkit.models.loading import load_causal, scorer_from_policy
from alignkit.models.policy import response_logprobs
from alignkit.models.scalar import ScalarModel
from alignkit.observe.metrics import Metrics
from alignkit.rollout.native import Native
from alignkit.runtime.sharding import Cluster
from alignkit.runtime.worker import leave
from alignkit.stages.actors import Actors, adam, sample, score_all
from alignkit.stages.ppo_update import ppo_update
from alignkit.stages.ptx import PtxBatches
from alignkit.stages.state import PPOState

EXACT = ("gpt_neox", torch.float64)  # its norms compute in float64 if asked to; RMS norms stay in float32
BY_LAYER = Native(temperature=0.9, min_response=0, max_response=8, batch=3, unshard=False)
PTX = {"ptx": Settings.ptx}


def layouts(world):
    """Name -> (cluster, what changes in the loop): every way in which the same work can be laid out."""
    return {
        "one_row_at_a_time": (Cluster.open(), {"ppo": replace(LOOP, microbatch_tokens=1)}),
        "layer_by_layer": (Cluster.open(), {"ppo": replace(LOOP, microbatch_tokens=30), "rollout": BY_LAYER}),
        "replicas": (Cluster.open(shard_size=1), {"ppo": replace(LOOP, microbatch_tokens=90)}),
        "groups": (Cluster.open(shard_size=max(1, world // 2)), {"ppo": LOOP, **PTX}),
        "recomputed": (Cluster.open(activation_checkpointing=True, offload_frozen=True), {"ppo": LOOP}),
    }


def invariance(single, world):
    """Each layout against one rank that computes seven rows at once: neither should be seen in the result."""
    expected = {text: loop(single, {"ppo": LOOP} | text_of, *EXACT) for text, text_of in (("", {}), ("ptx", PTX))}
    return {
        name: compared(loop(cluster, changes, *EXACT), expected["ptx" if "ptx" in changes else ""])
        for name, (cluster, changes) in layouts(world).items()
    }


def placed(cluster):
    """Models from a folder: what they compute against a plain load, and what each rank held while loading."""
    folder = [tempfile.mkdtemp() if cluster.is_main else None]
    dist.broadcast_object_list(folder)
    if cluster.is_main:
        fresh_policy().save_pretrained(folder[0])
    dist.barrier()
    tokens, devices = torch.arange(2, 22).view(2, 10), []

    def load():
        model = load_causal(folder[0])
        devices.append({p.device.type for p in model.parameters()})
        return model

    def scorer():
        model = ScalarModel(scorer_from_policy(folder[0], seed=3))
        model.absorb_affine(0.5, 2.0)
        return model

    policy, value = cluster.place(load, trainable=True), cluster.place(scorer, trainable=False)
    mask = torch.ones_like(tokens).bool()
    with torch.no_grad():
        gaps = [
            float((policy(input_ids=tokens).logits - load_causal(folder[0])(input_ids=tokens).logits).abs().max()),
            float((value(tokens, mask) - scorer()(tokens, mask)).abs().max()),
        ]
    held = [None] * cluster.world_size
    dist.all_gather_object(held, [sorted(kinds) for kinds in devices])
    return {"gaps": gaps, "loads": held, "tied": policy.lm_head.weight is policy.model.embed_tokens.weight}


def bytes_held(cluster):
    """Bytes of weights, gradients and moments of the four models on this rank after scoring and one backward and step
    of both trained ones; the largest over the ranks, the total of whole models, and the largest layer."""
    wide = config()
    for name, value in {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6}.items():
        setattr(wide, name, value)

    def policy():
        return AutoModelForCausalLM.from_config(wide, dtype=torch.float32)

    def scalar():
        return ScalarModel(AutoModelForSequenceClassification.from_config(wide, dtype=torch.float32))

    plain = [policy(), scalar()]
    models = [cluster.shard(m, trainable=trained) for m, trained in
              ((policy(), True), (policy(), False), (scalar(), True), (scalar(), False))]  # fmt: skip
    settings = replace(LOOP, learning_rate=1e-3)
    optimizers = [adam(models[0], 1e-3, settings), adam(models[2], 1e-3, settings)]
    tokens, mask = torch.arange(2, 42).view(4, 10), torch.ones(4, 10, dtype=torch.bool)
    with torch.no_grad():
        response_logprobs(models[1], tokens, mask, mask[:, -4:], RULE)
        models[3](tokens, mask)
    response_logprobs(models[0], tokens, mask, mask[:, -4:], RULE)[0].sum().backward()
    models[2](tokens, mask).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    held = 0
    for model in models:
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor)
            held += parameter.to_local().nbytes + (0 if parameter.grad is None else parameter.grad.to_local().nbytes)
    for optimizer in optimizers:
        held += sum(
            value.to_local().nbytes
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, DTensor)
        )
    sizes = [sum(p.nbytes for p in model.parameters()) for model in plain]
    layer = max(sum(p.nbytes for p in block.parameters()) for block in plain[0].model.layers)
    total = sum(4 * size + size for size in sizes)  # weights, gradient and two moments; the frozen one weights alone
    return {"largest": float(cluster.max(torch.tensor(float(held)))), "total": total, "layer": layer}


def few(cluster):
    """Fewer rows than ranks: sampling, scoring and an update stay in step."""
    policy, value = cluster.shard(fresh_policy(), trainable=True), cluster.shard(fresh_scalar(), trainable=True)
    settings = type("Config", (), {"seed": 0, "rollout": BY_LAYER})
    single = sample(policy, [[5, 6]], 0, settings, RULE, cluster, 0)
    rows = rows_of_a_minibatch().rows(torch.tensor([0]))
    made = Actors(cluster, None, RULE, policy, None, value, None, adam(policy, 1e-3, LOOP), adam(value, 1e-3, LOOP),
                  PPOState(0.1))  # fmt: skip
    changed = type("Config", (Settings,), {"ppo": replace(LOOP, microbatch_tokens=20)})
    ppo_update(made, rows, PtxBatches([([5, 6, 7], 1)], 1, 0), changed, Metrics(), first=False)
    return {"response": single.response.tolist(), "scores": score_all(value, [[4, 5]], 0, 8, cluster).tolist()}


def half(single):
    """bf16 compute: dtypes, and an iteration whose self-checks hold."""
    cluster = Cluster.open(compute_dtype="bfloat16")
    policy, frozen = cluster.shard(fresh_policy(), trainable=True), cluster.shard(fresh_policy(), trainable=False)
    tokens = torch.arange(2, 22).view(2, 10)
    logits = policy(input_ids=tokens).logits
    logits.float().square().mean().backward()
    parameter = next(policy.parameters())
    exact = fresh_policy()(input_ids=tokens).logits
    history, before, after, _ = loop(cluster, {"ppo": replace(LOOP, microbatch_tokens=30)})
    return {
        "dtypes": [
            str(x) for x in (logits.dtype, parameter.dtype, parameter.grad.dtype, next(frozen.parameters()).dtype)
        ],
        "same_frozen": bool(torch.equal(frozen(input_ids=tokens).logits, logits.detach())),
        "gap": float((logits.float() - exact).norm() / exact.norm()),
        "moved": before and {name: distance(after[name], before[name]) for name in before},
        "ratio_error": max(row["ratio_error"] for row in history),
        "position_table": str(frozen.model.rotary_emb.inv_freq.dtype),
    }


def main(out):
    torch.set_num_threads(1)
    cluster = Cluster.open()
    single = alone()
    results = {"world": cluster.world_size, "rows": ROWS, "loops": invariance(single, cluster.world_size)}
    for check in (placed, bytes_held, few):
        results[check.__name__] = check(cluster)
    results["half"] = half(single)
    results["few_alone"] = few(single)
    if cluster.is_main:
        Path(out).write_text(json.dumps(results))
    cluster.close()


if __name__ == "__main__":
    main(sys.argv[1])
    leave(0)
