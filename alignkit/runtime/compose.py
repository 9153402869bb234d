"""Hydra, kept in one file: composition of conf/ with the command line, sweeps, and its errors in plain words.

Hydra writes nothing itself: no output folder, no log; alignkit's own runs/ folder is made after the check.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignkit.errors import UserError


def compose_and_call(conf: Path, name: str, call: Callable[[dict[str, Any]], int]) -> int:
    """Compose conf/<name>.yaml with sys.argv and call `call` with the plain settings, once a job (several with -m).

    `call` returns an exit code; the first that is not 0 is returned. Jobs of a sweep go on after one has failed, but
    not after a signal (codes from 128 on).
    """
    sys.path.insert(0, os.getcwd())  # for the user's own strategies, as `python -m` would
    full = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and exiting
    codes: list[int] = []

    def task(composed) -> None:
        if any(code >= 128 for code in codes):
            return
        raw = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
        if HydraConfig.get().mode is not None and HydraConfig.get().mode.name == "MULTIRUN":
            raw["name"] = _job_name(raw["name"], name)
        codes.append(call(raw))

    try:
        hydra.main(version_base="1.3", config_path=str(conf), config_name=name)(task)()
    finally:
        if full is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
    return next((code for code in codes if code), 0)


def _job_name(base: str | None, recipe: str) -> str:
    """A name of its own for each job of a sweep: what the job changes."""
    words = HydraConfig.get().job.override_dirname or str(HydraConfig.get().job.num)
    words = re.sub(r"[^A-Za-z0-9_.=,+-]", "_", ",".join(w for w in words.split(",") if not w.startswith("name=")))
    return f"{base or recipe}-{HydraConfig.get().job.num}-{words}"[:120]


def explain(error: Exception, conf: Path, name: str) -> str:
    """One of Hydra's or OmegaConf's errors as one line: what is wrong, and the nearest that is right."""
    text = str(error)
    if found := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(found.group(1).split("@")[0], conf, name)
    if found := re.search(
        r"Could not find '([^']+)'\s+Available options in '([^']+)':\s+(.*?)\n(?:Config|Did)", text, re.S
    ):
        return f"{found.group(2)}={found.group(1).split('/')[-1]}: no such option; options: {', '.join(found.group(3).split())}"
    if found := re.search(r"Could not override '([^']+)'.\s+No match in the defaults list", text):
        return f"{found.group(1)}: unknown group of settings"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith(("object_type", "reference_type", "full_key")))


def _unknown_key(key: str, conf: Path, name: str) -> str:
    """`ppo.eopchs: unknown key; did you mean ppo.epochs?`"""
    keys: list[str] = []
    try:
        with hydra.initialize_config_dir(str(conf), version_base="1.3"):
            keys = list(_leaves(OmegaConf.to_container(hydra.compose(name))))
    except (HydraException, OmegaConfBaseException):
        pass
    near = difflib.get_close_matches(key, keys, n=3, cutoff=0.5)
    near = near or [known for known in keys if known.split(".")[-1] == key.split(".")[-1]][:3]
    hint = f"did you mean {' or '.join(near)}?" if near else f"alignkit {name} --cfg job shows all keys"
    return f"{key}: unknown key; {hint}"


def _leaves(node: dict, prefix: str = ""):
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
