"""Rewards from a Python function or an HTTP endpoint: what they are asked, and what happens when they fail."""

import json
import socket
import sys
import threading
import time

import pytest
import torch
from ppo_world import config_of, iterate
from reward_world import (
    FINISHED,
    PROMPTS,
    RESPONSES,
    Endpoint,
    answers_of,
    function,
    http,
    lengths,
    scored,
)

from alignkit.errors import TrainingError

LENGTHS = [float(len(response)) for response in RESPONSES]


@pytest.fixture(scope="module")
def answers(encoder):
    return answers_of(encoder)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write the user's module `own_rewards` and give the name of its `score`."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> str:
        monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
        (tmp_path / "own_rewards.py").write_text("import asyncio, sys, time, torch\nCALLS = []\n" + text)
        return "own_rewards.score"

    return write


@pytest.fixture
def serve():
    """Endpoint(*script), closed at the end."""
    opened = []

    def start(*script):
        opened.append(Endpoint(*script))
        return opened[-1]

    yield start
    for endpoint in opened:
        endpoint.close()


# --------------------------------------------------------------------------------------------------- python functions

PLAIN = "def score(prompts, responses):\n    CALLS.append((prompts, responses))\n    "
KINDS = {
    "def": PLAIN + "return [len(r) for r in responses]\n",
    "async def": "async def score(prompts, responses):\n    CALLS.append((prompts, responses))\n"
    "    await asyncio.sleep(0.01)\n    return [float(len(r)) for r in responses]\n",
    "array": PLAIN + "return torch.tensor([len(r) for r in responses], dtype=torch.float64)\n",
    "with gradients": PLAIN + "assert not torch.is_grad_enabled()\n    return tuple(len(r) for r in responses)\n",
}


@pytest.mark.parametrize("text", KINDS.values(), ids=KINDS)
def test_a_function_scores_the_responses_in_calls_of_a_batch(module, answers, cluster, tmp_path, text):
    source = function(module(text), batch=2).open(None, None, cluster)
    scores, failures = scored(source, answers, cluster, tmp_path)
    assert scores.tolist() == LENGTHS and scores.dtype == torch.float32 and failures is None
    calls = sys.modules["own_rewards"].CALLS
    assert [len(prompts) for prompts, _ in calls] == [2, 2, 1]
    asked = {response: prompt for prompts, responses in calls for prompt, response in zip(prompts, responses)}
    assert asked == dict(zip(RESPONSES, PROMPTS))


def test_a_coroutine_finds_the_same_event_loop_in_every_call(module, answers, cluster, tmp_path):
    text = "async def score(prompts, responses):\n    CALLS.append(asyncio.get_running_loop())\n    return [0.0]\n"
    source = function(module(text), batch=1).open(None, None, cluster)
    scored(source, answers, cluster, tmp_path)
    scored(source, answers, cluster, tmp_path)
    assert len(set(sys.modules["own_rewards"].CALLS)) == 1


BAD = {  # what the function does -> what is said of it
    "raises": ("raise ValueError('no luck\\nat all')", r"own_rewards\.score: ValueError: no luck \(.*own_rewards\.py, "
               r"line 5\); 5 of 5 responses have no score"),
    "exits": ("sys.exit(3)", r"own_rewards\.score: SystemExit: 3 "),
    "too few": ("return [1.0]", r"answered 1 scores to 5 responses; 5 of 5"),
    "text": ("return 'good'", r"answered str where a list of 5 numbers was expected"),
    "none": ("return None", r"answered NoneType where a list"),
    "texts": ("return ['good'] * 5", r"answered 'good' where a number was expected"),
    "switches": ("return [True] * 5", r"answered True where a number was expected"),
    "table": ("return torch.zeros(5, 2)", r"answered \[0\.0, 0\.0\] where a number was expected"),
    "not finite": ("return [1.0, float('nan'), float('inf'), None, 2.0]", r"reward: 3 of 5 scores are not finite; "),
    "too large": ("return [1e300] * 5", r"5 of 5 scores are not finite"),
    "late": ("time.sleep(30)", r"own_rewards\.score: no answer within 0\.3 s"),
}  # fmt: skip


