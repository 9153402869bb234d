"""How sure one may be of a preference, as a file that `alignkit denoise` writes, and what may be done about doubt.

Source: Wang et al. 2024 (Secrets of RLHF II), arXiv:2401.06080, section 2: mean and deviation over reward models.
"""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from alignkit.data.corpus import Pair
from alignkit.data.rankings import places_by_ranking
from alignkit.errors import UserError

Treatment = Literal["smooth", "flip", "drop"]
FLIP, SMOOTH = 0.1, 0.5  # a label that is right with less probability than this is proposed to be flipped, smoothed


def key_of(pair: Pair) -> str:
    """Names a labelled pair by its texts, whatever file or row it comes from."""
    content = json.dumps([pair.prompt, pair.chosen, pair.rejected], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8")).hexdigest()[:16]


def proposal(right: float) -> Literal["keep", "smooth", "flip"]:
    """What to do with a label that is right with this probability."""
    return "flip" if right < FLIP else "smooth" if right < SMOOTH else "keep"


def half_of(pairs: Sequence[Pair], number: int, seed: int) -> list[int]:
    """Which pairs reward model `number` (1, 2, ...) learns from: a random half, and 2j the one that 2j - 1 left, so
    that of an even number of models half have not seen a pair."""
    shuffled = places_by_ranking(pairs)
    random.Random(f"half-{seed}-{(number - 1) // 2}").shuffle(shuffled)
    middle = len(shuffled) // 2
    return sorted(place for whole in (shuffled[:middle] if number % 2 else shuffled[middle:]) for place in whole)


def some_of(pairs: list[Pair], count: int, seed: int) -> list[Pair]:
    """A fixed draw of at most `count` pairs, whole rankings (the last one may go beyond)."""
    drawn: list[int] = []
    order = places_by_ranking(pairs)
    random.Random(f"some-{seed}").shuffle(order)
    for whole in order:
        if len(drawn) < count:
            drawn += whole
    return [pairs[place] for place in sorted(drawn)]


def treated(pairs: list[Pair], data: Any) -> tuple[list[Pair], list[str]]:
    """The training pairs as the strengths in `data.denoise` propose, and a note for the log. data: the data's settings;
    denoise_by: what is done about labels in doubt: `flip` as proposed, `smooth` flips none and smooths them too, `drop`
    leaves all of them out.

    Raises UserError if the file cannot be read or knows none of the pairs.
    """
    if getattr(data, "denoise", None) is None:  # a data source from outside need not have it
        return pairs, []
    path, by = data.denoise, data.denoise_by
    strengths, result = read_strengths(path), []
    done: Counter[str] = Counter()
    for pair in pairs:
        right = strengths.get(key_of(pair))
        wanted: str = "keep" if right is None else proposal(right)
        if wanted == "flip" and by == "smooth":
            wanted = "smooth"
        if wanted != "keep" and by == "drop":
            wanted = "drop"
        done["unknown" if right is None else wanted] += 1
        if wanted == "flip":
            pair = replace(pair, chosen=pair.rejected, rejected=pair.chosen)
        elif wanted == "smooth" and right is not None:
            pair = replace(pair, smoothing=min(1.0 - right, 0.5))
        if wanted != "drop":
            result.append(pair)
    if pairs and done["unknown"] == len(pairs):
        raise UserError(f"data.denoise={path}: it knows none of the {len(pairs)} training pairs; it is of other data")
    counts = ", ".join(f"{count} {name}" for name, count in sorted(done.items()))
    return result, [f"labels in doubt, by {Path(path).name}: {counts}"]


def strengths_file(path: str) -> Path:
    """The file of strengths in the folder of the stage that made it, or the file itself."""
    place = Path(path).expanduser()
    return place / "strength.jsonl" if place.is_dir() else place


def read_strengths(path: str) -> dict[str, float]:
    """Pair's key -> probability that its label is right. Raises UserError with file and line."""
    file, found = strengths_file(path), {}
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.denoise={path}: cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            found[row["key"]] = float(row["right"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file}:{number}: expected a row of `alignkit denoise` with key and right") from None
    return found
