"""Held-out preference pairs with their scores: each response scored once, and which pairs hang together."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.algo.calibration import Clusters, Estimate, rightness, share_interval
from alignkit.algo.statistics import contrast_accuracy
from alignkit.data.corpus import Pair, Split
from alignkit.data.tokens import Encoder
from alignkit.errors import NotFinite, UserError

MOST_PAIRS = 20_000  # of labelled texts, paired each with each, drawn for all but the accuracy itself
Scores = Callable[[list[list[int]]], Tensor]  # rows of ids -> [n]


@dataclass(frozen=True)
class Heldout:
    """n pairs and r distinct responses.

    chosen, rejected: scores [n] float64; longer_by: tokens of the chosen response less those of the rejected one [n];
    clusters: what hangs together (see algo/calibration); subsets: [n] names; responses, lengths: score and tokens of
    each distinct response [r]; accuracy: over all pairs, also those that were not drawn; dropped: left out, by reason.
    """

    chosen: Tensor
    rejected: Tensor
    longer_by: Tensor
    clusters: Clusters
    subsets: list[str]
    responses: Tensor
    lengths: Tensor
    accuracy: Estimate
    dropped: dict[str, int]

    @property
    def delta(self) -> Tensor:
        """Score of the chosen response less that of the rejected one, [n]."""
        return self.chosen - self.rejected

    @property
    def interval(self) -> str:
        """How the intervals were made, in words."""
        if len(self.clusters) == 2:
            return "by texts: pairs of one text are not independent"
        if len(self.clusters[0].unique()) < len(self.chosen):
            return "by prompts: pairs of one prompt or ranking are not independent"
        return "by pairs"


def score_heldout(split: Split, encoder: Encoder, max_length: int, scores: Scores, seed: int) -> Heldout:
    """Score all held-out pairs in one pass. Raises UserError if none is left, TrainingError at a score that is not
    finite. Collective where `scores` is: every rank must call it."""
    if split.contrast:
        return _texts(split, encoder, max_length, scores, seed)
    return _pairs(split, encoder, max_length, scores)


def usable(
    pairs: list[Pair], encoder: Encoder, max_length: int
) -> tuple[list[tuple[Pair, list[int], list[int]]], dict[str, int]]:
    """Pairs with the ids of prompt + chosen and prompt + rejected, and how many were left out for which reason."""
    kept, dropped = [], {"too long": 0, "the same tokens": 0}
    for pair in pairs:
        chosen, rejected = encoder.pair(pair)
        if max(len(chosen), len(rejected)) > max_length:
            dropped["too long"] += 1
        elif chosen == rejected:
            dropped["the same tokens"] += 1
        else:
            kept.append((pair, chosen, rejected))
    return kept, dropped


def groups_of(pairs: list[Pair]) -> Tensor:
    """A number for each pair, equal where the prompt is the same (of pairs without one: the ranking), [n] int64."""
    numbers: dict[str, int] = {}
    names = [
        json.dumps(pair.prompt) if pair.prompt else f"ranking {pair.ranking}" if pair.ranking else f"row {row}"
        for row, pair in enumerate(pairs)
    ]
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names], dtype=torch.long)


def _pairs(split: Split, encoder: Encoder, max_length: int, scores: Scores) -> Heldout:
    kept, dropped = usable(split.pairs, encoder, max_length)
    if not kept:
        raise _none_left()
    places: dict[tuple[int, ...], int] = {}
    index = torch.tensor([[places.setdefault(tuple(ids), len(places)) for ids in sides] for _, *sides in kept])
    values = _finite(scores([list(ids) for ids in places]))
    lengths = torch.zeros(len(places), dtype=torch.long)
    for (pair, *sides), row in zip(kept, index.tolist()):
        before = len(encoder.prompt(pair.prompt))
        for ids, place in zip(sides, row):
            lengths[place] = len(ids) - before
    chosen, rejected = values[index[:, 0]], values[index[:, 1]]
    clusters = (groups_of([pair for pair, *_ in kept]),)
    return Heldout(
        chosen=chosen,
        rejected=rejected,
        longer_by=lengths[index[:, 0]] - lengths[index[:, 1]],
        clusters=clusters,
        subsets=[pair.subset for pair, *_ in kept],
        responses=values,
        lengths=lengths,
        accuracy=share_interval(rightness(chosen - rejected), clusters),
        dropped=dropped,
    )


def _texts(split: Split, encoder: Encoder, max_length: int, scores: Scores, seed: int) -> Heldout:
    """Labelled texts: each positive one with each negative one, at most `MOST_PAIRS` of these pairs drawn."""
    assert split.contrast is not None
    whole = [[encoder.prompt("") + encoder.response("", text) for text in side] for side in split.contrast]
    sides = [[ids for ids in side if len(ids) <= max_length] for side in whole]
    if not all(sides):
        raise _none_left()
    values = _finite(scores(sides[0] + sides[1]))
    before, (m, n) = len(encoder.prompt("")), map(len, sides)
    lengths = torch.tensor([len(ids) - before for side in sides for ids in side])
    drawn: Sequence[int] = range(m * n)
    if m * n > MOST_PAIRS:
        drawn = sorted(random.Random(f"contrast-{seed}").sample(drawn, MOST_PAIRS))
    numbers = torch.tensor(drawn)
    positive, negative = numbers // n, numbers % n
    share, low, high = contrast_accuracy(values[:m], values[m:])
    return Heldout(
        chosen=values[positive],
        rejected=values[m + negative],
        longer_by=lengths[positive] - lengths[m + negative],
        clusters=(positive, negative),
        subsets=[""] * len(numbers),
        responses=values,
        lengths=lengths,
        accuracy=Estimate(share, low, high, m * n),
        dropped={"too long": sum(map(len, whole)) - m - n},
    )


def _finite(scores: Tensor) -> Tensor:
    if not bool(torch.isfinite(scores).all()):
        raise NotFinite("the reward model gives scores that are not finite: lower reward_model.learning_rate")
    return scores.double()


def _none_left() -> UserError:
    return UserError("data: no held-out preference pairs are left; raise data.heldout or reward_model.max_length")
