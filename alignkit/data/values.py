"""Single values of a row, checked: prompts, turns, texts, numbers. Every fault is a `ValueError` that reads
"expected ..., got ..."."""

import math
from collections.abc import Iterable
from typing import Any

from alignkit.data.corpus import Prompt

Turns = list[dict[str, str]]

ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SPEAKERS = {**ROLES, "human": "user", "gpt": "assistant"}


def prompt_value(value: object) -> Prompt:
    """Text, or messages that end with a user turn."""
    if isinstance(value, list):
        return before_answer(turns_value(value, "prompt"))
    if not isinstance(value, str):
        raise ValueError(f"expected `prompt` to be text or a list of messages, got {shown(value)}")
    return text_value(value, "prompt")


def as_turns(prompt: Prompt) -> Turns:
    """A text as a single user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def before_answer(turns: Turns) -> Turns:
    """The turns, if an assistant may answer them."""
    if not turns or turns[-1]["role"] != "user":
        got = f"the {turns[-1]['role']}'s" if turns else "nothing"
        raise ValueError(f"expected a user turn before the assistant's answer, got {got}")
    return turns


def with_system(row: dict[str, Any], turns: Turns) -> Turns:
    """Some ShareGPT and Alpaca files keep the system message in a column of its own."""
    if not row.get("system") or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": text_value(row["system"], "system")}, *turns]


def turns_value(value: object, key: str) -> Turns:
    """A list of messages, at least one."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected `{key}` to be a list of messages, got {shown(value)}")
    return [turn_value(turn, f"{key}[{position}]") for position, turn in enumerate(value)]


def turn_value(value: object, key: str) -> dict[str, str]:
    """A message `{"role", "content"}` or its ShareGPT spelling `{"from", "value"}`."""
    if not isinstance(value, dict):
        raise ValueError(f"expected `{key}` to be a message with role and content, got {shown(value)}")
    if value.get("role") is None and value.get("from") is not None:
        spelt, content, known = value["from"], value.get("value"), SPEAKERS
    else:
        spelt, content, known = value.get("role"), value.get("content"), ROLES
    if not isinstance(spelt, str) or spelt not in known:
        raise ValueError(f"expected `{key}` to be from one of {', '.join(known)}, got {shown(spelt)}")
    return {"role": known[spelt], "content": text_value(content, f"content of {key}")}


def response_value(value: object, key: str) -> str:
    """Text that is more than white space."""
    text = text_value(value, key)
    if not text.strip():
        raise ValueError(f"expected `{key}` not to be empty, got {shown(text)}")
    return text


def text_value(value: object, key: str) -> str:
    """Text that UTF-8 can hold: JSON may spell half of a surrogate pair, which no tokenizer and no hash accepts."""
    if not isinstance(value, str):
        raise ValueError(f"expected `{key}` to be text, got {shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"expected `{key}` to be Unicode text, got half of a surrogate pair in it") from None
    return value


def margin_value(value: object) -> float:
    """A finite number; null: 0."""
    return 0.0 if value is None else number_value(value, "margin")


def number_value(value: object, key: str) -> float:
    """A finite number that is no boolean."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e9 and math.isfinite(value):
        return float(value)
    raise ValueError(f"expected `{key}` to be a finite number, got {shown(value)}")


def subset_value(value: object) -> str:
    """The name of a part of the data; years and the like are often numbers."""
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return str(value)
    return text_value(value, "subset")


def shown(value: object) -> str:
    """A value in a few words, on one line, for a message."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return f"an object with keys {listed(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "a very long number"
    return text if len(text) <= 60 else f"{text[:56]}...{text[0]}"


def listed(keys: Iterable[str]) -> str:
    """Key names on one line, whatever characters they hold."""
    text = ", ".join(repr(key)[1:-1] for key in keys) or "no keys"
    return text if len(text) <= 120 else f"{text[:117]}..."
