"""Every format: one golden row, its name in the log, and each fault with what the message must say."""

import pytest

from alignkit.data.corpus import Demonstration, Pair
from alignkit.data.formats import FORMATS, Labelled, convert_row
from alignkit.data.rankings import Ranked


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}
POST = {"subreddit": "cats", "title": "b {x}", "post": "c\n\nd"}
ASKED = "SUBREDDIT: r/cats\n\nTITLE: b {x}\n\nPOST: c\n\nd\n\nTL;DR:"
COMPARED = {"info": {**POST, "id": "t3"}, "summaries": [{"text": " e"}, {"text": "f "}], "choice": 1}


def hh(*turns):
    return "".join(f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {turn}" for i, turn in enumerate(turns))


GOLDEN = [
    # the columns of openai/summarize_from_feedback and of sets that were made from it, with chosen and rejected beside
    ("subreddit+title+post+summary", {**POST, "id": "t3", "summary": "e "}, Demonstration(ASKED, " e")),
    ("info+summaries+choice", {**COMPARED, "chosen": " f<|endoftext|>", "rejected": "e"}, Pair(ASKED, " f", " e")),
    ("info+summaries+choice", {**COMPARED, "choice": 0, "subset": "batch9"}, Pair(ASKED, " e", " f", subset="batch9")),
    ("prompt+response", {"prompt": "a ", "response": "b "}, Demonstration("a ", "b ")),
    ("prompt+response", {"prompt": [user("a")], "response": "b"}, Demonstration([user("a")], "b")),
    ("prompt+response", {"prompt": "", "response": "b"}, Demonstration("", "b")),
    ("prompt+completion", {"prompt": "a", "completion": "b"}, Demonstration("a", "b")),
    (
        "prompt+completion",
        {"prompt": [user("a")], "completion": [assistant("b"), user("c"), assistant("d")]},
        Demonstration([user("a"), assistant("b"), user("c")], "d"),
    ),
    ("prompt+chosen+rejected", {"prompt": "a", "chosen": "b", "rejected": "c"}, Pair("a", "b", "c")),
    ("prompt+chosen+rejected", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2}, Pair("a", "b", "c", 2.0)),
    (
        "prompt+chosen+rejected",
        {"prompt": [SYSTEM, user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        Pair([SYSTEM, user("a")], "b", "c"),
    ),
    (  # whole conversations beside the prompt that they repeat
        "prompt+chosen+rejected",
        {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        Pair([user("a")], "b", "c"),
    ),
    (
        "prompt+chosen+rejected",
        {"prompt": "a", "chosen": "b", "rejected": "c", "subset": 2024},
        Pair("a", "b", "c", subset="2024"),
    ),
    ("prompt+responses", {"prompt": "a", "responses": ["b", "c"]}, Ranked("a", ["b", "c"], [0, -1], 0.0, "")),
    (
        "prompt+responses",
        {"prompt": "a", "responses": ["b", "c", "d"], "ranks": [2, 1, 2], "margin": 0.5, "subset": "x"},
        Ranked("a", ["b", "c", "d"], [-2.0, -1.0, -2.0], 0.5, "x"),
    ),
    (
        "prompt+responses",
        {"prompt": "a", "responses": ["b", "c", "b"], "scores": [1, 3.5, 1], "margin": [1, 3, 1]},
        Ranked("a", ["b", "c"], [1.0, 3.5], [1.0, 3.0], ""),
    ),
    (
        "prompt+responses",
        {"prompt": "a", "responses": [assistant("b"), [assistant("c")]]},
        Ranked([user("a")], ["b", "c"], [0, -1], 0.0, ""),
    ),
    ("chosen+rejected", {"chosen": hh("a", "b"), "rejected": hh("a", "c")}, Pair([user("a")], "b", "c")),
    (
        "chosen+rejected",
        {"chosen": hh("a", "b", "c", "d"), "rejected": hh("a", "b", "c", "e"), "margin": 0.5},
        Pair([user("a"), assistant("b"), user("c")], "d", "e", 0.5),
    ),
    (  # a model that spoke twice in a row: one turn, on one side or in the shared beginning
        "chosen+rejected",
        {"chosen": hh("a", "b  Human: x") + "\n\nAssistant:  y", "rejected": hh("a", "c")},
        Pair([user("a")], "b  Human: x\n\ny", "c"),
    ),
    (
        "chosen+rejected",
        {
            "chosen": hh("a", "b:") + "\n\nAssistant: c" + hh("d", "e"),
            "rejected": hh("a", "b:") + "\n\nAssistant: c" + hh("d", "f"),
        },
        Pair([user("a"), assistant("b:\n\nc"), user("d")], "e", "f"),
    ),
    (
        "chosen+rejected",
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        Pair([user("a")], "b", "c"),
    ),
    (
        "conversations+chosen+rejected",
        {
            "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        Pair([SYSTEM, user("a")], "b", "c"),
    ),
    (
        "conversations",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "Be brief."},
        Demonstration([SYSTEM, user("a")], "b"),
    ),
    ("messages", {"messages": [SYSTEM, user("a"), assistant("b")]}, Demonstration([SYSTEM, user("a")], "b")),
    ("instruction+output", {"instruction": "a", "input": "", "output": "b"}, Demonstration([user("a")], "b")),
    ("instruction+output", {"instruction": "a", "input": "x", "output": "b"}, Demonstration([user("a\n\nx")], "b")),
    ("text+label", {"text": "a", "label": 1}, Labelled("a", 1)),
    ("text+label", {"text": "a", "label": "negative"}, Labelled("a", 0)),
    ("text+label", {"text": "a", "label": "Positive"}, Labelled("a", 1)),
    ("text", {"text": "a"}, Demonstration("", "a")),
]


@pytest.mark.parametrize(("name", "row", "expected"), GOLDEN)
def test_golden_rows(name, row, expected):
    recognised, converted = convert_row(row)
    assert (recognised.name, converted) == (name, expected)
    unrelated = {"id": 7, "source": None, "margin": row.get("margin")}
    assert convert_row({**unrelated, **row})[1] == expected, "other columns and gaps filled with null change nothing"


def test_every_format_has_a_golden_row():
    assert {name for name, _, _ in GOLDEN} == {candidate.name for candidate in FORMATS}


def test_columns_that_a_columnar_file_fills_with_null_do_not_count():
    recognised, _ = convert_row({"prompt": "a", "response": "b", "chosen": None, "rejected": None, "text": None})
    assert recognised.name == "prompt+response"


FAULTS = [
    (["a"], "expected an object such as .*, got a list of 1"),
    ({"question": "a", "answer": "b"}, r"expected the keys of one format \(.*text\+label.*\), got question, answer"),
    ({"prompt": "a", "response": None}, r"got prompt, response \(null\)"),
    ({}, "got no keys"),
    ({"prompt": 3, "response": "b"}, "expected `prompt` to be text or a list of messages, got 3"),
    ({"prompt": "a", "response": 3}, "expected `response` to be text, got 3"),
    ({"prompt": "a", "response": " \n"}, "expected `response` not to be empty"),
    ({"prompt": "a", "response": "\ud83d"}, "expected `response` to be Unicode text, got half of a surrogate pair"),
    (
        {"prompt": [assistant("a")], "response": "b"},
        "expected a user turn before the assistant's answer, got the assistant's",
    ),
    ({"prompt": [], "response": "b"}, "expected `prompt` to be a list of messages, got a list of 0"),
    ({"prompt": ["a"], "response": "b"}, r"expected `prompt\[0\]` to be a message with role and content, got 'a'"),
    ({"messages": [user("a")]}, "expected the last turn to be the assistant's, got the user's"),
    ({"messages": [assistant("a")]}, "expected a user turn before the assistant's answer, got nothing"),
    (
        {"messages": [{"role": "tool", "content": "a"}]},
        r"expected `messages\[0\]` to be from one of system, user, assistant, got 'tool'",
    ),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "got a list of 1"),
    (
        {"messages": [{"role": "user", "content": [1]}]},
        r"expected `content of messages\[0\]` to be text, got a list of 1",
    ),
    ({"conversations": [{"from": "observation", "value": "a"}]}, "from one of .*human, gpt, got 'observation'"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "expected two different responses, got the same one twice: 'b'"),
    ({"prompt": "a", "chosen": "", "rejected": "b"}, "expected `chosen` not to be empty"),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "2"},
        "expected `margin` to be a finite number, got '2'",
    ),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")}, "finite number, got nan"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400}, "finite number, got a very long number"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": True}, "finite number, got True"),
    (
        {"prompt": "a", "chosen": [user("b"), assistant("c")], "rejected": [user("b"), assistant("d")]},
        "expected `chosen` to begin with an assistant turn or to repeat `prompt`, got neither",
    ),
    ({"chosen": "b", "rejected": "c"}, "expected `chosen` to be a transcript beginning with 'Human:' .*, got 'b'"),
    ({"chosen": "x" + hh("a", "b"), "rejected": hh("a", "c")}, "beginning with 'Human:'"),
    (
        {"chosen": hh("a", "b"), "rejected": hh("a")},
        "expected `rejected` to end with an assistant turn, got a user turn",
    ),
    ({"chosen": hh("a", ""), "rejected": hh("a", "b")}, "expected `chosen` not to be empty"),
    ({"chosen": hh("a", "b"), "rejected": hh("x", "c")}, "expected .* to begin with the same user turn, got different"),
    (
        {"chosen": hh("a", "b", "c", "d"), "rejected": hh("a", "e")},
        "expected one assistant turn a side after the shared turns, got 3 and 1 turns",
    ),
    (
        {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "human", "value": "b"}, "rejected": {}},
        "expected `chosen` to be an assistant turn, got a user turn",
    ),
    ({"prompt": "a", "responses": ["b"]}, "expected `responses` to be a list of at least two texts or messages, got a"),
    ({"prompt": "a", "responses": "b"}, "at least two texts or messages, got 'b'"),
    ({"prompt": "a", "responses": ["b", ""]}, r"expected `responses\[1\]` not to be empty"),
    (
        {"prompt": "a", "responses": ["b", user("c")]},
        r"expected `responses\[1\]` to be an assistant turn, got a user turn",
    ),
    (
        {"prompt": "a", "responses": ["b", "b"]},
        "expected each response once, got one in two places of the ranking: 'b'",
    ),
    (
        {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2], "scores": [1, 2]},
        "expected `ranks` or `scores` beside `responses`, got both",
    ),
    (
        {"prompt": "a", "responses": ["b", "c"], "scores": [1]},
        "expected `scores` to be a list of 2 numbers, one a response, got a list of 1",
    ),
    (
        {"prompt": "a", "responses": ["b", "c"], "ranks": [1, None]},
        r"expected `ranks\[1\]` to be a finite number, got null",
    ),
    ({"prompt": "a", "responses": ["b", "c"], "margin": [1.0]}, "expected `margin` to be a list of 2 numbers"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "subset": ["x"]}, "expected `subset` to be text, got a list of 1"),
    ({"instruction": "a", "input": 4, "output": "b"}, "expected `input` to be text, got 4"),
    ({"text": "a", "label": 2}, "expected `label` to be 0, 1, 'negative' or 'positive', got 2"),
    ({"text": "a", "label": "good"}, "got 'good'"),
    ({**COMPARED, "info": {**POST, "post": None}}, "expected `post` to be text, got null"),  # news, not a Reddit post
    ({**COMPARED, "choice": 2}, "expected `info` with a post, two `summaries` and `choice` 0 or 1, got .* and 2"),
    ({**COMPARED, "summaries": ["e"]}, "a list of 1 and 1"),
    ({**COMPARED, "summaries": [{"text": "e"}, {"text": ""}]}, "expected `chosen` not to be empty"),
    ({**POST, "summary": 3}, "expected `summary` to be text, got 3"),
    ({"text": "", "label": 1}, "expected `text` not to be empty"),
]


