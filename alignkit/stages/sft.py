"""Supervised fine-tuning through TRL: the policy learns the responses of the demonstrations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sized
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset
from torch import nn
from trl import SFTConfig, SFTTrainer

from alignkit.data.corpus import Demonstration, Split
from alignkit.data.tokens import Encoder, training_texts
from alignkit.errors import NotFinite, UserError
from alignkit.models.adapters import attach, quantization, trainable
from alignkit.models.loading import load_causal, make_encoder, start_policy
from alignkit.models.settings import refuse_stacking
from alignkit.models.tokenizer import PLAIN_TEMPLATE
from alignkit.stages.common import (
    encode_demonstrations,
    heldout_loss,
    prepare,
    require_room,
    save_trained,
    show_example,
)
from alignkit.stages.trainer import lay_out, make_room, offloaded, train, trainer_arguments, trl_config, whole_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from alignkit.observe.tracking import Tracker
    from alignkit.runtime.checkpoint import Checkpoints
    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.job import Job


def run(job: Job, cluster: Cluster, tracker: Tracker, checkpoints: Checkpoints) -> dict[str, float]:
    """Train, save `model/`, evaluate it on held-out demonstrations. Returns eval_loss (nats a token) and perplexity."""
    corpus, settings = prepare(job, cluster.is_main), job.config.sft
    if not corpus.train.demonstrations or not corpus.heldout.demonstrations:
        raise UserError(
            "data: no demonstrations to fine-tune on; SFT needs prompt+response rows, texts or chosen responses"
        )
    refuse_stacking(job.config.peft, job.config.model.path)
    start = Start(job, corpus.train)
    model = lay_out(start.load, job.config.peft, cluster)
    encoder = make_encoder(start.tokenizer, model.generation_config)
    rows, counts = encode_demonstrations(corpus.train.demonstrations, encoder, settings.max_length)
    heldout, heldout_counts = encode_demonstrations(corpus.heldout.demonstrations, encoder, settings.max_length)
    if cluster.is_main:
        cut = {"": counts, "held-out ": heldout_counts}
        tell(model, encoder, corpus.train.demonstrations[0], cut, settings.max_length)
        print(f"sft: {len(rows)} demonstrations")
    if not heldout:
        raise UserError(f"sft.max_length={settings.max_length}: every held-out prompt is longer; raise it")

    trainer = make_trainer(model, rows, encoder, job, cluster)
    train(trainer, job, cluster, tracker, checkpoints)
    whole = whole_model(trainer, start.load, cluster)
    if cluster.is_main:
        assert whole is not None
        save_trained(whole, encoder, job, job.config.model.path, job.config.model.revision)
    cluster.barrier()
    steps, learnt = trainer.state.global_step, whole if job.config.peft.virtual_tokens else None
    del trainer, model, whole
    make_room()
    model = learnt or cluster.place(lambda: load_causal(job.out / "model"), trainable=False)
    loss = heldout_loss(model, heldout, encoder.tokenizer.pad_token_id, settings.microbatch, cluster)
    if not math.isfinite(loss):
        raise NotFinite(f"the held-out loss is {loss}: lower sft.learning_rate={settings.learning_rate}")
    tracker.log({"eval_loss": loss}, step=steps)
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0)), "train_rows": len(rows)}


class Start:
    """What SFT starts from. Tokenizers are learnt or read along with the model."""

    tokenizer: PreTrainedTokenizerBase

    def __init__(self, job: Job, split: Split) -> None:
        self.job, self.split = job, split

    def load(self) -> PreTrainedModel | PeftModel:
        """The model before training, with its adapter; the tokenizer is there from then on."""
        config = self.job.config
        model, self.tokenizer = start_policy(config.model, self._texts, quantization(config.peft))
        require_room(model, self.job, config.sft.max_length)
        return attach(model, config.peft, "CAUSAL_LM")

    def _texts(self) -> Iterable[str]:
        chosen = [text for pair in self.split.pairs for text in (pair.chosen, pair.rejected)]
        return training_texts(self.split.prompts, [row.response for row in self.split.demonstrations] + chosen)


def make_trainer(
    model: PreTrainedModel | PeftModel, rows: list[dict[str, Any]], encoder: Encoder, job: Job, cluster: Cluster
) -> SFTTrainer:
    """TRL's trainer on rows that are token ids already. Raises UserError if packing leaves too few of them."""
    settings = job.config.sft
    arguments = trainer_arguments(job, settings, cluster, len(rows))
    if arguments.get("packing"):
        arguments["max_length"] = settings.max_length  # of a packed row
    else:
        arguments["dataset_kwargs"] = {"skip_prepare_dataset": True}
    config = trl_config(SFTConfig, arguments, "sft")
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=encoder.tokenizer,
        optimizer_cls_and_kwargs=offloaded(config, job),
    )
    packed = len(cast(Sized, trainer.train_dataset))
    if packed < settings.batch:
        raise UserError(f"sft.batch={settings.batch} is more than the {packed} packed rows: lower sft.batch")
    return trainer


def tell(
    model: nn.Module, encoder: Encoder, first: Demonstration, counts: dict[str, dict[str, int]], max_length: int
) -> None:
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
