"""Every file under conf/ composes, passes the check, explains each of its keys, and sets what the code reads."""

import ast
import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from alignkit.runtime.artifact import STUDIES
from alignkit.runtime.config import SETTINGS, STRATEGIES, RunConfig, conf_dir, load
from alignkit.runtime.rules import TRAINS

CONF = conf_dir()
PACKAGE = Path(sys.modules["alignkit"].__file__).parent
PRIMARIES = sorted(file.stem for file in CONF.glob("*.yaml") if file.stem != "base")
FILES = sorted(CONF.rglob("*.yaml"))
PRESET_FOLDERS = ("experiment", "sweep")
PRESETS = [f"{folder}={file.stem}" for folder in PRESET_FOLDERS for file in sorted((CONF / folder).glob("*.yaml"))]
OPTIONS = [f"{file.parent.name}={file.stem}" for file in FILES if file.parent.name in (*SETTINGS, *STRATEGIES)]
NEEDS = {  # groups and options that make sense only with another setting; an adapter needs a pretrained model under it
    "peft": ("model.path=folder",),
    "advantage=grpo": ("ppo.samples_per_prompt=2",),
    "advantage=rloo": ("ppo.samples_per_prompt=2",),
    "ptx=instructgpt": ("model.context_length=2048",),
    **{f"{group}=function": (f"{group}.function=mine.score", "trusted=[mine]") for group in ("reward", "judge")},
    **{f"{group}=http": (f"{group}.url=http://127.0.0.1:8321/score",) for group in ("reward", "judge")},
    "judge=chat": ("judge.url=http://127.0.0.1:8000/v1/chat/completions",),
    "reward=ensemble": ("+reward@reward.members.a=model", "+reward@reward.members.b=model"),
    "reward=weighted_sum": ("+reward@reward.members.a=model", "+reward.weights={a:1.0}"),
}


def composed(primary: str, *overrides: str) -> dict:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose(primary, overrides=list(overrides))
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=False)


