"""Rewards at the boundary: what is refused, what a run's identity covers, and which stages a chain then has."""

import functools
import json
import runpy
import sys
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import alignkit.cli
from alignkit.cli import find_recipes
from alignkit.errors import UserError
from alignkit.runtime.artifact import stage_digest
from alignkit.runtime.config import conf_dir, load
from alignkit.runtime.run import Run
from alignkit.runtime.sources import with_sources

MODULE = "text = 'no function'\n\ndef score(prompts, responses):\n    return [0.0 for _ in responses]\n"
TWO = ("reward=ensemble", "+reward@reward.members.a=model", "+reward@reward.members.b=model")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with a module `mine` that holds a reward function."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    for name in ("RANK", "SLURM_PROCID", "MY_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "mine.py").write_text(MODULE)
    return tmp_path


@functools.cache
def composed(*words: str) -> dict:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("ppo", overrides=["tracking=none", *words]), resolve=True)


MISTAKES = {
    "no function": (
        ["reward=function"],
        ["reward: function=null: expected module.name of score(prompts, responses) -> list of numbers"],
    ),
    "no module": (
        ["reward=function", "reward.function=score"],
        ["reward: function=score: expected module.name of score(prompts, responses) -> list of numbers"],
    ),
    "a function outside alignkit": (
        ["reward=function", "reward.function=mine.score"],
        ["reward.function: 'mine.score' runs code outside alignkit; allow it with 'trusted=[mine]'"],
    ),
    "a function that is not there": (
        ["reward=function", "reward.function=mine.skore", "trusted=[mine]"],
        ["reward.function: 'mine.skore' cannot be imported: module 'mine' has no attribute 'skore'"],
    ),
    "no function at all": (
        ["reward=function", "reward.function=mine.text", "trusted=[mine]"],
        ["reward.function: 'mine.text' is not a function"],
    ),
    "what a failure cannot do": (
        ["reward=function", "reward.function=mine.score", "trusted=[mine]", "reward.on_failure=skip", "reward.batch=0"],
        [
            "reward.batch: expected greater than or equal to 1, got 0; set it with reward.batch=VALUE",
            "reward.on_failure: expected 'stop' or 'mean', got 'skip'; set it with reward.on_failure=VALUE",
        ],
    ),
    "a call longer than the other ranks wait": (
        ["reward=http", "reward.url=http://a/b", "reward.timeout=3600"],
        ["reward.timeout: expected less than or equal to 1500, got 3600; set it with reward.timeout=VALUE"],
    ),
    "no url": (["reward=http"], ["reward: url=null: expected http://HOST:PORT/PATH or https://..."]),
    "another url": (
        ["reward=http", "reward.url=ftp://a/b"],
        ["reward: url=ftp://a/b: expected http://HOST:PORT/PATH or https://..."],
    ),
    "a password in the url": (
        ["reward=http", "reward.url=https://me:secret@a/b"],
        ["reward: url holds a user or a password: leave it out, and name a variable in token_env"],
    ),
    "a token that is not there": (
        ["reward=http", "reward.url=http://a/b", "reward.token_env=MY_TOKEN"],
        ["reward: token_env=MY_TOKEN: the environment has no such variable"],
    ),
    "one member": (
        ["reward=ensemble", "+reward@reward.members.a=model"],
        ["reward: members: expected at least two rewards, got a"],
    ),
    "a member without a weight": (
        ["reward=weighted_sum", "+reward@reward.members.a=model", "+reward.weights={b: 1.0}"],
        ["reward: weights: expected one for each of members, got members: a; weights: b"],
    ),
    "faults of members": (
        [
            *("reward=ensemble", "+reward@reward.members.a=http", "reward.members.a.url=x", "+reward.members.c.path=p"),
            *(
                "+reward@reward.members.b=function",
                "reward.members.b.function=mine.score",
                "+reward.members.b.tmeout=3",
            ),
        ],
        [
            "reward.members.a: url=x: expected http://HOST:PORT/PATH or https://...",
            "reward.members.b.function: 'mine.score' runs code outside alignkit; allow it with 'trusted=[mine]'",
            "reward.members.b.tmeout: unknown key; did you mean reward.members.b.timeout?",
            "reward.members.c._target_: expected module.Class, got None; choose an option with "
            "+reward@reward.members.c=NAME",
        ],
    ),
    "a member outside alignkit": (
        [*TWO, "reward.members.a._target_=mine.Reward"],
        ["reward.members.a._target_: 'mine.Reward' runs code outside alignkit; allow it with 'trusted=[mine]'"],
    ),
    "a member that is no reward": (
        [*TWO, "reward.members.a._target_=alignkit.algo.control.FixedKL"],
        [
            "reward.members.a._target_: 'alignkit.algo.control.FixedKL' lacks open(folder, encoder, cluster) or "
            "score(answers, microbatch), which reward must have"
        ],
    ),
    "a member that is not added": (
        ["reward=ensemble", "reward@reward.members.a=model"],
        ["reward@reward.members.a: has to be added, not overridden: +reward@reward.members.a=VALUE"],
    ),
    "weights that are not added": (
        ["reward=weighted_sum", "reward.weights={a: 1.0}"],
        ["reward.weights: has to be added, not overridden: +reward.weights=VALUE"],
    ),
    "no such member": (
        ["reward=ensemble", "+reward@reward.members.a=modell"],
        ["reward=modell: no such option; options: ensemble, function, http, model, weighted_sum"],
    ),
}


