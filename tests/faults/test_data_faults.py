"""Faults of data: what is in the file, and the one line that is said of it, through the entry of a run; code 2, nothing
made, nothing lost. Then what is no fault but has to be told. More of each reader and format, message by message:
tests/unit/test_files.py, test_formats.py, test_assemble.py; wild ones: test_fuzz.py."""

import gzip
import json
import time

import pytest
from fault_world import settings_of

from alignkit.runtime.config import load


def pair(i: int) -> dict:
    return {"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"}


def lines(rows, ending: str = "\n") -> bytes:
    return "".join(json.dumps(row) + ending for row in rows).encode()


GOOD = lines(map(pair, range(3)))
MEND = "; mend the row or set data.on_bad_row=skip"
JUNK = "copy or download it again"
KNOWN = (
    "info+summaries+choice, subreddit+title+post+summary, "
    "prompt+chosen+rejected, conversations+chosen+rejected, chosen+rejected, prompt+responses, prompt+response, "
    "prompt+completion, conversations, messages, instruction+output, text+label, text"
)
NESTED = "one that is nested too deeply or has a number that is too long"


def row(value) -> bytes:
    return GOOD + lines([value])


FAULTS = {  # what is wrong -> the file's name, its bytes, the line
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), "a.jsonl:1: expected UTF-8 text, got UTF-16: convert it with "
               "`iconv -f UTF-16 -t UTF-8`"),
    "Latin-1": ("a.jsonl", GOOD + '{"text": "café"}\n'.encode("latin-1"), "a.jsonl:4: expected UTF-8 text, got byte "
        "0xe9 "
                f"at column 14{MEND}"),
    "gzip cut off": ("a.jsonl.gz", gzip.compress(GOOD * 99)[:-9], "a.jsonl.gz:298: expected gzip data, got its end "
        "(the "
                     f"file is cut off); {JUNK}"),
    "gzip in name alone": ("a.jsonl.gz", GOOD, "a.jsonl.gz:1: expected gzip data, got Not a gzipped file (b'{\"'); "
                           f"{JUNK}"),
    "gzip without the name": ("a.jsonl", gzip.compress(GOOD), "a.jsonl:1: expected UTF-8 text, got gzip data: let the "
                              "file's name end with .gz"),
    "a row cut off": ("a.jsonl", GOOD + b'{"text": "a', "a.jsonl:4: expected one JSON object, got a fault at column 10 "
                      f"(Unterminated string starting at){MEND}"),
    "several rows on a line": ("a.jsonl", GOOD + b'{"text": "a"} {"text": "b"}', "a.jsonl:4: expected one JSON object, "
                               f"got a fault at column 15 (Extra data){MEND}"),
    "a list in lines": ("a.jsonl", json.dumps([pair(0)]).encode(), "a.jsonl:1: expected an object such as {'prompt': "
                        f"..., 'response': ...}}, got a list of 1{MEND}"),
    "lines in a list": ("a.json", GOOD, "a.json:1: expected a list [...] of objects; one object a line needs a name "
                        "ending in .jsonl"),
    "nested too deeply": ("a.jsonl", GOOD + b"[" * 200_000, f"a.jsonl:4: expected one JSON object, got {NESTED}{MEND}"),
    "a number of 5,000 digits": ("a.jsonl", GOOD + b"1" * 5000, f"a.jsonl:4: expected one JSON object, got "
        f"{NESTED}{MEND}"),
    "NaN as margin": ("a.jsonl", row({**pair(9), "margin": float("nan")}), "a.jsonl:4: expected `margin` to be a "
        "finite "
                      f"number, got nan{MEND}"),
    "infinity as margin": ("a.jsonl", row({**pair(9), "margin": float("inf")}), "a.jsonl:4: expected `margin` to be a "
                           f"finite number, got inf{MEND}"),
    "half of a surrogate pair": ("a.jsonl", row({**pair(9), "chosen": "\ud83d"}), "a.jsonl:4: expected `chosen` to be "
                                 f"Unicode text, got half of a surrogate pair in it{MEND}"),
    "an empty response": ("a.jsonl", row({**pair(9), "chosen": ""}), f"a.jsonl:4: expected `chosen` not to be "
        f"empty, got ''{MEND}"),
    "a blank response": ("a.jsonl", row({"prompt": "a", "response": " \n"}), "a.jsonl:4: expected `response` not to be "
                         f"empty, got ' \\n'{MEND}"),
    "a null": ("a.jsonl", row({**pair(9), "chosen": None}), f"a.jsonl:4: expected the keys of one format ({KNOWN}), "
        f"got "
               f"prompt, chosen (null), rejected{MEND}"),
    "a number for a text": ("a.jsonl", row({"prompt": 3, "response": "b"}), "a.jsonl:4: expected `prompt` to be "
        "text or a "
                            f"list of messages, got 3{MEND}"),
    "an object for a text": ("a.jsonl", row({"prompt": "a", "response": {"x": 1}}), "a.jsonl:4: expected `response` "
        "to be "
                             f"text, got an object with keys x{MEND}"),
    "the same response twice": ("a.jsonl", row({**pair(9), "rejected": "good 9"}), "a.jsonl:4: expected two different "
                                f"responses, got the same one twice: 'good 9'{MEND}"),
    "a role that there is not": ("a.jsonl", row({"messages": [{"role": "tool", "content": "a"}]}), "a.jsonl:4: "
        "expected "
                                 f"`messages[0]` to be from one of system, user, assistant, got 'tool'{MEND}"),
    "the user's turn last": ("a.jsonl", row({"messages": [{"role": "user", "content": "a"}]}), "a.jsonl:4: expected "
        "the "
                             f"last turn to be the assistant's, got the user's{MEND}"),
    "a label that there is not": ("a.jsonl", row({"text": "a", "label": "good"}), "a.jsonl:4: expected `label` to "
        "be 0, 1, "
                                  f"'negative' or 'positive', got 'good'{MEND}"),
    "keys of no format": ("a.jsonl", row({"question": "a"}), f"a.jsonl:4: expected the keys of one format "
        f"({KNOWN}), got "
                          f"question{MEND}"),
    "Parquet in name alone": ("a.parquet", GOOD, "a.parquet:1: expected Parquet data, got a fault (Parquet magic "
                                                 "bytes not "
                              "found in footer. Either the file is corrupted or this is not a parquet file.)"),
    "Parquet without the name": ("a.jsonl", b"PAR1...", "a.jsonl:1: expected UTF-8 text, got Parquet data: let the "
                                                        "file's "
                                 "name end with .parquet"),
    "an empty file": ("a.jsonl", b"", "a.jsonl:1: expected at least one row, got an empty file"),
    "blank lines alone": ("a.jsonl", b"\n \n", "a.jsonl:1: expected at least one row, got an empty file"),
    "a name that says nothing": ("a.csv", GOOD, "a.csv: expected a name that ends in .jsonl, .json (either also "
                                                "with .gz) "
                                 "or .parquet, got a.csv"),
}  # fmt: skip


