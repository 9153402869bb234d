"""`alignkit explain KEY`: what a setting means, its value, the file that holds it, and which presets change it.

Everything is read from conf/, where each setting is written down once, with its meaning and unit beside it.
"""

import difflib
import functools
import shutil
import sys
import textwrap
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from alignkit.errors import UserError
from alignkit.runtime.config import REFUSED, SETTINGS, RunConfig, conf_dir
from alignkit.runtime.recipe import report
from alignkit.runtime.written import PRESETS, Entry, composed, groups, imported, option_entries, options, presets, read

NAMES = {int: "whole number", float: "number", bool: "true | false", str: "text", type(None): "null"}
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def explain_command(words: list[str], recipes: Mapping[str, str]) -> int:
    """The words after `alignkit explain`. recipes: name -> one line. Returns the exit code: 0, or 2 after a mistake."""
    try:
        if len(words) > 2 or words[:1] in (["-h"], ["--help"]):
            raise UserError("usage: alignkit explain [KEY [RECIPE]], as in alignkit explain kl.target overoptimize")
        key, recipe = [*words, "", ""][:2]
        if recipe and recipe not in recipes:
            raise UserError(f"no recipe '{recipe}'; recipes: {', '.join(recipes)}")
        print(explanation(key.partition("=")[0], recipe, recipes))
    except UserError as error:
        return report(str(error), 2)
    return 0


def explanation(key: str, recipe: str, recipes: Mapping[str, str]) -> str:
    """The text for a setting, for a group of them, or with an empty key for recipes and presets. recipe: empty for the
    first that has it. Raises UserError for a key that there is not, with those that are near."""
    if key in ("", *PRESETS):
        return _overview(key, recipes)
    if key in groups():
        return _group_text(key, composed(recipe or next(iter(recipes)))[1][key])
    if key not in every_key(tuple(recipes)):
        raise UserError(f"{key}: {REFUSED.get(key) or f'unknown setting; {_hint(key, recipes)}'}")
    has = [name for name in recipes if key in composed(name)[0]]
    if recipe and has and recipe not in has and not holders(key):
        raise UserError(f"{key}: alignkit {recipe} does not have it; it belongs to {', '.join(has)}")
    return _setting_text(key, recipe or next(iter([*has, *recipes])), [] if recipe else list(recipes))


@functools.cache
def every_key(recipes: tuple[str, ...]) -> list[str]:
    """Every setting that a shipped file has, groups included."""
    found = dict.fromkeys(groups())
    for name in recipes:
        found |= dict.fromkeys(composed(name)[0])
    for group in groups():
        for option in options(group):
            found |= dict.fromkeys(option_entries(group, option))
    for preset in presets():
        found |= dict.fromkeys(read(preset).entries)
    return list(found)


def holders(key: str) -> dict[str, Entry]:
    """The options of its group that have a setting, with what each has."""
    group = key.partition(".")[0]
    found = {option: option_entries(group, option) for option in (options(group) if group in groups() else [])}
    return {option: entries[key] for option, entries in found.items() if key in entries}


def _setting_text(key: str, recipe: str, recipes: Iterable[str]) -> str:
    """What `explanation` tells of a setting; `recipes`: those whose values are compared with this one's."""
    (entries, chosen), having = composed(recipe), holders(key)
    group, here = key.partition(".")[0], entries.get(key)
    option = chosen.get(group, "")
    if having and option not in having:
        option = next(iter(having))
    told = having.get(option) or here or next(e for file in presets() if (e := read(file).entries.get(key)))
    where = f"{here.place}" if here else f"not in alignkit {recipe} unless chosen"
    lines = [f"{key} = {here.text}   {where}" if here else f"{key}   {where}", *_wrapped(told.comment)]
    kind = takes(type_of(key, option))
    if kind and not all(word in told.comment for word in kind.split(" | ")):
        lines += [f"  takes: {kind}"]
    lines += _rows("keys", [(path, e.text, e.comment) for path, e in entries.items() if path.startswith(f"{key}.")])
    rows = []
    for name in options(group) if having else []:
        entry, label = having.get(name), f"{group}={name}{' (default)' * (name == chosen[group])}"
        rows.append((label, entry.text, _beside(entry, told.comment)) if entry else (label, "-", "does not have it"))
    lines += _rows("options", rows) if len(rows) > 1 else []
    changes = _changes(key, recipe, recipes, here)
    return "\n".join([*lines, *(_rows("changed by", changes) or ["", "no preset changes it"])])


