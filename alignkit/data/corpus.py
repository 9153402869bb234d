"""What a data source hands to the stages: demonstrations, preference pairs and prompts, split by prompt.

A prompt is either a string (raw text that the response continues) or a list of chat messages
`{"role": "system" | "user" | "assistant", "content": str}` that ends with a user turn. A response is always a string.
Tokens, templates and lengths are not decided here: `data/tokens.py` turns these rows into token ids.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from alignkit.errors import UserError, in_words

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Demonstration:
    """A prompt and a response to imitate. With an empty prompt the whole response is language-modelling text."""

    prompt: Prompt
    response: str


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, of which people preferred `chosen`.

    margin:    by how much, in reward units (0: none given).
    subset:    the part of the data that it comes from, by which accuracy is told ("": none given).
    ranking:   pairs of one ranking of several responses share its name ("": a pair of its own).
    smoothing: probability that the label is wrong, as far as it is known (0: taken as it is).
    """

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float = 0.0
    subset: str = ""
    ranking: str = ""
    smoothing: float = 0.0


@dataclass(frozen=True)
class Split:
    """One side of the held-out split. `contrast`: two lists of texts, each of the first preferred over each of the
    second (labelled texts give this instead of single pairs, so that accuracy is over all positive-negative pairs)."""

    demonstrations: list[Demonstration]
    pairs: list[Pair]
    prompts: list[Prompt]
    contrast: tuple[list[str], list[str]] | None = None


@dataclass(frozen=True)
class Corpus:
    """All that a run learns from. No prompt is in both `train` and `heldout`, in any stage.

    gold:   the true score of (prompt, response) where the task knows it (synthetic data), else None.
    judge:  labelled texts (text, label 0 or 1) kept apart for an independent judge; empty where there is none.
    notes:  lines for the log: the format recognised and why, row counts, what was left out and why.
    """

    train: Split
    heldout: Split
    gold: Callable[[Prompt, str], float] | None = None
    judge: list[tuple[str, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_rows(cls, rows: Sequence[Demonstration | Pair], heldout: float = 0.1) -> "Corpus":
        """Demonstrations and pairs in any order, the share `heldout` of their prompts held out (by a hash: see
        `split_fraction`). A row without a prompt goes by its text, a ranking by its name. Where no row is a
        demonstration, SFT imitates the preferred responses."""
        pairs, notes = [row for row in rows if isinstance(row, Pair)], []
        demonstrations = [row for row in rows if isinstance(row, Demonstration)]
        if not demonstrations:
            demonstrations = list({json.dumps([row.prompt, row.response]): row for row in to_imitate(pairs)}.values())
            which = "chosen responses of the pairs" + ", the best of the rankings" * any(pair.ranking for pair in pairs)
            notes = [f"demonstrations: the {which}, because no row is a demonstration"]

        def side(wanted: bool) -> Split:
            said = [row for row in demonstrations if _is_held_out(row, heldout) == wanted]
            preferred = [row for row in pairs if _is_held_out(row, heldout) == wanted]
            asked = (row.prompt for row in rows if row.prompt and _is_held_out(row, heldout) == wanted)
            return Split(said, preferred, list({json.dumps(prompt): prompt for prompt in asked}.values()))

        return cls(side(False), side(True), notes=notes)


class DataSource(ABC):
    """Where a run's rows come from: a frozen dataclass of settings that `_target_` names, with `load`.

    `fingerprint() -> str`, if it has that too, names the rows without reading them all (a digest of their files, say):
    with another one the stages are made again. Without it the rows themselves are read and hashed.
    """

    @abstractmethod
    def load(self, seed: int) -> Corpus:
        """All rows, the same ones for the same seed, in every process; `Corpus.from_rows` splits them by prompt. A
        mistake of a person's is raised as UserError."""
        ...


def load_corpus(source: DataSource, seed: int) -> Corpus:
    """What a source loads. Raises UserError, in one line, where one from outside alignkit cannot or gives no Corpus."""
    name = f"{type(source).__module__}.{type(source).__qualname__}"
    try:
        corpus = source.load(seed)
    except Exception as error:
        if isinstance(error, UserError) or name.startswith("alignkit."):
            raise
        raise UserError(f"data: '{name}' could not load(seed={seed}): {in_words(error)}") from error
    if not isinstance(corpus, Corpus):
        raise UserError(f"data: '{name}' loads {type(corpus).__name__}, expected Corpus, as Corpus.from_rows makes it")
    return corpus


def fingerprint_of(source: DataSource, seed: int) -> str:
    """The source's own fingerprint, or SHA-256 over all of its rows."""
    if hasattr(source, "fingerprint"):
        return source.fingerprint()
    corpus = load_corpus(source, seed)
    return hashlib.sha256(repr((corpus.train, corpus.heldout, corpus.judge)).encode("utf-8", "replace")).hexdigest()


def to_imitate(rows: Sequence[Demonstration | Pair]) -> list[Demonstration]:
    """The demonstrations, and of each pair the chosen response; of a ranking the best alone (or those level with it),
    once."""
    beaten = {(row.ranking, row.rejected) for row in rows if isinstance(row, Pair) and row.ranking}
    found: dict[object, Demonstration] = {}
    for number, row in enumerate(rows):
        if isinstance(row, Demonstration):
            found[number] = row
        elif (row.ranking, row.chosen) not in beaten:
            found.setdefault(
                (row.ranking, row.chosen) if row.ranking else number, Demonstration(row.prompt, row.chosen)
            )
    return list(found.values())


def _is_held_out(row: Demonstration | Pair, heldout: float) -> bool:
    """By the prompt; a row without one by its text, because otherwise all such rows would fall on the same side (a
    ranking by its name, so that it stays together)."""
    text = row.response if isinstance(row, Demonstration) else row.ranking or row.chosen
    return split_fraction(row.prompt or text) < heldout


def split_fraction(prompt: Prompt) -> float:
    """A number in [0, 1) that depends on the prompt alone: rows below `heldout` are held out, whatever file,
    order or stage they come from. (First 8 bytes of SHA-256 over the text or the canonical JSON of the turns; a single
    user turn counts as its text, so that a prompt falls on one side however it is written.)"""
    if isinstance(prompt, list) and len(prompt) == 1 and prompt[0]["role"] == "user":
        prompt = prompt[0]["content"]
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64
