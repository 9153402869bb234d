"""The boundary: a composed configuration becomes one frozen, checked `RunConfig`, or an error that lists every fault.

Two kinds of sections. Settings (model, sft, ppo, ...) have a fixed class. Strategies (data, rollout, reward, advantage,
kl, judge) name theirs by `_target_`: a frozen dataclass in alignkit, or in the user's own module if `trusted` lists it.
The same code runs in the launcher and in every rank. Nothing here imports torch.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic.dataclasses import is_pydantic_dataclass
from pydantic_core import ErrorDetails

from alignkit.algo.shaping import Shaping
from alignkit.errors import UserError, in_words, on_one_line
from alignkit.models.settings import ModelSettings, PeftSettings
from alignkit.observe.secrets import secrets_in
from alignkit.observe.settings import TrackingSettings
from alignkit.runtime.rules import across
from alignkit.runtime.settings import (
    BenchSettings,
    CheckpointSettings,
    DenoiseSettings,
    FrontierSettings,
    LaunchSettings,
    OveroptimizeSettings,
    ShardingSettings,
)
from alignkit.runtime.trust import trusted_code
from alignkit.stages.settings import EvaluateSettings, PPOSettings, PtxSettings, RewardModelSettings, SFTSettings

SETTINGS = {
    "model": ModelSettings,
    "peft": PeftSettings,
    "sft": SFTSettings,
    "reward_model": RewardModelSettings,
    "ppo": PPOSettings,
    "ptx": PtxSettings,
    "shaping": Shaping,
    "evaluate": EvaluateSettings,
    "sharding": ShardingSettings,
    "checkpoint": CheckpointSettings,
    "tracking": TrackingSettings,
    "launch": LaunchSettings,
    "frontier": FrontierSettings,
    "overoptimize": OveroptimizeSettings,
    "denoise": DenoiseSettings,
    "bench": BenchSettings,
}
PROTOCOL = {  # what the class that `_target_` names must have, methods as they are called; alternatives by a bar
    "data": ["load(seed)"],
    "rollout": [
        *("temperature", "min_response", "max_response", "unshard", "generate(model, prompts, rule, noise, go_on=)")
    ],
    "reward": ["open(folder, encoder, cluster)|score(answers, microbatch)"],
    "judge": ["open|score(answers, microbatch)"],
    "advantage": ["uses_values", "min_samples", "whiten", "clip", "__call__(reward, values, mask, samples)"],
    "kl": ["coef", "target", "estimator", "place", "next(coef, observed=, episodes=)"],
}
STRATEGIES = tuple(PROTOCOL)
REFUSED = {  # keys that people look for, and why they are not there
    "evaluate.judge": ("unknown key; choose who judges with judge=gold, model, http, chat or another option of judge"),
    **dict.fromkeys(
        [f"rollout.{name}" for name in ("top_p", "top_k", "min_p", "repetition_penalty")],
        "not offered: the log-probabilities of PPO are those of the distribution that is sampled, and a truncated or "
        "penalised one gives old, new and reference policy different supports, so ratio and KL become infinite; use "
        "rollout.temperature",
    ),
}

NO_SECRET = (
    "holds a secret, which would be written into the files of every run: leave it out and give the name of an "
    "environment variable instead (token_env of reward and judge; HF_TOKEN for the Hub, WANDB_API_KEY for W&B)"
)


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run was told. `name`, `runs_dir`: where it writes; `seed`: all randomness; `compute_dtype`:
    of forward and backward passes; `force`: run finished stages again; `trusted`: modules besides alignkit that
    `_target_` may name; `policy`: a model folder; `objective`: the figure of summary.json by which the jobs of a sweep
    are compared, or several."""

    name: str | None
    runs_dir: str
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    compute_dtype: Literal["float32", "bfloat16"]
    force: bool
    trusted: list[str]
    policy: str | None
    model: ModelSettings
    peft: PeftSettings
    data: Any
    sft: SFTSettings
    reward_model: RewardModelSettings
    ppo: PPOSettings
    ptx: PtxSettings
    rollout: Any
    reward: Any
    shaping: Shaping
    advantage: Any
    kl: Any
    evaluate: EvaluateSettings
    judge: Any
    sharding: ShardingSettings
    checkpoint: CheckpointSettings
    tracking: TrackingSettings
    launch: LaunchSettings
    objective: str | list[str] | None = None
    frontier: FrontierSettings | None = None
    overoptimize: OveroptimizeSettings | None = None
    denoise: DenoiseSettings | None = None
    bench: BenchSettings | None = None


