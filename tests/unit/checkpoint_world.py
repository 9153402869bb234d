"""What the tests of checkpoints share: a small PPO stage that can be run, stopped and run again."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from ppo_world import PROMPTS, config_of

from alignkit.algo.advantage import RLOO
from alignkit.algo.control import AdaptiveKL
from alignkit.data.corpus import Corpus, Demonstration, Split
from alignkit.models.settings import PeftSettings
from alignkit.observe.tracking import Tracker
from alignkit.reward.model import ModelSource, RewardModel
from alignkit.runtime.artifact import file_digest
from alignkit.runtime.checkpoint import Checkpoints
from alignkit.runtime.settings import CheckpointSettings
from alignkit.stages import ppo
from alignkit.stages.job import Job

ITERATIONS, BATCH = 4, 8
EVERY = CheckpointSettings(every_iterations=1, every_steps=1, every_minutes=None, keep_last=9, background=False)
NEVER = replace(EVERY, every_iterations=None, every_steps=None)
SETTINGS = {"seed": 0, "ppo": {"clip": 0.2, "batch": 8}, "kl": {"target": 3.0}}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1}
MORE_PROMPTS = ["a beach", "the west", "every window"]  # 11 in all: no multiple of a batch, so the cursor matters
TEXTS = [("the harbour", " was quiet"), ("a lamp", " burned"), ("why", " not"), ("she wrote", " three letters")]
UNEQUAL = ("time", "ppo/seconds", "ppo/tokens_per_second")  # measured, not computed
WARMUP = 2  # iterations in which the value model learns alone


class Noisy(ModelSource):
    """A reward model's score with noise from the generators of torch, NumPy and Python. Both normal generators draw two
    numbers at a time and keep one: an odd number of calls leaves one behind."""

    def score(self, answers, microbatch):
        scores = super().score(answers, microbatch)
        return scores + 0.1 * torch.randn(len(scores)) + 0.1 * np.random.standard_normal() + 0.1 * random.gauss(0, 1)


class NoisyReward(RewardModel):
    def open(self, *arguments):
        return Noisy(**vars(super().open(*arguments)))


def config_for(kind: str) -> SimpleNamespace:
    """Settings of PPO in which all that a checkpoint holds moves: average, running moments, KL coefficient, ptx rows,
    value warm-up, learning rates, generators."""
    changes = {"value_warmup": WARMUP, "ema": 0.9, "warmup": 1}
    if kind == "rloo":
        changes = {"samples_per_prompt": 2, "advantage": RLOO(whiten="none", clip=None)}
    changes |= {"episodes": ITERATIONS * BATCH, "batch": BATCH, "epochs": 1, "max_prompt": 16}
    config = config_of(
        learning_rate=1e-2,
        value_learning_rate=1e-2,
        ptx=0.5,
        kl=AdaptiveKL(coef=0.1, target=0.1, horizon=40, estimator="k1", place="reward"),
        shaping={"running": "scale"},
        **changes,
    )
    if kind == "lora":
        config.peft = PeftSettings(method="lora", settings=LORA, quantization={}, merge=False)
    config.sharding = replace(config.sharding, offload_optimizer=kind == "offloaded")
    config.reward = NoisyReward(path=None, normalise="none")
    demonstrations = [Demonstration(prompt, text) for prompt, text in TEXTS]
    corpus = Corpus(Split(demonstrations, [], PROMPTS + MORE_PROMPTS), Split([], [], []))
    config.data = SimpleNamespace(load=lambda seed: corpus)
    config.checkpoint = EVERY
    return config


class Watched(Tracker):
    """Calls `then` with the number of the iteration whose row it has just written."""

    def __init__(self, folder: Path, then: Callable[[int], None]) -> None:
        super().__init__(folder, "ppo", is_main=True)
        self.then = then

    def log(self, values, step: int) -> None:
        super().log(values, step)
        self.then(step // BATCH)


def nothing(iteration: int) -> None:
    """What follows a row by default."""


def open_checkpoints(folder: Path, cluster, when: CheckpointSettings = EVERY, **identity) -> Checkpoints:
    """The checkpoints of a stage that writes `folder`."""
    known = {"stage": "ppo", "digest": "abc", "settings": SETTINGS, **identity}
    return Checkpoints(folder, cluster, Tracker(folder, "ppo", cluster.is_main), when, known)


def train(folders, cluster, out: Path, kind: str = "full", *, checkpoint=EVERY, then=nothing) -> dict[str, float]:
    """Run PPO in `out`, on from what it finds there. Raises Interrupted if `then` asks for an end."""
    config = config_for(kind)
    config.checkpoint = checkpoint
    (out / "stop").unlink(missing_ok=True)
    tracker = Watched(out, then)
    identity = {"stage": "ppo", "digest": "abc", "settings": SETTINGS}
    checkpoints = Checkpoints(out, cluster, tracker, checkpoint, identity)
    return ppo.run(Job("ppo", config, folders, out, first=False), cluster, tracker, checkpoints)


def asking(out: Path, iteration: int) -> Callable[[int], None]:
    """`then` for `train`: ask for an end after this iteration."""
    return lambda done: (out / "stop").touch() if done == iteration else None


def rows(file: Path) -> list[dict]:
    """The rows of metrics.jsonl or samples.jsonl without what is measured."""
    lines = file.read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(UNEQUAL)} for line in lines]


def result_of(out: Path) -> dict:
    """What a finished stage has left: digests of its weights, its metrics and its samples."""
    weights = {file.name: file_digest(file) for file in (out / "model").glob("*.safetensors")}
    assert weights
    return {"weights": weights, **{name: rows(out / f"{name}.jsonl") for name in ("metrics", "samples")}}
