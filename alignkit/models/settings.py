"""Which model a run starts from, and which small part of it is trained instead of the whole."""

import ast
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from alignkit.errors import UserError
from alignkit.schema import Count, settings

CONFIG_CLASS = {  # of peft, by method
    "lora": "LoraConfig",
    "ia3": "IA3Config",
    "prefix": "PrefixTuningConfig",
    "prompt": "PromptTuningConfig",
    "p_tuning": "PromptEncoderConfig",
}
UNGROUPED = ("gpt2", "gpt_neox")  # architectures without grouped key-value heads and with a plain, 4 times wider MLP
PROMPT_METHODS = ("prefix", "prompt", "p_tuning")  # learnt tokens before the first one, no change of any weight
MUST_STAY = {  # else the adapter changes the base or does not start as the identity, and cannot be switched off
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian"),
    "init_ia3_weights": (True,),
    "layer_replication": (None,),
    "target_parameters": (None,),
    "trainable_token_indices": (None,),
}


@settings
class ModelSettings:
    """`path`: a local folder or a Hub id of a decoder-only model, at `revision`; or null: a model of `architecture`
    with these dimensions is built from scratch, with a BPE vocabulary learnt from the training texts. Beside a Hub id
    they are that model's dimensions, for `alignkit plan` where the Hub is out of reach. intermediate_size,
    num_kv_heads, head_dim: null follows from the others; tie_embeddings: one matrix for embeddings and head."""

    path: str | None
    revision: str | None
    trust_remote_code: bool
    architecture: Literal["llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox"]
    hidden_size: Count
    intermediate_size: Count | None
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count | None
    head_dim: Count | None
    tie_embeddings: bool
    vocab_size: Count
    context_length: Count

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}")
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.vocab_size < 262:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 262: 256 bytes and 6 special tokens")
        for name in ("num_kv_heads", "head_dim"):
            if self.architecture in UNGROUPED and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)}: {self.architecture} has as many key-value heads as heads, each of "
                    f"hidden_size / num_heads; set {name}=null"
                )


@settings
class PeftSettings:
    """Parameter-efficient training: `settings` go to the config class that peft has for `method` (bitfit, the training
    of all biases, is our own), `quantization` to transformers' BitsAndBytesConfig when the frozen base is loaded;
    `merge`: the stage hands on plain weights, the adapter beside them, instead of the adapter alone."""

    method: Literal["none", "lora", "ia3", "prefix", "prompt", "p_tuning", "bitfit"]
    settings: dict[str, Any]
    quantization: dict[str, Any]
    merge: bool

    def __post_init__(self) -> None:
        if self.method in ("none", "bitfit") and self.settings:
            raise ValueError(f"method={self.method} has no settings, got settings={self.settings}")
        if self.method == "none" and self.merge:
            raise ValueError("merge=True has nothing to merge with method=none")
        if self.method == "bitfit" and not self.merge:
            raise ValueError(
                "merge=False does not go with method=bitfit: biases are part of the weights; set merge=True"
            )
        if self.method in PROMPT_METHODS and self.merge:
            raise ValueError(f"merge=True does not go with method={self.method}: learnt tokens are no part of a weight")
        if self.method != "lora" and self.quantization:
            raise ValueError(f"quantization={self.quantization} needs method=lora, got method={self.method}")
        for key, allowed in MUST_STAY.items():
            if key in self.settings and self.settings[key] not in allowed:
                raise ValueError(
                    f"settings.{key}={self.settings[key]!r}: expected {' or '.join(map(repr, allowed))}, as otherwise "
                    "the adapter could not be switched off or put on its base again"
                )

    @property
    def virtual_tokens(self) -> int:
        """Learnt tokens before the first real one."""
        return self.settings.get("num_virtual_tokens", 0) if self.method in PROMPT_METHODS else 0

    def clashes(self, start: str | None, processes: int) -> list[str]:
        """What does not go with the rest of the run; start: the model that there is to start from."""
        faults = []
        if self.method != "none" and start is None:
            faults.append(
                f"peft.method={self.method}: with model.path=null the model starts from random weights, which an "
                "adapter would freeze; set model.path=FOLDER or a Hub id"
            )
        if self.quantization and processes > 1:
            faults.append(f"peft.quantization runs on one GPU, got launch.processes={processes}; choose peft=lora")
        return faults

    def known_keys(self) -> list[str]:
        """The keys that `settings` may have, read from peft's source, as importing peft would import torch; [] if that
        cannot be found: then peft itself says what is wrong, when the stage starts."""
        found, wanted = find_spec("peft"), (CONFIG_CLASS.get(self.method), "PromptLearningConfig")
        if found is None or wanted[0] is None:
            return []
        folder = Path(str(found.origin)).parent
        files = [file for file in folder.glob("tuners/*/config.py") if f"class {wanted[0]}(" in file.read_text("utf-8")]
        files += [folder / "config.py"] if self.method in PROMPT_METHODS else []
        classes = [node for file in files for node in ast.parse(file.read_text("utf-8")).body]
        bodies = [node.body for node in classes if isinstance(node, ast.ClassDef) and node.name in wanted]
        return [ast.unparse(line.target) for body in bodies for line in body if isinstance(line, ast.AnnAssign)]