@pytest.mark.parametrize("words, expected", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_in_its_own_words(here, monkeypatch, capsys, words, expected):
    monkeypatch.setattr(sys, "argv", ["alignkit", "ppo", *words])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as stop:
        alignkit.cli.main()
    assert capsys.readouterr().err.splitlines() == [f"error: {line}" for line in expected]
    assert stop.value.code == 2 and not Path("runs").exists()


def test_members_are_built_wherever_they_stand(here):
    words = (*TWO, "reward.members.b.path=X", "+reward@reward.members.c=weighted_sum",
             "+reward@reward.members.c.members.d=function", "reward.members.c.members.d.function=mine.score",
             "+reward.members.c.weights.d=0.5", "trusted=[mine]")  # fmt: skip
    reward = load(composed(*words)).reward
    assert (reward.members["a"].path, reward.members["b"].path) == (None, "X")
    assert reward.members["c"].members["d"].function == "mine.score" and reward.members["c"].weights == {"d": 0.5}


def identity(*words: str) -> str:
    return stage_digest("ppo", with_sources(composed(*words)), "", {})


def test_the_code_of_a_function_is_part_of_what_a_run_is(here):
    words = ("reward=function", "reward.function=mine.score", "trusted=[mine]")
    inside = (*TWO, "+reward@reward.members.c=function", "reward.members.c.function=mine.score", "trusted=[mine]")
    before = [identity(*words), identity(*inside)]
    assert [identity(*words), identity(*inside)] == before
    (here / "mine.py").write_text(MODULE + "\n")
    assert not {identity(*words), identity(*inside)} & set(before)


def model_folder(place: Path, text: str) -> str:
    place.mkdir()
    (place / "config.json").write_text(text)
    return str(place)


def test_the_model_of_a_member_is_part_of_what_a_run_is_not_its_place(here):
    def with_b(path: str) -> str:
        return identity(*TWO, f"reward.members.b.path={path}")

    one, same, other = (model_folder(here / name, text) for name, text in zip("xyz", ["{}", "{}", "{ }"]))
    assert with_b(one) == with_b(same) != with_b(other)
    with pytest.raises(UserError, match="'nowhere' does not exist"):
        with_b("nowhere")


@pytest.mark.parametrize("key, value", [("timeout", 3.0), ("retries", 9), ("backoff", 9.0), ("concurrency", 9)])
def test_how_an_endpoint_is_asked_is_no_part_of_what_a_run_is(here, key, value):
    words = ("reward=http", "reward.url=http://a/b")
    assert identity(*words, f"reward.{key}={value}") == identity(*words)
    assert identity(*words, "reward.batch=3") != identity(*words) != identity("reward=http", "reward.url=http://a/c")


class Recorded:
    """A run that only notes what its recipe asks of it."""

    def __init__(self, needs: bool) -> None:
        self.needs_reward_model, self.asked = needs, []

    def stage(self, name, **inputs):
        self.asked.append((name, {key: value for key, value in inputs.items() if key in ("reward", "init")}))
        return name

    def given(self, key):
        self.asked.append((key, {}))
        return key


@pytest.mark.parametrize("recipe, first", [("rlhf", "reward_model"), ("ppo", "reward.path")])
def test_a_chain_makes_or_asks_for_a_reward_model_only_where_it_scores(recipe, first):
    chain = runpy.run_path(str(find_recipes()[recipe]), run_name="alignkit.recipe")["main"].chain
    for needs in (True, False):
        run = Recorded(needs)
        chain(run)
        asked = dict(run.asked)
        assert (first in asked) is needs
        assert asked["ppo"]["reward"] == asked["evaluate"]["reward"] == (first if needs else None)


def test_without_a_reward_model_a_chain_needs_no_pairs(here):
    rows = [{"prompt": f"say {i}", "response": "this"} for i in range(50)]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("data=jsonl", "data.path=rows.jsonl")
    outside = (*data, "reward=function", "reward.function=mine.score", "trusted=[mine]")
    raw = composed(*outside)
    assert not Run("rlhf", load(raw), raw).needs_reward_model
    for recipe, words in (("rlhf", data), ("reward_model", outside)):
        raw = composed(*words)
        with pytest.raises(UserError, match="data: no preference pairs"):
            Run(recipe, load(raw), raw)._look()


def test_a_member_without_a_path_is_asked_for_by_its_key(here):
    raw = composed(*TWO, "reward.members.a.path=X", "policy=Y")
    with pytest.raises(UserError, match=r"'X' does not exist"):  # before anything is asked for
        Run("ppo", load(raw), raw)
    model_folder(here / "X", "{}")
    with pytest.raises(UserError, match=r"^reward\.members\.b\.path: missing; alignkit ppo needs the folder of a fin"):
        Run("ppo", load(raw), raw).given("reward.path")