def _changes(key: str, recipe: str, recipes: Iterable[str], here: Entry | None) -> list[tuple[str, str, str]]:
    """(what changes a setting, to which value, where): presets under this recipe, then the other recipes."""
    others = [(f"{preset.parent.name}={preset.stem}", composed(recipe, preset)) for preset in presets()]
    others += [(f"alignkit {name}", composed(name)) for name in recipes if name != recipe]
    rows, group = [], key.partition(".")[0]
    for label, (entries, chosen) in others:
        there = entries.get(key)
        if there and (here is None or there.text != here.text):
            rows.append((label, there.text, _beside(there, here.comment if here else "")))
        elif here and not there and group in chosen:
            rows.append((label, "-", f"{group}={chosen[group]} does not have it"))
    return rows


def _group_text(group: str, default: str) -> str:
    """A group's options and all their keys; a key that the default lacks says whose it is."""
    found = {name: option_entries(group, name) for name in sorted(options(group), key=lambda name: name != default)}
    rows = [(f"{group}={name}", read(conf_dir() / group / f"{name}.yaml").summary) for name in found]
    rows[0] = (f"{rows[0][0]} (default)", rows[0][1])
    keys = []
    for key in dict.fromkeys(key for entries in found.values() for key in entries):
        having = [name for name in found if key in found[name]]
        only = "" if default in having else f"with {', '.join(having)}: "
        keys.append((key, found[having[0]][key].text, only + found[having[0]][key].comment))
    return "\n".join([*_rows("options", rows)[1:], *_rows("keys", keys)])


def _overview(only: str, recipes: Mapping[str, str]) -> str:
    """Recipes and presets, or the presets of one folder, with one line each."""
    rows = {
        kind: [(f"{kind}={f.stem}", read(f).summary) for f in presets() if f.parent.name == kind] for kind in PRESETS
    }
    if only:
        return "\n".join(_rows(only, rows[only])[1:])
    found = _rows("recipes", [(f"alignkit {name}", line) for name, line in recipes.items()])[1:]
    found += _rows("experiments", rows["experiment"]) + _rows("sweeps", rows["sweep"])
    listed = textwrap.fill(", ".join(groups()), _columns(), initial_indent="  ", subsequent_indent="  ")
    return "\n".join([*found, "", "groups of settings", listed, "", "alignkit explain kl, alignkit explain kl.target"])


def takes(kind: Any) -> str:
    """What values a field's type allows, in words: `number > 0 | null`; empty where that says nothing."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, types.UnionType):
        parts = [takes(part) for part in args]
        return " | ".join(parts) if all(parts) else ""
    if origin is Annotated:
        found = [item for mark in args[1:] for item in getattr(mark, "metadata", [mark])]
        limits = [
            f"{sign} {getattr(item, name)}" for item in found for name, sign in BOUNDS.items() if hasattr(item, name)
        ]
        return " ".join([takes(args[0]), " and ".join(limits)]).strip()
    if origin is list:
        return f"list, each a {takes(args[0])}" if takes(args[0]) else "list"
    return NAMES.get(kind, "")


def type_of(key: str, option: str) -> Any:
    """The type of a setting's field in the dataclass that checks it; None where it has none of its own."""
    group, _, name = key.partition(".")
    target = option_entries(group, option).get(f"{group}._target_") if option else None
    kind = imported(target.text) if target else SETTINGS.get(group, RunConfig)
    for part in (name or group).split("."):
        owner = get_args(kind)[0] if get_origin(kind) is Annotated else kind
        kind = next((f.type for f in fields(owner) if f.name == part), None) if is_dataclass(owner) else None
    return kind


def _hint(key: str, recipes: Iterable[str]) -> str:
    known = every_key(tuple(recipes))
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.7)
    near = near or [name for name in known if name.split(".")[-1] == key.split(".")[-1]][:3]
    near = near or [name for name in known if key.startswith(f"{name}.")][-1:]
    return f"did you mean {' or '.join(near)}?" if near else "alignkit explain lists recipes, presets and groups"


def _rows(title: str, rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A titled table after an empty line; what is too wide for its column or for the terminal is cut."""
    short = [tuple(_cut(cell, 44) for cell in row[:-1]) for row in rows]
    widths = [max(len(row[n]) for row in short) for n in range(len(short[0]))] if rows else []
    lines = ["".join(f"  {cell:<{width}}" for cell, width in zip(row, widths)) for row in short]
    return ["", title, *(_cut(f"{line}  {row[-1]}", _columns()) for line, row in zip(lines, rows))] if rows else []


def _cut(text: str, width: int) -> str:
    return text.rstrip() if len(text) <= width else f"{text[: width - 3].rstrip()}..."


def _beside(entry: Entry, known: str) -> str:
    """Where a value is, and the comment that it has there unless that is known."""
    return entry.place if entry.comment in ("", known) else f"{entry.place}  {entry.comment}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _columns(), initial_indent="  ", subsequent_indent="  ")


def _columns() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 120