@pytest.mark.parametrize("text, said", BAD.values(), ids=BAD)
def test_a_function_that_fails_stops_the_stage_and_leaves_the_batch(module, answers, cluster, tmp_path, text, said):
    source = function(module(PLAIN + text + "\n"), timeout=0.3).open(None, None, cluster)
    with pytest.raises(TrainingError, match=said) as error:
        scored(source, answers, cluster, tmp_path)
    place = tmp_path / "state" / "failed-rewards-1.jsonl"
    assert str(error.value).endswith(f"the batch is in {place}") and "\n" not in str(error.value)
    rows = [json.loads(line, parse_constant=pytest.fail) for line in place.read_text().splitlines()]
    assert [(row["prompt"], row["response"]) for row in rows] == list(zip(PROMPTS, RESPONSES))
    assert any(row["score"] is None for row in rows)


def test_a_late_coroutine_is_given_up(module, answers, cluster, tmp_path):
    text = "async def score(prompts, responses):\n    await asyncio.sleep(30)\n"
    began = time.monotonic()
    with pytest.raises(TrainingError, match="no answer within 0.2 s"):
        scored(function(module(text), timeout=0.2).open(None, None, cluster), answers, cluster, tmp_path)
    assert time.monotonic() - began < 2


def test_after_a_failure_that_stops_nothing_more_is_asked(module, answers, cluster, tmp_path):
    source = function(module(PLAIN + "raise ValueError\n"), batch=1).open(None, None, cluster)
    with pytest.raises(TrainingError, match=r"own_rewards.score: ValueError \("):
        scored(source, answers, cluster, tmp_path)
    assert len(sys.modules["own_rewards"].CALLS) == 1


SOME = (
    PLAIN + "if PICK in responses:\n        raise ValueError('not this one')\n    return [len(r) for r in responses]\n"
)


def test_with_mean_the_rows_of_a_failed_call_get_the_mean_of_the_others(module, answers, cluster, tmp_path, capsys):
    named = module(SOME.replace("PICK", repr(RESPONSES[1])))
    source = function(named, batch=1, on_failure="mean").open(None, None, cluster)
    others = [length for i, length in enumerate(LENGTHS) if i != 1]
    expected = [sum(others) / 4 if i == 1 else length for i, length in enumerate(LENGTHS)]
    for number in (1, 2):
        scores, failures = scored(source, answers, cluster, tmp_path)
        assert scores.tolist() == pytest.approx(expected) and failures == pytest.approx(0.2)
        rows = (tmp_path / "state" / f"failed-rewards-{number}.jsonl").read_text().splitlines()
        assert [json.loads(row)["score"] for row in rows] == [
            None if i == 1 else length for i, length in enumerate(LENGTHS)
        ]
    (told,) = capsys.readouterr().out.splitlines()
    assert told.startswith("reward: own_rewards.score: ValueError: not this one (")
    assert "1 of 5 responses have no score and get the mean of the others (on_failure=mean)" in told


def test_with_mean_a_batch_without_any_score_stops(module, answers, cluster, tmp_path):
    source = function(module(PLAIN + "return [None] * len(responses)\n"), on_failure="mean").open(None, None, cluster)
    with pytest.raises(TrainingError, match="5 of 5 scores are not finite"):
        scored(source, answers, cluster, tmp_path)


def test_a_disk_that_takes_nothing_does_not_hide_the_failure(module, answers, cluster, tmp_path):
    (tmp_path / "state").touch()
    source = function(module(PLAIN + "return [None] * 5\n")).open(None, None, cluster)
    with pytest.raises(TrainingError, match="not finite; the batch could not be saved in "):
        scored(source, answers, cluster, tmp_path)