@pytest.mark.parametrize("name, data, line", FAULTS.values(), ids=FAULTS)
def test_a_fault_of_a_file(run, refused, here, no_stage, name, data, line):
    (here / name).write_bytes(data)
    refused(lambda: run("sft", data="jsonl", **{"data.path": name}), line)


PATHS = {
    "no file": ("none.jsonl", "data.path=none.jsonl: expected a file, got no such file in {here}"),
    "a glob without a match": ("*.jsonl", "data.path=*.jsonl: expected at least one file, got no match in {here}"),
    "a folder": ("runs", "data.path=runs: expected a file, got a folder; name its files, as in runs/*.jsonl"),
    "a NUL in the name": ("a\0.jsonl", "data.path=a\\x00.jsonl: expected a file, got no such file in {here}"),
    "a name that is too long": ("a" * 300 + ".jsonl", "data.path=" + "a" * 300 + ".jsonl: expected a file, got no "
        "such file "
                                "in {here}"),
    "a loop of links": (
        "loop.jsonl",
        "loop.jsonl: expected a readable file, got Too many levels of symbolic links",
    ),
    "a list with a hole": (["none.jsonl"], "data.path=none.jsonl: expected a file, got no such file in {here}"),
}  # fmt: skip


@pytest.mark.parametrize("path, line", PATHS.values(), ids=PATHS)
def test_a_fault_of_a_path(run, refused, here, no_stage, path, line):
    (here / "loop.jsonl").symlink_to("loop.jsonl")
    if path == "*.jsonl":
        (here / "loop.jsonl").unlink()
    refused(lambda: run("sft", data="jsonl", **{"data.path": path}), line.format(here=here))


