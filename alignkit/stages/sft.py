"""Supervised fine-tuning through TRL: the policy learns the responses of the demonstrations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from alignkit.algo.batching import pad_right
from alignkit.algo.losses import negative_log_likelihood
from alignkit.algo.sequence import token_logprobs
from alignkit.data.corpus import Demonstration
from alignkit.data.tokens import Encoder, training_texts
from alignkit.errors import TrainingError, UserError
from alignkit.models.loading import make_encoder, require_context, start_policy
from alignkit.models.tokenizer import PLAIN_TEMPLATE
from alignkit.observe.trainer_callback import make_callback
from alignkit.stages.common import ProgressCallback, prepare, save_model, show_example, trainer_arguments, trl_config

if TYPE_CHECKING:
    from alignkit.observe.tracking import Tracker
    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.job import Job


def run(job: Job, cluster: Cluster, tracker: Tracker) -> dict[str, float]:
    """Train, evaluate on held-out demonstrations, save `model/`. Returns eval_loss (nats a token) and perplexity."""
    corpus, settings = prepare(job, cluster.is_main), job.config.sft
    if not corpus.train.demonstrations or not corpus.heldout.demonstrations:
        raise UserError(
            "data: no demonstrations to fine-tune on; SFT needs prompt+response rows, texts or chosen responses"
        )

    def texts():
        split = corpus.train
        responses = [row.response for row in split.demonstrations]
        return training_texts(split.prompts, responses + [text for p in split.pairs for text in (p.chosen, p.rejected)])

    model, tokenizer = start_policy(job.config.model, texts)
    encoder = make_encoder(tokenizer, model.generation_config)
    require_context(model, settings.max_length, f"sft.max_length={settings.max_length}")
    train, counts = encode(corpus.train.demonstrations, encoder, settings.max_length)
    heldout, heldout_counts = encode(corpus.heldout.demonstrations, encoder, settings.max_length)
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
        save_model(model, encoder, job.out / "model")
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0)), "train_rows": len(train)}


def tell(model, encoder: Encoder, first: Demonstration, counts: dict[str, dict[str, int]], max_length: int) -> None:
    """What is about to be trained on what: size, chat template, what was cut or left out, one row."""
    parameters = sum(p.numel() for p in model.parameters())
    print(f"sft: {parameters / 1e6:.2f} M parameters, vocabulary {len(encoder.tokenizer)}")
    if encoder.tokenizer.chat_template == PLAIN_TEMPLATE:
        print("sft: the model has no chat template; chats become plain `Human: ... Assistant: ...` turns")
    for side, found in counts.items():
        for what, count in found.items():
            if count:
                print(f"sft: {count} {side}{what}: longer than sft.max_length={max_length} tokens")
    prompt, response = encoder.prompt(first.prompt), encoder.response(first.prompt, first.response)
    show_example("sft example", encoder, prompt, response)


def heldout_loss(model, rows: list[dict], pad_id: int, batch: int, cluster: Cluster) -> float:
    """Negative log-likelihood per learnt token over all rows, nats: one sum over one count, whatever the batches."""
    total = torch.zeros(2, dtype=torch.float64)
    mine, real = cluster.deal(len(rows))
    for part, here in zip(mine.split(batch), real.split(batch)):
        tokens, mask = (x.to(cluster.device) for x in pad_right([rows[i]["input_ids"] for i in part], pad_id))
        labels, _ = pad_right([rows[i]["labels"] for i in part], -100)
        learnt = (labels != -100).to(cluster.device) & here.to(cluster.device)[:, None]
        with torch.no_grad():
            logits = model.eval()(input_ids=tokens, attention_mask=mask.long()).logits
        loss = negative_log_likelihood(token_logprobs(logits[:, :-1], tokens[:, 1:]), learnt[:, 1:])
        total += torch.stack([loss.total.double(), loss.count.double()]).cpu()
    summed = cluster.sum(total)
    return float(summed[0] / summed[1])


def encode(rows: list[Demonstration], encoder: Encoder, max_length: int) -> tuple[list[dict], dict[str, int]]:
    """Rows as TRL takes them (labels -100 on the prompt), and how many `max_length` tokens cut short or left out."""
    encoded, counts = [], {"responses were cut short": 0, "prompts were left out": 0}
    for row in rows:
        prompt = encoder.prompt(row.prompt)
        ids = prompt + encoder.response(row.prompt, row.response)
        if len(prompt) >= max_length:
            counts["prompts were left out"] += 1
            continue
        counts["responses were cut short"] += len(ids) > max_length
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        encoded.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
    return encoded, counts