@pytest.fixture(scope="module", autouse=True)
def a_module_of_the_user(tmp_path_factory):
    """`mine`, with a reward function."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text("def score(prompts, responses):\n    return [0.0 for _ in responses]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder), prepend=":")
        yield


@functools.cache
def checked(primary: str, *overrides: str) -> RunConfig:
    return load(composed(primary, *overrides))


def with_needs(option: str) -> tuple[str, ...]:
    return option, *NEEDS.get(option, NEEDS.get(option.partition("=")[0], ()))


def chosen(option: str) -> RunConfig:
    """rlhf with one option and what it needs."""
    return checked("rlhf", *with_needs(option))


def sweep_words(preset: str) -> dict[str, str]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("rlhf", overrides=[preset], return_hydra_config=True)
    return {str(key): str(value) for key, value in (config.hydra.sweeper.params or {}).items()}


def test_there_is_a_primary_for_every_recipe_and_a_group_for_every_section():
    recipes = {file.stem for file in (CONF.parent / "recipes").glob("*.py") if not file.stem.startswith("_")}
    assert set(PRIMARIES) == recipes
    groups = {str(file.parent.relative_to(CONF)) for file in FILES if file.parent != CONF}
    assert groups <= {*SETTINGS, *STRATEGIES, *PRESET_FOLDERS, "hydra/launcher"}
    assert {option.partition("=")[0] for option in OPTIONS} == {*SETTINGS, *STRATEGIES} - set(STUDIES)
    assert set(TRAINS) == recipes


@pytest.mark.parametrize("primary", PRIMARIES)
def test_every_primary_composes_and_passes_the_check(primary):
    assert isinstance(checked(primary), RunConfig)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_passes_the_check(option):
    group, _, name = option.partition("=")
    given = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))
    given.pop("defaults", None)
    section = getattr(chosen(option), group)
    needed = {word.partition("=")[0].rpartition(f"{group}.")[2].partition(".")[0] for word in with_needs(option)[1:]}
    for key in given.keys() - {"_target_"} - needed:
        value = getattr(section, key)
        assert (dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value) == given[key]


@pytest.mark.parametrize("primary", PRIMARIES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes_and_passes_the_check_with_every_recipe(preset, primary):
    assert isinstance(checked(primary, preset), RunConfig)


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset.startswith("sweep=")])
def test_every_job_of_a_sweep_passes_the_check(preset):
    params = sweep_words(preset)
    assert params, "a sweep preset names what it varies under hydra.sweeper.params"
    for key, values in params.items():
        override = OverridesParser.create().parse_override(f"{key}={values}")
        assert override.is_sweep_override()
        ends = override.is_interval_sweep() and (override.value().start, override.value().end)
        for value in ends or override.sweep_string_iterator():
            assert isinstance(checked("rlhf", preset, f"{key}={value}"), RunConfig)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF)))
def test_every_file_and_every_key_is_explained(file):
    lines = file.read_text("utf-8").splitlines()
    said = [line for line in lines if line.startswith("#") and "@package" not in line]
    assert said and lines.index(said[0]) <= 1, "a file begins with a comment that says what it is"
    block, silent = None, []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if not line.startswith((" ", "-")):
            block = text.partition(":")[0]
        if block in ("defaults", "hydra") or text.startswith("_target_:"):
            continue
        following = next((other for other in lines[number:] if other.strip()), "")
        heads_a_section = text.endswith(":") and following.startswith(" ")
        if not heads_a_section and " # " not in line:
            silent.append(f"{number}: {text}")
    assert not silent, "keys without a comment on their line"


def strategy_and_settings_classes() -> dict[type, str]:
    """Class -> section, of everything that an option of conf/ can make."""
    found = {}
    for option in OPTIONS:
        group = option.partition("=")[0]
        found[type(section := getattr(chosen(option), group))] = group
        inner = {value for value in vars(section).values() if dataclasses.is_dataclass(value) and group in SETTINGS}
        found |= {type(value): type(value).__name__.lower() for value in inner}
    return found | {type(getattr(checked(study), study)): study for study in STUDIES}


@pytest.fixture(scope="module")
def classes() -> dict[type, str]:
    return strategy_and_settings_classes()


@pytest.mark.parametrize("option", OPTIONS)
def test_every_field_is_written_down_in_every_option(option):
    group, _, name = option.partition("=")
    fields = {field.name for field in dataclasses.fields(getattr(chosen(option), group))}
    given = set(OmegaConf.load(CONF / group / f"{name}.yaml")) - {"_target_", "defaults"}
    base = OmegaConf.load(CONF / group / f"{name}.yaml").get("defaults")
    assert given == fields or (base and given < fields)


def test_fields_have_no_second_value_in_python(classes):
    for cls in classes:
        for field in dataclasses.fields(cls):
            default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
            assert not default, f"{cls.__name__}.{field.name}: the value belongs in conf/"


def test_every_settings_class_can_be_reached_from_conf(classes):
    reachable = {f"{base.__module__}.{base.__name__}" for cls in classes for base in cls.__mro__}
    for file in PACKAGE.rglob("*.py"):
        module = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(d) == "settings" for d in node.decorator_list):
                assert f"{module}.{node.name}" in reachable


def reads(tree: ast.AST, inside: str = ""):
    """(receiver, attribute) of every attribute that is read, outside `__post_init__`: `ppo.clip` -> ("ppo", "clip")."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield ast.unparse(node.value).split(".")[-1], node.attr
        yield from reads(node)


def test_every_field_is_read_somewhere(classes):
    """`trusted` is the one that `load` itself uses, before there is a RunConfig to read it from."""
    files = [*PACKAGE.rglob("*.py"), *(CONF.parent / "recipes").glob("*.py")]
    used = {pair for file in files for pair in reads(ast.parse(file.read_text("utf-8")))}
    unread = []
    for cls, section in {**classes, RunConfig: "config"}.items():
        receivers = {"self", "settings", "options", "spec", section}
        unread += [
            f"{cls.__name__}.{field.name}"
            for field in dataclasses.fields(cls)
            if not any((receiver, field.name) in used for receiver in receivers) and field.name != "trusted"
        ]
    assert not unread, "settings that no code reads"


WITHOUT_TORCH_OR_NETWORK = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("composition and check must not use the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import hydra
from omegaconf import OmegaConf
import alignkit.cli, alignkit.runtime.recipe
from alignkit.runtime.config import conf_dir, load
for words in sys.argv[1:]:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        load(OmegaConf.to_container(hydra.compose("rlhf", overrides=words.split()), resolve=True))
heavy = {"torch", "transformers", "wandb", "datasets", "trl", "accelerate", "peft"} & sys.modules.keys()
assert not heavy, heavy
"""


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def test_composition_and_check_need_neither_torch_nor_a_network():
    strategies = [option for option in OPTIONS if option.partition("=")[0] in STRATEGIES]
    words = [" ".join(with_needs(option)) for option in (*strategies, "peft=lora")]
    ended = run_python(WITHOUT_TORCH_OR_NETWORK, "", *words)
    assert ended.returncode == 0, ended.stderr


def test_a_rank_does_not_import_hydra():
    code = "import alignkit.runtime.worker, sys; assert not {'hydra', 'omegaconf'} & sys.modules.keys()"
    ended = run_python(code)
    assert ended.returncode == 0, ended.stderr
