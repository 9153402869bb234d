"""Reward models as rewards, whose tokens they read, served over HTTP, and several rewards as one."""

import copy
import json
import math
import socket
import threading
import urllib.error
import urllib.request

import pytest
import torch
from reward_world import (
    FINISHED,
    PROMPTS,
    RESPONSES,
    TEMPLATE,
    answers_of,
    function,
    http,
    other_tokenizer,
    save_reward_model,
    scored,
)

import alignkit.runtime.serve
from alignkit.errors import TrainingError, UserError
from alignkit.models.loading import make_encoder
from alignkit.models.settings import PeftSettings
from alignkit.reward.ensemble import Ensemble
from alignkit.reward.model import ModelSource, RewardModel
from alignkit.reward.rendered import RenderedSource, render
from alignkit.reward.source import CombinedSource, chain_key
from alignkit.reward.weighted_sum import WeightedSum
from alignkit.runtime.serve import open_server, serve_command


@pytest.fixture(scope="module")
def answers(encoder):
    return answers_of(encoder)


# ------------------------------------------------------------------------------------------------------- serve-reward


@pytest.fixture(scope="module")
def reward_folder(tiny_tokenizer, tmp_path_factory):
    """A finished reward model of the chain, as its stage leaves it."""
    folder = tmp_path_factory.mktemp("reward")
    save_reward_model(folder, tiny_tokenizer, metrics={"score_mean": 0.3, "score_std": 2.0, "temperature": 1.6})
    return folder


@pytest.fixture
def served(reward_folder):
    server = open_server(str(reward_folder), "127.0.0.1", 0, "shift_scale", batch=2)
    threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_served_reward_model_gives_ppo_the_scores_of_the_model_itself(
    served, reward_folder, answers, encoder, cluster, tmp_path
):
    itself = RewardModel(path=None, normalise="shift_scale").open(reward_folder, encoder, cluster)
    expected, _ = scored(itself, answers, cluster, tmp_path)
    scores, _ = scored(http(f"{served}/score").open(None, None, cluster), answers, cluster, tmp_path)
    assert (scores - expected).abs().max() < 1e-6
    assert expected.std() > 0.1


def ask(url: str, body: bytes | None) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, body, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


REQUESTS = {
    "not JSON": (b"{", "expected JSON, got something else: "),
    "no object": (b"[]", 'expected {"prompts": [...], "responses": [...]}'),
    "no responses": (b'{"prompts": []}', 'expected {"prompts": [...], "responses": [...]}'),
    "no list": (b'{"prompts": "a", "responses": ["b"]}', "prompts: expected a list of texts or lists of chat messages"),
    "numbers": (b'{"prompts": ["a"], "responses": [1]}', "responses: expected a list of texts"),
    "no turns": (b'{"prompts": [[]], "responses": ["b"]}', "prompts: expected a list of texts or lists of chat"),
    "half a turn": (b'{"prompts": [[{"role": "user"}]], "responses": ["b"]}', "prompts: expected a list of texts or"),
    "uneven": (b'{"prompts": ["a", "b"], "responses": ["c"]}', "prompts: 2 of them to 1 responses"),
    "unsaid end": (b'{"prompts": ["a"], "responses": ["c"], "finished": [1]}', "finished: expected a list of true or"),
    "too long": (
        json.dumps({"prompts": ["a"], "responses": ["why " * 99]}).encode(),
        "a prompt with its response takes",
    ),
}


@pytest.mark.parametrize("body, said", REQUESTS.values(), ids=REQUESTS)
def test_a_malformed_request_is_answered_with_one_line(served, body, said):
    status, text = ask(f"{served}/score", body)
    assert status == 400 and text.startswith(said) and text.count("\n") == 1


