"""Preflight of the models that the settings name by a path: configs, tokenizers, chat templates, and of their weights
the headers."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from alignkit.data.corpus import Corpus, Prompt
from alignkit.data.tokens import Encoder
from alignkit.errors import UserError
from alignkit.models.loading import load_encoder, make_encoder, model_folder, require_context
from alignkit.models.settings import adapter_facts
from alignkit.models.tokenizer import end_of_turn, first_line, start_tokenizer
from alignkit.reward.model import RewardModel, units
from alignkit.reward.rendered import own_encoder, same_rendering
from alignkit.runtime.artifact import open_artifact
from alignkit.runtime.check_machine import is_reached
from alignkit.runtime.config import RunConfig
from alignkit.runtime.findings import Finding, error, fact, warning
from alignkit.runtime.inputs import is_place

SAMPLE, MANY = 200, 0.1  # rows whose tokens are counted, and the share from which it is told that they are too long


@dataclass(frozen=True)
class Model:
    """key: the setting that names it; starts: SFT makes a policy of it; scores: it is a reward model; numbers: its
    parameters, None where its weights are not here."""

    key: str
    starts: bool
    scores: bool
    config: PreTrainedConfig
    encoder: Encoder
    numbers: int | None


def check_models(
    named: list[tuple[str, str, Any]], stages: Sequence[str], config: RunConfig, corpus: Corpus
) -> tuple[list[Finding], int | None]:
    """What there is to say of the models that `inputs.named_models` gives, and the parameters of the first. stages:
    what the recipe trains."""
    found, models = [], []
    for key, path, source in named:
        try:
            models.append(read(key, path, source is None and "sft" in stages, source is not None, config))
            if isinstance(source, RewardModel):
                units(Path(path).expanduser(), source.normalise)
        except UserError as mistake:
            found.append(error(f"{key}={path}", str(mistake)))
    for model in models:
        found += [*_tokens(model), *_chats(model, corpus)]
        same = same_rendering(model.encoder, models[0].encoder)
        found += _context(model, stages, config) if same else []  # other tokens may be fewer
        words = "the same tokens and chat template" if same else "it reads the texts, as its tokens or template differ"
        found += [fact(model.key, f"beside {models[0].key}: {words}")] if model is not models[0] else []
    if models and not models[0].scores:
        found += _lengths(models[0], stages, config, corpus)
    return found, models[0].numbers if models else None


def read(key: str, path: str, starts: bool, scores: bool, config: RunConfig) -> Model:
    """Raises UserError where something is missing, cut off, or no such model."""
    spec, listed, here = config.model, None, is_place(path)
    if not here:
        require_hub(path, spec.revision)
    folder = model_folder(open_artifact(path, whole=False).path) if here else path
    facts = adapter_facts(folder)
    revision = spec.revision if starts and not facts else None
    try:
        found = AutoConfig.from_pretrained(
            str(facts["base_model_name_or_path"] if facts else folder),
            revision=revision or "main",
            trust_remote_code=starts and spec.trust_remote_code,  # said: left out, transformers asks the terminal
        )
    except Exception as fault:  # of transformers, of the Hub, or of what checks a config's fields
        raise UserError(f"its config cannot be read: {first_line(fault)}") from None
    shapes = headers(Path(folder)) if here else {}
    if scores and not facts and found.num_labels != 1:
        raise UserError(f"has {found.num_labels} labels; a reward model has one score (num_labels: 1)")
    if scores and not facts and not any({"score", "classifier"} & {*name.split(".")} for name in shapes):
        raise UserError("holds no weights of a score, which would be random: it is no reward model")
    if starts:
        with suppress(OSError):  # a model without one
            listed = GenerationConfig.from_pretrained(str(folder), revision=spec.revision or "main")
        encoder = make_encoder(start_tokenizer(path, spec.revision, spec.trust_remote_code), listed)
    else:
        encoder = own_encoder(Path(folder)) if scores else load_encoder(folder)
    numbers = sum(map(math.prod, shapes.values())) if shapes and not facts else None
    return Model(key, starts, scores, found, encoder, numbers)


def require_hub(path: str, revision: str | None) -> None:
    """Raise UserError for a Hub id that is neither in the cache nor within reach."""
    from huggingface_hub import constants, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str)
    if not cached and (constants.HF_HUB_OFFLINE or not is_reached(constants.ENDPOINT)):
        raise UserError(f"no folder here and not in the Hub's cache, and {constants.ENDPOINT} is out of reach")


def headers(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of all weights, from the first bytes of their files. Raises UserError if there are none."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            head = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        shapes |= {name: facts["shape"] for name, facts in head.items() if name != "__metadata__"}
    if not shapes:
        raise UserError("holds no .safetensors file, and others are not read: save it anew with transformers")
    return shapes


def _tokens(model: Model) -> Iterator[Finding]:
    """The vocabulary, special tokens included, against the rows of the embeddings; PAD, EOS and padding."""
    tokenizer, end, rows = model.encoder.tokenizer, model.encoder.end_id, model.config.get_text_config().vocab_size
    grown = {tokenizer.pad_token_id} if model.starts else set()  # PAD gets a row
    beyond = {*tokenizer.get_vocab().values(), *model.encoder.stop_ids} - {*range(rows)} - grown
    if beyond:
        sound = model.starts and max(beyond) < len(tokenizer)
        what = f"{len(beyond):,} tokens from id {min(beyond)} on have no row in its embeddings of {rows:,}"
        why = "SFT makes rows of which the model knows nothing" if sound else "the first text with one ends the run"
        mend = "take tokenizer and model from one place, or resize the embeddings"
        yield (warning if sound else error)(model.key, what, why, mend)
    size = "" if model.numbers is None else f" of {model.numbers / 1e6:,.2f} M parameters"
    pad = f"PAD {tokenizer.pad_token!r}" + ", which gets a row" * (model.starts and tokenizer.pad_token_id >= rows)
    ends = (
        f"answers end with {tokenizer.convert_ids_to_tokens(end)!r}, one of {len(model.encoder.stop_ids)} stop tokens"
    )
    side = f"prompts are padded on the left (its tokenizer says {tokenizer.padding_side})"
    yield fact(model.key, f"{model.config.model_type}{size}, {len(tokenizer):,} tokens; {pad}; {ends}; {side}")


def _chats(model: Model, corpus: Corpus) -> Iterator[Finding]:
    """Whether the chats of the data can be rendered, and how an answer ends there."""
    chats = [prompt for prompt in corpus.train.prompts if not isinstance(prompt, str)][:SAMPLE]
    try:
        for prompt in chats:
            model.encoder.prompt(prompt)
    except UserError as mistake:
        yield error(model.key, str(mistake))
        return
    tokenizer = model.encoder.tokenizer
    if chats and not model.encoder.pooled and end_of_turn(tokenizer) is None:
        why = f"answers end with {tokenizer.eos_token!r}, which the turns before them lack"
        mend = "let the template put eos_token after the assistant's content"
        yield warning(model.key, "its chat template ends an answer with no special token", why, mend)


def _context(model: Model, stages: Sequence[str], config: RunConfig) -> Iterator[Finding]:
    """The longest sequences that the settings allow against the positions of the model."""
    asked, virtual = {}, config.peft.virtual_tokens
    for name in [] if model.scores else {"sft", "reward_model"} & {*stages}:
        longest = getattr(config, name).max_length
        asked[f"{name}.max_length={longest}" + f" and {virtual} learnt tokens" * bool(virtual)] = longest + virtual
    if "ppo" in stages:
        prompt, response = config.ppo.max_prompt, config.rollout.max_response
        asked[f"ppo.max_prompt={prompt} and rollout.max_response={response}"] = prompt + response
        if config.ptx.coef and not model.scores:
            asked[f"ptx.max_length={config.ptx.max_length}"] = config.ptx.max_length
    for settings, tokens in asked.items():
        try:
            require_context(model, tokens, settings)  # type: ignore[arg-type] # of the model its config alone is read
        except UserError as mistake:
            yield error(model.key, str(mistake))


def _lengths(model: Model, stages: Sequence[str], config: RunConfig, corpus: Corpus) -> Iterator[Finding]:
    """Of a sample of the rows, the share that is too long for the settings."""
    encoder, rows = model.encoder, corpus.train
    parts: dict[str, list[tuple[Prompt, str | None]]] = {
        "sft.max_length": [(row.prompt, row.response) for row in rows.demonstrations],
        "reward_model.max_length": [(row.prompt, max(row.chosen, row.rejected, key=len)) for row in rows.pairs],
        "ppo.max_prompt": [(prompt, None) for prompt in rows.prompts],
    }

    def length(prompt: Prompt, response: str | None) -> int:
        return len(encoder.prompt(prompt)) + (0 if response is None else len(encoder.response(prompt, response)))

    for key, found in parts.items():
        section, setting = key.split(".")
        limit, fate = getattr(getattr(config, section), setting), "cut" if section == "sft" else "left out"
        sample = found[:: max(len(found) // SAMPLE, 1)] if section in stages else []
        with suppress(UserError):  # a chat that the template refuses, of which is told
            long = sum(length(*row) > limit for row in sample)
            if long > MANY * len(sample):
                what = f"{long} of {len(sample)} rows that were looked at are longer"
                yield warning(f"{key}={limit}", what, f"these are {fate}", f"raise {key}, if memory allows")
