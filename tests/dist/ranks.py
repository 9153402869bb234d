"""What the ranks of tests/dist do: the checks that need several processes, results as JSON from rank 0.

python -m torch.distributed.run --standalone --nproc-per-node 2 ranks.py OUT.json
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from alignkit.algo.batching import pad_left
from alignkit.algo.control import FixedKL
from alignkit.algo.sampling import SamplingRule, uniform_noise
from alignkit.algo.types import Minibatch, PromptBatch
from alignkit.models.scalar import ScalarModel
from alignkit.observe.metrics import Metrics
from alignkit.rollout.native import Native
from alignkit.runtime.sharding import Cluster
from alignkit.stages.actors import Actors
from alignkit.stages.ppo_update import ppo_update
from alignkit.stages.ptx import PtxBatches
from alignkit.stages.settings import PPOSettings, PtxSettings
from alignkit.stages.state import PPOState

RULE = SamplingRule(temperature=0.9, stop_ids=(1,))
ROWS = 7  # odd: ranks hold different numbers of rows


def config():
    return AutoConfig.for_model(
        "llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, initializer_range=0.2, num_labels=1,
    )  # fmt: skip


def fresh_policy():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(), dtype=torch.float32)


def fresh_scalar():
    torch.manual_seed(1)
    return ScalarModel(AutoModelForSequenceClassification.from_config(config(), dtype=torch.float32))


class Recorder(torch.optim.SGD):
    """Keeps the whole gradient of the step and moves nothing."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.0)

    def step(self, closure=None):
        whole = [
            p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in self.param_groups[0]["params"]
        ]
        self.gradient = torch.cat([g.flatten().double() for g in whole])


def actors(cluster):
    policy, value = cluster.shard(fresh_policy(), trainable=True), cluster.shard(fresh_scalar(), trainable=True)
    return Actors(cluster, None, RULE, policy, None, value, None, Recorder(policy), Recorder(value), PPOState(0.1))


class Settings:
    ppo = PPOSettings(
        episodes=7, batch=7, samples_per_prompt=1, minibatch=7, microbatch=2, epochs=1, learning_rate=1e-3,
        value_learning_rate=1e-3, schedule="linear", warmup=0, value_warmup=0, adam_beta1=0.9, adam_beta2=0.999,
        adam_eps=1e-5, weight_decay=0.0, joint=True, clip=0.2, clip_high=None, dual_clip=None, value_clip=0.2,
        value_coef=1.0, entropy_coef=0.01, loss_aggregation="seq_mean_token_mean", stop_kl=1e9, max_grad_norm=0.5,
        ema=None, self_checks=True, max_prompt=8, samples_every=1,
    )  # fmt: skip
    ptx = PtxSettings(coef=0.5, path=None, batch=3, max_length=16)
    kl = FixedKL(coef=0.1, estimator="k3", place="loss")


def minibatch():
    generator = torch.Generator().manual_seed(5)
    prompts, response = 4, 6
    tokens = torch.randint(2, 64, (ROWS, prompts + response), generator=generator)
    starts, ends = torch.randint(0, 3, (ROWS,), generator=generator), torch.randint(1, 7, (ROWS,), generator=generator)
    columns = torch.arange(prompts + response)
    mask = (columns >= starts[:, None]) & (columns < (prompts + ends)[:, None])
    random = [torch.randn(ROWS, response, generator=generator) for _ in range(5)]
    real = mask[:, prompts:]
    old, reference = -random[0].abs() - 3, -random[4].abs() - 3
    return Minibatch(tokens, mask, real, real, old, reference, random[1], random[2], random[3])


def gradients(cluster):
    """Gradients of policy and value model of one update with ptx, gathered whole."""
    made = actors(cluster)
    ptx = PtxBatches([([5, 6, 7, 8], 1), ([9, 10, 11], 2), ([12, 13, 14, 15, 16], 1)], 3, 0)
    ppo_update(made, minibatch(), ptx, Settings, Metrics(), first=False)
    return made.policy_optimizer.gradient, made.value_optimizer.gradient


def distance(a, b):
    return float((a - b).norm() / b.norm())


def sampled(cluster):
    """Responses of all rows, dealt over the ranks, and what the model computes after sampling."""
    policy = cluster.shard(fresh_policy(), trainable=True)
    tokens, mask = pad_left([[5 + i] * (1 + i % 3) for i in range(ROWS)], 0)
    rows, _ = cluster.deal(ROWS)
    noise = uniform_noise(3, 0, rows, 12)
    engine = Native(temperature=0.9, min_response=0, max_response=12, batch=2)
    with cluster.whole(policy):
        part = engine.generate(policy, PromptBatch(tokens[rows], mask[rows], rows), RULE, noise)
    halves = [p.to_local().numel() / p.numel() for p in policy.parameters()]
    sharded = max(halves) <= 1 / cluster.world_size
    after = policy(input_ids=tokens).logits  # a collective on every rank
    return cluster.collect(part.response, ROWS), after, sharded


def alone():
    """A cluster of this process only, for the reference results."""
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh.from_group([dist.new_subgroups(1)[0]][0], "cpu", mesh_dim_names=("shard",))
    return Cluster(0, 1, torch.device("cpu"), mesh)


def main(out):
    torch.set_num_threads(1)
    cluster = Cluster.open()
    results = {"world": cluster.world_size}
    single = alone()
    expected = gradients(single)
    for name, shards in {"fsdp": cluster.world_size, "replicas": 1}.items():
        got = gradients(Cluster.open(shards))
        results[f"gradient_{name}"] = [distance(a, b) for a, b in zip(got, expected)]
    tokens, after, sharded = sampled(cluster)
    tokens_alone, after_alone, _ = sampled(single)
    results["same_tokens"] = bool((tokens == tokens_alone).all())
    results["same_logits_after"] = float((after - after_alone).abs().max())
    results["sharded_again"] = sharded
    state = cluster.full_state(cluster.shard(fresh_policy(), trainable=True))
    plain = fresh_policy().state_dict()
    results["full_state"] = state is None or all(torch.equal(state[k], plain[k]) for k in plain)
    rows, real = cluster.deal(ROWS)
    results["dealt"] = cluster.collect(torch.where(real, rows, -1), ROWS).tolist()
    results["summed"] = float(cluster.sum(torch.tensor(float(cluster.rank + 1))))
    results["largest"] = float(cluster.max(torch.tensor(float(cluster.rank))))
    if cluster.is_main:
        Path(out).write_text(json.dumps(results))
    cluster.close()


if __name__ == "__main__":
    main(sys.argv[1])