@pytest.mark.parametrize(("row", "message"), FAULTS)
def test_faults_say_what_was_expected_on_one_line(row, message):
    with pytest.raises(ValueError, match=message) as caught:
        convert_row(row)
    text = str(caught.value)
    assert text.startswith("expected ") and ", got " in text
    assert "\n" not in text and len(text) < 500
    text.encode("utf-8")


def test_long_and_strange_values_stay_short_in_messages():
    with pytest.raises(ValueError) as caught:
        convert_row({"text": "a", "label": "x\n" * 1000})
    assert len(str(caught.value)) < 150
    with pytest.raises(ValueError) as caught:
        convert_row({f"column\n{i}\ud800": 1 for i in range(100)})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_ranking_is_its_pairs_best_first_without_those_that_are_level():
    pairs = Ranked("a", ["b", "c", "d", "e"], [1, 3, 1, 2], [0.0, 5.0, 1.0, 2.0], "x").pairs()
    assert [(pair.chosen, pair.rejected, pair.margin) for pair in pairs] == [
        ("c", "e", 3.0), ("c", "b", 5.0), ("c", "d", 4.0), ("e", "b", 2.0), ("e", "d", 1.0)
    ]  # fmt: skip
    assert {(pair.prompt, pair.subset) for pair in pairs} == {("a", "x")} and len({pair.ranking for pair in pairs}) == 1
    other = Ranked("a", ["b", "c", "d", "e"], [1, 3, 1, 0], 0.0, "").pairs()
    assert other[0].ranking != pairs[0].ranking
    assert Ranked("a", ["b", "c"], [1, 1], 0.0, "").pairs() == []
