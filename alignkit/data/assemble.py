"""Rows of any source to a `Corpus`: convert, drop doubles, split by hash, pair labelled texts, write the notes.

Which side of the split a row falls on depends on its prompt alone (its text, where there is no prompt), so that files
may be reordered, cut or joined and a held-out prompt is still never trained on.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sized
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import PurePath
from typing import Literal, NamedTuple

from alignkit.data.corpus import Corpus, Demonstration, Pair, Split, split_fraction, to_imitate
from alignkit.data.formats import Labelled, Row, convert_row
from alignkit.data.rankings import Ranked
from alignkit.data.strength import Treatment
from alignkit.data.values import listed
from alignkit.errors import UserError
from alignkit.schema import Count, Fraction, Proportion, settings


class RawRow(NamedTuple):
    """A row as it was read. `line` counts from 1 (the row's number where the source has no lines); `fault` says what
    was expected of a line that could not be read at all."""

    source: str
    line: int
    content: object
    fault: str | None = None


@settings
class RowOptions:
    """What every source of rows shares; `conf/data/jsonl.yaml` says what each means."""

    heldout: Proportion
    judge: Fraction
    on_bad_row: Literal["stop", "skip"]
    as_chat: bool
    prompt_words: list[int]
    pairs_per_text: Count
    limit: Count | None
    margin_column: str | None
    subset_column: str | None
    denoise: str | None
    denoise_by: Treatment

    def __post_init__(self) -> None:
        if self.heldout + self.judge >= 1:
            raise ValueError(f"heldout + judge must leave something to train on, got {self.heldout} + {self.judge}")
        if len(self.prompt_words) != 2 or not 1 <= self.prompt_words[0] <= self.prompt_words[1]:
            raise ValueError(f"prompt_words must be [fewest, most] with 1 <= fewest <= most, got {self.prompt_words}")


def corpus_from_rows(rows: Iterable[RawRow], options: RowOptions, seed: int) -> Corpus:
    """`seed` decides only which labelled training texts are paired; the split does not depend on it."""
    table = collect(rows, options)
    corpus = labelled_corpus(table, options, seed) if table.labels else prompted_corpus(table, options)
    sizes = [size_note("train", corpus.train), size_note("held out", corpus.heldout)]
    if corpus.judge:
        sizes.append(f"judge: {len(corpus.judge):,} texts")
    return replace(corpus, notes=[*table.notes(), *corpus.notes, *sizes])


def demonstrations_from_rows(rows: Iterable[RawRow]) -> list[Demonstration]:
    """All rows as demonstrations, of pairs the chosen response; a bad row stops, and nothing is held out."""
    table = collect(rows, RowOptions(0.5, 0.0, "stop", False, [1, 1], 1, None, None, None, None, "smooth"))
    return [*to_imitate(table.rows), *as_demonstrations(list(table.labels))]


# --------------------------------------------------------------------------------------------------------- collecting


@dataclass
class Table:
    """Converted rows without doubles, in the order of reading, and what the log says about them."""

    rows: list[Demonstration | Pair] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    contradictory: set[str] = field(default_factory=set)
    formats: Counter[tuple[str, str]] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)
    level: int = 0
    doubles: int = 0
    seen: set[str] = field(default_factory=set)

    def add(self, row: Row) -> None:
        """A double has the same texts, whatever else is said of them: it would count twice in every loss."""
        if isinstance(row, Ranked):
            pairs = row.pairs()
            self.level += not pairs
            for pair in pairs:
                self.add(pair)
            return
        beside = ("margin", "subset", "ranking", "smoothing")
        key = json.dumps([value for name, value in vars(row).items() if name not in beside], sort_keys=True)
        if key in self.seen:
            self.doubles += 1
        elif not isinstance(row, Labelled):
            self.rows.append(row)
        elif self.labels.setdefault(row.text, row.label) != row.label:
            self.contradictory.add(row.text)
        self.seen.add(key)

    def notes(self) -> list[str]:
        lines = [
            f"{PurePath(source).name}: {count:,} rows read as {name}" for (source, name), count in self.formats.items()
        ]
        if self.skipped:
            lines.append(f"{len(self.skipped):,} rows skipped: " + "; ".join(self.skipped[:3]))
        if self.level:
            lines.append(f"{self.level:,} rankings left out: all of their responses are on one level")
        if self.doubles:
            lines.append(f"{self.doubles:,} rows left out: the same as an earlier row")
        if self.contradictory:
            lines.append(f"{len(self.contradictory):,} texts left out: labelled both 0 and 1")
        return lines


def collect(rows: Iterable[RawRow], options: RowOptions) -> Table:
    table = Table()
    found: set[str] = set()
    named = {"margin": options.margin_column, "subset": options.subset_column}
    renamed = {key: name for key, name in named.items() if name != key}
    for row in islice(rows, options.limit):
        found.update(row.content if isinstance(row.content, dict) else ())
        try:
            if row.fault:
                raise ValueError(row.fault)
            recognised, converted = convert_row(with_columns(row.content, renamed))
        except ValueError as fault:
            if options.on_bad_row == "stop":
                advice = "mend the row or set data.on_bad_row=skip"
                raise UserError(f"{row.source}:{row.line}: {fault}; {advice}") from None
            table.skipped.append(f"{PurePath(row.source).name}:{row.line}: {fault}")
            continue
        table.formats[row.source, f"{recognised.name} ({recognised.meaning})"] += 1
        table.add(with_chat_prompt(converted) if options.as_chat else converted)
    if not table.formats:
        first = f", the first: {table.skipped[0]}" if table.skipped else ""
        raise UserError(f"data.path: expected at least one good row, got none ({len(table.skipped)} bad{first})")
    if table.labels and table.rows:
        raise UserError(f"data.path: expected text+label rows alone, got a mixture: {'; '.join(table.notes())}")
    for key, name in renamed.items():
        if name is not None and name not in found:
            raise UserError(f"data.{key}_column={name}: no row has that key; its keys: {listed(sorted(found))}")
    for text in table.contradictory:
        del table.labels[text]
    return table


def with_columns(row: object, renamed: dict[str, str | None]) -> object:
    """The row with its margin and subset under these keys, from the columns that the settings name (None: without)."""
    if not renamed or not isinstance(row, dict):
        return row
    return {**row, **{key: None if name is None else row.get(name) for key, name in renamed.items()}}


def with_chat_prompt(row: Row) -> Row:
    """An empty prompt stays as it is: text for language modelling answers nobody."""
    if isinstance(row, Labelled):
        raise UserError("data.as_chat=true: expected rows with prompts, got text+label rows; set data.as_chat=false")
    if isinstance(row.prompt, str) and row.prompt:
        return replace(row, prompt=[{"role": "user", "content": row.prompt}])
    return row


# -------------------------------------------------------------------------------------------- demonstrations and pairs


def prompted_corpus(table: Table, options: RowOptions) -> Corpus:
    if options.judge > 0:
        raise UserError(f"data.judge={options.judge}: expected text+label rows to judge by, got none; set data.judge=0")
    bare = sum(not row.prompt for row in table.rows)
    notes = [f"{bare:,} rows without a prompt give none to PPO"] if 0 < bare < len(table.rows) else []
    corpus = Corpus.from_rows(table.rows, options.heldout)
    train, heldout = corpus.train, corpus.heldout
    require_both("demonstrations", train.demonstrations, heldout.demonstrations, options)
    require_both("pairs", train.pairs, heldout.pairs, options, needed=bool(train.pairs or heldout.pairs))
    return replace(corpus, notes=notes + corpus.notes)


# ------------------------------------------------------------------------------------------------------ labelled texts


def labelled_corpus(table: Table, options: RowOptions, seed: int) -> Corpus:
    """The texts are the demonstrations, any positive one is preferred to any negative one, and the first words of a
    text are a prompt. Held-out pairs are in the order of reading: the same for every seed."""
    train: list[str] = []
    heldout: list[str] = []
    judge: list[str] = []
    for text in table.labels:
        position = split_fraction(text)
        side = heldout if position < options.heldout else judge if position < options.heldout + options.judge else train
        side.append(text)
    good, bad = by_label(train, table.labels)
    good_heldout, bad_heldout = by_label(heldout, table.labels)
    require_both("texts labelled 1", good, good_heldout, options)
    require_both("texts labelled 0", bad, bad_heldout, options)
    if options.judge > 0 and not all(by_label(judge, table.labels)):
        raise UserError(
            f"data.judge={options.judge}: expected texts of both labels to judge by, got {len(judge)} texts"
        )

    prompts_heldout = beginnings(heldout, options)
    prompts = [prompt for prompt in beginnings(train, options) if prompt not in prompts_heldout]
    require_both(f"prompts of {options.prompt_words} words (data.prompt_words)", prompts, prompts_heldout, options)
    return Corpus(
        train=Split(as_demonstrations(train), random_pairs(good, bad, options.pairs_per_text, seed), list(prompts)),
        heldout=Split(
            as_demonstrations(heldout),
            [Pair("", *texts) for texts in zip(good_heldout, bad_heldout)],
            list(prompts_heldout),
            contrast=(good_heldout, bad_heldout),
        ),
        judge=[(text, table.labels[text]) for text in judge],
    )


def by_label(texts: list[str], labels: dict[str, int]) -> tuple[list[str], list[str]]:
    """(positive, negative)"""
    return [text for text in texts if labels[text] == 1], [text for text in texts if labels[text] == 0]


def as_demonstrations(texts: list[str]) -> list[Demonstration]:
    return [Demonstration("", text) for text in texts]


def random_pairs(good: list[str], bad: list[str], rounds: int, seed: int) -> list[Pair]:
    """In each round every text of the larger class is paired once, those of the smaller class as evenly as possible."""
    shuffled = random.Random(seed)
    pairs = []
    for _ in range(rounds):
        positives, negatives = (shuffled.sample(texts, len(texts)) for texts in (good, bad))
        most = max(len(good), len(bad))
        pairs += [Pair("", *texts) for texts in islice(zip(cycle(positives), cycle(negatives)), most)]
    return pairs


def beginnings(texts: list[str], options: RowOptions) -> dict[str, None]:
    """The first words of each text, as spelt there, each once; a text with no word left to continue with gives none.
    The number of words comes from a hash of its own: the hash of the split would give held-out texts the fewest."""
    fewest, most = options.prompt_words
    prompts: dict[str, None] = {}
    for text in texts:
        number = fewest + int(split_fraction(f"number of words: {text}") * (most - fewest + 1))
        words = list(islice(re.finditer(r"\S+", text), number + 1))
        if len(words) > number:
            prompts[text[words[0].start() : words[number - 1].end()]] = None
    return prompts


# -------------------------------------------------------------------------------------------------------------- shared


def require_both(what: str, train: Sized, heldout: Sized, options: RowOptions, needed: bool = True) -> None:
    """Both sides need at least one: a stage would otherwise fail much later, or report a figure over nothing."""
    numbers = f"got {len(train):,} to train on and {len(heldout):,} held out with data.heldout={options.heldout}"
    if needed and not (train and heldout):
        change = "raise data.heldout or " if train else "lower data.heldout or " if heldout else ""
        raise UserError(f"data.path: expected {what} on both sides, {numbers}; {change}give more rows")


def size_note(name: str, split: Split) -> str:
    sizes = len(split.demonstrations), len(split.pairs), len(split.prompts)
    return "{}: {:,} demonstrations, {:,} pairs, {:,} prompts".format(name, *sizes)
