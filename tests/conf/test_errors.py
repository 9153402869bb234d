"""A mistake is told in one line that says where it is and how to mend it: code 2, no traceback, no runs/ folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import alignkit.cli
import alignkit.runtime.recipe
from alignkit.runtime.config import REFUSED

KEYS_OF_ADAPTIVE_KL = "coef, target, horizon, estimator, place"


@pytest.fixture
def cli(cli):
    """As the `cli` of all tests, but gives (exit code, lines of stderr)."""

    def call(*words: str) -> tuple[int, list[str]]:
        code, _, said = cli(*words)
        return code, said.splitlines()

    return call


def refused(ended: tuple[int, list[str]], *expected: str) -> None:
    """The command ended with code 2, said exactly these lines, and made no runs/ folder in the working folder."""
    code, said = ended
    assert said == [f"error: {line}" for line in expected]
    assert code == 2
    assert not Path("runs").exists()


MISTAKES = {
    "abbreviated key": (["ppo.lr=1e-3"], ["ppo.lr: unknown key; did you mean ppo.learning_rate?"]),
    "misspelt key": (["ppo.eopchs=4"], ["ppo.eopchs: unknown key; did you mean ppo.epochs?"]),
    "misspelt group": (["pppo.epochs=4"], ["pppo.epochs: unknown key; did you mean ppo.epochs?"]),
    "key without its group": (
        ["center_coef=1"],
        ["center_coef: unknown key; did you mean reward_model.center_coef?"],
    ),
    "key like no other": (["zzz=1"], ["zzz: unknown key; alignkit rlhf --cfg job shows all keys"]),
    "added key": (
        ["+kl.zzz=4"],
        [f"kl.zzz: unknown key; known keys: {KEYS_OF_ADAPTIVE_KL}"],
    ),
    "key of another option": (
        ["kl=fixed", "kl.target=4"],
        ["kl.target: unknown key with this choice of kl; it belongs to kl=adaptive or kl=adaptive_ziegler"],
    ),
    "key of two other options": (
        ["data.path=x"],
        ["data.path: unknown key with this choice of data; it belongs to data=hub or data=jsonl"],
    ),
    "removed key": (["~ppo.epochs"], ["ppo.epochs: missing; set it with ppo.epochs=VALUE"]),
    "removed group": (["~kl"], ["kl: missing"]),
    "text for an integer": (
        ["ppo.epochs=four"],
        ["ppo.epochs: expected a valid integer, got 'four'; set it with ppo.epochs=VALUE"],
    ),
    "fraction for an integer": (
        ["ppo.epochs=1.5"],
        ["ppo.epochs: expected a valid integer, got 1.5; set it with ppo.epochs=VALUE"],
    ),
    "text for a switch": (
        ["force=perhaps"],
        ["force: expected a valid boolean, got 'perhaps'; set it with force=VALUE"],
    ),
    "number for a text": (["name=1"], ["name: expected a text, got the number 1; quote it: 'name=\"1\"'"]),
    "path for a name": (["name=../mine"], ["name=../mine: expected the name of one folder in runs, not a path"]),
    "hidden name": (["name=.store"], ["name=.store: expected the name of one folder in runs, not a path"]),
    "nothing for a number": (["seed=null"], ["seed: expected a valid integer, got None; set it with seed=VALUE"]),
    "not a number": (["kl.target=nan"], ["kl.target: expected a finite number, got nan; set it with kl.target=VALUE"]),
    "too small": (
        ["ppo.epochs=0"],
        ["ppo.epochs: expected greater than or equal to 1, got 0; set it with ppo.epochs=VALUE"],
    ),
    "too large": (["ppo.clip=1.0"], ["ppo.clip: expected less than 1, got 1.0; set it with ppo.clip=VALUE"]),
    "not one of the choices": (
        ["reward.normalise=z"],
        [
            "reward.normalise: expected 'none', 'shift', 'shift_scale' or 'temperature', got 'z'; "
            "set it with reward.normalise=VALUE"
        ],
    ),
    "batch not divisible": (
        ["ppo.batch=10", "ppo.minibatch=3"],
        ["ppo: batch=10 must be a multiple of minibatch=3"],
    ),
    "fewer episodes than one batch": (
        ["ppo.episodes=10", "ppo.batch=64", "ppo.minibatch=32"],
        ["ppo: episodes=10 must be a multiple of batch=64"],
    ),
    "heads do not divide the width": (
        ["model.hidden_size=10", "model.num_heads=4"],
        ["model: hidden_size=10 must be a multiple of num_heads=4"],
    ),
    "longer than the context": (
        ["model.context_length=90", "ppo.max_prompt=48", "rollout.max_response=43", "sft.max_length=91"],
        [
            "ppo.max_prompt=48 plus rollout.max_response=43 is 91 tokens, above model.context_length=90",
            "reward_model.max_length=128 tokens is above model.context_length=90",
            "sft.max_length=91 tokens is above model.context_length=90",
        ],
    ),
    "a bad field beside a broken rule": (
        ["ppo.batch=50", "ppo.clip=2.0"],
        [
            "ppo.clip: expected less than 1, got 2.0; set it with ppo.clip=VALUE",
            "ppo: batch=50 must be a multiple of minibatch=32",
        ],
    ),
    "several at once": (
        ["ppo.batch=10", "ppo.minibatch=3", "sft.epochs=-1", "kl.target=x", "+launch.zzz=1", "seed=x"],
        [
            "kl.target: expected a valid number, got 'x'; set it with kl.target=VALUE",
            "launch.zzz: unknown key; known keys: "
            "processes, machines, machine, rendezvous, threads, inline, grace, patience",
            "ppo: batch=10 must be a multiple of minibatch=3",
            "seed: expected a valid integer, got 'x'; set it with seed=VALUE",
            "sft.epochs: expected greater than 0, got -1; set it with sft.epochs=VALUE",
        ],
    ),
    "unknown option": (["kl=adaptve"], ["kl=adaptve: no such option; options: adaptive, adaptive_ziegler, fixed"]),
    "number for an option": (["ppo=1"], ["ppo=1: no such option; options: default"]),
    "value that refers to nothing": (["kl.target=${zzz}"], ["Interpolation key 'zzz' not found"]),
    "target outside alignkit": (
        ["kl._target_=os.path.join"],
        ["kl._target_: 'os.path.join' runs code outside alignkit; allow it with 'trusted=[os.path]'"],
    ),
    "target whose name begins like alignkit": (
        ["kl._target_=alignkit_evil.control.FixedKL"],
        [
            "kl._target_: 'alignkit_evil.control.FixedKL' runs code outside alignkit; "
            "allow it with 'trusted=[alignkit_evil.control]'"
        ],
    ),
    "trusted target that is no dataclass": (
        ["kl._target_=os.path.join", "trusted=[os]"],
        ["kl._target_: 'os.path.join' is not a dataclass"],
    ),
    "target without a module": (
        ["kl._target_=FixedKL"],
        ["kl._target_: expected module.Class, got 'FixedKL'; choose an option with kl=NAME"],
    ),
    "target that is not in its module": (
        ["kl._target_=alignkit.algo.control.Nope"],
        [
            "kl._target_: 'alignkit.algo.control.Nope' cannot be imported: "
            "module 'alignkit.algo.control' has no attribute 'Nope'"
        ],
    ),
    "target in no module": (
        ["kl._target_=alignkit.nope.Nope"],
        ["kl._target_: 'alignkit.nope.Nope' cannot be imported: No module named 'alignkit.nope'"],
    ),
    "data without a path": (
        ["data=jsonl"],
        [
            "data.path=FILE is required: .jsonl, .json (either also with .gz) or .parquet; "
            "a glob or a list [a.jsonl,b.jsonl] works too"
        ],
    ),
    "batch not divisible by the ranks": (
        ["launch.processes=3", "sft.batch=63", "reward_model.batch=64"],
        ["reward_model.batch=64 must be a multiple of launch.processes=3"],
    ),
    "ranks not divisible by the shards": (
        ["launch.processes=4", "sharding.shard_size=3", "sft.batch=64", "reward_model.batch=64"],
        ["launch.processes=4 must be a multiple of sharding.shard_size=3"],
    ),
    "nothing to offload": (
        ["sharding.offload_frozen=true", "peft=lora", "model.path=x"],
        [
            "sharding.offload_frozen=true: with peft.method=lora reference and reward model are the trained models "
            "without their adapters, so there is nothing to offload; set it to false"
        ],
    ),
    "one response where a prompt needs several": (
        ["advantage=rloo"],
        [
            "ppo.samples_per_prompt=1: advantage RLOO compares the responses to one prompt, so it needs at least 2",
        ],
    ),
    "responses that do not fill a batch": (
        ["ppo.samples_per_prompt=3"],
        ["ppo: batch=64 must be a multiple of samples_per_prompt=3"],
    ),
    "settings of a value model that is not there": (
        ["advantage=reinforce_pp", "ppo.value_warmup=2", "ppo.joint=true", "shaping.score_position=eos_plus_one"],
        [
            f"{mend.partition('=')[0]}: advantage ReinforcePlusPlus has no value model; set {mend}"
            for mend in ("ppo.joint=false", "ppo.value_warmup=0", "shaping.score_position=eos")
        ],
    ),
    "a controller that could turn negative": (
        ["kl.horizon=12"],
        ["kl.horizon=12 must be above a fifth of ppo.batch=64 episodes, or the coefficient could turn negative"],
    ),
    "ptx texts that would not be used": (
        ["ptx.path=mine.jsonl"],
        ["ptx.path=mine.jsonl: not used while ptx.coef=0; choose ptx=demonstrations or set ptx.coef"],
    ),
    "longer ptx texts than the model takes": (
        ["ptx=demonstrations", "ptx.max_length=129"],
        ["ptx.max_length=129 tokens is above model.context_length=128"],
    ),
    "an option that is not there, in a list of presets": (
        ["experiment=[n_plus,zzz]"],
        [
            "experiment=zzz: no such option; options: chinese, from_scratch, gao, gpt2_sentiment, hh_harmless, "
            "hh_qwen3, instructgpt, movie_reviews, n_plus, ppo_max, small, stiennon, tldr_pythia_1b, tldr_pythia_2_8b, "
            "tldr_pythia_6_9b, ultrafeedback_llama, ultrafeedback_qwen3_lora, ziegler"
        ],
    ),
    "a best policy that nobody looks for": (
        ["ppo.keep=best", "ppo.patience=3"],
        ["ppo: keep=best and patience=3 need evaluate_every, which is null"],
    ),
    "one sample to choose from": (
        ["evaluate.best_of_samples=1"],
        ["evaluate: best_of_samples=1: nothing can be chosen from one; set it to 0 or to 2 and more"],
    ),
    "a chat judge without its url": (
        ["judge=chat"],
        ["judge: url=null: expected http://HOST:PORT/PATH or https://..."],
    ),
    "the judge as it was set before": (
        ["evaluate.judge=gold"],
        [
            "evaluate.judge: unknown key; choose who judges with judge=gold, model, http, chat or another option of "
            "judge"
        ],
    ),
    "scores normalised twice": (
        ["shaping.running=scale"],
        [
            "shaping.running=scale with reward.normalise=shift_scale: scores would be normalised twice; "
            "set one of them to none"
        ],
    ),
    "a loss without a gradient": (
        ["kl=fixed", "kl.place=loss"],
        ["kl: place=loss needs estimator=k2 or k3: the gradient of k1 is 0 in expectation"],
    ),
    "warm-up as long as the run": (
        ["ppo.episodes=640", "ppo.warmup=10"],
        ["ppo: warmup=10 must be below the 10 iterations that episodes=640 of batch=64 make"],
    ),
    "value warm-up as long as the run": (
        ["ppo.episodes=640", "ppo.value_warmup=11"],
        ["ppo: value_warmup=11 must be below the 10 iterations that episodes=640 of batch=64 make"],
    ),
    "a published recipe on a small run": (
        ["experiment=[ppo_max,small]"],
        ["ppo: warmup=1000 must be below the 80 iterations that episodes=5120 of batch=64 make"],
    ),
    "one rate of decay": (
        ["ppo.adam_beta1=-0.1"],
        ["ppo.adam_beta1: expected greater than or equal to 0, got -0.1; set it with ppo.adam_beta1=VALUE"],
    ),
    "a rate of decay of 1": (
        ["ppo.adam_beta2=1.0"],
        ["ppo.adam_beta2: expected less than 1, got 1.0; set it with ppo.adam_beta2=VALUE"],
    ),
    "a truncated distribution": (
        ["rollout.top_p=0.9"],
        [f"rollout.top_p: {REFUSED['rollout.top_p']}"],
    ),
    "a penalised distribution, added": (
        ["+rollout.repetition_penalty=1.1"],
        [f"rollout.repetition_penalty: {REFUSED['rollout.repetition_penalty']}"],
    ),
    "several ranks inline": (
        ["launch=inline", "launch.processes=2"],
        ["launch: inline=true runs one process, but processes=2 and machines=1: set both to 1"],
    ),
}


@pytest.mark.parametrize("words, expected", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_in_its_own_words(cli, words, expected):
    refused(cli("rlhf", *words), *expected)


def test_an_unknown_recipe_is_answered_with_the_recipes(cli):
    named = "rlhf, sft, reward_model, ppo, evaluate, bench, denoise, frontier, overoptimize"
    refused(cli("rhlf"), f"no recipe 'rhlf'; recipes: {named} (alignkit --help)")


def test_an_unknown_preset_is_answered_with_the_presets(cli):
    code, said = cli("rlhf", "sweep=zzz")
    assert said[0].startswith("error: sweep=zzz: no such option; options: ")
    assert "kl" in said[0].split("options: ")[1].split(", ")
    refused((code, said), said[0].removeprefix("error: "))


@pytest.mark.parametrize("recipe", ["ppo", "reward_model"])
def test_a_missing_policy_is_named_with_an_example(cli, recipe):
    refused(
        cli(recipe, "tracking=none"),
        f"policy: missing; alignkit {recipe} needs the folder of a finished stage, for example policy=runs/NAME/sft",
    )


def test_a_policy_that_is_not_there_is_named(cli):
    refused(
        cli("ppo", "policy=nowhere", "tracking=none"),
        "'nowhere' does not exist: expected the folder of a finished stage or of a Hugging Face model",
    )


def test_a_missing_data_file_is_named_with_the_folder_that_was_searched(cli, tmp_path):
    expected = f"data.path=none.jsonl: expected a file, got no such file in {tmp_path}"
    refused(cli("rlhf", "data=jsonl", "data.path=none.jsonl"), expected)


def test_an_empty_data_file_is_told_before_anything_is_made(cli, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    refused(
        cli("rlhf", "data=jsonl", "data.path=empty.jsonl", "tracking=none", "launch=inline"),
        "empty.jsonl:1: expected at least one row, got an empty file",
    )


# ------------------------------------------------------------------------------------------------- the user's own conf

OWN_STRATEGY = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Slope:
    coef: float
    slope: int
    target, estimator, place = None, "k1", "reward"

    def next(self, coef, *, observed, episodes):
        return coef + self.slope

    def __post_init__(self):
        if self.slope > 3:
            raise ValueError(f"slope={self.slope} must be at most 3")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A user's folder: conf with an option and a preset of their own, and the module that the option names."""
    monkeypatch.delitem(sys.modules, "own_kl", raising=False)
    monkeypatch.syspath_prepend(tmp_path)  # forgets what the import system remembers of the folder
    (tmp_path / "own_kl.py").write_text(OWN_STRATEGY)
    (tmp_path / "conf" / "kl").mkdir(parents=True)
    (tmp_path / "conf" / "kl" / "slope.yaml").write_text("_target_: own_kl.Slope\ncoef: 0.1\nslope: 2\n")
    (tmp_path / "conf" / "experiment").mkdir()
    preset = "# @package _global_\nppo:\n  eopchs: 3\n"
    (tmp_path / "conf" / "experiment" / "misspelt.yaml").write_text(preset)
    return tmp_path


