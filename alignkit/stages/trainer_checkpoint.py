"""Checkpoints of a TRL trainer that any number of ranks, split or not, can go on from to the last bit.

The trainer's own know one layout, hold the frozen weights too, lose the networks behind learnt tokens, and a rank whose
disk is full leaves the others waiting. So weights and optimizer go the way of PPO's, each under the name of its weight.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from alignkit.errors import Interrupted
from alignkit.stages.optimizer import trained

if TYPE_CHECKING:
    from alignkit.runtime.checkpoint import Checkpoints
    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.early_stopping import EarlyStopping


class CheckpointCallback(TrainerCallback):
    """Saves where a checkpoint is due once a row of metrics is written; puts the newest back before the first step.

    Between two rows the trainers hold sums that are in no checkpoint: with logging_steps above 1 it waits for the next.
    """

    def __init__(
        self, trainer: Any, cluster: Cluster, checkpoints: Checkpoints, every: int | None,
        stopping: EarlyStopping | None = None,
    ) -> None:  # fmt: skip
        self.trainer, self.cluster, self.checkpoints, self.every = trainer, cluster, checkpoints, every
        self.stopping = stopping
        self.found: tuple[Path, dict[str, Any]] | None = None
        self.order: Tensor | None = None  # torch's generator as the epoch's rows are put in order

    def find(self) -> str | None:
        """What `Trainer.train` is to resume from: where the data and the generators stood; the rest comes later."""
        self.found = self.checkpoints.newest()
        if self.found is None:
            return None
        facts, folder = self.found[1], Path(self.trainer.args.output_dir) / "resumed"
        state = TrainerState(**facts["trainer"])
        if state.epoch.is_integer():
            self._start_epoch()
        else:
            self.order = torch.frombuffer(bytearray.fromhex(facts["order"]), dtype=torch.uint8)
        if self.cluster.is_main:
            shutil.rmtree(folder, ignore_errors=True)  # the trainer would read whatever else lies there, pickles too
        self.cluster.barrier()
        folder.mkdir(parents=True, exist_ok=True)
        self.trainer._save_rng_state(str(folder))  # as `newest` has just set them; it sets them again at the right time
        if self.cluster.is_main:
            state.save_to_json(str(folder / "trainer_state.json"))
            print(f"{self.checkpoints.stage}: going on from step {state.global_step}")
        self.cluster.barrier()
        self.trainer._load_from_checkpoint = lambda *_: None  # there are no weights in its own format
        return str(folder)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Put weights, optimizer, schedule and counters back."""
        if self.found is None:
            return
        place, facts = self.found
        make_state(model, optimizer)
        tensors, _ = contents(model, optimizer)
        if self.stopping:
            self.stopping.restore(facts["stopping"], model)
            tensors |= self.stopping.tensors()
        self.checkpoints.load(place, tensors)
        for name, parameter in trained(model).items():
            optimizer.state[parameter].update(facts["numbers"].get(name, {}))
        lr_scheduler.load_state_dict(facts["schedule"])
        for group, rate in zip(optimizer.param_groups, lr_scheduler.get_last_lr()):
            group["lr"] = rate
        self.trainer._total_train_tokens = facts["num_tokens"]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch that was begun before has its rows in the order that they had then."""
        if self.found is None:
            self._start_epoch()
        self.found = None
        torch.set_rng_state(cast(Tensor, self.order))

    def _start_epoch(self) -> None:
        """Some orders are drawn from torch's generator, on every rank, and must be the same there. Dropout may have
        moved the generators apart."""
        self.order = self.cluster.gather(torch.get_rng_state().to(self.cluster.device))[0].cpu()
        torch.set_rng_state(self.order)

    def on_log(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Save where a checkpoint is due. Raises Interrupted once it is saved if the stage is to end."""
        step, ends = state.global_step, state.global_step == state.max_steps or control.should_training_stop
        asked = "go on" if ends else self.checkpoints.ask(step, every=self.every)
        if asked == "go on":
            return
        tensors, numbers = contents(model, optimizer)
        facts = {
            "trainer": asdict(state) | {"log_history": []},
            "schedule": lr_scheduler.state_dict(),
            "numbers": numbers,
            "num_tokens": self.trainer._total_train_tokens,
            "order": bytes(cast(Tensor, self.order).tolist()).hex(),
        }
        if self.stopping:
            tensors |= self.stopping.tensors()
            facts["stopping"] = self.stopping.facts()
        self.checkpoints.save(step, tensors, facts)
        if asked == "stop":
            self.checkpoints.finish()
            raise Interrupted(step)


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a checkpoint, and what else the optimizer remembers of each weight."""
    states = {name: optimizer.state[parameter] for name, parameter in trained(model).items()}
    tensors = {name: {k: v for k, v in state.items() if isinstance(v, Tensor)} for name, state in states.items()}
    numbers = {name: {k: v for k, v in state.items() if not isinstance(v, Tensor)} for name, state in states.items()}
    weights = {name: parameter.detach() for name, parameter in trained(model).items()}
    return {"weights": weights, "optimizer": tensors}, {name: held for name, held in numbers.items() if held}


def make_state(model: nn.Module, optimizer: AcceleratedOptimizer) -> None:
    """What the optimizer remembers after a step, by taking one; its values, and the weights, are read afterwards."""
    for parameter in trained(model).values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.optimizer.step()  # not accelerate's, which may wait for the last micro-batch
    optimizer.optimizer.zero_grad()