def test_the_server_tells_that_it_works_and_where_scores_are(served, reward_folder):
    assert ask(f"{served}/health", None) == (200, json.dumps({"status": "ok", "model": str(reward_folder)}))
    assert ask(f"{served}/score", b'{"prompts": [], "responses": []}') == (200, '{"scores": []}')
    assert ask(f"{served}/scores", b"{}") == (404, "scores are at /score\n")
    assert ask(f"{served}/scores", None)[0] == 404


def test_ctrl_c_ends_the_server_quietly(reward_folder, monkeypatch, capsys):
    class Interrupted(alignkit.runtime.serve.ThreadingHTTPServer):
        def serve_forever(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(alignkit.runtime.serve, "ThreadingHTTPServer", Interrupted)
    assert serve_command([str(reward_folder), "--port", "0", "--normalise", "temperature"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and "reward=http reward.url=http://127.0.0.1:" in said.out


def test_mistakes_of_the_server_are_one_line(reward_folder, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        wrong = {
            (str(tmp_path),): f"'{tmp_path}' has neither manifest.json",
            (str(reward_folder / "model"), "--batch", "0"): "--batch 0: expected at least 1",
            (
                str(reward_folder),
                "--port",
                port,
            ): f"--host 127.0.0.1 --port {port}: cannot listen there: Addr",
            (str(reward_folder), "--port", "99999"): "--host 127.0.0.1 --port 99999: cannot listen there",
        }
        for words, said in wrong.items():
            assert serve_command(list(words)) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"error: {said}")


# ------------------------------------------------------------------------------------------------------ reward models


def test_a_model_with_the_same_tokens_reads_the_ids_and_gives_the_value_model(
    reward_folder, answers, encoder, cluster, tmp_path
):
    source = RewardModel(path=None, normalise="none").open(reward_folder, encoder, cluster)
    assert isinstance(source, ModelSource) and source.initial_value is not None
    hand = cluster.deal(answers.rollout.mask.sum(dim=1))
    with torch.no_grad():
        alone = source.score(answers, 5)
    scores, failures = scored(source, answers, cluster, tmp_path, microbatch=5)
    assert torch.equal(scores[hand.rows], alone[hand.rows]) and failures is None


def test_temperature_gives_log_odds(reward_folder, answers, encoder, cluster):
    def score(normalise):
        with torch.no_grad():
            return RewardModel(path=None, normalise=normalise).open(reward_folder, encoder, cluster).score(answers, 5)

    assert torch.allclose(score("temperature"), (score("none") - 0.3) / 1.6, atol=1e-6)
    assert torch.allclose(score("shift_scale"), (score("none") - 0.3) / 2.0, atol=1e-6)
    assert torch.allclose(score("shift"), score("none") - 0.3, atol=1e-6)


@pytest.mark.parametrize(
    "metrics, said",
    [
        (None, "was not trained by alignkit, so the mean of its score is unknown: set its normalise to none"),
        ({"score_mean": 0.1, "score_std": 1.0}, "holds no temperature, by which normalise=temperature divides: train"),
    ],
)
def test_units_that_nobody_measured_are_an_error(tiny_tokenizer, encoder, cluster, tmp_path, metrics, said):
    save_reward_model(tmp_path, tiny_tokenizer, metrics=metrics)
    with pytest.raises(UserError, match=said):
        RewardModel(path=None, normalise="temperature").open(tmp_path, encoder, cluster)


def test_a_model_with_other_tokens_reads_the_texts_in_its_own_template(answers, encoder, cluster, tmp_path, capsys):
    theirs = other_tokenizer()
    model = save_reward_model(tmp_path, theirs)
    end, ids = theirs.eos_token_id, lambda text: theirs(text, add_special_tokens=False)["input_ids"]
    expected_rows = [  # by hand, from PROMPTS, RESPONSES and FINISHED
        ids("the harbour") + ids(" was quiet") + [end],
        ids("[user: a small lamp][assistant: ") + ids("in every window]") + [end],
        ids("three letters") + ids(" and sent none"),
        ids("[system: be quiet][user: why?][assistant: ") + ids("the storm came]"),
        ids("stones on a beach") + ids(" in the west, before") + [end],
    ]
    own = make_encoder(theirs, None)
    assert [render(own, *row) for row in zip(PROMPTS, RESPONSES, FINISHED)] == expected_rows
    with torch.no_grad():
        hidden = [model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in expected_rows]
        expected = torch.stack([model.score(state)[0] for state in hidden])
    source = RewardModel(path=None, normalise="none").open(tmp_path, encoder, cluster)
    assert isinstance(source, RenderedSource) and not hasattr(source, "initial_value")
    assert "other tokens or chat template than the policy's; it reads the texts" in capsys.readouterr().out
    scores, failures = scored(source, answers, cluster, tmp_path)
    assert torch.allclose(scores, expected, atol=1e-5) and failures is None


def test_another_template_alone_is_enough(encoder, cluster, tmp_path):
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.chat_template = TEMPLATE
    save_reward_model(tmp_path, tokenizer)
    source = RewardModel(path=None, normalise="none").open(tmp_path, encoder, cluster)
    assert isinstance(source, RenderedSource)


def test_with_an_adapter_a_foreign_model_is_not_shared(encoder, cluster, tmp_path):
    save_reward_model(tmp_path, other_tokenizer())
    peft = PeftSettings(method="lora", settings={"r": 2}, quantization={}, merge=False)
    source = RewardModel(path=None, normalise="none").open(tmp_path, encoder, cluster, peft)
    assert not hasattr(source, "initial_value")
    assert not any(parameter.requires_grad for parameter in source.model.parameters())


def test_a_rendered_sequence_that_is_too_long_is_an_error(encoder, answers, cluster, tmp_path):
    save_reward_model(tmp_path, other_tokenizer(None))
    source = RewardModel(path=None, normalise="none").open(tmp_path, encoder, cluster)
    long = answers_of(encoder, ["why " * 5], ["a" * 60], [True])
    with pytest.raises(UserError, match=r"takes 8\d tokens of the reward model, which has 64 positions: lower "):
        scored(source, long, cluster, tmp_path)
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        scored(source, answers, cluster, tmp_path)


# ---------------------------------------------------------------------------------------------------- several as one


class Fixed:
    """A reward whose scores are given."""

    def __init__(self, scores, on_failure=None):
        self.scores = scores
        if on_failure:
            self.on_failure = on_failure

    def open(self, folder, encoder, cluster):
        return self

    def score(self, answers, microbatch):
        return torch.tensor([self.scores[RESPONSES.index(response)] for response in answers.responses])


A, B, C = [1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 2.0, 1.0, 0.0, -1.0], [5.0, 2.0, 2.0, 2.0, 11.0]
DEVIATION = [math.sqrt(8 / 3), 0.0, math.sqrt(2 / 3), math.sqrt(8 / 3), math.sqrt(24)]
HOW = {
    "mean": [3.0, 2.0, 2.0, 2.0, 5.0],
    "minimum": [1.0, 2.0, 1.0, 0.0, -1.0],
    "mean_minus_uncertainty": [mean - 0.5 * std for mean, std in zip([3.0, 2.0, 2.0, 2.0, 5.0], DEVIATION)],
}


@pytest.mark.parametrize("how, expected", HOW.items(), ids=HOW)
def test_an_ensemble_by_hand(answers, cluster, tmp_path, how, expected):
    members = {"b": Fixed(B), "a": Fixed(A), "c": Fixed(C)}
    source = Ensemble(members=members, how=how, uncertainty_coef=0.5).open(None, None, cluster)
    scores, failures = scored(source, answers, cluster, tmp_path)
    assert scores.tolist() == pytest.approx(expected, abs=1e-6) and failures is None
    assert scores.dtype == torch.float32 and not hasattr(source, "initial_value")


def test_a_weighted_sum_of_sums_by_hand(answers, cluster, tmp_path):
    inner = WeightedSum(members={"x": Fixed(B), "y": Fixed(C)}, weights={"y": 1.0, "x": -1.0})
    source = WeightedSum(members={"b": inner, "a": Fixed(A)}, weights={"a": 0.5, "b": 2.0}).open(None, None, cluster)
    scores, _ = scored(source, answers, cluster, tmp_path)
    assert scores.tolist() == pytest.approx([0.5 * a + 2 * (c - b) for a, b, c in zip(A, B, C)], abs=1e-6)


def test_a_member_fails_by_itself(answers, cluster, tmp_path):
    lost = [1.0, math.nan, 3.0, 4.0, 4.0]
    members = {"a": Fixed(lost, "mean"), "b": Fixed(B)}
    source = WeightedSum(members=members, weights={"a": 1.0, "b": 1.0}).open(None, None, cluster)
    scores, failures = scored(source, answers, cluster, tmp_path)
    assert scores.tolist() == pytest.approx([4.0, 5.0, 4.0, 4.0, 3.0]) and failures == pytest.approx(0.2)
    members["b"] = Fixed([math.inf] * 5)
    source = WeightedSum(members=members, weights={"a": 1.0, "b": 1.0}).open(None, None, cluster)
    with pytest.raises(TrainingError, match=r"reward\.members\.b: 5 of 5 scores are not finite"):
        scored(source, answers, cluster, tmp_path)


def test_members_read_their_own_folders_in_the_order_of_their_names(
    reward_folder, tiny_tokenizer, encoder, answers, cluster, tmp_path
):
    other = tmp_path / "other"
    save_reward_model(other, tiny_tokenizer, seed=1, metrics={"score_mean": 1.0, "score_std": 1.0})
    own = RewardModel(path=str(other / "model"), normalise="shift")
    chain = RewardModel(path=None, normalise="none")
    source = Ensemble(members={"z": own, "a": chain}, how="mean", uncertainty_coef=0.0).open(
        reward_folder, encoder, cluster
    )
    assert isinstance(source, CombinedSource) and list(source.members) == ["a", "z"]
    scores, _ = scored(source, answers, cluster, tmp_path)
    parts = [scored(reward.open(folder, encoder, cluster), answers, cluster, tmp_path)[0]
             for reward, folder in ((chain, reward_folder), (own, other))]  # fmt: skip
    assert torch.allclose(scores, (parts[0] + parts[1]) / 2, atol=1e-6)


def test_an_error_of_a_member_names_it(reward_folder, encoder, cluster):
    bad = Ensemble(
        members={"a": RewardModel(path=str(reward_folder / "model" / "x"), normalise="shift"), "b": Fixed(B)},
        how="mean", uncertainty_coef=0.0,
    )  # fmt: skip
    with pytest.raises(UserError, match="member a: '.*' was not trained by alignkit"):
        bad.open(None, encoder, cluster)
    alone = Ensemble(members={"a": RewardModel(path=None, normalise="none"), "b": Fixed(B)}, how="mean",
                     uncertainty_coef=0.0)  # fmt: skip
    with pytest.raises(UserError, match="member a: path=FOLDER is required"):
        alone.open(None, encoder, cluster)


def test_which_setting_names_the_reward_model_of_the_chain():
    named, unnamed = (RewardModel(path=path, normalise="none") for path in ("x", None))
    outside = function("a.b")

    def ensemble(**members):
        return Ensemble(members=members, how="mean", uncertainty_coef=0.0)

    assert chain_key(named) == chain_key(unnamed) == "reward.path"
    assert chain_key(outside) is None and chain_key(ensemble(a=outside, b=named)) is None
    assert chain_key(ensemble(a=outside, b=unnamed)) == "reward.members.b.path"
    assert chain_key(ensemble(a=outside, b=ensemble(c=named, d=unnamed))) == "reward.members.b.members.d.path"
    assert chain_key(Fixed(A)) == "reward.path"  # a class that does not say it needs none
