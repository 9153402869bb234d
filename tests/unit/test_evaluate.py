"""Judges, best-of-n's curve, held-out prompts, what an evaluation warns of, and the settings of `alignkit evaluate`."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import ClassVar

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from ppo_world import PROMPTS, config_of
from pydantic import ValidationError

from alignkit.data.corpus import Corpus, Split
from alignkit.errors import TrainingError, UserError
from alignkit.observe.hacking import hacking_warnings
from alignkit.reward.chat import ChatJudge
from alignkit.reward.function import Function
from alignkit.reward.judge import FromData
from alignkit.reward.model import RewardModel
from alignkit.reward.weighted_sum import WeightedSum
from alignkit.runtime.config import conf_dir
from alignkit.runtime.evaluate_run import with_words
from alignkit.stages.best_of_n import Samples, at_kl, curve
from alignkit.stages.judging import Judge, compare, is_climbed, open_judge, outcomes_of, scorer_of
from alignkit.stages.preferences import drawn
from alignkit.stages.responses import heldout_prompts, respond

# --------------------------------------------------------------------------------------------------------- judges


def corpus_of(gold=None, judge=(), contrast=None) -> Corpus:
    nothing = Split([], [], [])
    return Corpus(nothing, Split([], [], [], contrast), gold, list(judge))


def answers(*texts: str) -> SimpleNamespace:
    return SimpleNamespace(texts=list(texts))


LABELLED = [("a warm film", 1), ("a warm heart", 1), ("a dull film", 0), ("a dull plot", 0)]


def test_the_judge_is_the_best_that_the_data_has():
    rich = corpus_of(lambda p, t: 1.0, LABELLED, (["warm"], ["dull"]))
    assert FromData("auto").open(rich).name == "gold"
    assert FromData("auto").open(corpus_of(None, LABELLED, (["warm"], ["dull"]))).name == "bag_of_words"
    assert FromData("auto").open(corpus_of()) is None
    assert FromData("reward_model").open(rich) is None
    with pytest.raises(UserError, match="judge=gold: this data has no gold score"):
        FromData("gold").open(corpus_of())
    with pytest.raises(UserError, match="needs labelled texts"):
        FromData("bag_of_words").open(corpus_of())


def test_a_judge_by_words_scores_good_words_higher():
    judge = FromData("bag_of_words").open(corpus_of(None, LABELLED, (["a warm film"], ["a dull film"])))
    good, bad = judge.score(["it was", "it was"], ["a warm story", "a dull story"]).tolist()
    assert good > bad


def test_outcomes_are_one_half_and_nothing():
    assert outcomes_of(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0])).tolist() == [1.0, 0.5, 0.0]


def test_judging_by_scores_and_by_being_asked():
    by_length = Judge("length", lambda prompts, side: torch.tensor([float(len(t)) for t in side.texts]))
    found = compare(by_length, ["p"] * 3, answers("aaa", "b", "c"), answers("a", "b", "cc"))
    assert found.outcomes.tolist() == [1.0, 0.5, 0.0] and found.ours.tolist() == [3.0, 1.0, 1.0]
    asked = Judge(
        "chat", None, lambda prompts, first, second: torch.tensor([float(a > b) for a, b in zip(first, second)])
    )
    found = compare(asked, ["p"] * 2, answers("b", "a"), answers("a", "b"))
    assert found.outcomes.tolist() == [1.0, 0.0] and found.ours is None


def test_a_judge_that_is_the_reward_itself_says_so(exact, tmp_path):
    job = SimpleNamespace(config=config_of(), inputs={}, out=tmp_path)
    job.config.judge = FromData("auto")
    assert open_judge(job, corpus_of(), exact.reward, exact.encoder, exact.cluster).optimised
    assert not open_judge(job, corpus_of(lambda p, t: 0.0), exact.reward, exact.encoder, exact.cluster).optimised


@pytest.mark.parametrize(
    "judge, reward, climbed",
    [
        (RewardModel("m", "none"), RewardModel(None, "shift_scale"), True),  # the chain's folder, in other units
        (RewardModel("m", "none"), RewardModel("other", "shift_scale"), False),
        (RewardModel("m", "none"), WeightedSum({"a": RewardModel(None, "none")}, {"a": 1.0}), True),
        (RewardModel("m", "none"), WeightedSum({"a": RewardModel("other", "none")}, {"a": 1.0}), False),
        (Function("f.g", 4, 1.0, "stop"), Function("f.g", 4, 1.0, "stop"), True),
        (Function("f.g", 4, 1.0, "stop"), Function("f.h", 4, 1.0, "stop"), False),
        (Function("f.g", 4, 1.0, "stop"), RewardModel(None, "none"), False),
    ],
)
def test_a_judge_that_is_what_ppo_climbs_or_a_part_of_it_is_seen_through(tmp_path, monkeypatch, judge, reward, climbed):
    monkeypatch.chdir(tmp_path)
    for name in ("m", "other"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    job = SimpleNamespace(inputs={"judge": tmp_path / "m", "reward": tmp_path / "link" / "model"})
    assert is_climbed(judge, reward, job) == climbed


# ----------------------------------------------------------------------------------------- a judge that is asked


class LikesA(BaseHTTPRequestHandler):
    """A chat endpoint that names the longer response, and A where they are equally long; broken on demand."""

    questions: ClassVar[list[dict]] = []
    broken = False

    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.questions.append({**content, "token": self.headers["Authorization"]})
        text = content["messages"][0]["content"]
        first, second = (text.partition(f"[Response {x}]\n")[2].partition("\n\n")[0] for x in "AB")
        answer = "no idea" if self.broken else "A" if len(first) >= len(second) else " B.\n"
        body = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), LikesA)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(LikesA, "questions", [])
    monkeypatch.setattr(LikesA, "broken", False)
    yield f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
    server.shutdown()


def chat(url: str, **changes) -> ChatJudge:
    values = {"model": "m", "criterion": "Be kind.", "max_tokens": 4, "concurrency": 2, "timeout": 20.0, "retries": 0}
    return ChatJudge(url=url, **{**values, "backoff": 0.0, "token_env": None, **changes})


def test_a_chat_judge_is_asked_in_both_orders_and_a_contradiction_is_a_tie(endpoint, exact, monkeypatch, tmp_path):
    monkeypatch.setenv("A_KEY", "secret")
    job = SimpleNamespace(config=SimpleNamespace(judge=chat(endpoint, token_env="A_KEY")), inputs={}, out=tmp_path)
    judge = open_judge(job, corpus_of(), None, exact.encoder, exact.cluster)
    prompts = ["why", [{"role": "user", "content": "how"}], "when"]
    found = compare(judge, prompts, answers("long answer", "no", "same"), answers("short", "certainly", "also"))
    assert judge.name == "chat" and found.outcomes.tolist() == [1.0, 0.0, 0.5] and found.ours is None
    assert len(LikesA.questions) == 6
    assert {q["token"] for q in LikesA.questions} == {"Bearer secret"}
    assert {(q["model"], q["temperature"], q["max_tokens"]) for q in LikesA.questions} == {("m", 0.0, 4)}
    asked = [q["messages"][0]["content"] for q in LikesA.questions]
    assert any("user: how" in text for text in asked) and all(text.startswith("Be kind.") for text in asked)


def test_a_chat_judge_that_answers_nonsense_stops_the_stage(endpoint, exact, monkeypatch, tmp_path):
    monkeypatch.setattr(LikesA, "broken", True)
    job = SimpleNamespace(config=SimpleNamespace(judge=chat(endpoint)), inputs={}, out=tmp_path)
    judge = open_judge(job, corpus_of(), None, exact.encoder, exact.cluster)
    with pytest.raises(TrainingError, match="judge: answered neither A, B nor C"):
        compare(judge, ["why"], answers("a"), answers("b"))


@pytest.mark.parametrize(
    "changes, message", [({"url": "ftp://x"}, "expected http"), ({"token_env": "NOT_SET"}, "no such")]
)
def test_a_chat_judge_is_checked_before_anything_starts(changes, message):
    with pytest.raises(ValidationError, match=message):
        chat(**{"url": "http://x", **changes})


# ------------------------------------------------------------------------------------------------------ responses


def encoded(actors, prompts):
    return [(prompt, actors.encoder.prompt(prompt)) for prompt in prompts]


def test_a_model_is_at_no_distance_from_itself_and_its_surprise_is_its_own(exact):
    config, prompts = config_of(), encoded(exact, PROMPTS[:3])
    same = respond(exact.reference, exact.reference, prompts, exact.encoder, config, exact.cluster)
    assert same.kl.tolist() == [0.0] * 3
    plain, _ = exact.plain
    for row in range(3):
        tokens = same.rollout.tokens[row][same.rollout.mask[row]]
        logits = plain(input_ids=tokens[None]).logits[0].detach().double() / 0.9
        logprobs = logits.log_softmax(dim=-1)[:-1].gather(1, tokens[1:, None]).squeeze(1)
        expected = -float(logprobs[-len(same.ids[row]) :].sum())
        assert float(same.nll[row]) == pytest.approx(expected, abs=1e-6)


def test_responses_and_scores_do_not_depend_on_what_is_asked_beside(exact, tmp_path):
    config, prompts = config_of(), encoded(exact, PROMPTS)
    job = SimpleNamespace(config=config, out=tmp_path)
    whole = respond(exact.policy, exact.reference, prompts, exact.encoder, config, exact.cluster)
    part = respond(exact.policy, exact.reference, prompts[:3], exact.encoder, config, exact.cluster)
    assert whole.ids[:3] == part.ids
    score = scorer_of(exact.reward, job, exact.cluster)
    assert torch.allclose(score(PROMPTS, whole)[:3], score(PROMPTS[:3], part), atol=1e-6)


@pytest.mark.parametrize("every, expected", [(None, (40, 40)), (5, (40, 40))])
def test_prompts_of_the_looks_are_not_those_of_the_last_evaluation(exact, every, expected):
    prompts = [f"prompt {i}" for i in range(60)]
    corpus, config = Corpus(Split([], [], []), Split([], [], prompts)), config_of()
    config.ppo.__dict__.update(evaluate_every=every)
    sides = [
        {prompt for prompt, _ in heldout_prompts(corpus, exact.encoder, config, 60, part, False)}
        for part in ("final", "validation")
    ]
    if every is None:
        assert sides[0] == sides[1] == set(prompts)
    else:
        assert sides[0] | sides[1] == set(prompts) and not sides[0] & sides[1]
        assert 10 <= len(sides[1]) <= 30


def test_prompts_that_are_too_long_are_told(exact, capsys):
    corpus = Corpus(Split([], [], []), Split([], [], ["short", "word " * 50]))
    config = config_of()
    assert [p for p, _ in heldout_prompts(corpus, exact.encoder, config, 9, "final", True)] == ["short"]
    assert "1 of 2 held-out prompts left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of the 1 held-out prompts"):
        heldout_prompts(
            Corpus(Split([], [], []), Split([], [], ["word " * 50])), exact.encoder, config, 9, "final", True
        )


def test_pairs_are_drawn_from_prompts_that_fit_each_equally_often(exact):
    config = config_of()
    config.overoptimize = SimpleNamespace(num_pairs=7)
    job = SimpleNamespace(config=config)
    found = [prompt for prompt, _ in drawn(["a", "b", "c", "word " * 40], exact.encoder, job)]
    assert sorted(found.count(prompt) for prompt in "abc") == [2, 2, 3]
    with pytest.raises(UserError, match="preferences: none of 1 prompts has at most"):
        drawn(["word " * 40], exact.encoder, job)


# ------------------------------------------------------------------------------------------------------ best-of-n


def test_the_curve_of_best_of_n_rises_in_the_reward_and_stops_at_half_the_samples():
    reward = torch.randn(20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = curve(Samples(reward, -reward))
    assert [row["n"] for row in rows] == [1, 2, 4, 8]
    assert rows[0]["kl"] == 0 and rows[0]["reward"] == pytest.approx(float(reward.mean()), abs=1e-12)
    assert rows[0]["win_rate"] == pytest.approx(0.5, abs=1e-12) and rows[-1]["win_rate"] < 0.2
    for left, right in zip(rows, rows[1:]):
        assert right["reward"] > left["reward"] and right["judge"] < left["judge"] and right["kl"] > left["kl"]
        assert right["reward_low"] < right["reward"] < right["reward_high"]


def test_best_of_n_at_a_kl_between_its_points():
    rows = [{"kl": 0.0, "win_rate": 0.5}, {"kl": 0.25, "win_rate": 0.6}, {"kl": 1.0, "win_rate": 0.9}]
    assert at_kl(rows, 0.25) == pytest.approx(0.6)
    assert at_kl(rows, 0.0625) == pytest.approx(0.55)  # half way in sqrt(KL)
    assert at_kl(rows, 0.5625) == pytest.approx(0.75)
    assert at_kl(rows, 1.1) is None


# ------------------------------------------------------------------------------------------------------- warnings

GOOD = {
    "win_rate": 0.8, "win_rate_low": 0.7, "win_rate_high": 0.9, "judge": "gold", "judge_is_the_reward": False,
    "reward_gain": 1.0,
    "reward_gain_low": 0.8, "length_controlled_win_rate": 0.75, "length_controlled_win_rate_high": 0.85,
    "response_length": 22.0, "response_length_baseline": 20.0, "distinct_2": 0.25, "distinct_2_baseline": 0.3,
    "eos_fraction": 0.95, "eos_fraction_baseline": 0.95,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, []),
        ({"judge_is_the_reward": True}, ["the very reward that PPO climbed"]),
        ({"win_rate": 0.2, "win_rate_low": 0.1, "win_rate_high": 0.3}, ["finds it worse than the start"]),
        ({"win_rate": 0.52, "win_rate_low": 0.4, "win_rate_high": 0.6}, ["cannot be said to find it better"]),
        ({"win_rate": 0.52, "win_rate_low": 0.4, "win_rate_high": 0.6, "reward_gain_low": -0.1}, []),
        ({"length_controlled_win_rate": 0.4, "length_controlled_win_rate_high": 0.48}, ["wins by length"]),
        ({"response_length": 31.0}, ["grew from 20 to 31 tokens"]),
        ({"distinct_2": 0.1}, ["have become alike"]),
        ({"eos_fraction": 0.4}, ["have stopped ending"]),
        ({"response_length": 48.0, "eos_fraction": 0.0}, ["grew from", "stopped ending"]),
    ],
)
def test_a_policy_that_climbed_its_reward_without_getting_better_is_told(changes, words):
    told = hacking_warnings({**GOOD, **changes})
    assert len(told) == len(words)
    assert all(word in line for word, line in zip(words, told))


# ------------------------------------------------------------------------------------- the words of alignkit evaluate


@pytest.fixture(scope="module")
def settings() -> dict:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("rlhf", ["name=a"]), resolve=True)


def test_words_change_the_evaluation_alone(settings):
    changed = with_words(settings, ["judge=model", "judge.path=runs/b/reward_model", "evaluate.prompts=9"])
    assert changed["judge"]["_target_"].endswith("RewardModel") and changed["judge"]["path"] == "runs/b/reward_model"
    assert changed["evaluate"]["prompts"] == 9
    assert {key: changed[key] for key in settings if key not in ("judge", "evaluate")} == {
        key: settings[key] for key in settings if key not in ("judge", "evaluate")
    }
    assert settings["judge"]["by"] == "auto"  # the run's own settings stay as they are


@pytest.mark.parametrize(
    "word, message",
    [
        ("ppo.clip=0.1", "belongs to what the run has made already"),
        ("seed=1", "belongs to what the run has made already"),
        ("data=jsonl", "belongs to what the run has made already"),
        ("judge=golld", "judge=golld: no such option; options: auto, bag_of_words"),
        ("evaluate.promts=1", "evaluate.promts: unknown key; the keys of evaluate are prompts"),
        ("nothing", "evaluate: 'nothing' is no setting"),
        ("judge", "evaluate: 'judge' is no setting"),
        ("experiment=gao", "belongs to what the run has made already"),
    ],
)
def test_words_that_cannot_be_taken_are_explained(settings, word, message):
    with pytest.raises(UserError, match=message):
        with_words(settings, [word])


# ----------------------------------------------------------------------------------------------------- PPO's looks


def test_the_state_remembers_the_best_look():
    from alignkit.stages.state import PPOState

    state = PPOState(kl_coef=0.1, iteration=2)
    assert not state.take_look(0.4, start=0.5) and (state.best_look, state.best_iteration) == (0.5, 0)
    state.iteration = 4
    assert state.take_look(0.7, start=0.5) and (state.best_iteration, state.looks_since) == (4, 0)
    state.iteration = 6
    assert not state.take_look(0.7, start=0.5) and state.looks_since == 1  # no better is no gain
    assert PPOState.from_state_dict(state.state_dict()) == state


def test_kept_weights_come_back(make_actors):
    from alignkit.stages.state import KeptWeights

    actors = make_actors()
    kept = KeptWeights(actors.policy)
    before = {name: value.clone() for name, value in actors.cluster.full_state(actors.policy).items()}
    with torch.no_grad():
        for parameter in actors.policy.parameters():
            parameter.add_(1.0)
    kept.put(actors.policy)
    after = actors.cluster.full_state(actors.policy)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        for parameter in actors.policy.parameters():
            parameter.mul_(2.0)
    kept.take(actors.policy)
    assert all(math.isclose(float(k.full_tensor().sum()), float(p.detach().full_tensor().sum()))
               for k, p in zip(kept.kept.values(), actors.policy.parameters()))  # fmt: skip


@pytest.mark.parametrize("liked, best", [([0.2, 0.9, 0.4], 4), ([0.1, 0.2, 0.3], 0)])
def test_the_policy_that_the_judge_liked_most_is_kept(make_actors, monkeypatch, liked, best):
    """Three looks, two iterations apart, at weights that are marked; the judge's opinions are given."""
    from alignkit.stages import ppo_looks
    from alignkit.stages.judging import Judgement
    from alignkit.stages.ppo import choose, out_of_patience
    from alignkit.stages.state import KeptWeights

    actors, config = make_actors(), config_of(evaluate_every=2, keep="best", patience=2)
    actors.best = KeptWeights(actors.policy)
    start = float(sum(value.sum() for value in actors.cluster.full_state(actors.policy).values()))
    opinions = iter(liked)

    def opinion(judge, prompts, ours, theirs, known):
        mine = torch.full((3,), next(opinions), dtype=torch.float64)
        return Judgement(torch.ones(3), mine, torch.full((3,), 0.5, dtype=torch.float64))

    monkeypatch.setattr(ppo_looks, "compare", opinion)
    prompts = encoded(actors, PROMPTS[:3])
    reward = lambda prompts, side: torch.zeros(3)  # noqa: E731
    looks = ppo_looks.Looks(prompts, None, Judge("gold", reward), None, reward, None, {"reward": 0.0, "judge": 0.5})
    job, sums = SimpleNamespace(config=config), {0: start}
    for iteration in range(1, 7):
        actors.state.iteration = iteration
        with torch.no_grad():
            next(actors.policy.parameters()).add_(0.01)
        sums[iteration] = float(sum(value.sum() for value in actors.cluster.full_state(actors.policy).values()))
        found = looks.look(actors, job)
        assert (found == {}) == (iteration % 2 == 1)
    assert found["eval_best_iteration"] == best and found["eval_judge_mean"] == pytest.approx(liked[-1])
    assert out_of_patience(actors.state, config.ppo) == (best == 0)
    choose(actors)
    kept = float(sum(value.sum() for value in actors.cluster.full_state(actors.policy).values()))
    assert kept == pytest.approx(sums[best], abs=1e-9)