@pytest.fixture
def started(monkeypatch) -> list:
    """Stands in for a run: keeps the checked settings of each run that would have started."""
    configs = []

    class Recorded:
        summary, folder, products, made, needs_reward_model = {}, Path("runs"), {}, [], True

        def __init__(self, recipe, config, raw, purpose, team):
            configs.append(config)

        def stage(self, name, **inputs):
            return None

        given = stage

    monkeypatch.setattr(alignkit.runtime.recipe, "Run", Recorded)
    return configs


def test_a_misspelt_key_in_a_preset_of_the_user_is_named(cli, own):
    expected = "ppo.eopchs: unknown key; did you mean ppo.epochs?"
    refused(cli("rlhf", "--config-dir", "conf", "experiment=misspelt"), expected)


def test_the_options_of_the_user_are_listed_too(cli, own):
    expected = "kl=zzz: no such option; options: adaptive, adaptive_ziegler, fixed, slope"
    refused(cli("rlhf", "--config-dir", "conf", "kl=zzz"), expected)


def test_a_strategy_of_the_user_that_lacks_what_is_called_is_refused(cli, own):
    (own / "own_kl.py").write_text(OWN_STRATEGY.replace("def next(", "def nxt("))
    expected = "kl._target_: 'own_kl.Slope' lacks next(coef, observed=, episodes=), which kl must have"
    refused(cli("rlhf", "--config-dir", "conf", "kl=slope", "trusted=[own_kl]"), expected)


