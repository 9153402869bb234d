"""What the tests of PPO share: settings, a recording optimizer, ragged rows, one update, one iteration."""

import math
from dataclasses import fields, replace
from types import SimpleNamespace

import torch

from alignkit.algo.advantage import GAE
from alignkit.algo.control import FixedKL
from alignkit.algo.shaping import Shaping
from alignkit.algo.types import Minibatch
from alignkit.models.settings import PeftSettings
from alignkit.observe.alerts import Limits
from alignkit.observe.metrics import Metrics
from alignkit.reward.model import RewardModel
from alignkit.rollout.native import Native
from alignkit.runtime.settings import ShardingSettings
from alignkit.stages import ppo
from alignkit.stages.actors import Actors, logprobs_of, values_of
from alignkit.stages.job import Job
from alignkit.stages.ppo_update import ppo_update
from alignkit.stages.ptx import PtxBatches
from alignkit.stages.settings import PPOSettings, PtxSettings

ROWS, WIDTH, LENGTH = 8, 6, 5
EXACT = "gpt_neox"  # its norms and rotary tables compute in float64 if asked to; RMS norms stay in float32
NO_LIMITS = Limits(kl_ratio=None, kl=None, entropy=None, explained_variance=None, value_loss=None, nan=False)
PPO = PPOSettings(
    episodes=16,
    batch=8,
    samples_per_prompt=1,
    minibatch=4,
    microbatch_tokens=33,  # three of the longest rows
    packing=False,
    epochs=2,
    learning_rate=1e-3,
    value_learning_rate=2e-3,
    schedule="linear",
    warmup=0,
    value_warmup=0,
    adam_beta1=0.9,
    adam_beta2=0.999,
    adam_eps=1e-5,
    weight_decay=0.0,
    joint=False,
    clip=0.2,
    clip_high=None,
    dual_clip=None,
    value_clip=0.2,
    value_coef=1.0,
    entropy_coef=0.0,
    loss_aggregation="token_mean",
    stop_kl=None,
    max_grad_norm=None,
    ema=None,
    importance_cap=None,
    max_engine_gap=None,
    self_checks=True,
    evaluate_every=None,
    evaluate_prompts=4,
    keep="last",
    patience=None,
    stop_if=NO_LIMITS,
    max_prompt=8,
    samples_every=1,
)
TEXTS = [([40, 41, 42, 43, 44, 45], 2), ([50, 51, 52], 1), ([60, 61, 62, 63], 3)]  # ids and the length of the prompt
PROMPTS = ["the harbour", "a lamp", "why", "three letters", "storm from the west", "stones", "she wrote", "quiet"]


class Recorder(torch.optim.SGD):
    """Writes down every gradient that reaches a step, and moves nothing."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.0)
        self.names = [name for name, _ in model.named_parameters()]
        self.steps: list[dict[str, torch.Tensor]] = []

    def step(self, closure=None) -> None:
        held = zip(self.names, self.param_groups[0]["params"])
        self.steps.append({name: value.grad.full_tensor().clone() for name, value in held if value.grad is not None})


def flat(gradient: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient[name].flatten().double() for name in sorted(gradient)])


def distance(gradient: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm."""
    assert gradient.keys() == expected.keys()
    return float((flat(gradient) - flat(expected)).norm() / flat(expected).norm())


SHAPING = Shaping(
    running="none",
    clip=None,
    missing_eos="subtract",
    missing_eos_penalty=1.0,
    length_penalty=0.0,
    score_position="eos",
    whiten=False,
)


def config_of(ptx: float = 0.0, kl=None, shaping=None, advantage=None, **changes) -> SimpleNamespace:
    return SimpleNamespace(
        seed=0,
        ppo=replace(PPO, **changes),
        ptx=PtxSettings(coef=ptx, path=None, batch=3, max_length=16),
        rollout=Native(temperature=0.9, min_response=0, max_response=6, batch=64, unshard=True),
        reward=RewardModel(path=None, normalise="shift_scale"),
        shaping=replace(SHAPING, **(shaping or {})),
        advantage=advantage or GAE(gamma=1.0, lam=0.95, whiten="batch", clip=None),
        peft=PeftSettings(method="none", settings={}, quantization={}, merge=False),
        sharding=ShardingSettings(
            shard_size="all", activation_checkpointing=False, offload_frozen=False, offload_optimizer=False
        ),
        kl=kl or FixedKL(coef=0.1, estimator="k1", place="reward"),
    )


