"""Rankings: several responses to one prompt in order of quality, as a row of a file and as the pairs that it gives."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.data.corpus import Pair, Prompt
from alignkit.data.values import (
    as_turns,
    margin_value,
    number_value,
    prompt_value,
    response_value,
    shown,
    subset_value,
    turn_value,
)


@dataclass(frozen=True)
class Ranked:
    """Responses to one prompt, no two alike. levels: how good each is (higher is better; of two on one level neither is
    preferred); margins: a number each, a pair's margin is their difference, or one margin for all pairs."""

    prompt: Prompt
    responses: list[str]
    levels: list[float]
    margins: list[float] | float
    subset: str

    def pairs(self) -> list[Pair]:
        """Every two responses on different levels, best first, all under the ranking's name; [] if all are level."""
        name = hashlib.sha256(json.dumps([self.prompt, self.responses, self.levels]).encode()).hexdigest()[:16]
        order = sorted(range(len(self.responses)), key=lambda place: -self.levels[place])
        return [
            Pair(self.prompt, self.responses[i], self.responses[j], self._margin(i, j), self.subset, name)
            for number, i in enumerate(order)
            for j in order[number + 1 :]
            if self.levels[i] > self.levels[j]
        ]

    def _margin(self, better: int, worse: int) -> float:
        return self.margins[better] - self.margins[worse] if isinstance(self.margins, list) else self.margins


def ranking(row: dict[str, Any]) -> Ranked:
    """`responses` are texts or replies in messages: best first, or with `ranks` (lower is better) or `scores` (higher
    is better), one each. `margin`: a number for all pairs, or a list of one number a response."""
    given, prompt = row["responses"], prompt_value(row["prompt"])
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError(f"expected `responses` to be a list of at least two texts or messages, got {shown(given)}")
    texts = [_reply(value, f"responses[{place}]") for place, value in enumerate(given)]
    if not all(isinstance(value, str) for value in given):
        prompt = as_turns(prompt)
    levels = _levels(row, len(texts))
    margins = row.get("margin")
    margins = _numbers(margins, "margin", len(texts)) if isinstance(margins, list) else margin_value(margins)
    first = {text: place for place, text in reversed(list(enumerate(texts)))}
    for text, level in zip(texts, levels):
        if levels[first[text]] != level:
            raise ValueError(f"expected each response once, got one in two places of the ranking: {shown(text)}")
    kept = sorted(first.values())
    return Ranked(
        prompt,
        [texts[place] for place in kept],
        [levels[place] for place in kept],
        [margins[place] for place in kept] if isinstance(margins, list) else margins,
        subset_value(row.get("subset")),
    )


def by_ranking(pairs: list[Pair]) -> list[list[Pair]]:
    """Pairs that share a ranking together, every other one on its own, in the order of first appearance."""
    return [[pairs[place] for place in group] for group in places_by_ranking(pairs)]


def places_by_ranking(pairs: Sequence[Pair]) -> list[list[int]]:
    """The same by the pairs' places."""
    groups: dict[object, list[int]] = {}
    for place, pair in enumerate(pairs):
        groups.setdefault(pair.ranking or place, []).append(place)
    return list(groups.values())


def _reply(value: object, key: str) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, dict):
        return response_value(value, key)
    turn = turn_value(value, key)
    if turn["role"] != "assistant":
        raise ValueError(f"expected `{key}` to be an assistant turn, got a {turn['role']} turn")
    return response_value(turn["content"], key)


def _levels(row: dict[str, Any], count: int) -> list[float]:
    ranks, scores = row.get("ranks"), row.get("scores")
    if ranks is not None and scores is not None:
        raise ValueError("expected `ranks` or `scores` beside `responses`, got both")
    if scores is not None:
        return _numbers(scores, "scores", count)
    return [-rank for rank in (range(count) if ranks is None else _numbers(ranks, "ranks", count))]


def _numbers(value: object, key: str, count: int) -> list[float]:
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"expected `{key}` to be a list of {count} numbers, one a response, got {shown(value)}")
    return [number_value(number, f"{key}[{place}]") for place, number in enumerate(value)]