def test_a_file_that_may_not_be_read(run, refused, here, no_stage, monkeypatch):
    """Root may read everything, so it is the system's answer that is put in."""
    import builtins

    (here / "a.jsonl").write_bytes(GOOD)
    genuine = builtins.open

    def guarded(file, *rest, **named):
        if str(file) == "a.jsonl":
            raise PermissionError(13, "Permission denied", file)
        return genuine(file, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", guarded)
        refused(lambda: run("sft", data="jsonl", **{"data.path": "a.jsonl"}),
                "a.jsonl: expected a readable file, got Permission denied")  # fmt: skip


def test_no_pairs_for_a_reward_model(run, refused, here, no_stage):
    (here / "a.jsonl").write_bytes(lines({"prompt": f"q {i}", "response": f"a {i}"} for i in range(90)))
    line = "data: no preference pairs; a reward model needs prompt+chosen+rejected rows or labelled texts"
    refused(lambda: run("rlhf", data="jsonl", **{"data.path": "a.jsonl"}), line)


# ---------------------------------------------------------------- no fault, but nothing in silence


def corpus_of(here, data: bytes, **changes):
    (here / "a.jsonl").write_bytes(data)
    changes = {f"data.{key}": value for key, value in changes.items()}
    return load(settings_of("rlhf", {"data": "jsonl", "data.path": "a.jsonl", **changes})).data.load(seed=0)


def test_a_byte_order_mark_and_crlf_are_no_part_of_the_text(here):
    plain = corpus_of(here, lines(map(pair, range(60))))
    marked = corpus_of(here, b"\xef\xbb\xbf" + lines(map(pair, range(60)), ending="\r\n"))
    assert marked == plain


def test_duplicate_prompts_stay_on_one_side_and_double_rows_are_counted(here):
    rows = [{**pair(i % 50), "chosen": f"good {i}"} for i in range(200)] + [pair(60 + i // 2) for i in range(40)]
    corpus = corpus_of(here, lines(rows))
    sides = [{str(one.prompt) for one in side.pairs} for side in (corpus.train, corpus.heldout)]
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    assert len(corpus.train.pairs) + len(corpus.heldout.pairs) == 220
    assert [note for note in corpus.notes if note.startswith("20 ")], corpus.notes


def test_formats_mixed_in_one_file_are_each_counted(here):
    rows = [pair(i) if i % 2 else {"prompt": f"q {i}", "response": f"a {i}"} for i in range(100)]
    notes = corpus_of(here, lines(rows)).notes
    assert "a.jsonl: 50 rows read as prompt+chosen+rejected (preference pairs)" in notes
    assert "a.jsonl: 50 rows read as prompt+response (demonstrations)" in notes


def test_a_row_of_50_megabytes_is_read_at_once(here):
    began = time.process_time()
    corpus = corpus_of(here, lines([*map(pair, range(60)), {**pair(60), "chosen": "long " * 10_000_000}]))
    assert sum(len(side.pairs) for side in (corpus.train, corpus.heldout)) == 61
    assert time.process_time() - began < 10


def test_bad_rows_that_are_skipped_are_counted_with_their_places(here):
    notes = corpus_of(here, lines(map(pair, range(60))) + b'{"prompt": "a\n{}\n', on_bad_row="skip").notes
    (told,) = (note for note in notes if "skipped" in note)
    assert told.startswith("2 rows skipped: a.jsonl:61: ") and "a.jsonl:62: " in told


def test_nul_bytes_are_text_like_any_other(here):
    corpus = corpus_of(here, lines({**pair(i), "chosen": f"a\0{i}"} for i in range(60)))
    assert all("\0" in one.chosen for one in corpus.train.pairs)
