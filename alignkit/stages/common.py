"""What SFT and reward-model training share: rows as token ids, TRL's arguments, one example shown, saving."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, set_seed

from alignkit.data.corpus import Corpus
from alignkit.data.tokens import Encoder
from alignkit.errors import TrainingError, UserError
from alignkit.observe.progress import Progress

if TYPE_CHECKING:
    from alignkit.stages.job import Job


def prepare(job: Job, is_main: bool) -> Corpus:
    """Seed everything and load the data; the first stage of a run prints what was found in it."""
    set_seed(job.config.seed)
    corpus = job.config.data.load(job.config.seed)
    if is_main and job.first:
        for note in corpus.notes:
            print(f"data: {note}")
    return corpus


def trainer_arguments(job: Job, settings: Any, world_size: int, num_rows: int) -> dict[str, Any]:
    """What both TRL configs are given: the global batch cut for each rank, float32, our own tracking."""
    if num_rows < settings.batch:
        raise UserError(
            f"{job.stage}.batch={settings.batch} is more than the {num_rows} training rows there are: "
            f"lower {job.stage}.batch or give more data"
        )
    share = settings.batch // world_size
    micro = max(size for size in range(1, min(settings.microbatch, share) + 1) if share % size == 0)
    cuda = torch.cuda.is_available()
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
        "dataloader_drop_last": True,  # each optimizer step has `batch` rows, on any number of ranks
        "logging_steps": 10,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "gradient_checkpointing": False,
        "ddp_find_unused_parameters": False,
        "seed": job.config.seed,
        "dataset_num_proc": None,
        **settings.trainer,
    }


def trl_config(factory: Callable, arguments: dict[str, Any], stage: str) -> Any:
    """A TRL config; an argument that TRL does not know is the user's mistake in `<stage>.trainer`."""
    try:
        return factory(**arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{stage}.trainer: {factory.__name__} says: {error}") from error


class ProgressCallback(TrainerCallback):
    """Shows a trainer's steps, loss and time left."""

    def __init__(self, stage: str) -> None:
        self.stage, self.progress, self.note = stage, None, ""

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.progress = Progress(self.stage, state.max_steps, state.is_world_process_zero)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        shown = {key: value for key, value in (logs or {}).items() if key in ("loss", "accuracy")}
        if "loss" in shown and not math.isfinite(float(shown["loss"])):
            rate = f"{self.stage}.learning_rate={args.learning_rate}"
            raise TrainingError(f"the loss is {shown['loss']} at step {state.global_step}: lower {rate}")
        self.note = "  ".join(f"{key} {float(value):.3f}" for key, value in shown.items()) or self.note

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.progress.update(state.global_step, self.note)


def show_example(title: str, encoder: Encoder, prompt: Sequence[int], response: Sequence[int]) -> None:
    """Print one row as the model sees it, special tokens included, the part that is trained between brackets; of a long
    one the end of the prompt and the start of the response."""
    before, trained = (encoder.tokenizer.decode(list(ids)) for ids in (prompt, response))
    before = before if len(before) <= 200 else "..." + before[-197:]
    trained = trained if len(trained) <= 300 else trained[:297] + "..."
    print(f"{title}: {before}[[{trained}]]".replace("\n", "\\n"))


def save_model(model, encoder: Encoder, folder: Path) -> None:
    """Plain Hugging Face format, with tokenizer, chat template and the stop tokens in generation_config.json."""
    model.save_pretrained(folder, safe_serialization=True)
    encoder.tokenizer.save_pretrained(folder)


def sample_of(rows: Sequence, count: int, seed: int) -> list:
    """At most `count` rows, drawn without order from a seed."""
    return list(rows) if len(rows) <= count else random.Random(f"sample-{seed}").sample(list(rows), count)
