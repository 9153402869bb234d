"""From one row of a data set to one training row: the format is recognised by the row's keys, checked, converted.

Keys decide, values never do, so that every row of a file is read by the same visible rule; a key whose value is null
counts as absent (columnar files fill the gaps of mixed rows with null). Every fault is a `ValueError` that reads
"expected ..., got ..."; the reader puts file and line in front.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from alignkit.data.corpus import Demonstration, Pair, Prompt
from alignkit.data.rankings import Ranked, ranking
from alignkit.data.values import (
    Turns,
    as_turns,
    before_answer,
    listed,
    margin_value,
    prompt_value,
    response_value,
    shown,
    subset_value,
    text_value,
    turn_value,
    turns_value,
    with_system,
)

TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
TRANSCRIPT_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
LABELS = {"negative": 0, "positive": 1}
POST = ("subreddit", "title", "post")


@dataclass(frozen=True)
class Labelled:
    """A text that people found good (label 1) or bad (label 0); pairs are made from these later."""

    text: str
    label: int


Row = Demonstration | Pair | Ranked | Labelled


class Format(NamedTuple):
    """A row has this format when it has every key in `name`, joined by +. Name and meaning stand in the log."""

    name: str
    meaning: str
    convert: Callable[[dict[str, Any]], Row]


def convert_row(row: object) -> tuple[Format, Row]:
    """The first format of `FORMATS` whose keys the row has, and the row in that format."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object such as {{'prompt': ..., 'response': ...}}, got {shown(row)}")
    present = {key for key, value in row.items() if value is not None}
    for candidate in FORMATS:
        if present.issuperset(candidate.name.split("+")):
            return candidate, candidate.convert(row)
    known = ", ".join(candidate.name for candidate in FORMATS)
    found = listed(f"{key}" if key in present else f"{key} (null)" for key in row)
    raise ValueError(f"expected the keys of one format ({known}), got {found}")


# ------------------------------------------------------------------------------------------------- demonstrations


def answered_prompt(row: dict[str, Any], key: str) -> Demonstration:
    """Prompt and answer are each a text or chat messages; an answer in messages may hold several turns."""
    prompt = prompt_value(row["prompt"])
    if isinstance(row[key], list):
        return last_answer(as_turns(prompt) + turns_value(row[key], key))
    return Demonstration(prompt, response_value(row[key], key))


def conversation(row: dict[str, Any], key: str) -> Demonstration:
    return last_answer(with_system(row, turns_value(row[key], key)))


def alpaca(row: dict[str, Any]) -> Demonstration:
    """Always chat: an instruction is answered, not continued, so raw text would run the two together."""
    instruction, extra = text_value(row["instruction"], "instruction"), row.get("input")
    content = f"{instruction}\n\n{text_value(extra, 'input')}" if extra else instruction
    prompt = with_system(row, [{"role": "user", "content": content}])
    return Demonstration(prompt, response_value(row["output"], "output"))


def summary(row: dict[str, Any]) -> Demonstration:
    return Demonstration(summary_prompt(row), after_space(row["summary"], "summary"))


def summary_prompt(post: dict[str, Any]) -> str:
    """A Reddit post as Stiennon et al. 2020 put it (openai/summarize-from-feedback@7009674, tasks.py)."""
    subreddit, title, text = (text_value(post.get(key), key) for key in POST)
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {text}\n\nTL;DR:"


def after_space(value: object, key: str) -> str:
    """The published summaries begin with a space, the published demonstrations do not."""
    return f" {text_value(value, key).strip()}"


def language_modelling_text(row: dict[str, Any]) -> Demonstration:
    return Demonstration("", response_value(row["text"], "text"))


def last_answer(turns: Turns) -> Demonstration:
    """Only the last assistant turn is imitated; earlier ones are context, as they are when a person reads them."""
    if turns[-1]["role"] != "assistant":
        raise ValueError(f"expected the last turn to be the assistant's, got the {turns[-1]['role']}'s")
    return Demonstration(before_answer(turns[:-1]), response_value(turns[-1]["content"], "last turn"))


# ----------------------------------------------------------------------------------------------- preference pairs


def prompt_and_pair(row: dict[str, Any]) -> Pair:
    """`chosen` and `rejected` are texts, replies in messages, or whole conversations that repeat the prompt."""
    prompt = prompt_value(row["prompt"])
    if isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        return make_pair(row, prompt, row["chosen"], row["rejected"])
    asked = as_turns(prompt)
    chosen, rejected = (_after_prompt(asked, turns_value(row[key], key), key) for key in ("chosen", "rejected"))
    return shared_prompt_pair(row, chosen, rejected)


def _after_prompt(asked: Turns, turns: Turns, key: str) -> Turns:
    if turns[0]["role"] == "assistant":
        return asked + turns
    if asked[-1] not in turns:
        raise ValueError(f"expected `{key}` to begin with an assistant turn or to repeat `prompt`, got neither")
    return turns


def implicit_prompt_pair(row: dict[str, Any]) -> Pair:
    """Two whole conversations: transcripts (`Human:` and `Assistant:` after an empty line) or chat messages."""
    chosen, rejected = (
        transcript_turns(row[key], key) if isinstance(row[key], str) else turns_value(row[key], key)
        for key in ("chosen", "rejected")
    )
    return shared_prompt_pair(row, chosen, rejected)


