"""What stages share: the data, one example shown, saving, demonstrations as ids and their loss."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import set_seed

from alignkit.algo.batching import pad_right
from alignkit.algo.losses import negative_log_likelihood
from alignkit.algo.sequence import token_logprobs
from alignkit.data.corpus import Corpus, Demonstration, Prompt, load_corpus
from alignkit.data.tokens import Encoder
from alignkit.models.adapters import merge, save_adapter
from alignkit.models.loading import load_causal, load_scorer, require_context
from alignkit.models.settings import adapter_facts

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.job import Job


def prepare(job: Job, is_main: bool) -> Corpus:
    """Seed everything and load the data; the first stage of a run prints what was found in it."""
    set_seed(job.config.seed)
    corpus = load_corpus(job.config.data, job.config.seed)
    if is_main and job.first:
        for note in corpus.notes:
            print(f"data: {note}")
    return corpus


def require_room(model: PreTrainedModel, job: Job, max_length: int) -> None:
    """Raise UserError if the model has fewer positions than a sequence and the learnt tokens before it take."""
    learnt = job.config.peft.virtual_tokens
    names = f"{job.stage}.max_length={max_length}" + f" and {learnt} learnt tokens" * bool(learnt)
    require_context(model, max_length + learnt, names)


def show_example(title: str, encoder: Encoder, prompt: Sequence[int], response: Sequence[int]) -> None:
    """Print one row as the model sees it, special tokens included, the part that is trained between brackets; of a long
    one the end of the prompt and the start of the response."""
    before, trained = (str(encoder.tokenizer.decode(list(ids))) for ids in (prompt, response))
    before = before if len(before) <= 200 else "..." + before[-197:]
    trained = trained if len(trained) <= 300 else trained[:297] + "..."
    print(f"{title}: {before}[[{trained}]]".replace("\n", "\\n"))


def save_model(model: PreTrainedModel | PeftModel, encoder: Encoder, folder: Path) -> None:
    """Plain Hugging Face format, with tokenizer, chat template and the stop tokens in generation_config.json."""
    model.save_pretrained(str(folder), safe_serialization=True)
    encoder.tokenizer.save_pretrained(folder)


def save_trained(
    model: PreTrainedModel | PeftModel, encoder: Encoder, job: Job, base: str | Path | None, revision: str | None = None
) -> None:
    """What the stage hands on, `model/`: the adapter that stands on `base`, or with peft.merge=true (and without an
    adapter) plain weights, the adapter then beside them in `adapter/`."""
    peft, folder = job.config.peft, job.out / "model"
    if peft.method == "bitfit":
        merge(model)
    if peft.method in ("none", "bitfit"):
        save_model(model, encoder, folder)
        return
    place = job.out / "adapter" if peft.merge else folder
    assert base is not None  # as PeftSettings.faults holds
    save_adapter(model, model.state_dict(), place, base, revision)
    if job.stage != "reward_model":
        cast(Any, model.generation_config).save_pretrained(place)
    encoder.tokenizer.save_pretrained(place)  # and no config.json, with which transformers looks for whole weights here
    if peft.merge:
        load = load_scorer if job.stage == "reward_model" else load_causal
        save_model(load(place), encoder, folder)
        if adapter_facts(base) is not None:
            shutil.rmtree(place)
            print(f"{job.stage}: only merged weights are kept: the base '{base}' is an adapter, lost under another")


def sample_of(rows: Sequence[Any], count: int, seed: int) -> list[Any]:
    """At most `count` rows, drawn without order from a seed."""
    return list(rows) if len(rows) <= count else random.Random(f"sample-{seed}").sample(list(rows), count)


def prompts_within(
    prompts: Sequence[Prompt], encoder: Encoder, longest: int
) -> tuple[list[tuple[Prompt, list[int]]], int]:
    """Prompts of 1 to `longest` tokens with their ids, and how many there are not."""
    encoded = [(prompt, encoder.prompt(prompt)) for prompt in prompts]
    kept = [(prompt, ids) for prompt, ids in encoded if 0 < len(ids) <= longest]
    return kept, len(encoded) - len(kept)


def encode_demonstrations(
    rows: list[Demonstration], encoder: Encoder, max_length: int
) -> tuple[list[dict[str, Any]], dict[str, int]]:
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


def heldout_loss(model: nn.Module, rows: list[dict[str, Any]], pad_id: int, batch: int, cluster: Cluster) -> float:
    """Negative log-likelihood per learnt token over all rows, nats: one sum over one count, whatever the batches."""
    total = torch.zeros(2, dtype=torch.float64)
    hand = cluster.deal(torch.tensor([len(row["input_ids"]) for row in rows]))
    for part, here in zip(hand.rows.split(batch), hand.real.split(batch)):
        tokens, mask = (x.to(cluster.device) for x in pad_right([rows[i]["input_ids"] for i in part], pad_id))
        labels, _ = pad_right([rows[i]["labels"] for i in part], -100)
        learnt = (labels != -100).to(cluster.device) & here.to(cluster.device)[:, None]
        with torch.no_grad():
            logits = model.eval()(input_ids=tokens, attention_mask=mask.long()).logits
            logits = logits[:, -tokens.shape[1] :]  # learnt tokens before them have logits too
        loss = negative_log_likelihood(token_logprobs(logits[:, :-1], tokens[:, 1:]), learnt[:, 1:])
        total += torch.stack([loss.total.double(), loss.count.double()]).cpu()
    summed = cluster.sum(total)
    return float(summed[0] / summed[1])