def conf_dir() -> Path:
    """The folder of the shipped settings: inside the wheel, or at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(place for place in (package / "conf", package.parent / "conf") if (place / "base.yaml").is_file())


def load(raw: dict[str, Any]) -> RunConfig:
    """Plain composed settings -> RunConfig. Raises UserError with one line for every fault."""
    faults: list[str] = []
    parts: dict[str, Any] = {}
    known = [field.name for field in dataclasses.fields(RunConfig)]
    faults += [_unknown("", key, known) for key in raw if key not in known]
    needed = [field.name for field in dataclasses.fields(RunConfig) if field.default is dataclasses.MISSING]
    faults += [f"{key}: missing" for key in needed if key not in raw]
    for field in dataclasses.fields(RunConfig):
        if field.name in raw and field.name not in SETTINGS and field.name not in STRATEGIES:
            try:
                parts[field.name] = TypeAdapter(cast(Any, field.type)).validate_python(raw[field.name], strict=True)
            except ValidationError as error:
                faults += [_fault(field.name, item, []) for item in error.errors()]
    trusted = parts.get("trusted") or []
    for name in SETTINGS.keys() & raw.keys():
        parts[name] = _section(name, SETTINGS[name], raw[name], faults)
    for name in STRATEGIES:
        if name in raw:
            parts[name] = _strategy(name, raw[name], trusted, faults)
    if not faults:
        faults += [f"{name}: {NO_SECRET}" for name in secrets_in(raw)]
        faults += across(parts, _unknown)
    if faults:
        raise UserError("\n".join(sorted(map(on_one_line, faults))))
    return RunConfig(**parts)


def _section(path: str, cls: type, values: Any, faults: list[str]) -> Any:
    """One dataclass from its values; faults are added to the list and None comes back."""
    if not isinstance(values, dict):
        faults.append(f"{path}: expected a group of settings, got {values!r}")
        return None
    names = [field.name for field in dataclasses.fields(cls)]
    if not is_pydantic_dataclass(cls):  # a user's plain dataclass is checked by the same rules
        frozen = cast(Any, cls).__dataclass_params__.frozen  # a frozen class cannot have a subclass that is not
        cls = pydantic_dataclass(config=ConfigDict(extra="forbid", strict=True), frozen=frozen)(cls)
    unknown = [key for key in values if key not in names]
    faults += [_unknown(path, key, names) for key in unknown]
    try:
        return cls(**{key: value for key, value in values.items() if key in names})
    except ValidationError as error:
        faults += [_fault(path, item, names) for item in error.errors()]
        bad = {item["loc"][0] for item in error.errors() if item["loc"]}
        if bad:
            faults += _rules(path, cls, {k: v for k, v in values.items() if k in names and k not in bad})
    except Exception as error:
        if cls.__module__.startswith("alignkit."):
            raise
        faults.append(f"{path}: '{cls.__module__}.{cls.__qualname__}' could not be made: {in_words(error)}")
    return None


def _rules(path: str, cls: type, sound: dict[str, Any]) -> list[str]:
    """What the rules between fields say of the sound ones, so that one bad field does not hide another fault."""
    rules = getattr(cls, "__post_init__", lambda _: None)
    try:
        rules(SimpleNamespace(**sound))
    except ValueError as error:
        return [f"{path}: {error}"]
    except AttributeError:  # a rule that needs a bad field
        pass
    return []


def _strategy(path: str, values: Any, trusted: list[str], faults: list[str]) -> Any:
    """The dataclass that `_target_` names, built from the other keys; its members first, if it combines strategies."""
    target = values.get("_target_") if isinstance(values, dict) else None
    group, nested = path.split(".")[0], "." in path
    if not isinstance(target, str) or "." not in target:
        choice = f"+{group}@{path}=NAME" if nested else f"{path}=NAME"
        faults.append(f"{path}._target_: expected module.Class, got {target!r}; choose an option with {choice}")
        return None
    cls = trusted_code(f"{path}._target_", target, trusted, faults)
    if cls is None:
        return None
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        faults.append(f"{path}._target_: '{target}' is not a dataclass")
        return None
    if reason := _unfit(cls, group):
        faults.append(f"{path}._target_: '{target}' {reason}")
        return None
    values = {key: value for key, value in values.items() if key != "_target_"}
    key = getattr(cls, "MEMBERS", None)
    if isinstance(members := values.get(key), dict):
        values[key] = {name: _strategy(f"{path}.{key}.{name}", part, trusted, faults) for name, part in members.items()}
    key = getattr(cls, "CODE", None)
    if isinstance(named := values.get(key), str) and "." in named.strip("."):
        function = trusted_code(f"{path}.{key}", named, trusted, faults)
        if function is not None and not callable(function):
            faults.append(f"{path}.{key}: '{named}' is not a function")
    return _section(path, cls, values, faults)


def _unfit(cls: type, group: str) -> str:
    """What keeps a class from being a strategy of this group, in words; empty if nothing does."""
    there = {*dir(cls), *(field.name for field in dataclasses.fields(cls))} - getattr(cls, "__abstractmethods__", set())
    has = {wish: [way for way in wish.split("|") if way.partition("(")[0] in there] for wish in PROTOCOL[group]}
    if lacking := [wish.replace("|", " or ") for wish, ways in has.items() if not ways]:
        return f"lacks {', '.join(lacking)}, which {group} must have"
    for call in (ways[0] for ways in has.values() if "(" in ways[0]):
        name, given = call.partition("(")[0], call[:-1].partition("(")[2].split(", ")
        named = {word[:-1]: None for word in given if word.endswith("=")}
        if not inspect.isroutine(method := getattr(cls, name, None)):  # a field: what it holds is not known yet
            continue
        signature = inspect.signature(method)
        try:
            signature.bind("self", *given[len(named) :], **named)
        except TypeError as error:
            return f"has {name}{signature}, which {group} calls as {call}: {error}"
    return ""


def _fault(path: str, item: ErrorDetails, names: list[str]) -> str:
    """One line of pydantic's report in our words: path, what was expected, what was got."""
    place = ".".join([path, *(str(part) for part in item["loc"] if isinstance(part, int) or part in names)])
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":
        return f"{place}: missing; set it with {place}=VALUE"
    if item["type"] == "value_error":
        return f"{place}: {message}"
    if item["type"] == "string_type" and isinstance(item["input"], int | float):
        return f"{place}: expected a text, got the number {item['input']}; quote it: '{place}=\"{item['input']}\"'"
    expected = message.removeprefix("Input should be ")
    return f"{place}: expected {expected}, got {item['input']!r}; set it with {place}=VALUE"


def abbreviated(key: str, names: list[str]) -> list[str]:
    """The dotted names of the same group whose first letters the key is: lr of learning_rate."""
    group, _, short = key.rpartition(".")
    ours = [name for name in names if name.rpartition(".")[0] == group]
    return [name for name in ours if short == "".join(word[:1] for word in name.rpartition(".")[2].split("_"))]


def _unknown(path: str, key: str, names: list[str]) -> str:
    """`ppo.eopchs: unknown key; did you mean ppo.epochs?`"""
    prefix = f"{path}." if path else ""
    if f"{prefix}{key}" in REFUSED:
        return f"{prefix}{key}: {REFUSED[f'{prefix}{key}']}"
    near = abbreviated(str(key), names) or difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(names)}"
    return f"{prefix}{key}: unknown key; {hint}"


def with_changes(raw: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with some of them changed, named by their dotted paths; the given ones stay as they are."""
    result = dict(raw)
    for key, value in changes.items():
        section, _, rest = key.partition(".")
        result[section] = with_changes(result[section], {rest: value}) if rest else value
    return result


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
