"""SFT and reward training measured: TRL's trainers as the stages make them, timed step by step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from alignkit.algo.arithmetic import Network
from alignkit.models.loading import load_encoder, make_encoder, model_folder
from alignkit.stages import reward_model, sft
from alignkit.stages.bench_limits import WARM_UP, Limits, network_of, peak_memory, products_of
from alignkit.stages.bench_report import Update
from alignkit.stages.common import encode_demonstrations, prepare
from alignkit.stages.trainer import lay_out, train

if TYPE_CHECKING:
    from alignkit.observe.tracking import Tracker
    from alignkit.runtime.checkpoint import Checkpoints
    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.job import Job


def measure_trainer(
    job: Job, cluster: Cluster, tracker: Tracker, checkpoints: Checkpoints
) -> tuple[list[Update], Limits]:
    """Optimizer steps of SFT or reward training on the settings' data."""
    settings, bench = getattr(job.config, job.stage), job.config.bench
    assert bench is not None
    limited = replace(settings, trainer={**settings.trainer, "max_steps": bench.updates + WARM_UP})
    job = replace(job, config=replace(job.config, **{job.stage: limited}))
    trainer = {"sft": sft_trainer, "reward_model": reward_trainer}[job.stage](job, cluster)
    trainer.data_collator = batches = CountingCollator(trainer.data_collator)
    model = cast(nn.Module, trainer.model)
    clock = StepClock(batches, network_of(model), model, settings.batch, cluster)
    trainer.add_callback(clock)
    train(trainer, job, cluster, tracker, checkpoints)
    assert clock.limits is not None
    return clock.updates[WARM_UP:], clock.limits


def sft_trainer(job: Job, cluster: Cluster) -> Trainer:
    """TRL's trainer as `stages.sft` makes it, ready to train."""
    corpus = prepare(job, cluster.is_main)
    start = sft.Start(job, corpus.train)
    model = lay_out(start.load, job.config.peft, cluster)
    encoder = make_encoder(start.tokenizer, model.generation_config)
    rows, _ = encode_demonstrations(corpus.train.demonstrations, encoder, job.config.sft.max_length)
    return sft.make_trainer(model, rows, encoder, job, cluster)


def reward_trainer(job: Job, cluster: Cluster) -> Trainer:
    """TRL's trainer as `stages.reward_model` makes it, ready to train."""
    corpus, encoder = prepare(job, cluster.is_main), load_encoder(model_folder(job.inputs["init"]))
    rows, _, _ = reward_model.training_rows(corpus, encoder, job, cluster)
    model = lay_out(reward_model.loader(job, encoder), job.config.peft, cluster)
    return reward_model.make_trainer(model, rows, encoder, job, cluster)


@dataclass(frozen=True)
class Batch:
    """A micro-batch of a trainer: real tokens of each sequence, and how many of them are learnt (labels; 1 of a
    sequence that is given one score); computed: tokens with padding."""

    tokens: list[int]
    outputs: list[int]
    computed: int


class CountingCollator:
    """A trainer's collator that notes what is in each micro-batch, in the order in which they are trained on."""

    def __init__(self, inner: Callable[[Any], Any]) -> None:
        self.inner = inner
        self.seen: list[Batch] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if "responses" in rows[0]:
            tokens = [len(ids) for row in rows for ids in row["responses"]]
            outputs = [1] * len(tokens)
        else:
            tokens = [len(row["input_ids"]) for row in rows]
            outputs = [sum(label != -100 for label in row.get("labels", row["input_ids"])) for row in rows]
        batch = self.inner(rows)
        self.seen.append(Batch(tokens, outputs, batch["input_ids"].numel()))
        return batch


class StepClock(TrainerCallback):
    """Times a trainer's steps, from the end of one to the end of the next but for the measuring in between."""

    def __init__(
        self, batches: CountingCollator, network: Network, model: nn.Module, sequences: int, cluster: Cluster
    ) -> None:
        self.batches, self.network, self.model = batches, network, model
        self.sequences, self.cluster = sequences, cluster
        self.limits: Limits | None = None
        self.updates: list[Update] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is over: note it, then measure the limits."""
        if self.cluster.device.type == "cuda":
            torch.cuda.synchronize()
        self.cluster.barrier()
        seconds, cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        micros = args.gradient_accumulation_steps
        mine = self.batches.seen[len(self.updates) * micros : (len(self.updates) + 1) * micros]
        tokens, outputs = ([n for batch in mine for n in getattr(batch, key)] for key in ("tokens", "outputs"))
        here = (sum(tokens), self.network.training(tokens, outputs), sum(batch.computed for batch in mine))
        total, flops, computed = self.cluster.sum(torch.tensor(here, dtype=torch.float64)).tolist()
        peak = int(self.cluster.max(torch.tensor(peak_memory(self.cluster.device))))
        padding = 1.0 - total / computed
        self.updates.append(Update(seconds, cpu, {}, self.sequences, int(total), flops, None, padding, peak))
        if self.limits is None:
            sizes = (max(1, sum(x) // micros) for x in (tokens, outputs))
            self.limits = Limits(products_of(self.model, *sizes), 0, self.cluster)
        self.limits.measure()
        self.began = time.perf_counter(), time.process_time()
