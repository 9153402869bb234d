"""Supervised fine-tuning through TRL: the policy learns the responses of the demonstrations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from alignkit.data.corpus import Demonstration
from alignkit.data.tokens import Encoder, training_texts
from alignkit.errors import TrainingError, UserError
from alignkit.models.adapters import attach, quantization, trainable
from alignkit.models.loading import make_encoder, start_policy
from alignkit.models.settings import refuse_stacking
from alignkit.models.tokenizer import PLAIN_TEMPLATE
from alignkit.observe.trainer_callback import make_callback
from alignkit.stages.common import (
    ProgressCallback,
    encode_demonstrations,
    heldout_loss,
    prepare,
    require_room,
    save_trained,
    show_example,
    trainer_arguments,
    trl_config,
)

if TYPE_CHECKING:
    from alignkit.observe.tracking import Tracker
    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.job import Job


def run(job: Job, cluster: Cluster, tracker: Tracker) -> dict[str, float]:
    """Train, evaluate on held-out demonstrations, save `model/`. Returns eval_loss (nats a token) and perplexity."""
    corpus, settings, peft = prepare(job, cluster.is_main), job.config.sft, job.config.peft
    if not corpus.train.demonstrations or not corpus.heldout.demonstrations:
        raise UserError(
            "data: no demonstrations to fine-tune on; SFT needs prompt+response rows, texts or chosen responses"
        )

    def texts():
        split = corpus.train
        responses = [row.response for row in split.demonstrations]
        return training_texts(split.prompts, responses + [text for p in split.pairs for text in (p.chosen, p.rejected)])

    refuse_stacking(peft, job.config.model.path)
    model, tokenizer = start_policy(job.config.model, texts, quantization(peft))
    encoder = make_encoder(tokenizer, model.generation_config)
    require_room(model, job, settings.max_length)
    model = attach(model, peft, "CAUSAL_LM")
    train, counts = encode_demonstrations(corpus.train.demonstrations, encoder, settings.max_length)
    heldout, heldout_counts = encode_demonstrations(corpus.heldout.demonstrations, encoder, settings.max_length)
    if cluster.is_main:
        tell(
            model,
            encoder,
            corpus.train.demonstrations[0],
            {"": counts, "held-out ": heldout_counts},
            settings.max_length,
        )
        print(f"sft: {len(train)} demonstrations")
    if not heldout:
        raise UserError(f"sft.max_length={settings.max_length}: every held-out prompt is longer; raise it")

    arguments = trainer_arguments(job, settings, cluster.world_size, len(train))
    if arguments.get("packing"):
        arguments["max_length"] = settings.max_length  # of a packed row
    else:
        arguments["dataset_kwargs"] = {"skip_prepare_dataset": True}  # the rows are token ids already
    trainer = SFTTrainer(
        model=model,
        args=trl_config(SFTConfig, arguments, "sft"),
        train_dataset=Dataset.from_list(train),
        processing_class=tokenizer,
        callbacks=[make_callback(tracker), ProgressCallback("sft")],
    )
    if len(trainer.train_dataset) < settings.batch:
        raise UserError(
            f"sft.batch={settings.batch} is more than the {len(trainer.train_dataset)} packed rows: lower sft.batch"
        )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    loss = heldout_loss(model, heldout, tokenizer.pad_token_id, settings.microbatch, cluster)
    if not math.isfinite(loss):
        raise TrainingError(f"the held-out loss is {loss}: lower sft.learning_rate={settings.learning_rate}")
    tracker.log({"eval_loss": loss}, step=trainer.state.global_step)
    if cluster.is_main:
        save_trained(model, encoder, job, job.config.model.path, job.config.model.revision)
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0)), "train_rows": len(train)}


def tell(model, encoder: Encoder, first: Demonstration, counts: dict[str, dict[str, int]], max_length: int) -> None:
    """What is about to be trained on what: size, chat template, what was cut or left out, one row."""
    print(f"sft: training {trainable(model)}, vocabulary {len(encoder.tokenizer)}")
    if encoder.tokenizer.chat_template == PLAIN_TEMPLATE:
        print("sft: the model has no chat template; chats become plain `Human: ... Assistant: ...` turns")
    for side, found in counts.items():
        for what, count in found.items():
            if count:
                print(f"sft: {count} {side}{what}: longer than sft.max_length={max_length} tokens")
    prompt, response = encoder.prompt(first.prompt), encoder.response(first.prompt, first.response)
    show_example("sft example", encoder, prompt, response)
