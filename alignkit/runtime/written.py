"""The files of conf/ as they are written: each value beside its comment and its line, read once and without Hydra.

What a recipe sets stands in its own file, over that of base.yaml, over those of the chosen options.
"""

import functools
import importlib
import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from alignkit.runtime.config import conf_dir

PRESETS = ("experiment", "sweep")
NOT_GROUPS = (*PRESETS, "hydra")
PARAMS = "hydra.sweeper.params."


@dataclass(frozen=True)
class Entry:
    """A key of a YAML file: its value as it is written there, the comment beside it, and FILE:LINE."""

    text: str
    comment: str
    place: str


@dataclass(frozen=True)
class Source:
    """A YAML file of conf/: the sentence that it begins with, its entries by dotted path, the options that it starts
    from, and the options that it chooses for groups."""

    summary: str
    entries: dict[str, Entry]
    parents: tuple[str, ...]
    chosen: dict[str, str]


@functools.cache
def groups() -> list[str]:
    """The groups of settings, each a folder of options."""
    return sorted(f.name for f in conf_dir().iterdir() if f.is_dir() and f.name not in NOT_GROUPS)


@functools.cache
def options(group: str) -> list[str]:
    """The options of a group, by name."""
    return sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))


@functools.cache
def presets() -> list[Path]:
    """The files of all experiments and sweeps."""
    return [file for folder in PRESETS for file in sorted((conf_dir() / folder).glob("*.yaml"))]


@functools.cache
def read(file: Path) -> Source:
    """A file with its comments: PyYAML gives the place of each key and value, and the comment is what follows it."""
    text, entries = file.read_text("utf-8"), {}
    lines, plain = text.splitlines(), yaml.safe_load(text) or {}

    def walk(node: yaml.MappingNode, values: dict[str, Any], prefix: str) -> None:
        for name, value in node.value:
            path, block = f"{prefix}{name.value}", isinstance(value, yaml.CollectionNode) and not value.flow_style
            written = text[value.start_mark.index : value.end_mark.index]
            if block:
                written = yaml.safe_dump(values[name.value], default_flow_style=True, width=2**20, sort_keys=False)
            end = (name if block else value).end_mark
            place = f"{file.relative_to(conf_dir().parent)}:{name.start_mark.line + 1}"
            entries[path] = Entry(" ".join(written.split()), _comment(lines, end.line, end.column), place)
            if isinstance(value, yaml.MappingNode):
                walk(value, values[name.value], f"{path}.")

    root = yaml.compose(text)
    if isinstance(root, yaml.MappingNode):  # not of a file without settings
        walk(root, plain, "")
    entries = {path.removeprefix(PARAMS): entry for path, entry in entries.items()}
    entries = {path: entry for path, entry in entries.items() if path.split(".")[0] not in ("defaults", "hydra")}
    parents = tuple(item for item in plain.get("defaults", []) if isinstance(item, str) and item != "_self_")
    pairs = [pair for item in plain.get("defaults", []) if isinstance(item, dict) for pair in item.items()]
    chosen = {group.removeprefix("override ").removeprefix("/"): option for group, option in pairs}
    return Source(_summary(lines), entries, parents, {g: o for g, o in chosen.items() if g in groups()})


def _comment(lines: list[str], line: int, column: int) -> str:
    """The comment after a place of a line, and the indented lines below it that are nothing but its continuation."""
    found = lines[line][column:].partition("#")[2]
    for below in lines[line + 1 :] if found else []:
        if not re.match(r"\s+#", below):
            break
        found += " " + below.partition("#")[2].strip()
    return found.strip()


def _summary(lines: list[str]) -> str:
    """The first sentence of a file's own comment, without the command that may stand in it."""
    head = itertools.takewhile(lambda line: line.startswith("#"), lines)
    words = [re.split(r"\s{3,}", line[2:])[0] for line in head if not line.startswith("# @")]
    return re.split(r"(?<=[.!?])\s+(?=[A-Z(])", " ".join(filter(None, words)))[0]


@functools.cache
def option_entries(group: str, option: str) -> dict[str, Entry]:
    """The settings of an option by their full names, with those of the options that it starts from; a value that comes
    without a comment of its own has theirs."""
    source = read(conf_dir() / group / f"{option}.yaml")
    found: dict[str, Entry] = {}
    for parent in source.parents:
        found |= option_entries(group, parent)
    for path, entry in source.entries.items():
        key = f"{group}.{path}"
        inherited = found[key].comment if key in found else ""
        found[key] = replace(entry, comment=entry.comment or inherited or _class_line(path, entry.text))
    return found


@functools.cache
def composed(recipe: str, preset: Path | None = None) -> tuple[dict[str, Entry], dict[str, str]]:
    """A recipe's settings, under a preset if one is given, and the option that each group has."""
    layers = [read(conf_dir() / f"{name}.yaml") for name in ("base", recipe)] + (_lineage(preset) if preset else [])
    chosen = {group: option for layer in layers for group, option in layer.chosen.items()}
    entries = {key: e for group, option in chosen.items() for key, e in option_entries(group, option).items()}
    for layer in layers:
        entries |= layer.entries
    return entries, chosen


def _lineage(preset: Path) -> list[Source]:
    """A preset after those that it starts from."""
    source = read(preset)
    before = [layer for name in source.parents for layer in _lineage(preset.with_stem(name))]
    return [*before, source]


def imported(target: str) -> Any:
    """What a `_target_` names."""
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _class_line(path: str, text: str) -> str:
    """What stands for the comment of a `_target_`: the first sentence of its class."""
    if path != "_target_":
        return ""
    doc = " ".join((imported(text).__doc__ or "").split("\n\n")[0].split())
    return "the class behind this option: " + re.split(r"(?<=[.])\s+(?=[A-Z(])", doc)[0]
