"""README and docs/: commands compose and pass the check, links lead somewhere, and every setting, metric and message
that a page names is in the code. test_docs_run.py runs what can be run in minutes."""

import ast
import functools
import importlib.util
import json
import re
import runpy
import shlex
from pathlib import Path

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from pages import GENERATED, PAGES, ROOT, anchors, commands, fences, links, spans

import alignkit
from alignkit.cli import USAGE, find_recipes
from alignkit.runtime.config import conf_dir, load
from alignkit.runtime.explain import every_key, explain_command
from alignkit.runtime.written import composed, groups, option_entries, options

README = PAGES["README.md"]
COMMANDS = sorted({command for text in PAGES.values() for command in commands(text)})
QUESTIONS = ("serve-reward", "report", "sync", "recipes", "dashboard", "export")  # verbs with tests of their own
OPEN = ("sft.trainer", "reward_model.trainer", "peft.settings", "reward.members", "reward.weights", "ptx.path")
OF_THE_READER = {"data=sums", "reward=brief", "judge=brief", "advantage=to_go", "kl=decaying", "data.largest"}
ROOMS = "alignkit|algo|data|models|rollout|reward|stages|runtime|observe|tests|recipes|conf|docs"
FILE = re.compile(rf"(?:{ROOMS})/\S+\.(?:py|yaml|json|svg)(?:::\w+)?")
METRIC = re.compile(r"(?:sft|reward_model|ppo|evaluate)/[a-z_0-9]+")
KEY = re.compile(rf"^\+{{0,2}}((?:{'|'.join(groups())})\.[a-z_0-9.]+)(?:=\S*)?$")
RECIPE_FIRST = {"run", "load_config"}  # calls that take a recipe and settings


