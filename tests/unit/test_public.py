"""The names that `from alignkit import ...` gives, and what they do that nothing else tests."""

import inspect
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

import alignkit
from alignkit import PPO, Advantages, Corpus, DataSource, Demonstration, Pair, UserError, load_config, load_reward_model
from alignkit.data.corpus import fingerprint_of, load_corpus, split_fraction
from alignkit.errors import TrainingError
from alignkit.stages.ppo_checks import check_advantages

NAMES = {
    *("load_config", "run", "PPO", "load_reward_model", "DataSource", "Corpus", "Demonstration", "Pair"),
    *("RewardSource", "AdvantageEstimator", "Advantages", "UserError"),
}
TINY = (
    "ppo.batch=16",
    "ppo.minibatch=8",
    "ppo.epochs=4",
    "ppo.learning_rate=2e-2",
    "ppo.value_learning_rate=2e-2",
    "rollout.max_response=8",
)


def test_the_public_names_are_these_each_with_a_docstring_of_its_own():
    assert set(alignkit.__all__) == NAMES and set(dir(alignkit)) >= NAMES
    for name in NAMES:
        thing = getattr(alignkit, name)
        assert thing.__name__ == name and len(inspect.getdoc(thing) or "") > 60, name
        assert not inspect.getdoc(thing).startswith(f"{name}("), f"{name} has the text that dataclasses make up"
    with pytest.raises(AttributeError, match="has no attribute 'Ppo'"):
        alignkit.Ppo  # noqa: B018


def test_type_checkers_see_the_same_names():
    """They read what stands under TYPE_CHECKING, which nobody runs."""
    text = inspect.getsource(alignkit).partition("if TYPE_CHECKING:")[2].partition("__version__")[0]
    found = {}
    exec(inspect.cleandoc(text), found)
    assert all(found[name] is getattr(alignkit, name) for name in NAMES)
    assert found.keys() - {"__builtins__"} == NAMES


@pytest.mark.parametrize("use", ["alignkit", "alignkit; alignkit.load_config('ppo', 'kl=fixed')"])
def test_neither_the_import_nor_a_configuration_needs_torch(use):
    code = f"import sys, {use}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


MISTAKES = {
    "no recipe": (["pp"], "no recipe 'pp'; recipes: rlhf, sft, reward_model, ppo"),
    "a key": (["ppo", "ppo.eopchs=2"], "ppo.eopchs: unknown key; did you mean ppo.epochs?"),
    "an option": (["ppo", "kl=fixd"], "kl=fixd: no such option; options: adaptive, adaptive_ziegler, fixed"),
    "a number for a group": (["ppo", "ppo=2"], "ppo=2: no such option; options: default"),
    "a value": (["ppo", "ppo.clip=2.0"], "ppo.clip: expected less than 1, got 2.0; set it with ppo.clip=VALUE"),
}


@pytest.mark.parametrize("words, said", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_python_is_told_as_on_the_command_line(words, said):
    for function in (load_config, alignkit.run):
        with pytest.raises(UserError) as told:
            function(*words)
        assert str(told.value).startswith(said)


def test_a_corpus_from_rows_is_split_by_prompt():
    rows = [Demonstration(f"say {n}", " yes") for n in range(200)] + [Pair(f"say {n}", "a", "b") for n in range(200)]
    corpus = Corpus.from_rows(rows, heldout=0.25)
    assert set(corpus.heldout.prompts) == {f"say {n}" for n in range(200) if split_fraction(f"say {n}") < 0.25}
    for part in (corpus.train, corpus.heldout):
        assert part.prompts == [row.prompt for row in part.demonstrations] == [row.prompt for row in part.pairs]
    chosen = Corpus.from_rows(rows[200:]).train.demonstrations
    assert {row.response for row in chosen} == {"a"}, "without demonstrations the preferred responses are imitated"


@dataclass(frozen=True)
class Sayings(DataSource):
    count: int
    ending: str = "yes"

    def load(self, seed):
        if self.count < 0:
            raise KeyError("count")
        return Corpus.from_rows([Demonstration(f"say {n}", self.ending) for n in range(self.count)])


def test_data_without_a_fingerprint_is_known_by_its_rows():
    known = fingerprint_of(Sayings(9), 0)
    assert fingerprint_of(Sayings(9), 0) == known != fingerprint_of(Sayings(9, "no"), 0)
    assert fingerprint_of(load_config("sft").data, 0) == "synthetic-v1"


def test_data_that_cannot_be_loaded_is_told_in_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"^data: '.*Sayings' could not load\(seed=0\): KeyError: 'count' \(.*py, line"):
        load_corpus(Sayings(-1), 0)
    monkeypatch.setattr(Sayings, "load", lambda self, seed: [])
    with pytest.raises(UserError, match="Sayings' loads list, expected Corpus"):
        load_corpus(Sayings(1), 0)


