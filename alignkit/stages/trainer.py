"""What the two stages that TRL trains share: its arguments, the model's layout over the ranks, progress, checkpoints.

Over several ranks a model is split as PPO's are and handed to accelerate's FSDP2, which takes a model that is split
already as it is; or, with sharding.shard_size=1, every rank holds a whole one in DDP.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, convert_to_fp32
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback

from alignkit.errors import NotFinite, UserError
from alignkit.models.loading import skeletons
from alignkit.models.settings import PROMPT_METHODS, PeftSettings
from alignkit.observe.progress import Progress
from alignkit.observe.trainer_callback import make_callback
from alignkit.stages.optimizer import OffloadedAdamW
from alignkit.stages.trainer_checkpoint import CheckpointCallback

if TYPE_CHECKING:
    from alignkit.observe.tracking import Tracker
    from alignkit.runtime.checkpoint import Checkpoints
    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.early_stopping import EarlyStopping
    from alignkit.stages.job import Job

Model = TypeVar("Model", bound=nn.Module)
OURS = {  # arguments of TRL that would go past settings of alignkit's own, and those settings
    **dict.fromkeys(("bf16", "fp16"), "compute_dtype"),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), "sharding=fsdp2, hsdp or none"),
    **dict.fromkeys(("save_strategy", "save_steps", "save_total_limit", "enable_jit_checkpoint"), "checkpoint.*"),
    "gradient_checkpointing": "sharding.activation_checkpointing",
    "logging_strategy": "logging_steps, a small one, as checkpoints are made when a row is logged",
    "output_dir": "runs_dir",
}


def trainer_arguments(job: Job, settings: Any, cluster: Cluster, num_rows: int) -> dict[str, Any]:
    """What both TRL configs are given: the global batch cut for each rank, precision, sharding, our own tracking."""
    if num_rows < settings.batch:
        raise UserError(
            f"{job.stage}.batch={settings.batch} is more than the {num_rows} training rows there are: "
            f"lower {job.stage}.batch or give more data"
        )
    for name in OURS.keys() & settings.trainer.keys():
        raise UserError(f"{job.stage}.trainer.{name}: not passed on; use {OURS[name]}")
    if job.config.sharding.offload_optimizer and "optim" in settings.trainer:
        kind = f"{job.stage}.trainer.optim={settings.trainer['optim']}"
        raise UserError(f"{kind}: with sharding.offload_optimizer=true the optimizer is AdamW; leave out one of them")
    share = settings.batch // cluster.world_size
    micro = max(size for size in range(1, min(settings.microbatch, share) + 1) if share % size == 0)
    cuda, split = torch.cuda.is_available(), is_split(cluster)
    return {
        "output_dir": str(job.out / "state"),
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": settings.microbatch,
        "gradient_accumulation_steps": share // micro,
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "warmup_steps": settings.warmup,
        "lr_scheduler_type": "cosine",
        "max_length": None,
        "dataloader_drop_last": True,
        "logging_steps": 1,  # sums between two rows are in no checkpoint
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": cluster.compute_dtype == torch.bfloat16 and not split,  # a split model does it itself
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "gradient_checkpointing": cluster.activation_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        # With several ranks the buckets then stay as they are, and so the order of sums in a stage that goes on.
        "ddp_find_unused_parameters": cluster.world_size > 1,
        "fsdp": split,
        "fsdp_config": {"version": 2, "auto_wrap_policy": "NO_WRAP"},  # it is wrapped already
        "seed": job.config.seed,
        "dataset_num_proc": None,
        **settings.trainer,
    }


def trl_config(factory: Callable[..., Any], arguments: dict[str, Any], stage: str) -> Any:
    """A TRL config; an argument that TRL does not know is the user's mistake in `<stage>.trainer`."""
    try:
        config = factory(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{stage}.trainer: {factory.__name__} says: {error}") from error
    if config.fsdp and config.device.type == "cpu":  # asking for the device makes the state that is changed here
        # accelerate has FSDP2 for accelerators alone and elsewhere takes DDP without a word; told that the ranks have
        # GPUs, it does the same over gloo.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return config


def offloaded(config: Any, job: Job) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """The optimizer that sharding.offload_optimizer asks for, None: the trainer's own."""
    if not job.config.sharding.offload_optimizer:
        return None
    betas = (config.adam_beta1, config.adam_beta2)
    return OffloadedAdamW, {"lr": config.learning_rate, "betas": betas, "eps": config.adam_epsilon}


def is_split(cluster: Cluster) -> bool:
    """Whether a trained model is split over ranks; else each holds all of it."""
    return cluster.mesh["shard"].size() > 1


def lay_out(load: Callable[[], Model], peft: PeftSettings, cluster: Cluster) -> Model:
    """The model that `load` gives as a trainer takes it, whole or split. The trainers' losses expect gradients that are
    averaged over the ranks. Raises UserError for learnt tokens, which cannot be split."""
    if not is_split(cluster):
        return load()
    if peft.method in PROMPT_METHODS:
        raise UserError(f"peft.method={peft.method}: a model behind learnt tokens cannot be split: set sharding=none")
    model = cluster.place(load, trainable=True)
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            cast(Any, module).set_gradient_divide_factor(float(cluster.world_size))
    model.register_forward_hook(lambda module, inputs, output: convert_to_fp32(output))  # as accelerate does in DDP
    return model


def train(
    trainer: Trainer, job: Job, cluster: Cluster, tracker: Tracker, checkpoints: Checkpoints,
    stopping: EarlyStopping | None = None,
) -> None:  # fmt: skip
    """Train, from the newest checkpoint on if there is one. Raises Interrupted if the stage is asked to end before."""
    rows: Any = trainer.train_dataset
    batch = getattr(job.config, job.stage).batch
    # Every optimizer step has `batch` rows, and an epoch as many steps for any micro-batch and number of ranks.
    trainer.train_dataset = rows.select(range(len(rows) // batch * batch))
    saver = CheckpointCallback(trainer, cluster, checkpoints, job.config.checkpoint.every_steps, stopping)
    trainer.remove_callback(PrinterCallback)
    if is_split(cluster):
        trainer.add_callback(SplitCallback(trainer))
    if stopping:
        trainer.add_callback(stopping)
    for callback in (make_callback(tracker), ProgressCallback(job.stage), saver):  # a row is written before it is saved
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=saver.find())
    checkpoints.finish()


def whole_model(trainer: Trainer, load: Callable[[], Model], cluster: Cluster) -> Model | None:
    """The trained model with all of its weights; of a split one on rank 0 alone, in the CPU's memory."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if not is_split(cluster):
        return model
    state = cluster.full_state(model)
    if state is None:
        return None
    with torch.random.fork_rng(devices=[]), skeletons():
        whole: Any = load()
    whole.load_state_dict(state, assign=True)
    whole.config = model.config
    if hasattr(model, "generation_config"):  # an encoder has none
        whole.generation_config = model.generation_config
    return whole


def make_room() -> None:
    """Free a trainer and its model, whose last names are gone, before what was saved of them is loaded: they hold each
    other, so nothing else would for a while."""
    gc.collect()


class SplitCallback(TrainerCallback):
    """Sees to it that the optimizer has all weights of a split model.

    accelerate gives it the weights again once they are split, found by their address. A rank's part of a small weight
    can be empty, and then has none.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Raises UserError if accelerate would wrap the model in DDP instead, which it does without a word."""
        if not trainer.accelerator.is_fsdp2:
            raise UserError("sharding: accelerate would not split the model over these ranks; set sharding=none")
        self.weights = [list(group["params"]) for group in trainer.create_optimizer().param_groups]

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """accelerate is done: put the weights back."""
        for group, weights in zip(optimizer.param_groups, self.weights):
            group["params"] = weights


class ProgressCallback(TrainerCallback):
    """Shows a trainer's steps, loss and time left."""

    def __init__(self, stage: str) -> None:
        self.stage, self.note = stage, ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress = Progress(self.stage, state.max_steps, state.is_world_process_zero, done=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shown = {key: value for key, value in (logs or {}).items() if key in ("loss", "accuracy")}
        if "loss" in shown and not math.isfinite(float(shown["loss"])):
            rate = f"{self.stage}.learning_rate={args.learning_rate}"
            raise NotFinite(f"the loss is {shown['loss']} at step {state.global_step}: lower {rate}")
        self.note = "  ".join(f"{key} {float(value):.3f}" for key, value in shown.items()) or self.note

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(state.global_step, self.note)