def minibatch_of(actors: Actors) -> Minibatch:
    """Eight ragged rows near the policy's own log-probabilities and values, so that both clips bind here and there.
    Padding holds what must not matter: NaN in the numbers, random ids in the tokens."""
    generator = torch.Generator().manual_seed(3)
    prompts, responses = [1, 6, 3, 2, 5, 4, 6, 1], [5, 2, 4, 1, 3, 5, 1, 2]
    tokens = torch.randint(2, 280, (ROWS, WIDTH + LENGTH), generator=generator)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        mask[row, WIDTH - prompt : WIDTH + response] = True
    real = mask[:, WIDTH:]
    rollout = ppo.Rollout(tokens, mask, real, torch.ones(ROWS, dtype=torch.bool), torch.zeros(ROWS, LENGTH))
    dtype = actors.plain[0].dtype

    def near(values: torch.Tensor, spread: float) -> torch.Tensor:
        noise = torch.randn(values.shape, generator=generator, dtype=torch.float64) * spread
        return torch.where(real, values.double() + noise, torch.nan).to(dtype)

    (logprobs,) = logprobs_of(actors.policy, rollout, actors.rule, cut(rollout, ROWS))
    values, zero = values_of(actors.value_model, rollout, cut(rollout, ROWS)), torch.zeros(ROWS, LENGTH)
    return Minibatch(
        tokens=tokens,
        mask=mask,
        response_mask=real,
        value_mask=real,
        old_logprobs=near(logprobs, 0.5),
        ref_logprobs=near(logprobs, 0.5),
        old_values=near(values, 0.5),
        advantages=near(zero, 1.0),
        importance=near(zero, 0.0) + 1.0,
        returns=near(values, 1.0),
    )


def padded(batch: Minibatch, left: int, right: int) -> Minibatch:
    """The same rows in a wider rectangle."""
    fill = {"tokens": 99, "mask": False, "response_mask": False, "value_mask": False}
    sides = {"tokens": (left, right), "mask": (left, right)}
    wide = {}
    for field in fields(Minibatch):
        value = getattr(batch, field.name)
        side = sides.get(field.name, (0, right))
        wide[field.name] = torch.nn.functional.pad(value, side, value=fill.get(field.name, math.nan))
    return Minibatch(**wide)


def update(actors: Actors, batch: Minibatch, config, ptx: PtxBatches | None = None):
    """Gradients of policy and value model in one update, and its metrics."""
    metrics = Metrics()
    ppo_update(actors, batch, ptx or PtxBatches([], 1, 0), config, metrics, first=False)
    return actors.policy_optimizer.steps.pop(), actors.value_optimizer.steps.pop(), metrics.values()


def rollout_of(batch: Minibatch):
    finished, logprobs = torch.ones(len(batch), dtype=torch.bool), batch.old_logprobs
    return ppo.Rollout(batch.tokens, batch.mask, batch.response_mask, finished, logprobs)


def cut(rollout: ppo.Rollout, rows: int) -> list[torch.Tensor]:
    """Micro-batches of so many rows, from the shortest to the longest."""
    return list(rollout.mask.sum(dim=1).argsort(stable=True).split(rows))


def prompts_of(actors: Actors):
    return [(text, actors.encoder.prompt(text)) for text in PROMPTS]


def iterate(actors: Actors, config, out, number: int = 0):
    job = Job("ppo", config, {}, out, first=True)
    actors.state.iteration = number
    return ppo.ppo_iteration(actors, prompts_of(actors), PtxBatches(TEXTS, 3, 0), job, None)
