"""Published archives to files that `data=jsonl` reads. The same archive gives the same bytes, wherever it is run.

python -m alignkit.data.prepare movie_reviews rt-polaritydata.tar.gz movie_reviews.jsonl.gz
python -m alignkit.data.prepare hh_harmless harmless-base/test.jsonl.gz hh_harmless.jsonl.gz
"""

import argparse
import gzip
import json
import os
import random
import sys
import tarfile
import zlib
from collections.abc import Callable
from typing import Any

from alignkit.data.files import cause, read_rows
from alignkit.errors import UserError

LARGEST = 64 * 2**20  # bytes of a file in an archive; the real ones have under 1 MiB
REVIEWS = {"rt-polaritydata/rt-polarity.pos": 1, "rt-polaritydata/rt-polarity.neg": 0}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m alignkit.data.prepare", description=__doc__.splitlines()[0])
    chosen = parser.add_subparsers(required=True, metavar="DATASET")
    for name, (prepare, source) in DATASETS.items():
        command = chosen.add_parser(name, help=source)
        command.add_argument("source", metavar="ARCHIVE", help=source)
        command.add_argument("out", metavar="OUT", help="file to write; its name ends in .jsonl.gz")
        command.set_defaults(prepare=prepare)
    options = parser.parse_args(arguments)
    try:
        if not options.out.endswith(".jsonl.gz"):
            raise UserError(f"{options.out}: expected a name that ends in .jsonl.gz")
        rows, summary = options.prepare(options.source)
        write_rows(options.out, rows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {len(rows):,} rows ({summary})")
    return 0


def movie_reviews(archive: str) -> tuple[list[dict[str, Any]], str]:
    """Sentence polarity dataset v1.0 (Pang & Lee, ACL 2005): one sentence a line in two files of latin-1, one a label.
    Shuffled, so that the first rows of the file have both labels."""
    rows: list[dict[str, Any]] = []
    try:
        with tarfile.open(archive) as members:
            for member, label in REVIEWS.items():
                if members.getmember(member).size > LARGEST:
                    raise UserError(f"{archive}: expected texts of at most {LARGEST >> 20} MiB, got a larger {member}")
                text = members.extractfile(member).read().decode("latin-1")  # type: ignore[union-attr]  # see below
                sentences = [line.strip(" \r") for line in text.split("\n")]
                rows += [{"text": sentence, "label": label} for sentence in sentences if sentence]
    except (KeyError, AttributeError):
        raise UserError(f"{archive}: expected an archive with {' and '.join(REVIEWS)}, got one without them") from None
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(
            f"{archive}: expected the archive rt-polaritydata.tar.gz, got a fault ({cause(error)})"
        ) from None
    random.Random(0).shuffle(rows)
    positive = sum(row["label"] for row in rows)
    return rows, f"{positive:,} positive, {len(rows) - positive:,} negative"


def hh_harmless(source: str) -> tuple[list[dict[str, Any]], str]:
    """Anthropic/hh-rlhf, harmless-base/test.jsonl.gz: pairs of the same text twice say nothing and are dropped."""
    rows, same = [], 0
    for row in read_rows(source):
        pair = row.content if isinstance(row.content, dict) else {}
        if not all(isinstance(pair.get(key), str) for key in ("chosen", "rejected")):
            got = row.fault or "something else"
            raise UserError(f"{source}:{row.line}: expected texts under `chosen` and `rejected`, got {got}")
        if pair["chosen"] == pair["rejected"]:
            same += 1
        else:
            rows.append({"chosen": pair["chosen"], "rejected": pair["rejected"]})
    return rows, f"{same:,} identical pairs dropped"


def write_rows(out: str, rows: list[dict[str, Any]]) -> None:
    """Written aside and moved into place, without time or name in the gzip header."""
    try:
        with open(f"{out}.part", "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as stream:
            for row in rows:
                stream.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        os.replace(f"{out}.part", out)
    except OSError as error:
        raise UserError(f"{out}: expected a place to write to, got {cause(error)}") from None


DATASETS: dict[str, tuple[Callable[[str], tuple[list[dict[str, Any]], str]], str]] = {
    "movie_reviews": (movie_reviews, "rt-polaritydata.tar.gz of Pang & Lee, sentence polarity dataset v1.0"),
    "hh_harmless": (hh_harmless, "harmless-base/test.jsonl.gz of Anthropic/hh-rlhf"),
}

if __name__ == "__main__":
    sys.exit(main())