def refuse_stacking(peft: PeftSettings, base: str | Path | None) -> None:
    """Raise UserError if the product would be an adapter on an adapter, which peft and transformers load without a word
    as if the one below were not there."""
    if peft.method != "none" and not peft.merge and base is not None and adapter_facts(base) is not None:
        raise UserError(
            f"peft.merge=false: '{base}' is an adapter itself, and peft cannot load one on top of another; set "
            "peft.merge=true, here or in the stage that made it"
        )


def refuse_thin_chain(peft: PeftSettings) -> None:
    """The same before a chain of stages begins, each of which starts from the one before."""
    if peft.method != "none" and not peft.merge:
        raise UserError(
            "peft.merge=false: the reward model and PPO would stand on the adapter of SFT, and peft cannot load one "
            "adapter on top of another; set peft.merge=true"
        )


def refuse_in_ppo(peft: PeftSettings) -> None:
    """Raise UserError for the methods that PPO cannot train."""
    if peft.method in PROMPT_METHODS:
        raise UserError(
            f"peft.method={peft.method}: PPO cannot train learnt tokens: it calls the network's parts directly, which "
            "skips them, and counts positions, which they shift; choose lora, ia3 or bitfit, or run only alignkit sft "
            "or alignkit reward_model with it"
        )
    if peft.quantization:
        raise UserError(
            "peft.quantization: PPO shards its models with FSDP2, which cannot split quantised weights; run alignkit "
            "sft or alignkit reward_model with peft=qlora, then PPO with peft=lora"
        )


def adapter_facts(folder: str | Path) -> dict[str, Any] | None:
    """What an adapter folder says of itself (base_model_name_or_path, revision, task_type, ...); None if `folder` is
    no local adapter folder. Raises UserError if it names no base."""
    file = Path(folder).expanduser() / "adapter_config.json"
    try:
        facts = json.loads(file.read_text("utf-8")) if file.is_file() else None
    except ValueError as error:
        raise UserError(f"'{file}': expected JSON, got a fault ({error}); copy the adapter again") from None
    if facts is not None and not (isinstance(facts, dict) and facts.get("base_model_name_or_path")):
        raise UserError(f"'{file}' has no base_model_name_or_path: write the place of the adapter's base there")
    return facts


def stage_folder(path: str | Path) -> Path:
    """The folder of a finished stage (or of a model from elsewhere), whatever link or `model/` inside names it."""
    place = Path(path).expanduser().resolve()
    return place.parent if place.name == "model" and (place.parent / "manifest.json").is_file() else place
