"""What the ranks of tests/dist do: the checks that need several processes, results as JSON from rank 0.

python -m torch.distributed.run --standalone --nproc-per-node 2 ranks.py OUT.json
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from alignkit.algo.advantage import GAE, RLOO
from alignkit.algo.batching import pad_left
from alignkit.algo.control import FixedKL
from alignkit.algo.sampling import SamplingRule, uniform_noise
from alignkit.algo.shaping import Shaping
from alignkit.algo.types import Minibatch, PromptBatch
from alignkit.models.adapters import add_adapter
from alignkit.models.scalar import ScalarModel
from alignkit.models.settings import PeftSettings
from alignkit.observe.alerts import Limits
from alignkit.observe.metrics import Metrics
from alignkit.rollout.native import Native
from alignkit.runtime.sharding import Cluster
from alignkit.runtime.worker import leave
from alignkit.stages.actors import Actors, WithoutAdapter, adam
from alignkit.stages.job import Job
from alignkit.stages.ppo import ppo_iteration
from alignkit.stages.ppo_update import ppo_update
from alignkit.stages.ptx import PtxBatches
from alignkit.stages.settings import PPOSettings, PtxSettings
from alignkit.stages.state import AveragedWeights, PPOState

FLOOR = 1e-2  # metrics smaller than this are compared absolutely: KL before the first step is rounding, 5e-8
RULE = SamplingRule(temperature=0.9, stop_ids=(1,))
ROWS = 7  # odd: ranks hold different numbers of rows


def config(architecture="llama"):
    return AutoConfig.for_model(
        architecture, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, initializer_range=0.2, num_labels=1,
    )  # fmt: skip


def fresh_policy(architecture="llama", dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(architecture), dtype=dtype)


def fresh_scalar(architecture="llama", dtype=torch.float32):
    torch.manual_seed(1)
    return ScalarModel(AutoModelForSequenceClassification.from_config(config(architecture), dtype=dtype)).to(dtype)


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
        episodes=7, batch=7, samples_per_prompt=1, minibatch=7, microbatch_tokens=20, packing=False, epochs=1, learning_rate=1e-3,
        value_learning_rate=1e-3, schedule="linear", warmup=0, value_warmup=0, adam_beta1=0.9, adam_beta2=0.999,
        adam_eps=1e-5, weight_decay=0.0, joint=True, clip=0.2, clip_high=None, dual_clip=None, value_clip=0.2,
        value_coef=1.0, entropy_coef=0.01, loss_aggregation="seq_mean_token_mean", stop_kl=1e9, max_grad_norm=0.5,
        ema=None, importance_cap=None, max_engine_gap=None, self_checks=True,
        evaluate_every=None, evaluate_prompts=4, keep="last", patience=None, max_prompt=8, samples_every=1,
        stop_if=Limits(
            kl_ratio=None, kl=None, entropy=None, explained_variance=None, value_loss=None, nan=False,
        ),
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
    return Minibatch(tokens, mask, real, real, old, reference, random[1], random[2], torch.ones_like(old), random[3])


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
    hand = cluster.deal(mask.sum(dim=1))
    rows = hand.rows
    noise = uniform_noise(3, 0, rows, 12)
    engine = Native(temperature=0.9, min_response=0, max_response=12, batch=2, unshard=True)
    with cluster.sampling(policy, unshard=True):
        part = engine.generate(policy, PromptBatch(tokens[rows], mask[rows], rows), RULE, noise, bool)
    halves = [p.to_local().numel() / p.numel() for p in policy.parameters()]
    sharded = max(halves) <= 1 / cluster.world_size
    after = policy(input_ids=tokens).logits  # a collective on every rank
    return cluster.collect(part.response, hand), after, sharded


SHAPING = Shaping(
    running="none", clip=None, missing_eos="subtract", missing_eos_penalty=1.0, length_penalty=0.0,
    score_position="eos", whiten=False,
)  # fmt: skip
LOOP = replace(
    Settings.ppo, episodes=3 * 14, batch=14, epochs=2, joint=False, entropy_coef=0.0, loss_aggregation="token_mean",
    stop_kl=None, schedule="constant",
)  # fmt: skip
LAYOUT = ("seconds/", "tokens_per_second", "ratio_error", "engine_gap", "padding_fraction")  # of rounding and layout
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
IN_REWARD = FixedKL(coef=0.1, estimator="k1", place="reward")
LOOPS = {  # minibatches of 7 rows: 4 on one rank, 3 on the other
    "ema_and_stop_kl": {"ppo": replace(LOOP, ema=0.9, epochs=4, stop_kl=2e-3)},
    "slot_after_the_stop": {
        "ppo": replace(LOOP, value_warmup=1, joint=True),
        "shaping": replace(SHAPING, score_position="eos_plus_one", running="scale"),
        "ptx": Settings.ptx,
    },
    "rloo": {"ppo": replace(LOOP, samples_per_prompt=2), "advantage": RLOO(whiten="none", clip=None)},
    "lora": {
        "ppo": replace(LOOP, learning_rate=1e-2, ema=0.9),
        "peft": PeftSettings(method="lora", settings=LORA, quantization={}, merge=False),
    },
}


class Silent:
    """An encoder without a tokenizer: nobody reads the responses."""

    tokenizer = SimpleNamespace(pad_token_id=0)

    def text(self, ids):
        return " ".join(map(str, ids))


class MeanId:
    """The reward source: the mean id of a response over 10."""

    def score(self, answers, microbatch):
        rollout = answers.rollout
        mask = rollout.response_mask
        return torch.where(mask, rollout.response, 0).sum(dim=1) / mask.sum(dim=1) / 10


def loop(cluster, changes, *model):
    """Three iterations. Metrics of each, and the weights (policy, value model, average) before and after, whole; model:
    architecture and dtype."""
    config = SimpleNamespace(**{
        "seed": 0, "ptx": replace(Settings.ptx, coef=0.0), "shaping": SHAPING, "kl": IN_REWARD, "peft": None,
        "rollout": Native(temperature=0.9, min_response=0, max_response=8, batch=3, unshard=True),
        "advantage": GAE(gamma=1.0, lam=0.95, whiten="batch", clip=None), **changes,
    })  # fmt: skip
    settings, policy, value = config.ppo, fresh_policy(*model), None
    if config.peft:
        torch.manual_seed(2)
        add_adapter(policy, config.peft, "CAUSAL_LM")
    policy = cluster.shard(policy, trainable=True)
    reference = WithoutAdapter(policy) if config.peft else cluster.shard(fresh_policy(*model), trainable=False)
    if config.advantage.uses_values:
        value = cluster.shard(fresh_scalar(*model), trainable=True)
    made = Actors(
        cluster=cluster,
        encoder=Silent(),
        rule=SamplingRule(temperature=0.9, stop_ids=tuple(range(1, 9))),  # about one token in eight
        policy=policy,
        reference=reference,
        value_model=value,
        reward=MeanId(),
        policy_optimizer=adam(policy, settings.learning_rate, settings),
        value_optimizer=adam(value, settings.value_learning_rate, settings) if value else None,
        state=PPOState(kl_coef=config.kl.coef),
        ema=None if settings.ema is None else AveragedWeights(policy, settings.ema),
    )
    each = settings.samples_per_prompt
    prompts = [("", [9 + i] * (1 + i % 3)) for i in range(settings.batch // each) for _ in range(each)]
    ptx = PtxBatches([([5, 6, 7, 8], 1), ([9, 10, 11], 2), ([12, 13, 14, 15, 16], 1)], 3, 0)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}

    def weights():
        models = {"policy": cluster.full_state(policy), "value": cluster.full_state(value) if value else {}}
        if made.ema:
            made.ema.swap(policy)
            models["ema"] = cluster.full_state(policy)
            made.ema.swap(policy)
        if not cluster.is_main:
            return None
        names = {"policy": trained, "ema": trained, "value": models["value"]}
        return {
            model: torch.cat([state[name].flatten().double() for name in sorted(names[model])])
            for model, state in models.items()
            if state
        }

    before, job = weights(), Job("ppo", config, {}, Path(os.devnull), first=True)
    done = [ppo_iteration(made, prompts, ptx, job, None) for _ in range(3)]
    texts = [[row["response"] for row in rows] for _, rows in done]
    return [values for values, _ in done], before, weights(), texts


def untimed(values):
    return {k: v for k, v in values.items() if not k.startswith(LAYOUT)}


def compared(several, single):
    """A loop on several ranks against the same on one, largest differences, relative."""
    history, _, after, texts = several
    expected, start, end, same = single
    if after is None:
        return None
    metrics = {}
    for got, wanted in zip(map(untimed, history), map(untimed, expected), strict=True):
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            metrics[name] = max(metrics.get(name, 0.0), abs(got[name] - value) / max(abs(value), FLOOR))
    return {
        "metrics": metrics,
        "same_responses": texts == same,
        "weights": {name: distance(after[name], end[name]) for name in end},
        "moved": {name: distance(end[name], start[name]) for name in end},
        "steps": [values["policy_steps"] for values in history],
        "value_steps": [values["value_steps"] for values in history],
        "eos_fraction": [values["eos_fraction"] for values in history],
    }


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
        got = gradients(Cluster.open(shard_size=shards))
        results[f"gradient_{name}"] = [distance(a, b) for a, b in zip(got, expected)]
    tokens, after, sharded = sampled(cluster)
    tokens_alone, after_alone, _ = sampled(single)
    results["same_tokens"] = bool((tokens == tokens_alone).all())
    results["same_logits_after"] = float((after - after_alone).abs().max())
    results["sharded_again"] = sharded
    state = cluster.full_state(cluster.shard(fresh_policy(), trainable=True))
    plain = fresh_policy().state_dict()
    results["full_state"] = state is None or all(torch.equal(state[k], plain[k]) for k in plain)
    hand = cluster.deal(torch.arange(ROWS))
    results["dealt"] = cluster.collect(torch.where(hand.real, hand.rows, -1), hand).tolist()
    results["summed"] = float(cluster.sum(torch.tensor(float(cluster.rank + 1))))
    results["largest"] = float(cluster.max(torch.tensor(float(cluster.rank))))
    results["loops"] = {
        name: compared(loop(cluster, changes), loop(single, changes)) for name, changes in LOOPS.items()
    }
    if cluster.is_main:
        Path(out).write_text(json.dumps(results))
    cluster.close()


if __name__ == "__main__":
    main(sys.argv[1])
    leave(0)
