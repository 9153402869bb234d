"""Whether a model from elsewhere is whole: its files before anything is begun, its weights once they are loaded. What
transformers takes without a word (a tensor that is missing is drawn at random) would be a run for nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import UserError

if TYPE_CHECKING:
    from torch import nn

AGAIN = "copy or download the model again"
READ_FIRST = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def refuse_broken_files(folder: Path) -> None:
    """Raise UserError for a Hugging Face folder with a file that is cut off, no JSON, missing from its index or pickled
    (no torch here: this is for the launcher)."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    held = {file: _object(file) for file in (*(folder / name for name in READ_FIRST), *indices) if file.is_file()}
    named = {str(name) for index in indices for name in dict(held[index].get("weight_map") or {}).values()}
    lost = sorted(name for name in named if not (folder / name).is_file())
    if lost:
        raise UserError(f"{indices[0]}: {lost[0]} is not there ({len(lost)} of {len(named)} files missing); {AGAIN}")
    weights = sorted(folder.glob("*.safetensors"))
    for file in weights:
        _refuse_cut(file)
    pickled = sorted(file.name for ending in ("*.bin", "*.pt", "*.pth") for file in folder.glob(ending))
    if pickled and not weights and (folder / "config.json").is_file():
        got = f"{pickled[0]}, which may run code when it is read: save it again with save_pretrained of transformers"
        raise UserError(f"'{folder}': expected weights in .safetensors files, got {got}")


def refuse_unsound_weights(model: nn.Module, info: Mapping[str, Any], path: str | Path, new_head: bool) -> None:
    """Raise UserError for weights that are missing, of another shape than the config says, or not finite. info: what
    transformers tells of the loading; new_head: a head (and pooler) that is missing may be drawn."""
    for name, found, expected in sorted(info["mismatched_keys"]):
        shapes = f"{tuple(found)} in the file, {tuple(expected)} by config.json"
        raise UserError(f"no model could be loaded from '{path}': {name} has the shape {shapes}; {AGAIN}")
    body = f"{model.base_model_prefix}."
    free = (name for name in info["missing_keys"] if new_head and (not name.startswith(body) or ".pooler." in name))
    lost = sorted(set(info["missing_keys"]) - set(free))
    if lost:
        raise UserError(
            f"'{path}' has no weights for {lost[0]} ({len(lost)} missing in all): it is cut off, or of another kind"
        )
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.detach().sum().isfinite():
            raise UserError(f"'{path}': {name} holds NaN or infinity: this model cannot be used; take an earlier one")


def refuse_other_tokenizer(path: str | Path, tokens: int, rows: int | None = None) -> None:
    """Raise UserError for more tokens than embeddings (`rows`; None: those that config.json tells of, if it does)."""
    config = Path(path) / "config.json"
    if rows is None and config.is_file():
        facts = _object(config)
        rows = facts.get("vocab_size", facts.get("text_config", {}).get("vocab_size"))
    if rows is not None and tokens > rows:
        told = f"its tokenizer has {tokens} tokens, its model embeddings of {rows}: they do not belong together"
        raise UserError(f"'{path}': {told}; put the model's own tokenizer there")


def _object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{file}: expected JSON, got a fault ({' '.join(str(error).split())}); {AGAIN}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, got {type(content).__name__}; {AGAIN}")
    return content


def _refuse_cut(file: Path) -> None:
    """A .safetensors file says in its first bytes how long it is."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            tensors = json.loads(stream.read(length) if length < 100_000_000 else b"")
            ends = [facts["data_offsets"][1] for name, facts in tensors.items() if name != "__metadata__"]
            whole = 8 + length + max(ends, default=0)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{file}: expected a .safetensors file, got something else; {AGAIN}") from None
    if file.stat().st_size != whole:
        raise UserError(f"{file}: expected {whole:,} bytes, got {file.stat().st_size:,}; {AGAIN}")