def sharegpt_pair(row: dict[str, Any]) -> Pair:
    prompt = before_answer(with_system(row, turns_value(row["conversations"], "conversations")))
    replies = []
    for key in ("chosen", "rejected"):
        reply = turn_value(row[key], key)
        if reply["role"] != "assistant":
            raise ValueError(f"expected `{key}` to be an assistant turn, got a {reply['role']} turn")
        replies.append(reply["content"])
    return make_pair(row, prompt, *replies)


def compared_summaries(row: dict[str, Any]) -> Pair:
    """`info` is a Reddit post, `choice` (0 or 1) the better one of two `summaries`."""
    info, given, choice = row["info"], row["summaries"], row["choice"]
    if not isinstance(info, dict) or not isinstance(given, list) or len(given) != 2 or choice not in (0, 1):
        got = f"{shown(info)}, {shown(given)} and {shown(choice)}"
        raise ValueError(f"expected `info` with a post, two `summaries` and `choice` 0 or 1, got {got}")
    texts = [after_space(item.get("text") if isinstance(item, dict) else item, "summaries") for item in given]
    return make_pair(row, summary_prompt(info), texts[int(choice)], texts[1 - int(choice)])


def transcript_turns(text: str, key: str) -> Turns:
    """HH transcripts to turns. Models that sampled them sometimes spoke twice in a row, or wrote a human line of
    their own inside their turn. Neighbouring turns of one speaker are therefore joined by an empty line (chat
    templates demand alternation), and only the marker at the start of a paragraph begins a turn."""
    before, *rest = TRANSCRIPT_TURN.split(text_value(text, key))
    if before or not rest:
        raise ValueError(
            f"expected `{key}` to be a transcript beginning with 'Human:' (or a `prompt` beside it), got {shown(text)}"
        )
    turns: Turns = []
    for role, content in zip(rest[0::2], rest[1::2], strict=True):
        role, content = TRANSCRIPT_ROLES[role], content.strip()
        if turns and turns[-1]["role"] == role:
            content = "\n\n".join(part for part in (turns.pop()["content"], content) if part)
        turns.append({"role": role, "content": content})
    return turns


def shared_prompt_pair(row: dict[str, Any], chosen: Turns, rejected: Turns) -> Pair:
    """The prompt is the longest shared beginning that ends with a user turn; each response is the one assistant turn
    after it. Where more turns follow on a side, the two were not answers to one prompt: rendering them into a response
    would teach the policy to write the user's lines, so such a row is a fault (to be skipped, if wanted)."""
    for key, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1]["role"] != "assistant":
            raise ValueError(f"expected `{key}` to end with an assistant turn, got a {turns[-1]['role']} turn")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1]["role"] != "user":
        shared -= 1
    if not shared:
        raise ValueError("expected `chosen` and `rejected` to begin with the same user turn, got different beginnings")
    left = len(chosen) - shared, len(rejected) - shared
    if left != (1, 1):
        raise ValueError(
            f"expected one assistant turn a side after the shared turns, got {left[0]} and {left[1]} turns"
        )
    return make_pair(row, chosen[:shared], chosen[-1]["content"], rejected[-1]["content"])


def make_pair(row: dict[str, Any], prompt: Prompt, chosen: object, rejected: object) -> Pair:
    chosen, rejected = response_value(chosen, "chosen"), response_value(rejected, "rejected")
    if chosen == rejected:
        raise ValueError(f"expected two different responses, got the same one twice: {shown(chosen)}")
    return Pair(prompt, chosen, rejected, margin_value(row.get("margin")), subset_value(row.get("subset")))


# -------------------------------------------------------------------------------------------------- labelled texts


def labelled_text(row: dict[str, Any]) -> Labelled:
    label = row["label"]
    number = LABELS.get(label.lower()) if isinstance(label, str) else label
    if not isinstance(number, int | float) or number not in (0, 1):
        raise ValueError(f"expected `label` to be 0, 1, 'negative' or 'positive', got {shown(label)}")
    return Labelled(response_value(row["text"], "text"), int(number))


FORMATS = (
    Format("info+summaries+choice", "compared summaries of posts", compared_summaries),
    Format("subreddit+title+post+summary", "summaries of posts", summary),
    Format("prompt+chosen+rejected", "preference pairs", prompt_and_pair),
    Format("conversations+chosen+rejected", "ShareGPT preference pairs", sharegpt_pair),
    Format("chosen+rejected", "preference pairs with the prompt in them", implicit_prompt_pair),
    Format("prompt+responses", "rankings", ranking),
    Format("prompt+response", "demonstrations", partial(answered_prompt, key="response")),
    Format("prompt+completion", "demonstrations", partial(answered_prompt, key="completion")),
    Format("conversations", "ShareGPT demonstrations", partial(conversation, key="conversations")),
    Format("messages", "chat demonstrations", partial(conversation, key="messages")),
    Format("instruction+output", "Alpaca demonstrations", alpaca),
    Format("text+label", "labelled texts", labelled_text),
    Format("text", "texts for language modelling", language_modelling_text),
)
"""In the order of trying: the more a format's keys say, the earlier it stands."""