def test_a_strategy_of_the_user_needs_their_word(cli, own):
    expected = "kl._target_: 'own_kl.Slope' runs code outside alignkit; allow it with 'trusted=[own_kl]'"
    refused(cli("rlhf", "--config-dir", "conf", "kl=slope"), expected)
    assert "own_kl" not in sys.modules


@pytest.mark.parametrize("decorator", ["@dataclass(frozen=True)", "@dataclass"])
def test_a_trusted_strategy_of_the_user_is_used(cli, own, started, decorator):
    (own / "own_kl.py").write_text(OWN_STRATEGY.replace("@dataclass(frozen=True)", decorator))
    code, said = cli("rlhf", "--config-dir", "conf", "kl=slope", "kl.slope=3", "trusted=[own_kl]")
    assert (code, said) == (0, [])
    (config,) = started
    assert (type(config.kl).__name__, config.kl.coef, config.kl.slope) == ("Slope", 0.1, 3)


OWN_MISTAKES = {
    "out of range": (["kl.slope=5"], "kl: slope=5 must be at most 3"),
    "wrong type": (["kl.slope=x"], "kl.slope: expected a valid integer, got 'x'; set it with kl.slope=VALUE"),
    "misspelt": (["+kl.slpoe=1"], "kl.slpoe: unknown key; did you mean kl.slope?"),
}


