"""A reward model from pairs and rankings through TRL (Bradley-Terry), and what is known of it on pairs that it has not
seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset
from torch import nn
from trl import RewardConfig

from alignkit.data.corpus import Corpus, Pair
from alignkit.data.strength import half_of, some_of, treated
from alignkit.data.tokens import Encoder
from alignkit.data.validation import validation_split
from alignkit.errors import UserError
from alignkit.models.adapters import attach, quantization, trainable
from alignkit.models.loading import load_encoder, model_folder, scorer_from_policy
from alignkit.models.scalar import PromptedScalar, Scalars, load_scalar
from alignkit.models.settings import refuse_stacking
from alignkit.stages.common import prepare, require_room, save_trained, show_example
from alignkit.stages.early_stopping import EarlyStopping
from alignkit.stages.ranking_trainer import RankingTrainer, encode_rankings
from alignkit.stages.reward_report import measure
from alignkit.stages.trainer import lay_out, make_room, offloaded, train, trainer_arguments, trl_config, whole_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from alignkit.observe.tracking import Tracker
    from alignkit.runtime.checkpoint import Checkpoints
    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.job import Job

VALIDATION_SHARE = 0.1  # of the training prompts, with reward_model.patience


def run(job: Job, cluster: Cluster, tracker: Tracker, checkpoints: Checkpoints) -> dict[str, float]:
    """Train from the SFT model's backbone or from an encoder model, save `model/`, and measure it. Returns accuracy
    with its 95% interval on all held-out pairs, and the mean and standard deviation of the score on reference
    responses, which PPO normalises by."""
    corpus, peft = prepare(job, cluster.is_main), job.config.peft
    source = model_folder(job.inputs["init"])
    refuse_stacking(peft, source)
    encoder = load_encoder(source)
    _refuse_pooled_adapter(encoder, job)
    rows, validation, dropped = training_rows(corpus, encoder, job, cluster)
    load = loader(job, encoder)
    model = lay_out(load, peft, cluster)
    learnt = PromptedScalar(cast("PeftModel", model)) if peft.virtual_tokens else None
    if cluster.is_main:
        print(f"reward_model: training {trainable(model)}")
    trainer = make_trainer(model, rows, encoder, job, cluster)
    stopping = early_stopping(validation, len(rows), encoder, job, cluster) if validation else None
    train(trainer, job, cluster, tracker, checkpoints, stopping)
    best = stopping.put_back(model) if stopping else {}
    whole = whole_model(trainer, load, cluster)
    if cluster.is_main:
        assert whole is not None
        save_trained(whole, encoder, job, source)
    cluster.barrier()
    del trainer, model, whole, stopping
    make_room()
    scorer: Scalars
    if learnt:
        scorer = learnt.to(cluster.device).eval()
    else:
        scorer = cluster.place(lambda: load_scalar(job.out / "model", encoder), trainable=False)
    metrics = measure(scorer, corpus, encoder, job, cluster)
    if cluster.is_main:
        low, high = metrics["eval_accuracy_low"], metrics["eval_accuracy_high"]
        print(f"reward_model: held-out accuracy {metrics['eval_accuracy']:.3f} (95% interval {low:.3f} to {high:.3f})")
    pairs = sum(len(row["chosen_ids"]) for row in rows)
    return {"train_pairs": pairs, "dropped_pairs": dropped, **best, **metrics}


def training_rows(
    corpus: Corpus, encoder: Encoder, job: Job, cluster: Cluster
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """The trainer's rows, those of validation ([] without reward_model.patience), and how many training pairs were left
    out."""
    settings, pairs = job.config.reward_model, corpus.train.pairs
    aside: list[Pair] = []
    if not pairs:
        raise UserError(
            "data: no preference pairs; a reward model needs rows of prompt+chosen+rejected or prompt+responses, or "
            "labelled texts"
        )
    pairs, notes = treated(pairs, job.config.data)
    if cluster.is_main:
        print("".join(f"reward_model: {note}\n" for note in notes), end="")
    if settings.half:
        pairs = [pairs[i] for i in half_of(pairs, settings.half, job.config.seed)]
    if settings.num_pairs and settings.num_pairs > len(pairs):
        raise UserError(
            f"reward_model.num_pairs={settings.num_pairs}: there are only {len(pairs)} training pairs; lower it or "
            "give more data"
        )
    if settings.num_pairs:
        pairs = some_of(pairs, settings.num_pairs, job.config.seed)
    if settings.patience:
        pairs, aside = validation_split(pairs, VALIDATION_SHARE, corpus.heldout.contrast is not None)
    rows, dropped = encode_rankings(pairs, encoder, settings.max_length, settings.label_smoothing)
    validation, _ = encode_rankings(aside, encoder, settings.max_length, 0.0)
    if settings.patience and not validation:
        raise UserError(
            f"reward_model.patience={settings.patience}: no pairs are left to validate by in a tenth of the training "
            "prompts; give more data or set reward_model.patience=null"
        )
    if cluster.is_main:
        count = sum(len(row["chosen_ids"]) for row in rows)
        counts = f"{count} pairs" + f" in {len(rows)} rankings" * (count > len(rows))
        counts += _why(dropped, settings.max_length) + f"; {len(validation)} to validate by" * bool(validation)
        tell(pairs[0], encoder, counts)
    return rows, validation, sum(dropped.values())


def loader(job: Job, encoder: Encoder) -> Callable[[], PreTrainedModel | PeftModel]:
    """Loads the model to be trained, as every rank does."""
    peft, source, longest = job.config.peft, model_folder(job.inputs["init"]), job.config.reward_model.max_length

    def load() -> PreTrainedModel | PeftModel:
        model = scorer_from_policy(source, job.config.seed, **quantization(peft, skip=["score"]))
        require_room(model, job, longest)
        model.config.pad_token_id = encoder.tokenizer.pad_token_id
        return attach(model, peft, "SEQ_CLS")

    return load


def make_trainer(
    model: nn.Module, rows: list[dict[str, Any]], encoder: Encoder, job: Job, cluster: Cluster
) -> RankingTrainer:
    """TRL's trainer on rankings that are token ids already."""
    settings = job.config.reward_model
    arguments = trainer_arguments(job, settings, cluster, len(rows))
    arguments["center_rewards_coefficient"] = settings.center_coef or None
    arguments["remove_unused_columns"] = False  # TRL knows none but its own
    config = trl_config(RewardConfig, arguments, "reward_model")
    return RankingTrainer(
        pad_id=encoder.tokenizer.pad_token_id,
        center_form=settings.center_form,
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=encoder.tokenizer,
        optimizer_cls_and_kwargs=offloaded(config, job),
    )


