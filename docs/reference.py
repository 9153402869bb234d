"""Writes docs/pages/reference.md, every setting of conf/ on one page: python docs/reference.py"""

from pathlib import Path

from alignkit.cli import find_recipes
from alignkit.runtime.config import conf_dir
from alignkit.runtime.explain import holders, takes, type_of
from alignkit.runtime.written import composed, groups, option_entries, options, presets, read

PAGE = Path(__file__).parent / "pages" / "reference.md"
HEAD = """# All settings

<!-- Written by `python docs/reference.py` from conf/; a test compares the two. Change conf/ instead. -->

Every setting of every group, from the files in `conf/` and the classes that check them. `alignkit explain KEY` tells
the same of one setting in the terminal, and `alignkit rlhf --cfg job` prints all of a run.

A default is that of `alignkit rlhf`; *changed by* names the recipes and presets (`experiment=...`, `sweep=...`) that
set something else. A group with several options is chosen as in `kl=fixed`.
"""
TOP = {  # groups in the order in which a run meets them
    "What is learnt from": ("data", "model", "peft"),
    "Stages": ("sft", "reward_model", "ppo", "evaluate"),
    "PPO's parts": ("rollout", "reward", "shaping", "advantage", "kl", "ptx", "judge"),
    "Where and how it runs": ("launch", "sharding", "checkpoint", "tracking"),
}


def page() -> str:
    """The whole page. Raises AssertionError if conf/ has a group that the page does not."""
    named = [name for names in TOP.values() for name in names]
    assert sorted(named) == sorted(groups()), "docs/reference.py: TOP does not name the groups of conf/"
    base = read(conf_dir() / "base.yaml").entries
    parts = [HEAD, "## The run itself\n", _table([_row(key, "", {}) for key in base if "." not in key])]
    for title, names in TOP.items():
        parts.append(f"## {title}\n")
        parts += [_group(name) for name in names]
    parts.append("## Recipes of several runs\n")
    parts.append("Each of these groups belongs to the recipe of its name alone.\n")
    parts += [_study(name) for name in find_recipes() if name in composed(name)[0]]
    parts.append(_sweeps())
    parts.append("## Presets\n")
    parts.append(_table([(f"`{f.parent.name}={f.stem}`", _cell(read(f).summary)) for f in presets()], "preset", "what"))
    return "\n".join(parts).rstrip() + "\n"


def _group(group: str) -> str:
    """A group's options, then the settings that any of them has."""
    default = composed("rlhf")[1][group]
    names = sorted(options(group), key=lambda name: name != default)
    parts = [f"### {group}\n"]
    rows = [
        (f"`{group}={n}`" + " (default)" * (n == default), _cell(read(conf_dir() / group / f"{n}.yaml").summary))
        for n in names
    ]
    parts.append(_table(rows, "option", "what") if len(rows) > 1 else f"{rows[0][1]}\n")
    keys = dict.fromkeys(key for name in names for key in option_entries(group, name) if not key.endswith("_target_"))
    having = {key: [n for n in names if key in option_entries(group, n)] for key in keys}
    rows = [_row(key, having[key][0], {n: option_entries(group, n)[key].text for n in having[key]}) for key in keys]
    return "\n".join([*parts, _table(rows)])


def _study(recipe: str) -> str:
    keys = [key for key in composed(recipe)[0] if key.split(".")[0] == recipe and "." in key]
    return "\n".join([f"### {recipe}\n", _table([_row(key, "", {}, recipe) for key in keys])])


def _sweeps() -> str:
    """Hydra's launcher of alignkit, which `-m` uses: not a group of a run's settings."""
    entries = read(conf_dir() / "hydra" / "launcher" / "alignkit.yaml").entries
    rows = [
        (f"`hydra.launcher.{key}`", "", f"`{entry.text}`", _cell(entry.comment))
        for key, entry in entries.items()
        if key != "_target_"
    ]
    return "\n".join(["### Sweeps (-m)\n", _table(rows)])


def _row(key: str, option: str, values: dict[str, str], recipe: str = "rlhf") -> tuple[str, str, str, str]:
    """key, what it takes, its default, its meaning with what changes it. option: the first of its group that has the
    key, with `values` of all that have it."""
    here = composed(recipe)[0].get(key)
    told = holders(key)[option] if option else here
    kind = takes(type_of(key, option))
    default = f"`{told.text}`" if here or len(set(values.values())) == 1 else "by option"
    words = [_cell(told.comment)]
    others = options(key.split(".")[0]) if option else []
    if values and len(values) < len(others):
        words.append(f"*only with {_listed(values)}*")
    if len(set(values.values())) > 1 and len(values) <= 5:
        words.append("*" + ", ".join(f"{name}: `{text}`" for name, text in values.items()) + "*")
    elif len(set(values.values())) > 1:
        words.append("*each option has its own*")
    changed = [] if recipe != "rlhf" else _changes(key, here)
    if changed:
        words.append(f"*changed by {', '.join(changed)}*")
    return f'<span id="{key}"></span>`{key}`', _cell(kind), _cell(default), "<br>".join(words)


def _changes(key: str, here) -> list[str]:
    """Recipes and presets that give a key another value than `alignkit rlhf` does."""
    layers = [(f"`{f.parent.name}={f.stem}`", composed("rlhf", f)[0] if here else read(f).entries) for f in presets()]
    layers += [(f"`alignkit {name}`", read(conf_dir() / f"{name}.yaml").entries) for name in find_recipes()]
    found = [(label, entries[key].text) for label, entries in layers if key in entries]
    return [f"{label} (`{_cell(text)}`)" for label, text in found if here is None or text != here.text]


def _listed(names) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _cell(text: str) -> str:
    """Text that may stand in a cell of a table, as it is."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace(" _target_", " `_target_`")


def _table(rows: list[tuple[str, ...]], *head: str) -> str:
    head = head or ("setting", "takes", "default", "meaning")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    print(f"{PAGE}: {len(PAGE.read_text('utf-8').splitlines())} lines")
