"""Parameter-efficient adapters: put on a model, switched off, merged, saved as peft folders.

LoRA (rsLoRA, DoRA) and (IA)3 come from peft, put into the model in place, so that it keeps its class and its forward.
BitFit is ours: an offset beside each bias, added to the layer's output. All three start as the identity, and all can be
switched off, so that one set of base weights serves as policy and reference, or as value and reward model. The learnt
tokens of prefix, prompt and P-tuning wrap the model instead; they can only be trained and saved.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from alignkit.errors import UserError
from alignkit.models.settings import CONFIG_CLASS, PROMPT_METHODS, PeftSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Task = Literal["CAUSAL_LM", "SEQ_CLS"]


def attach(model: PreTrainedModel, settings: PeftSettings, task: Task) -> PreTrainedModel | PeftModel:
    """The model that a trainer is given: `model` itself with an adapter put in, or peft's wrapper around it (learnt
    tokens), all else frozen but a classifier's head; with method none just `model`. Raises UserError."""
    if settings.method == "none":
        return model
    if settings.method in PROMPT_METHODS:
        import peft

        config = peft_config(settings, task)
        with _told(settings):
            return peft.get_peft_model(model, config)
    add_adapter(model, settings, task)
    if task == "SEQ_CLS":
        model.score.requires_grad_(True)
    return model


def add_adapter(model: PreTrainedModel, settings: PeftSettings, task: Task) -> None:
    """Put a fresh adapter into `model` in place and freeze the rest; afterwards it computes exactly what it did before.

    Draws from torch's generator, which must be in the same state on all ranks. Goes before sharding; dropout of the
    adapter's own is turned off by `disable_dropout` after it. Raises UserError with the reason where it cannot.
    """
    if settings.method == "bitfit":
        _add_offsets(model)
        return
    import peft

    ends = _ends(model)
    config = peft_config(settings, task)
    with _told(settings):
        peft.inject_adapter_in_model(config, model)
    if _ends(model) != ends:
        raise UserError(
            "peft.settings: the adapter reaches embeddings or head, whose weights are tied or read directly, past any "
            "adapter; take them out of target_modules and modules_to_save"
        )
    if getattr(model, "is_quantized", False):
        model._hf_peft_config_loaded = True  # without it transformers' Trainer refuses a quantised model


def peft_config(settings: PeftSettings, task: Task) -> Any:
    """peft's config object. Raises UserError with what peft says of a wrong key or value."""
    import peft

    with _told(settings):
        return getattr(peft, CONFIG_CLASS[settings.method])(task_type=task, **copy.deepcopy(settings.settings))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, `model` computes without its adapter, exactly as before `add_adapter`; sharded or not.

    A flag of each layer, unlike peft's `enable_adapters`, which also changes requires_grad, and FSDP2 has read that
    already. Not between a forward and its backward.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield model
    finally:
        for layer, was in zip(layers, before):
            layer._disable_adapters = was


def adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a peft adapter file. `model` (sharded or not) gives the names, `state` the whole weights under the
    names of its state dict; a classifier's head is part of what was trained."""
    from peft import PeftModel, get_peft_model_state_dict

    if isinstance(model, PeftModel):  # learnt tokens, made by a network that is not kept
        return get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = get_peft_model_state_dict(model, state_dict=dict(state), save_embedding_layers=False)
    if peft_of(model).task_type == "SEQ_CLS":
        tensors |= {name: value for name, value in state.items() if name.startswith("score.")}
    return {f"base_model.model.{name}": value for name, value in tensors.items()}


def peft_of(model: Any) -> Any:
    """peft's config of the adapter on `model`."""
    return model.peft_config["default"]