def early_stopping(
    validation: list[dict[str, Any]], num_rows: int, encoder: Encoder, job: Job, cluster: Cluster
) -> EarlyStopping:
    """Evaluates every `reward_model.evaluate_every` epochs, in whole steps."""
    settings = job.config.reward_model
    every = max(1, round(settings.evaluate_every * (num_rows // settings.batch)))
    assert settings.patience is not None
    batch = 4 * settings.microbatch
    return EarlyStopping(validation, encoder.tokenizer.pad_token_id, batch, every, settings.patience, cluster)


def tell(first: Pair, encoder: Encoder, counts: str) -> None:
    """How many pairs there are, and one of them."""
    print(f"reward_model: {counts}")
    for kind in ("chosen", "rejected"):
        response = encoder.response(first.prompt, getattr(first, kind))
        show_example(f"reward_model {kind}", encoder, encoder.prompt(first.prompt), response)


def _why(dropped: dict[str, int], max_length: int) -> str:
    words = {"too long": f"longer than reward_model.max_length={max_length} tokens", "the same tokens": "identical"}
    parts = [f"{count} left out: {words[reason]}" for reason, count in dropped.items() if count]
    return f" ({'; '.join(parts)})" if parts else ""


def _refuse_pooled_adapter(encoder: Encoder, job: Job) -> None:
    if encoder.pooled and job.config.peft.method != "none":
        raise UserError(
            f"peft.method={job.config.peft.method}: an encoder is trained whole, as its pooling and head are new; "
            "set peft=none"
        )
