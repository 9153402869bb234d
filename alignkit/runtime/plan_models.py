"""The models of a run as skeletons: what they are built from, found without a network, and what their weights take."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
from omegaconf import OmegaConf
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from alignkit.errors import UserError
from alignkit.models.adapters import add_adapter
from alignkit.models.loading import disable_dropout, model_config, model_folder
from alignkit.models.memory import ATTENTION
from alignkit.models.scalar import ScalarModel, SharedScalar
from alignkit.models.settings import PROMPT_METHODS, ModelSettings, PeftSettings, adapter_facts
from alignkit.models.tokenizer import first_line
from alignkit.runtime.config import RunConfig, conf_dir

SOURCE = ("path", "revision", "trust_remote_code")  # the settings of a model that are not its dimensions


@dataclass(frozen=True, eq=False)
class Source:
    """What a model is built from. name: the setting that it comes from, with its value."""

    config: PreTrainedConfig
    name: str
    trust_remote_code: bool
    peft: PeftSettings

    @property
    def vocab(self) -> int:
        """Rows of the embeddings."""
        return self.config.get_text_config().vocab_size


def find_sources(recipe: str, config: RunConfig) -> tuple[Source, Source]:
    """What the policy and the reward model are built from. Raises UserError where a config cannot be read or the model
    cannot be counted."""
    if config.peft.quantization or config.peft.method in PROMPT_METHODS:
        raise UserError(
            f"peft.method={config.peft.method}: learnt tokens and quantised weights are not counted; choose peft=lora, "
            "which takes more than both"
        )
    given = {"reward_model": ("policy",), "ppo": ("policy", "reward.path")}.get(recipe, ())
    places = {"policy": config.policy, "reward.path": getattr(config.reward, "path", None)}
    folders: dict[str, Any] = {key: places[key] for key in given if places[key]}
    policy = _read(folders["policy"], "policy", config) if "policy" in folders else _start(config)
    return policy, _read(folders["reward.path"], "reward.path", config) if "reward.path" in folders else policy


def _start(config: RunConfig) -> Source:
    """From the section `model`."""
    spec = config.model
    if spec.path is None:
        return Source(model_config(spec, vocab_size=spec.vocab_size), f"model {_words(spec)}", False, config.peft)
    return _read(spec.path, "model.path", config)


def _read(path: str, key: str, config: RunConfig) -> Source:
    """From a local folder, or from a Hub id: of one of the options of `model`, else through the Hub, else with the
    dimensions that the section `model` gives beside it."""
    spec, name = config.model, f"{key}={path}"
    place = Path(path).expanduser()
    if place.exists():
        folder = model_folder(place)
        if facts := adapter_facts(folder):
            return _read(facts["base_model_name_or_path"], key, config)
        return Source(_load(folder, name), name, spec.trust_remote_code, config.peft)
    if not re.fullmatch(r"[\w-]+(/[\w.-]+)?", path):
        raise UserError(f"{name}: no such folder, and no Hub id (OWNER/NAME)")
    known = {option.path: option for option in options().values()}
    if path in known:
        return Source(model_config(known[path], vocab_size=known[path].vocab_size), name, False, config.peft)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each attempt, we of the last
    try:
        found = _load(path, name, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
        return Source(found, name, spec.trust_remote_code, config.peft)
    except UserError as error:
        if _sizes(spec) == _sizes(options()["tiny"]):
            others = ", ".join(name for name in options() if name != "tiny")
            raise UserError(
                f"{error}; plan with the dimensions of another: model=NAME model.path=null ({others})"
            ) from None
    return Source(model_config(spec, vocab_size=spec.vocab_size), name, False, config.peft)


def _load(path: str | Path, name: str, **options: Any) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(str(path), **{"trust_remote_code": False, **options})
    except (OSError, ValueError, KeyError) as error:
        reason = first_line(error).rstrip(".")
        raise UserError(f"{name}: no model's config could be read there: {reason}") from None


@lru_cache(maxsize=1)
def options() -> dict[str, ModelSettings]:
    """The options of `model` that are shipped, by name."""
    files = sorted((conf_dir() / "model").glob("*.yaml"))
    return {
        file.stem: ModelSettings(**cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(file)))) for file in files
    }


def _sizes(spec: ModelSettings) -> dict[str, Any]:
    return {field.name: getattr(spec, field.name) for field in fields(spec) if field.name not in SOURCE}


def _words(spec: ModelSettings) -> str:
    return f"{spec.architecture}, {spec.num_layers} layers of {spec.hidden_size}"


Task = Literal["causal", "scalar", "shared"]


@dataclass(frozen=True)
class Kind:
    """How a model of a run is set up. task: shared is value and reward model on one base (adapters); dtype: of its
    forward; autocast: float32 weights, cast to bfloat16 on the way; dropout: as the config has it, else none."""

    task: Task
    trained: bool
    dtype: torch.dtype
    checkpointing: bool = False
    autocast: bool = False
    dropout: bool = False


@lru_cache(maxsize=32)
def skeleton(source: Source, kind: Kind) -> Any:
    """The model on the meta device, with its adapter where it trains one. Raises UserError if it cannot be built."""
    config = copy.deepcopy(source.config)
    config.num_labels, config.pad_token_id = 1, 0
    factory: Any = AutoModelForCausalLM if kind.task == "causal" else AutoModelForSequenceClassification
    adapted = kind.trained and source.peft.method != "none"
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            model = factory.from_config(
                config, dtype=kind.dtype, attn_implementation=ATTENTION, trust_remote_code=source.trust_remote_code
            )
            if adapted and kind.task != "shared":
                add_adapter(model, source.peft, "CAUSAL_LM" if kind.task == "causal" else "SEQ_CLS")
            if kind.task == "scalar":
                model = ScalarModel(model)
                model.head.requires_grad_(kind.trained)
            if kind.task == "shared":
                model = SharedScalar(model, source.peft)
            if kind.checkpointing:
                network = getattr(model, "classifier", model)
                network.gradient_checkpointing_enable({"use_reentrant": False})
    except KeyError as error:
        if ATTENTION not in error.args:
            raise
        raise UserError(
            f"{source.name}: {config.model_type} computes attention in code of its own, which cannot be counted"
        ) from None
    except (ValueError, ImportError, OSError) as error:
        raise UserError(f"{source.name}: its memory cannot be counted: {first_line(error)}") from None
    if not kind.dropout:
        disable_dropout(getattr(model, "classifier", model))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(kind.dtype)
    if not kind.trained:
        model.requires_grad_(False)
    return model.train(kind.trained)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The weights that have gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def shard_bytes(weights: Iterable[nn.Parameter], shards: int, size: int) -> int:
    """Bytes of a rank's shards, `size` for each number: FSDP2 splits the first dimension and rounds up."""
    return sum(-(-p.shape[0] // shards) * (p.numel() // p.shape[0]) * size for p in weights)
