"""What the ranks of test_adapters_two_ranks.py do: adapters under FSDP2 against the same on one process.

python -m torch.distributed.run --standalone --nproc-per-node 2 adapter_ranks.py OUT.json
"""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from alignkit.models.adapters import adapter_state, adapters_off, add_adapter
from alignkit.models.scalar import ScalarModel, SharedScalar, score_sequences
from alignkit.models.settings import PeftSettings
from alignkit.runtime.sharding import Cluster
from alignkit.runtime.worker import leave

LINEAR = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
METHODS = {
    "lora": ("llama", "lora", LINEAR),
    "rslora": ("gpt2", "lora", {**LINEAR, "use_rslora": True}),
    "dora": ("llama", "lora", {**LINEAR, "use_dora": True}),
    "ia3": ("llama", "ia3", {}),
    "bitfit": ("gpt2", "bitfit", {}),
}
COMMON = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.2}
SIZES = {
    "llama": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
    },
    "gpt2": {
        "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}  # fmt: skip


def settings(name: str) -> PeftSettings:
    _, method, values = METHODS[name]
    return PeftSettings(method=method, settings=dict(values), quantization={}, merge=name == "bitfit")


def fresh(name: str, factory):
    torch.manual_seed(0)
    kind = METHODS[name][0]
    return factory.from_config(AutoConfig.for_model(kind, **COMMON, **SIZES[kind], num_labels=1), dtype=torch.float32)


def nudge(model):
    """As training would move it; before sharding, so that it is the same on any number of ranks."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    return model.train()


def policy(name: str):
    model = fresh(name, AutoModelForCausalLM)
    add_adapter(model, settings(name), "CAUSAL_LM")
    return nudge(model)


def scalar(name: str) -> SharedScalar:
    model = SharedScalar(fresh(name, AutoModelForSequenceClassification), settings(name))
    model.absorb_affine(0.7, 0.5)
    return nudge(model)


def batch():
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(2, 64, (4, 8), generator=generator)
    mask = torch.arange(8) < torch.tensor([8, 5, 3, 7])[:, None]
    return torch.where(mask, tokens, 0), mask


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(ours: dict, theirs: dict) -> float:
    if ours.keys() != theirs.keys():
        return float("inf")
    return max(float((ours[name] - theirs[name]).norm() / (theirs[name].norm() + 1e-12)) for name in theirs)


def check_policy(name: str, cluster: Cluster) -> dict:
    tokens, mask = batch()
    mine = slice(cluster.rank, None, cluster.world_size)
    alone, sharded, plain = policy(name), cluster.shard(policy(name), trainable=True), fresh(name, AutoModelForCausalLM)

    def forward(model, rows=slice(None)):
        return model(input_ids=tokens[rows], attention_mask=mask[rows].long()).logits

    with torch.no_grad():
        base = forward(plain)
        with adapters_off(sharded):
            off_before = forward(sharded)
        with cluster.sampling(sharded, unshard=True), adapters_off(sharded):
            off_whole = forward(sharded)
    forward(sharded, mine).square().sum().backward()
    forward(alone).square().sum().backward()
    moved = gradients(sharded)  # before another forward, which leaves the root whole: its parameters are then others
    with torch.no_grad(), adapters_off(sharded):
        off_after = forward(sharded)
    state = cluster.full_state(sharded)
    same = state is None or all(value.equal(state[key]) for key, value in alone.state_dict().items())
    files = None
    if state is not None and name != "bitfit":
        ours, theirs = adapter_state(sharded, state), adapter_state(alone, alone.state_dict())
        files = ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in theirs)
    return {
        "off": max(float((other - base).abs().max()) for other in (off_before, off_whole, off_after)),
        "on": float((forward(sharded) - forward(alone)).abs().max()),
        "gradient": distance(moved, gradients(alone)),
        "state": same,
        "files": files,
    }


def check_scalar(name: str, cluster: Cluster) -> dict:
    tokens, mask = batch()
    mine = slice(cluster.rank, None, cluster.world_size)
    alone, sharded = scalar(name), cluster.shard(scalar(name), trainable=True)
    reward = ScalarModel(fresh(name, AutoModelForSequenceClassification)).eval()
    with torch.no_grad():
        expected = score_sequences(reward, tokens, mask)
        values = sharded(tokens, mask)
        scores = score_sequences(sharded.score, tokens, mask)
        again = sharded(tokens, mask)
    sharded(tokens[mine], mask[mine]).square().sum().backward()
    alone(tokens, mask).square().sum().backward()
    held = {p.to_local().untyped_storage().data_ptr(): p.to_local() for p in sharded.parameters()}
    held = torch.tensor(float(sum(part.untyped_storage().nbytes() for part in held.values())))
    bare = sum(p.numel() for p in fresh(name, AutoModelForSequenceClassification).parameters())
    extra = sum(p.numel() for p in alone.parameters() if p.requires_grad)
    moved = gradients(sharded)
    return {
        "value": float((values - alone(tokens, mask)).abs().max()),
        "value_after_score": float((again - values).abs().max()),
        "score": float((scores - expected).abs().max()),
        "score_after_backward": float((score_sequences(sharded.score, tokens, mask) - expected).abs().max()),
        "gradient": distance(moved, gradients(alone)),
        "trained": sorted({key.split(".")[-2] if "default" in key else key.split(".")[-1] for key in moved}),
        "frozen_head": "classifier.score.weight" not in moved and "value_head.weight" in moved and "bias" in moved,
        "bytes": float(cluster.sum(held)) / (4 * (bare + extra)),
    }


def main(out):
    torch.set_num_threads(1)
    cluster = Cluster.open()
    results = {name: {"policy": check_policy(name, cluster), "scalar": check_scalar(name, cluster)} for name in METHODS}
    if cluster.is_main:
        Path(out).write_text(json.dumps(results))
    cluster.close()


if __name__ == "__main__":
    main(sys.argv[1])
    leave(0)