class OwnSource:
    """A source of the user's that alignkit knows nothing of."""

    def __init__(self, answer):
        self.score = lambda answers, microbatch: answer(torch.tensor(LENGTHS, dtype=torch.float64))


@pytest.mark.parametrize(
    "answer, said",
    [
        (lambda scores: scores.tolist(), r"TypeError: score\(\) returned list, expected a tensor of 5 numbers"),
        (lambda scores: scores[1:], r"ValueError: score\(\) returned the shape \(4,\) to 5 responses"),
        (lambda scores: scores / 0 * 0, "reward: 5 of 5 scores are not finite"),
        (lambda scores: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_source_of_the_user_fails_in_the_same_way(answers, cluster, tmp_path, answer, said):
    with pytest.raises(TrainingError, match=said):
        scored(OwnSource(answer), answers, cluster, tmp_path)
    assert (tmp_path / "state" / "failed-rewards-1.jsonl").is_file()


def test_a_source_of_the_user_keeps_its_precision(answers, cluster, tmp_path):
    source = OwnSource(lambda scores: scores[[4, 1, 2, 0, 3]] / 3)  # the rows as they are dealt
    scores, failures = scored(source, answers, cluster, tmp_path)
    assert scores.dtype == torch.float64 and failures is None


def test_ppo_tells_the_share_of_failures_and_stops_where_it_should(module, single, tmp_path, monkeypatch):
    text = PLAIN + "return [None if i == 0 else len(r) for i, r in enumerate(responses)]\n"
    monkeypatch.setattr(single, "reward", function(module(text), on_failure="mean").open(None, None, single.cluster))
    values, _ = iterate(single, config_of(), tmp_path)
    assert values["reward_failures"] == pytest.approx(1 / 8)
    monkeypatch.setattr(single, "reward", function(module(text)).open(None, None, single.cluster))
    with pytest.raises(TrainingError, match="reward: 1 of 8 scores are not finite"):
        iterate(single, config_of(), tmp_path, number=1)


def test_ppo_says_nothing_of_failures_where_there_can_be_none(single, tmp_path):
    values, _ = iterate(single, config_of(), tmp_path)
    assert "reward_failures" not in values


# --------------------------------------------------------------------------------------------------------------- http


def test_an_endpoint_is_asked_in_batches_and_its_answers_stay_in_order(serve, answers, cluster, tmp_path):
    endpoint = serve(lambda request: (time.sleep(0.1 * (len(request["responses"]) == 2)), lengths(request))[1])
    scores, _ = scored(http(endpoint.url).open(None, None, cluster), answers, cluster, tmp_path)
    assert scores.tolist() == LENGTHS
    assert sorted(len(request["responses"]) for request in endpoint.requests) == [1, 2, 2]
    rows = {row[1]: row for request in endpoint.requests for row in zip(*(request[key] for key in request))}
    assert rows == {row[1]: row for row in zip(PROMPTS, RESPONSES, FINISHED)}


def test_requests_run_beside_each_other(serve, answers, cluster, tmp_path):
    together = threading.Barrier(3, timeout=5)
    endpoint = serve(lambda request: (together.wait(), lengths(request))[1])
    source = http(endpoint.url, concurrency=3, retries=0).open(None, None, cluster)
    assert scored(source, answers, cluster, tmp_path)[0].tolist() == LENGTHS


def test_what_may_mend_itself_is_asked_again_and_later_each_time(serve, answers, cluster, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr("alignkit.reward.http.time.sleep", waits.append)
    endpoint = serve((503, "busy"), (429, "slower"), (500, ""), lengths)
    source = http(endpoint.url, batch=5, retries=3, backoff=0.5).open(None, None, cluster)
    assert scored(source, answers, cluster, tmp_path)[0].tolist() == LENGTHS
    assert waits == [0.5, 1.0, 2.0]


ENDPOINTS = {  # script -> what is said, and the number of requests
    "down for good": ((503, "try later\nplease"), r"answered 503: try later \(3 attempts\); 5 of 5", 3),
    "refuses": ((404, "no such model\n<html>"), r"answered 404: no such model; 5 of 5 responses have no score", 1),
    "refuses without a word": ((401, ""), r"answered 401: Unauthorized", 1),
    "sends elsewhere": ((302, ""), r"answered 302: ", 1),
    "no JSON": ((200, "<html>"), r'answered no JSON like \{"scores": \[\.\.\.\]\}, but \'<html>\'', 1),
    "other JSON": ((200, "[1, 2]"), r"answered no JSON like", 1),
    "too many": ((200, '{"scores": [1, 2, 3, 4, 5, 6]}'), r"answered 6 scores to 5 responses", 1),
    "no list": ((200, '{"scores": 1}'), r"answered int where a list of 5 numbers", 1),
    "texts": ((200, '{"scores": ["a", 2, 3, 4, 5]}'), r"answered 'a' where a number", 1),
    "NaN": ((200, '{"scores": [NaN, 2, null, 4, 5]}'), r"2 of 5 scores are not finite", 1),
}


@pytest.mark.parametrize("step, said, asked", ENDPOINTS.values(), ids=ENDPOINTS)
def test_an_endpoint_that_fails_is_told_in_its_own_words(serve, answers, cluster, tmp_path, step, said, asked):
    endpoint = serve(step)
    source = http(endpoint.url, batch=5, backoff=0.0).open(None, None, cluster)
    with pytest.raises(TrainingError, match=said):
        scored(source, answers, cluster, tmp_path)
    assert len(endpoint.requests) == asked
    assert (tmp_path / "state" / "failed-rewards-1.jsonl").is_file()


def drip(request):
    def parts():
        for part in '{"scores": [1, 2, 3, 4, 5]}':
            time.sleep(0.1)
            yield part

    return 200, parts()


@pytest.mark.parametrize("step", [lambda request: (time.sleep(1.0), (200, ""))[1], drip], ids=["silent", "drips"])
def test_a_slow_endpoint_is_given_up(serve, answers, cluster, tmp_path, step):
    endpoint = serve(step)
    source = http(endpoint.url, batch=5, timeout=0.2, retries=1, backoff=0.0).open(None, None, cluster)
    with pytest.raises(TrainingError, match=r"no answer within 0\.2 s \(2 attempts\)"):
        scored(source, answers, cluster, tmp_path)


def test_an_endpoint_that_is_not_there_is_named(answers, cluster, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/score"
    source = http(url, retries=0).open(None, None, cluster)
    with pytest.raises(TrainingError, match=rf"reward: {url}: no answer: \[Errno 111\] Connection refused; "):
        scored(source, answers, cluster, tmp_path)


def test_with_mean_a_request_that_failed_costs_its_rows_only(serve, answers, cluster, tmp_path):
    endpoint = serve((400, "not today"), lengths)
    source = http(endpoint.url, batch=1, concurrency=1, on_failure="mean").open(None, None, cluster)
    scores, failures = scored(source, answers, cluster, tmp_path)
    lost = int((~torch.isin(scores, torch.tensor(LENGTHS))).nonzero())
    others = [length for i, length in enumerate(LENGTHS) if i != lost]
    assert failures == pytest.approx(0.2) and float(scores[lost]) == pytest.approx(sum(others) / 4)


def test_a_token_comes_from_the_environment(serve, answers, cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "abc\n")
    endpoint = serve(lengths)
    settings = http(endpoint.url, token_env="MY_TOKEN")
    scored(settings.open(None, None, cluster), answers, cluster, tmp_path)
    assert {headers["Authorization"] for headers in endpoint.headers} == {"Bearer abc"}
    assert "abc" not in repr(settings)
