"""Hydra, kept in one file: composition of conf/ with the command line, sweeps, and its errors in plain words.

Hydra writes nothing itself: no output folder, no log; alignkit's own runs/ folder is made after the check.
"""

import contextlib
import difflib
import io
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignkit.errors import UserError
from alignkit.runtime.config import REFUSED, abbreviated, conf_dir
from alignkit.runtime.shipped import find_recipes
from alignkit.runtime.sweep import Sweep
from alignkit.runtime.sweep_logs import sweep_figures

STAMP = time.strftime("%Y%m%d-%H%M%S")  # of this process: the jobs of one sweep share it
HERE = secrets.token_hex(8)  # this process, by which a job knows that it was sent to another one


class JobFailed(Exception):
    """A job that ran in another process: its words, and its exit code."""

    def __init__(self, words: str, code: int) -> None:
        super().__init__(words, code)
        self.words, self.code = words, code


def compose_and_call(
    conf: Path, name: str, call: Callable[[dict[str, Any]], int], check: Callable[[dict[str, Any]], str] | None = None
) -> int:
    """Compose conf/<name>.yaml with sys.argv and call `call` with the plain settings; returns its exit code.

    The jobs of a sweep (-m) are run by `sweep.Sweep`, which checks them all first. Without `check`, with
    launch.inline=true or with another launcher of Hydra's each is `call`ed: jobs go on after one has failed, but not
    after a signal (codes from 128 on).
    Of jobs in other processes (also submitit's) the first that failed is raised as JobFailed once all have ended.
    """
    full = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and exiting
    codes: list[int] = []
    faults: list[OmegaConfBaseException] = []
    begun: list[bool] = []  # until then it is Hydra that opens files
    here, stamp, typed = HERE, STAMP, list(sys.argv)  # as they are now: another process has others

    def task(composed: DictConfig) -> float | tuple[float, ...] | None:
        begun.append(True)
        if faults or any(code >= 128 for code in codes):
            return None
        try:
            raw = plain(composed)
        except OmegaConfBaseException as error:  # raised from here, Hydra would print a line of its own
            if not _is_here(here):
                raise JobFailed(" ".join(str(error).split()), 2) from None
            faults.append(error)
            return None
        if (mode := HydraConfig.get().mode) is not None and mode.name == "MULTIRUN":
            raw["name"] = job_name(raw["name"] or f"{name}-{stamp}", typed)
        codes.append(call(raw) if _is_here(here) else _call_elsewhere(call, raw))
        return sweep_figures(name, raw) if check and not codes[-1] else None

    sweep = Sweep(name, typed, f"{name}-{stamp}", check)
    vars(task)["sweep"] = sweep  # for the launcher
    _register_launcher()
    if other := [word.partition("=")[2] for word in typed if word.startswith("hydra/launcher=")]:
        print(f"the jobs are run by {other[-1]}, and what they say is in its logs (RUNS_DIR/.sweeps)", flush=True)
    try:
        hydra.main(version_base="1.3", config_path=str(conf), config_name=name)(task)()
    except Exception as error:
        if told := _told(error, conf, sweep, bool(begun)):
            raise told from error
        raise
    finally:
        sweep.close()
        if full is None:
            os.environ.pop("HYDRA_FULL_ERROR", None)
    if faults:
        raise faults[0]
    if sweep.failure:
        raise JobFailed(*sweep.failure)
    return next((code for code in codes if code), 0)


def _told(error: Exception, conf: Path, sweep: Sweep, begun: bool) -> Exception | None:
    """An error that Hydra or a launcher let through, as one for people; None for what is none. begun: a job was."""
    if isinstance(error, ValueError) and sweep.failure:  # Optuna, where no job has ended well
        return JobFailed(*sweep.failure)
    if isinstance(error, PermissionError if begun else OSError) and error.filename:
        return UserError(f"{error.filename}: cannot be written: {error.strerror}")
    if isinstance(error, ValueError) and "integer string conversion" in str(error):
        return UserError("a number on the command line has more than 4,300 digits")
    if isinstance(error, ValueError) and "Config group override" in str(error):
        return HydraException(_not_an_option(conf, sys.argv[1:]))
    if type(error).__module__.startswith("submitit."):  # killed by Slurm, say
        return JobFailed(f"a job did not come back: {' '.join(str(error).split())}", 1)
    return None


def _register_launcher() -> None:
    """Make plugins/hydra_plugins a part of the namespace package in which Hydra looks, also if it has looked before."""
    place = str(Path(__file__).with_name("plugins"))
    if place not in sys.path:
        sys.path.append(place)
    from hydra_plugins.alignkit import SweepLauncher

    Plugins.instance().register(SweepLauncher)


def _is_here(process: str) -> bool:
    return process == HERE