@pytest.mark.parametrize("words, expected", OWN_MISTAKES.values(), ids=OWN_MISTAKES)
def test_a_strategy_of_the_user_is_checked_like_any_other(cli, own, words, expected):
    refused(cli("rlhf", "--config-dir", "conf", "kl=slope", "trusted=[own_kl]", *words), expected)


FAULTY_MODULES = {
    "def broken(:\n": "SyntaxError: invalid syntax ({file}, line 1)",
    "\nzzz\n": "NameError: name 'zzz' is not defined ({file}, line 2)",
    "import zzz_not_there\n": "No module named 'zzz_not_there'",
}


@pytest.mark.parametrize("text, reason", FAULTY_MODULES.items(), ids=["syntax", "name", "import"])
def test_a_module_of_the_user_that_cannot_be_imported_is_told_with_the_place(cli, own, text, reason):
    (own / "own_kl.py").write_text(text)
    expected = f"kl._target_: 'own_kl.Slope' cannot be imported: {reason.format(file=own / 'own_kl.py')}"
    refused(cli("rlhf", "--config-dir", "conf", "kl=slope", "trusted=[own_kl]"), expected)


def test_a_config_folder_that_is_not_there_is_named(cli, tmp_path):
    expected = f"Additional config directory '{tmp_path / 'zzz'}' not found"
    refused(cli("rlhf", "--config-dir", "zzz"), expected)