def save_adapter(
    model: nn.Module, state: Mapping[str, Tensor], folder: Path, base: str | Path, revision: str | None = None
) -> None:
    """Write adapter_config.json and adapter_model.safetensors as peft reads them; `base`: the folder or Hub id of the
    model that the adapter belongs on. Call it on one rank."""
    local = Path(base).expanduser()
    config = copy.deepcopy(peft_of(model))
    config.base_model_name_or_path = str(local.resolve() if local.exists() else base)
    config.revision, config.inference_mode = revision, True
    if config.task_type == "SEQ_CLS":
        config.modules_to_save = sorted({*(config.modules_to_save or ()), "score"} - {"classifier"})
    config.save_pretrained(str(folder))
    tensors = {name: value.detach().cpu().contiguous() for name, value in adapter_state(model, state).items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def merge(model: nn.Module) -> None:
    """Turn the adapter that was put in place into plain weights under the original names. Not on a sharded model."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            model.set_submodule(name, plain)
        elif hasattr(module, "bias_offset"):
            module.bias.data += module.bias_offset.data
            module.offset_hook.remove()
            del module.bias_offset, module.offset_hook, module._disable_adapters
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(True)


def apply_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model`, a whole base, with the adapter in `folder` merged into it. Raises UserError with the reason."""
    from peft import PeftConfig, PeftModel

    if not (folder / "adapter_model.safetensors").is_file():  # peft would take a pickle instead, or ask the Hub
        raise UserError(f"'{folder}' holds no adapter_model.safetensors, the only format that an adapter is read from")
    if PeftConfig.from_pretrained(str(folder)).is_prompt_learning:
        raise UserError(
            f"'{folder}' holds learnt tokens (prefix, prompt or P-tuning), which are no part of any weight, so that no "
            "stage can start from it; peft.PeftModel.from_pretrained loads it"
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")
            merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError, KeyError, UserWarning, SafetensorError) as error:
        raise UserError(f"the adapter in '{folder}' does not go on its base: {str(error).splitlines()[0]}") from error
    return merged.requires_grad_(True)


def quantization(settings: PeftSettings, skip: list[str] | None = None) -> dict[str, Any]:
    """What `from_pretrained` needs to load the base quantised, {} if it is not to be. `skip`: modules left whole.
    Raises UserError where quantised training cannot run."""
    if not settings.quantization:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None or not torch.cuda.is_available():
        raise UserError(
            "peft.quantization needs a CUDA GPU and the package bitsandbytes (pip install bitsandbytes); "
            "without them choose peft=lora"
        )
    from transformers import BitsAndBytesConfig

    with _told(settings, "quantization"):
        config = BitsAndBytesConfig(**{"llm_int8_skip_modules": skip, **settings.quantization})
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def trainable(model: nn.Module) -> str:
    """`0.02 of 1.30 M parameters (1.5%)`: what is trained of how much."""
    total = sum(value.numel() for value in model.parameters())
    count = sum(value.numel() for value in model.parameters() if value.requires_grad)
    return f"{count / 1e6:.2f} of {total / 1e6:.2f} M parameters ({count / total:.2%})"


def _ends(model: PreTrainedModel) -> tuple[nn.Module | None, ...]:
    """The layers where tokens come in and numbers go out."""
    return model.get_input_embeddings(), model.get_output_embeddings(), getattr(model, "score", None)


def _add_offsets(model: PreTrainedModel) -> None:
    """BitFit: output + offset for every layer with a bias but the head, which trainers read past its own forward."""
    head = model.get_output_embeddings()
    model.requires_grad_(False)
    layers: list[Any] = [
        m for m in model.modules() if isinstance(getattr(m, "bias", None), nn.Parameter) and m is not head
    ]
    if not layers:
        raise UserError(
            f"peft.method=bitfit trains biases, and this {type(model).__name__} has none (nor have Mistral, Qwen3 and "
            "others); choose lora or ia3"
        )
    for layer in layers:
        layer.bias_offset = nn.Parameter(torch.zeros_like(layer.bias))
        layer._disable_adapters = False
        layer.offset_hook = layer.register_forward_hook(_offset)


def _offset(layer: Any, inputs: Any, output: Tensor) -> Tensor:
    return output if layer._disable_adapters else output + layer.bias_offset


@contextmanager
def _told(settings: PeftSettings, part: str = "settings") -> Iterator[None]:
    """What peft or transformers refuse in this part of the settings is the user's mistake."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # of GPT-2's layers, which peft then sets right
            yield
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"peft.{part}: with method={settings.method} the library says: {reason}") from error