def _call_elsewhere(call: Callable[[dict[str, Any]], int], raw: dict[str, Any]) -> int:
    """Run a job in a process whose exit code nobody sees: what it says of a failure is raised as well."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            code = call(raw)
    finally:
        sys.stderr.write(told.getvalue())
    if code:
        words = "\n".join(line.removeprefix("error: ") for line in told.getvalue().strip().splitlines())
        raise JobFailed(f"{raw['name']}: {words}", code)
    return code


def job_name(base: str, typed: list[str]) -> str:
    """A name of its own for each job of a sweep: its number and what it changes against the other jobs. typed: the
    words that all jobs share."""
    if not isinstance(base, str):
        raise UserError(f"name: expected a text, got {base!r}; quote it: 'name=\"{base}\"'")
    changed = own_words(list(HydraConfig.get().overrides.task), typed)
    words = re.sub(r"[^A-Za-z0-9_.=,+-]", "_", ",".join(changed))
    return f"{base[:80]}-{HydraConfig.get().job.num}-{words}"[:120].rstrip("-")


def own_words(words: list[str], typed: list[str]) -> list[str]:
    """The words of a job whose settings were not typed with one value for all; without quotes and escapes."""
    parser, fixed = OverridesParser.create(), {"name"}
    for word in typed[1:]:
        with contextlib.suppress(HydraException):
            override = parser.parse_override(word)
            fixed |= set() if override.is_sweep_override() else {override.get_key_element()}
    plain = [re.sub(r"['\\]", "", word) for word in words]
    return [word for word in plain if word.partition("=")[0] not in fixed and not word.startswith("hydra")]


def explain(error: Exception, conf: Path, name: str) -> str:
    """One of Hydra's or OmegaConf's errors as one line: what is wrong, and the nearest that is right."""
    text = str(error)
    if (word := getattr(error, "override", None)) is not None:  # the grammar's own words are for its authors
        return f"{word!r} cannot be read: write KEY=VALUE, and quote what has blanks or signs in it: 'name=\"a b\"'"
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found.group(1)
        if re.search(r"\.(members|weights)\b", key):  # of a combined reward: there are none before they are named
            return f"{key}: has to be added, not overridden: +{key}=VALUE"
        return _unknown_key(key.split("@")[0], conf, name)
    if found := re.search(
        r"Could not find '([^']+)/([^'/]+)'\s+(?:Available options in '[^']+':\s+(.*?)\n)?(?:Config|Did)", text, re.S
    ):
        group, option, known = found.groups()
        return f"{group}={option}: no such option; options: {', '.join((known or 'none').split())}"
    if found := re.search(r"Could not load '([^']+)/([^'/]+?)(?:\.yaml)?'", text):
        group, option = found.groups()
        return f"{group}={option}: no such option; options: {', '.join(_options(conf, group))}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith(("object_type", "reference_type", "full_key")))


def _unknown_key(key: str, conf: Path, name: str) -> str:
    """`ppo.eopchs: unknown key; did you mean ppo.epochs?`"""
    group, _, rest = key.partition(".")
    if key in REFUSED:
        return f"{key}: {REFUSED[key]}"
    if rest.startswith("trainer") and group in ("sft", "reward_model"):
        return f"{key}: passed on to TRL, so it has to be added, not overridden: +{group}.trainer.ARGUMENT=VALUE"
    if key.startswith("peft.settings."):
        return f"{key}: passed on to peft, so it has to be added, not overridden: +{key}=VALUE"
    owners = [file.stem for file in sorted((conf / group).glob("*.yaml")) if rest and rest in OmegaConf.load(file)]
    if owners:
        belongs = " or ".join(f"{group}={owner}" for owner in owners)
        return f"{key}: unknown key with this choice of {group}; it belongs to {belongs}"
    keys: list[str] = []
    try:
        with hydra.initialize_config_dir(str(conf), version_base="1.3"):
            keys = list(_leaves(plain(hydra.compose(name), resolve=False)))
    except (HydraException, OmegaConfBaseException):
        pass
    near = abbreviated(key, keys) or difflib.get_close_matches(key, keys, n=3, cutoff=0.7)
    near = near or [known for known in keys if known.split(".")[-1] == key.split(".")[-1]][:3]
    hint = f"did you mean {' or '.join(near)}?" if near else f"alignkit {name} --cfg job shows all keys"
    return f"{key}: unknown key; {hint}"


def _not_an_option(conf: Path, words: Sequence[str]) -> str:
    """`ppo=1: no such option; options: default`: a group was given a number, which Hydra does not say in words."""
    for word in words:
        group, _, value = word.partition("=")
        options = _options(conf, group) if group else []
        if options and value not in options:
            return f"{word}: no such option; options: {', '.join(options)}"
    return "a group of settings takes the name of one of its options, as in model=tiny"


def _options(conf: Path, group: str) -> list[str]:
    return sorted(file.stem for file in (conf / group).glob("*.yaml"))


def plain(node: DictConfig | ListConfig, resolve: bool = True) -> dict[str, Any]:
    """Composed settings as plain ones; what is still missing stays `???`."""
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=resolve, throw_on_missing=False))


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")


def composed(recipe: str, settings: Sequence[str], config_dir: str | Path | None = None) -> dict[str, Any]:
    """The plain settings of a recipe with the words of a command line, from Python. Raises UserError in its words."""
    conf, words = conf_dir(), list(settings)
    if recipe not in find_recipes():
        raise UserError(f"no recipe '{recipe}'; recipes: {', '.join(find_recipes())}")
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise UserError(f"config_dir={config_dir}: expected a folder of settings, got none")
        words.append(f"hydra.searchpath=['file://{Path(config_dir).resolve()}']")
    _register_launcher()
    try:
        with hydra.initialize_config_dir(str(conf), version_base="1.3"):
            found = hydra.compose(recipe, words)
            return cast(dict[str, Any], OmegaConf.to_container(found, resolve=True, throw_on_missing=False))
    except ValueError as error:
        raise UserError(_not_an_option(conf, words) if "Config group override" in str(error) else str(error)) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, conf, recipe)) from None


def read_option(group: str, name: str) -> dict[str, Any]:
    """The settings in one shipped file of a group, which has no defaults of its own: also while Hydra is at work.
    Raises UserError if there is none."""
    options = _options(conf_dir(), group)
    if name not in options:
        raise UserError(f"{group}={name}: no such option; options: {', '.join(options)}")
    return plain(OmegaConf.load(conf_dir() / group / f"{name}.yaml"), resolve=False)


def as_yaml(raw: dict[str, Any]) -> str:
    """Plain settings as the text of a YAML file."""
    return OmegaConf.to_yaml(OmegaConf.create(raw))
