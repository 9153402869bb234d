"""Rows from files: .jsonl, .json (a list of objects), either also .gz, and .parquet.

Files come from strangers, so everything that can be wrong with one ends in a `UserError` of one line. What spoils a
single line of a .jsonl file may be skipped; what leaves the rest of a file unreadable may not.
"""

import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator

from alignkit.data.assemble import RawRow, RowOptions, corpus_from_rows, demonstrations_from_rows
from alignkit.data.corpus import Corpus, Demonstration
from alignkit.errors import UserError
from alignkit.schema import settings

LONGEST_LINE = 256 * 2**20  # bytes
MOST_EXPANDED = 200  # times a .gz file's size, once it is more than a line; texts come to 20 at most
READABLE = ".jsonl, .json (either also with .gz) or .parquet"
UNPARSABLE = "one that is nested too deeply or has a number that is too long"
FOREIGN_BEGINNINGS = {
    b"\x1f\x8b": "gzip data: let the file's name end with .gz",
    b"\xff\xfe": "UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`",
    b"PAR1": "Parquet data: let the file's name end with .parquet",
}


@settings
class Files(RowOptions):
    """`data=jsonl`: files on disk. `path` is one path, a glob, or a list of either, read in that order."""

    path: str | list[str] | None

    def load(self, seed: int) -> Corpus:
        rows = (row for file in resolve(self.path) for row in read_rows(file))
        return corpus_from_rows(rows, self, seed)

    def fingerprint(self) -> str:
        """SHA-256 over the bytes of all files in order: of one file, what `sha256sum` prints."""
        return files_digest(self.path, "data.path")


def files_digest(path: str | list[str] | None, key: str) -> str:
    """SHA-256 over the bytes of all files that the setting `key` names. Raises UserError where one cannot be read."""
    digest = hashlib.sha256()
    for file in resolve(path, key):
        if os.path.isfile(file) and os.path.getsize(file) == 0:
            raise UserError(f"{file}:1: expected at least one row, got an empty file")
        try:
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"{file}: expected a readable file, got {cause(error)}") from None
    return digest.hexdigest()


def read_demonstrations(path: str | list[str], key: str) -> list[Demonstration]:
    """Every row of the files as something to imitate: texts, responses, chosen responses (for `ptx`)."""
    return demonstrations_from_rows(row for file in resolve(path, key) for row in read_rows(file))


def resolve(path: str | list[str] | None, key: str = "data.path") -> list[str]:
    """The files that `path` names, each once; those of a glob in alphabetical order."""
    if not path:
        raise UserError(f"{key}=FILE is required: {READABLE}; a glob or a list [a.jsonl,b.jsonl] works too")
    files: dict[str, None] = {}
    for pattern in [path] if isinstance(path, str) else path:
        expanded = os.path.expanduser(pattern)
        found = [expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded, recursive=True))
        if not found and glob.has_magic(expanded):
            raise UserError(f"{key}={pattern}: expected at least one file, got no match in {os.getcwd()}")
        if not found:
            raise UserError(f"{key}={pattern}: expected a file, got no such file in {os.getcwd()}")
        files.update(dict.fromkeys(found))
    for file in files:
        if os.path.isdir(file):
            raise UserError(f"{key}={file}: expected a file, got a folder; name its files, as in {file}/*.jsonl")
    return list(files)


def read_rows(file: str) -> Iterator[RawRow]:
    """Every row of one file, at least one."""
    readers = {".jsonl": jsonl_rows, ".json": json_rows, ".parquet": parquet_rows}
    name = file.removesuffix(".gz")
    ending = os.path.splitext(name)[1]
    if ending not in readers or (name != file and ending == ".parquet"):
        raise UserError(f"{file}: expected a name that ends in {READABLE}, got {os.path.basename(file)}")
    row = None
    for row in readers[ending](file):
        yield row
    if row is None:
        raise UserError(f"{file}:1: expected at least one row, got an empty file")


def jsonl_rows(file: str) -> Iterator[RawRow]:
    for number, line in lines(file):
        if not line.strip():
            continue
        try:
            yield RawRow(file, number, parsed(line.decode("utf-8")))
        except UnicodeDecodeError as error:
            got = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
            yield RawRow(file, number, None, f"expected UTF-8 text, got {got}")
        except ValueError as error:
            yield RawRow(file, number, None, str(error))


def parsed(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"expected one JSON object, got a fault at column {error.colno} ({error.msg})") from None
    except (RecursionError, ValueError):
        raise ValueError(f"expected one JSON object, got {UNPARSABLE}") from None


def lines(file: str) -> Iterator[tuple[int, bytes]]:
    """Lines as bytes, for one with a wrong byte must not spoil the others; without the byte-order mark of UTF-8."""
    number, read = 0, 0
    try:
        most = max(LONGEST_LINE, MOST_EXPANDED * os.path.getsize(file)) if file.endswith(".gz") else float("inf")
        with gzip.open(file) if file.endswith(".gz") else open(file, "rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE), b""), start=1):
                read += len(line)
                if len(line) == LONGEST_LINE or read > most:
                    limits = f"lines below {LONGEST_LINE >> 20} MiB, and {MOST_EXPANDED} times a .gz file's size in all"
                    raise UserError(f"{file}:{number}: expected {limits}, got more")
                if number == 1:
                    refuse_foreign(file, line)
                    line = line.removeprefix(b"\xef\xbb\xbf")
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        got = "its end (the file is cut off)" if isinstance(error, EOFError) else cause(error)
        raise UserError(f"{file}:{number + 1}: expected gzip data, got {got}; copy or download it again") from None
    except OSError as error:
        raise UserError(f"{file}:{number + 1}: expected a readable file, got {cause(error)}") from None


def refuse_foreign(file: str, line: bytes) -> None:
    for beginning, what in FOREIGN_BEGINNINGS.items():
        if line.startswith(beginning):
            raise UserError(f"{file}:1: expected UTF-8 text, got {what}")


def json_rows(file: str) -> Iterator[RawRow]:
    """One value at a time, so that each row knows its line. A fault ends the reading: what follows has no anchor."""
    text = whole_text(file)
    position, counted, line = blank_until(text, 0), 0, 1
    if not text.strip():
        return
    if text[position] != "[":
        raise UserError(f"{file}:1: expected a list [...] of objects; one object a line needs a name ending in .jsonl")
    while text[position : position + 1] in ("[", ","):
        position = blank_until(text, position + 1)
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            break
        try:
            value, position = json.JSONDecoder().raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}:{error.lineno}: expected a JSON object, got a fault ({error.msg})") from None
        except (RecursionError, ValueError):
            raise UserError(f"{file}:{line}: expected a JSON object, got {UNPARSABLE}") from None
        yield RawRow(file, line, value)
        position = blank_until(text, position)
    if text[position:].rstrip() != "]":
        line = text.count("\n", 0, position) + 1
        raise UserError(f"{file}:{line}: expected `,` and an object or the final `]`, got {text[position:][:20]!r}")


def whole_text(file: str) -> str:
    try:
        return b"".join(line for _, line in lines(file)).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: expected UTF-8 text, got byte 0x{error.object[error.start]:02x}") from None


def blank_until(text: str, position: int) -> int:
    """The next position that is not JSON's white space."""
    return next(re.compile(r"[ \t\r\n]*").finditer(text, position)).end()


def parquet_rows(file: str) -> Iterator[RawRow]:
    """Parquet has no lines: rows are counted instead."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(file, number, row)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file}:{number + 1}: expected Parquet data, got a fault ({cause(error)})") from None


def cause(error: Exception) -> str:
    """What went wrong, on one line."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(reason.split())[:200]
