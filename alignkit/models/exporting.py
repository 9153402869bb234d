"""A model as plain Hugging Face files, and the proof that others read the same model from them."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from alignkit.errors import UserError
from alignkit.models.loading import load_causal, load_encoder, load_scorer
from alignkit.models.settings import adapter_facts
from alignkit.models.tokenizer import first_line

SHARD = "5GB"  # the largest file of weights
LARGEST = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}  # difference of a logit, as a share of the largest one
PROBE = [{"role": "user", "content": "What makes a good answer?"}]


def export_model(source: Path, folder: Path, scores: bool, form: str, dtype: str) -> float:
    """Write the model in `source` into a new folder in `dtype`, with its tokenizer and all stop tokens: whole, an
    adapter merged into its base, or (form="adapter") as peft has it. scores: a reward model. Returns the largest
    difference of its logits, read again as others do, to the source's. Raises UserError if that is too large."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    encoder, kind = load_encoder(source), getattr(torch, dtype)
    ids = encoder.prompt(PROBE)
    if form == "adapter":
        before = logits(as_others_load(source, scores), ids)
        shutil.copytree(source, folder)
        weights = folder / "adapter_model.safetensors"
        save_file({name: x.to(kind) for name, x in load_file(weights).items()}, weights, metadata={"format": "pt"})
    else:
        model = (load_scorer if scores else load_causal)(source)
        before = logits(model, ids)
        model.config.use_cache = True  # training had it off
        if not scores:
            model.generation_config.eos_token_id = list(encoder.stop_ids)
        model.to(kind).save_pretrained(folder, max_shard_size=SHARD)
        encoder.tokenizer.save_pretrained(folder)
        del model  # one in memory at a time
    read, after = load_encoder(folder), logits(as_others_load(folder, scores), ids)
    if ids != read.prompt(PROBE) or encoder.stop_ids != read.stop_ids:
        raise UserError("export: written and read again, the tokenizer makes other tokens of a prompt")
    difference, allowed = float((after - before).abs().max()), LARGEST[dtype] * max(1.0, float(before.abs().max()))
    if not difference <= allowed:  # NaN too
        raise UserError(
            f"export: written in {dtype} and read again, its logits differ by {difference:.3g}, more than "
            f"{allowed:.3g}: choose another --dtype"
        )
    return difference


def as_others_load(folder: Path, scores: bool) -> nn.Module:
    """As somebody without alignkit: by transformers, an adapter by peft on a float32 base. Raises UserError."""
    try:
        if adapter_facts(folder) is None:
            return (AutoModelForSequenceClassification if scores else AutoModelForCausalLM).from_pretrained(
                folder, trust_remote_code=False
            )
        import peft

        options: dict[str, Any] = {
            "dtype": torch.float32,
            "trust_remote_code": False,
            **({"num_labels": 1} if scores else {}),
        }
        kind = peft.AutoPeftModelForSequenceClassification if scores else peft.AutoPeftModelForCausalLM
        return kind.from_pretrained(str(folder), **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"export: '{folder}' cannot be loaded: {first_line(error)}") from error


@torch.no_grad()
def logits(model: nn.Module, ids: list[int]) -> Tensor:
    """Of one row, in float32."""
    return model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits.float()