# --------------------------------------------------------------------------------------------- as a person types it


def typed(folder: Path, *words: str) -> tuple[int, list[str]]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "SLURM_PROCID")}
    command = [sys.executable, "-c", "from alignkit.cli import main; main()", *words]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.stdout == ""
    return ended.returncode, ended.stderr.splitlines()


def test_in_a_process_of_its_own_a_mistake_is_two_lines_and_code_2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(
        typed(tmp_path, "rlhf", "ppo.batch=10", "ppo.minibatch=3", "sft.epochs=0"),
        "ppo: batch=10 must be a multiple of minibatch=3",
        "sft.epochs: expected greater than 0, got 0; set it with sft.epochs=VALUE",
    )


def test_in_a_process_of_its_own_the_users_module_is_found_in_the_working_folder(own, monkeypatch):
    monkeypatch.chdir(own)
    words = ["rlhf", "--config-dir", "conf", "kl=slope", "trusted=[own_kl]", "kl.slope=4"]
    refused(typed(own, *words), "kl: slope=4 must be at most 3")


def test_a_recipe_that_is_run_as_a_file_answers_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = alignkit.cli.find_recipes()["sft"]
    ended = subprocess.run([sys.executable, file, "sft.eopchs=1"], capture_output=True, text=True, timeout=120)
    refused((ended.returncode, ended.stderr.splitlines()), "sft.eopchs: unknown key; did you mean sft.epochs?")


def test_a_missing_file_of_ptx_is_named_by_its_own_key(cli, tmp_path):
    expected = f"ptx.path=none.jsonl: expected a file, got no such file in {tmp_path}"
    refused(cli("rlhf", "ptx=demonstrations", "ptx.path=none.jsonl"), expected)
