"""Loading and saving of models in plain Hugging Face format, and the small model built from scratch."""

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alignkit.data.tokens import Encoder
from alignkit.errors import UserError
from alignkit.models.adapters import apply_adapter, merge
from alignkit.models.pooled import is_pooled, pooled_encoder
from alignkit.models.settings import UNGROUPED, ModelSettings, adapter_facts
from alignkit.models.sound import refuse_other_tokenizer, refuse_unsound_weights
from alignkit.models.tokenizer import (
    end_of_turn,
    ensure_pad,
    find_stop_ids,
    first_line,
    learn_tokenizer,
    load_tokenizer,
    start_tokenizer,
)


def start_policy(
    spec: ModelSettings, texts: Callable[[], Iterable[str]], quantization: dict[str, Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that SFT starts from, with its tokenizer: PAD apart from EOS, embeddings resized once, here; a model
    that knows no chat gets a plain template, which SFT then teaches it. quantization: see `adapters.quantization`."""
    if spec.path is None:
        tokenizer = learn_tokenizer(texts(), spec.vocab_size)
        model = build_model(spec, tokenizer)
    else:
        tokenizer = start_tokenizer(spec.path, spec.revision, spec.trust_remote_code)
        model = load_causal(spec.path, spec.revision, spec.trust_remote_code, **(quantization or {}))
        rows = model.get_input_embeddings().get_parameter("weight").shape[0]
        refuse_other_tokenizer(spec.path, tokenizer.vocab_size, rows)
        grow_embeddings(model, len(tokenizer))
    tokenizer.padding_side = "left"
    model.config.pad_token_id = tokenizer.pad_token_id
    stops = find_stop_ids(tokenizer, model.generation_config)
    model.generation_config.eos_token_id = list(stops)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def build_model(spec: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model of `spec`'s architecture and dimensions with random weights; the seed is the caller's."""
    config = model_config(
        spec,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return _build(AutoModelForCausalLM, config)


def model_config(spec: ModelSettings, **options: Any) -> PreTrainedConfig:
    """transformers' config of `spec`'s architecture and dimensions; what is null there follows from the rest."""
    sizes: dict[str, Any] = {
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "max_position_embeddings": spec.context_length,
        "tie_word_embeddings": spec.tie_embeddings,
    }
    if spec.architecture in UNGROUPED:
        wide = "n_inner" if spec.architecture == "gpt2" else "intermediate_size"
        sizes[wide] = spec.intermediate_size or 4 * spec.hidden_size
    else:
        sizes["intermediate_size"] = spec.intermediate_size or spec.hidden_size * 8 // 3 // 8 * 8
        sizes["num_key_value_heads"] = spec.num_kv_heads or spec.num_heads
        sizes["head_dim"] = spec.head_dim or spec.hidden_size // spec.num_heads
    if spec.architecture == "mistral":
        sizes["sliding_window"] = None  # as of version 0.3 of the 7B model
    return AutoConfig.for_model(spec.architecture, **{**sizes, **options})


def grow_embeddings(model: PreTrainedModel, size: int) -> None:
    """Make room for `size` tokens. Each new row is the mean of the old ones: a function of the base alone, so that an
    adapter folder need not hold it."""
    old = model.get_input_embeddings().get_parameter("weight").shape[0]
    if size <= old:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                weight = layer.get_parameter("weight")
                weight[old:] = weight[:old].mean(dim=0)


def load_causal(
    path: str | Path, revision: str | None = None, trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """A causal language model in float32 from a folder or Hub id; an adapter comes merged into its base. options:
    transformers' own. Raises UserError with the reason."""
    options = {"revision": revision, "trust_remote_code": trust_remote_code, **options}
    if adapter_facts(path) is None:
        return _load(AutoModelForCausalLM, path, **options)
    base, options = _base(path, options)
    return _put_on(load_causal(base, **options), Path(path))


def load_scorer(path: str | Path) -> PreTrainedModel:
    """A one-label sequence classifier in float32 from a folder or Hub id; an adapter comes merged into its base.
    Raises UserError with the reason."""
    model = _load_classifier(path)
    if model.config.num_labels != 1:
        raise UserError(f"'{path}' has {model.config.num_labels} labels; a reward model has one score (num_labels: 1)")
    return model


def scorer_from_policy(path: str | Path, seed: int, **options: Any) -> PreTrainedModel:
    """The backbone of a causal model with a fresh scalar head, weights N(0, 1/(d+1)); of an encoder model transformers'
    classifier, what is missing in the folder (head, some poolers) drawn as transformers does. options: its own.

    Source: Stiennon et al. 2020 code; Huang et al. 2024, arXiv:2403.17031 (reward-head initialisation).
    Tests:  test_models.py::test_the_fresh_head_has_deviation_one_over_the_root_of_width_plus_one
    """
    if is_pooled(path):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _load_classifier(path, num_labels=1, **options)
    model = _load_classifier(path, num_labels=1, **options)
    head = scalar_head(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / (head.in_features + 1) ** 0.5)
        if head.bias is not None:
            head.bias.zero_()
    return model


def scalar_head(classifier: nn.Module) -> nn.Linear:
    """The linear layer that gives a decoder classifier its score."""
    head = getattr(classifier, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        name = type(classifier).__name__
        raise UserError(f"{name} has no `score` layer with one output; decoder classifiers of transformers have one")
    return head


def load_encoder(path: str | Path) -> Encoder:
    """Tokenizer and stop tokens of a finished stage's model folder (or of any Hugging Face model folder)."""
    tokenizer = load_tokenizer(path)
    refuse_other_tokenizer(path, len(tokenizer))
    if is_pooled(path):
        return pooled_encoder(tokenizer, path)
    if ensure_pad(tokenizer):
        raise UserError(f"'{path}' has no PAD token apart from EOS: run SFT on it first, which adds one and keeps it")
    listed = Path(path) / "generation_config.json"
    generation = GenerationConfig.from_pretrained(str(path)) if listed.is_file() else None
    return make_encoder(tokenizer, generation)


def make_encoder(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> Encoder:
    """The encoder that goes with a tokenizer and its model's generation settings."""
    stops = find_stop_ids(tokenizer, generation_config)
    end = end_of_turn(tokenizer)
    return Encoder(tokenizer=tokenizer, stop_ids=stops, end_id=tokenizer.eos_token_id if end is None else end)


def disable_dropout(model: PreTrainedModel) -> None:
    """Dropout off for good: sampling, scoring and training must see one and the same network."""
    for name, value in vars(model.config).items():
        if "drop" in name:
            setattr(model.config, name, 0.0 if isinstance(value, float) else value)
    for module in model.modules():  # some families read it from a float of their own
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def model_folder(path: str | Path) -> Path:
    """The folder with the weights: `model/` of a finished stage, or the folder itself."""
    path = Path(path)
    held = (path / "model" / name for name in ("config.json", "adapter_config.json"))
    return path / "model" if any(file.is_file() for file in held) else path


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of the stage that made this model, {} for a model from elsewhere."""
    file = Path(path) / "manifest.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


@contextmanager
def skeletons() -> Iterator[None]:
    """Inside, models are loaded and built without weights: parameters on the meta device, buffers as they should be."""
    global _without_weights
    _without_weights = True
    try:
        yield
    finally:
        _without_weights = False


_without_weights = False


def _build(factory: Any, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """A model of this config with random weights in float32, or among `skeletons` with none."""
    if not _without_weights:
        return factory.from_config(config, dtype=torch.float32, **options)
    with init_empty_weights(include_buffers=False):
        model = factory.from_config(config, dtype=torch.float32, **options)
    model.tie_weights()  # outside: within, each assignment of a parameter makes another one
    return model


def _load(factory: Any, path: str | Path, **options: Any) -> PreTrainedModel:
    options = {"trust_remote_code": False, **options}  # left out, transformers would ask the terminal
    try:
        if _without_weights:
            remote = {"trust_remote_code": options["trust_remote_code"]}
            model = _build(factory, AutoConfig.from_pretrained(str(path), **options), **remote)
            with suppress(OSError):  # a model without one
                revision: Any = options.get("revision")
                model.generation_config = GenerationConfig.from_pretrained(str(path), revision=revision)
            return model
        told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # we refuse them, by name
        model, info = factory.from_pretrained(str(path), dtype=torch.float32, use_safetensors=True, **told, **options)
    except Exception as error:  # of many classes, for whatever stands in a stranger's files
        raise UserError(f"no model could be loaded from '{path}': {first_line(error)}") from error
    refuse_unsound_weights(model, info, path, new_head="num_labels" in options)
    if hasattr(model, "peft_config"):  # a Hub id of an adapter, which transformers has put on its base
        merge(model)
    return model


def _load_classifier(path: str | Path, **options: Any) -> PreTrainedModel:
    """A sequence classifier; on a causal model's weights its head is random."""
    facts = adapter_facts(path)
    if facts is None:
        return _load(AutoModelForSequenceClassification, path, **options)
    if facts.get("task_type") == "SEQ_CLS":
        base, options = _base(path, {**options, "num_labels": 1})
        return _put_on(_load_classifier(base, **options), Path(path))
    labels = options.pop("num_labels", None)
    causal = load_causal(path, **options)
    config: Any = copy.deepcopy(causal.config)
    config.num_labels = labels or config.num_labels
    model = _build(AutoModelForSequenceClassification, config)
    if not _without_weights:
        model.base_model.load_state_dict(causal.base_model.state_dict())
    return model


def _base(path: str | Path, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The base of an adapter folder and the options to load it with. Raises UserError if it is gone."""
    facts = adapter_facts(path) or {}
    base = str(facts["base_model_name_or_path"])
    if Path(base).is_absolute() and not Path(base).exists():
        raise UserError(
            f"'{path}' is an adapter and its base '{base}' is not there: put it back, or write its place into "
            "base_model_name_or_path in adapter_config.json"
        )
    if "quantization_config" in options:
        raise UserError(
            f"'{path}' is an adapter, which cannot be merged into a quantised base: make it with peft.merge=true first"
        )
    return base, {**options, "revision": facts.get("revision")}


def _put_on(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The base with the adapter in `folder` merged in, and what else the folder says of the model."""
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(folder)
        grow_embeddings(model, len(tokenizer))
        model.config.pad_token_id = tokenizer.pad_token_id
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return model if _without_weights else apply_adapter(model, folder)


def require_context(model: PreTrainedModel, tokens: int, settings: str) -> None:
    """Raise UserError if the model has fewer positions than `tokens`, which `settings` (names with values) ask for."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise UserError(f"{settings} need {tokens} tokens, but the model has {positions} positions: lower them")