def test_one_number_a_response_becomes_its_advantage_at_every_token():
    mask = torch.tensor([[True, True], [True, False]])
    made = Advantages.of_responses(torch.tensor([[2.0], [-3.0]]), mask)
    assert made.advantages.tolist() == [[2.0, 2.0], [-3.0, 0.0]] and made.returns.tolist() == [[0.0, 0.0]] * 2


WRONG = {
    "a tensor": (torch.zeros(2, 3), "returned Tensor, expected"),
    "a number": (1.0, "returned float, expected"),
    "another shape": (Advantages(torch.zeros(2), torch.zeros(2)), r"Advantages of \[\(2,\), \(2,\)\], expected"),
}


@pytest.mark.parametrize("made, said", WRONG.values(), ids=WRONG)
def test_an_estimator_that_returns_something_else_is_named(made, said):
    with pytest.raises(TrainingError, match=rf"^advantage: '.*\.Sayings' .*{said}"):
        check_advantages(made, Sayings(1), torch.Size((2, 3)))
    check_advantages(Advantages(torch.zeros(2, 3), torch.zeros(2, 3)), Sayings(1), torch.Size((2, 3)))


@pytest.fixture(scope="module")
def policy(cluster, tiny_policy, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tiny_policy("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def shortness(prompts, responses):
    return [-len(text) / 10 for text in responses]


def test_a_loop_of_ones_own_raises_the_score(policy, tmp_path):
    config = load_config("ppo", *TINY, "ppo.episodes=80", "kl=fixed")
    ppo, prompts = PPO(config, policy, shortness, tmp_path), [f"why {number}" for number in range(16)]
    seen = [ppo.iterate(prompts) for _ in range(config.ppo.iterations)]
    scores = [metrics["score_mean"] for metrics, _ in seen]
    assert scores[-1] > scores[0] + 0.2
    assert seen[0][0]["kl"] == pytest.approx(0.0, abs=1e-5) and seen[-1][0]["kl"] > 0.1
    assert all(row["score"] == pytest.approx(-len(row["response"]) / 10) for row in seen[0][1])
    assert [row["prompt"] for row in seen[0][1]] == prompts
    with pytest.raises(UserError, match="^ppo.episodes=80 are done"):
        ppo.iterate(prompts)


@pytest.mark.parametrize("ema", ["null", "0.5"])
def test_a_loop_takes_so_many_prompts_and_saves_its_policy(policy, tmp_path, ema):
    from transformers import AutoModelForCausalLM

    words = ("ppo.episodes=16", "ppo.samples_per_prompt=2", f"ppo.ema={ema}")
    ppo = PPO(load_config("ppo", *TINY, *words), policy, shortness, tmp_path)
    with pytest.raises(
        UserError, match=r"takes 8 prompts \(ppo.batch / ppo.samples_per_prompt\), but there are only 7"
    ):
        ppo.iterate(["why"] * 7 + ["why " * 60])
    metrics, samples = ppo.iterate([f"why {n}" for n in range(8)])
    assert [row["prompt"] for row in samples] == [f"why {n // 2}" for n in range(16)]
    saved, name = AutoModelForCausalLM.from_pretrained(ppo.save()), "model.layers.0.mlp.up_proj.weight"
    last = ppo.actors.policy.get_parameter(name).full_tensor()
    wanted = last if ema == "null" else ppo.actors.ema.average[name].full_tensor()
    assert saved.get_parameter(name).equal(wanted) and (ema == "null") == wanted.equal(last)


def test_a_reward_model_is_a_function_and_a_strategy_may_be_an_object(policy, tmp_path):
    from alignkit.models.loading import scorer_from_policy

    scorer_from_policy(policy, seed=1).save_pretrained(tmp_path / "reward")
    for file in policy.glob("*token*"):
        (tmp_path / "reward" / file.name).write_bytes(file.read_bytes())
    score = load_reward_model(tmp_path / "reward")
    config = load_config("ppo", *TINY, "ppo.episodes=16", "reward.normalise=none")
    config = replace(config, reward=replace(config.reward, path=str(tmp_path / "reward")))
    _, samples = PPO(config, policy, folder=tmp_path).iterate([f"why {n}" for n in range(16)])
    ended = [row for row in samples if row["finished"]]
    again = score([row["prompt"] for row in ended], [row["response"] for row in ended])
    assert ended and again == pytest.approx([row["score"] for row in ended], abs=1e-4)
