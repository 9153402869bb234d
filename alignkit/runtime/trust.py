"""Whose code may run here, and what the files of a run that somebody else may have packed must not decide alone."""

import importlib
import os
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.errors import UserError

TRUST = ("trusted", "trust_remote_code", "token_env")  # settings by which foreign code runs, or a secret is sent


def trusted_code(path: str, target: str, trusted: list[str], faults: list[str]) -> Any:
    """What module.name stands for, if its module may be run; faults are added to the list and None comes back."""
    module, _, name = target.rpartition(".")
    ours = module.split(".")[0] == "alignkit"
    if not ours and not any(module == t or module.startswith(f"{t}.") for t in trusted):
        faults.append(f"{path}: '{target}' runs code outside alignkit; allow it with 'trusted=[{module}]'")
        return None
    if not ours and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for the user's own modules; last, so that they stand for no installed one
    try:
        found = getattr(importlib.import_module(module), name)
        if not ours or getattr(found, "__module__", "").split(".")[0] == "alignkit":
            return found
        faults.append(f"{path}: '{target}' is not of alignkit, which only uses it; name the module that it is of")
    except (ImportError, AttributeError) as error:
        faults.append(f"{path}: '{target}' cannot be imported: {error}")
    except Exception as error:  # the user's module has a fault: say where
        *_, frame = traceback.extract_tb(error.__traceback__)
        place = f"{frame.filename}, line {frame.lineno}"
        place = f"{error.filename}, line {error.lineno}" if isinstance(error, SyntaxError) else place
        reason = error.msg if isinstance(error, SyntaxError) else error
        faults.append(f"{path}: '{target}' cannot be imported: {type(error).__name__}: {reason} ({place})")
    return None


def words_of_trust(raw: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What the settings say of TRUST, as words of a command line."""
    words = []
    for key, value in raw.items():
        if isinstance(value, Mapping):
            words += words_of_trust(value, f"{prefix}{key}.")
        elif key in TRUST and value:
            words.append(f"{prefix}{key}=" + (f"[{','.join(value)}]" if isinstance(value, list) else str(value)))
    return words


def require_trust(raw: Mapping[str, Any], words: Sequence[str], verb: str = "resume") -> None:
    """Raise UserError unless the words typed after `verb`, the run first, say what its config.yaml says of TRUST."""
    said = {word.lstrip("+").partition("=")[0] for word in words}
    unsaid = [word for word in words_of_trust(raw) if word.partition("=")[0] not in said]
    if unsaid:
        raise UserError(
            f"{verb}: {Path(words[0]) / 'config.yaml'} asks for code from outside alignkit to be run, or for a secret "
            f"to be sent: if that run is yours, or you have read the file, say it here too: {shlex.join(unsaid)}"
        )


def refuse_links(folder: Path, store: Path | None = None) -> None:
    """Raise UserError for a link in a folder that is written into: a folder that somebody else packed could lead what
    is written anywhere. store: links to products in it may be there, and those of W&B's own."""
    for place in folder.rglob("*") if store is None else (*folder.iterdir(), *folder.glob("wandb/*")):
        if not place.is_symlink():
            continue
        target = os.readlink(place)
        inside = place.parent.name == "wandb" and not os.path.isabs(target) and ".." not in Path(target).parts
        if store is None or not (inside or Path(os.path.normpath(place.parent / target)).parent == store):
            raise UserError(f"{place} is a link to {target}, which alignkit has not made: take it away")