@pytest.fixture(scope="module", autouse=True)
def users_own(tmp_path_factory):
    """The module of the user that the pages name, and the key of a judge."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_rewards.py").write_text("def score(prompts, responses):\n    return [0.0 for _ in responses]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("API_KEY", "x")
        yield


def test_the_pages_have_commands():
    assert len(COMMANDS) > 60 and len(PAGES) > 20


@pytest.mark.parametrize("command", COMMANDS)
def test_command_composes_and_passes_the_check(command):
    recipe, *words = shlex.split(command)[1:]
    words = [word for word in words if word not in ("KEY=VALUE", "KEY", "GROUP", "RECIPE")]
    if recipe in ("plan", "check"):
        recipe, *words = [word for word in words if not re.fullmatch(r"--gpu-memory(=\d+)?|\d+", word)] or ["rlhf"]
    if recipe in ("resume", "evaluate"):  # further words of these change settings in the same way
        recipe, words = "rlhf", words[1:]
    if recipe == "explain":
        assert explain_command(words, dict.fromkeys(find_recipes(), "")) == 0
        return
    if recipe in QUESTIONS:
        assert f"alignkit {recipe}" in USAGE
        return
    if any(word.startswith("-") and word != "-m" for word in words):
        return  # a question to Hydra (--cfg, --info), tested with the command line; --config-dir: test_docs_run.py
    overrides = []
    for word in OverridesParser.create().parse_overrides([word for word in words if word != "-m"]):
        if word.is_sweep_override():  # one job of the sweep stands for all
            overrides.append(f"{word.key_or_group}={next(iter(word.sweep_string_iterator()))}")
        else:
            overrides.append(word.input_line)
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = hydra.compose(recipe, overrides=overrides)
    load(OmegaConf.to_container(config, resolve=True))


@pytest.mark.parametrize("page", PAGES)
def test_python_commands_name_files_and_modules_that_exist(page):
    text = "\n".join([*fences(PAGES[page], "bash"), *spans(PAGES[page])])
    for module in re.findall(r"^python -m (alignkit\S*)", text, re.M):
        assert importlib.util.find_spec(module), module
    for file in re.findall(r"^python ((?:tests|recipes|docs)/\S+\.py)", text, re.M):
        assert (ROOT / file).is_file(), file


def test_the_python_of_the_page_on_python_takes_public_names_and_settings_that_pass():
    from alignkit import load_config

    bodies = fences(PAGES["docs/pages/python.md"], "python")
    nodes = [node for body in bodies for node in ast.walk(ast.parse(body))]
    asked = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert asked and asked <= {*alignkit.__all__}
    called = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") in RECIPE_FIRST]
    assert {node.func.id for node in called} == RECIPE_FIRST
    for node in called:
        assert load_config(*(ast.literal_eval(word) for word in node.args)).trusted == []


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_lead_somewhere(page):
    for target in links(PAGES[page]):
        path, _, place = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.is_file(), target
        if place:
            assert place in anchors(file.read_text("utf-8")), target


@functools.cache
def literals() -> list[str]:
    """The texts of alignkit's code; in an f-string the places of its values are left out."""
    found = []
    for file in Path(alignkit.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("\0".join(part.value if isinstance(part, ast.Constant) else "" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def is_metric(name: str) -> bool:
    """Whether a stage logs it: always, or only in some runs, and then its name stands in the code."""
    logged = json.loads((ROOT / "tests/logged_metrics.json").read_text())
    return any(name in names for names in logged.values()) or name.partition("/")[2] in literals()


def is_file(word: str) -> bool:
    path = word.partition("::")[0]
    return "*" in path or (ROOT / path).exists() or (ROOT / "alignkit" / path).exists()


@pytest.mark.parametrize("page", PAGES)
def test_settings_metrics_options_and_files_that_a_page_names_exist(page):
    words = {word for span in spans(PAGES[page]) for word in span.split()}
    keys = {found[1] for word in words if (found := KEY.match(word)) and not found[1].startswith(OPEN)}
    missing = keys - set(every_key(tuple(find_recipes())))
    missing |= {word for word in words if METRIC.fullmatch(word) and not is_metric(word)}
    missing |= {word for word in words if FILE.fullmatch(word) and not is_file(word)}
    for group, _, option in (word.partition("=") for word in words):
        if group in groups() and re.fullmatch(r"[a-z_0-9]+", option) and option not in options(group):
            missing.add(f"{group}={option}")
    assert missing - OF_THE_READER == set()


def test_every_setting_is_in_the_reference_and_it_is_up_to_date():
    written = runpy.run_path(str(ROOT / "docs" / "reference.py"))["page"]()
    assert written == PAGES[GENERATED], "run python docs/reference.py"
    keys = {key for group in groups() for option in options(group) for key in option_entries(group, option)}
    keys |= {key for recipe in find_recipes() for key in composed(recipe)[0]}
    named = {key for key in keys if not key.endswith("_target_") and not key.startswith(OPEN)}
    assert named - anchors(written) <= set(groups()) | set(find_recipes())


def test_every_message_of_troubleshooting_is_one_of_the_code():
    told = PAGES["docs/pages/troubleshooting.md"].partition("## Without a message")[0]
    lines, texts = re.findall(r"^\| `(.+?)` \|", told, re.M), literals()
    assert len(lines) >= 25
    for line in lines:
        parts = [part.strip() for part in line.replace("\\|", "|").split("...") if len(part.strip()) > 3]
        assert parts, line
        assert [part for part in parts if not any(part in text for text in texts)] == [], line


def test_every_option_of_trls_last_ppo_is_accounted_for():
    """PPOConfig of TRL 1.12.0 with transformers 5.23: its fields and their defaults, as dataclasses.fields has them."""
    theirs, page = (
        json.loads((Path(__file__).parent / "trl_1_12_ppo_options.json").read_text()),
        PAGES["docs/pages/trl.md"],
    )
    assert len(theirs) == 145
    assert theirs.keys() - set(spans(page)) == set()
    rows = re.findall(r"^\| `(\w+)` \| ([^|`]+) \| `([a-z_.]+)` \| ([^|]+) \|", page, re.M)
    assert len(rows) > 12
    ours = composed("rlhf")[0]
    for name, default, key, our_default in rows:
        assert str(theirs[name]) == default or "x" in default, name
        assert ours[key].text == our_default, key


def test_the_memory_of_the_experiments_is_that_of_their_files():
    promised = {
        file.stem: found[1]
        for file in (conf_dir() / "experiment").iterdir()
        if (found := re.search(r"planned peak ([\d.]+) GiB", file.read_text("utf-8")))
    }
    rows = re.findall(r"^\| `experiment=(\w+)` .* ([\d.]+) GiB \|$", PAGES["docs/pages/experiments.md"], re.M)
    assert dict(rows) == promised


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "docs" / "mkdocs.yml").read_text("utf-8").partition("nav:")[2]
    named = {f"docs/pages/{path}" for path in re.findall(r": (\S+\.md)$", navigation, re.M)}
    assert named == PAGES.keys() - {"README.md"}


def test_set_up_commands_are_one_line_each():
    lines = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert [line.rsplit("/", 1)[-1] for line in lines] == ["alignkit rlhf", "pytest"]


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_is_filled_in(page):
    assert not re.search(r"@@|\{\{|TODO|TBD", PAGES[page])
