"""The published archives, three lines long, made here."""

import gzip
import io
import json
import tarfile

import pytest

from alignkit.data.prepare import main


def make_archive(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def read(path):
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def write_lines(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def test_movie_reviews(tmp_path, capsys):
    # 0x85 is a line end to str.splitlines, but only a character in this archive
    positive = "caf\xe9 society .\nsimply\x85put , fine . \n\n".encode("latin-1")
    make_archive(
        tmp_path / "rt.tar.gz",
        {"rt-polaritydata/rt-polarity.pos": positive, "rt-polaritydata/rt-polarity.neg": b"dull .\r\n"},
    )
    out = tmp_path / "a.jsonl.gz"
    assert main(["movie_reviews", str(tmp_path / "rt.tar.gz"), str(out)]) == 0
    assert "3 rows (2 positive, 1 negative)" in capsys.readouterr().out
    expected = {("café society .", 1), ("simply\x85put , fine .", 1), ("dull .", 0)}
    assert {(row["text"], row["label"]) for row in read(out)} == expected
    assert len(read(out)) == 3

    again = tmp_path / "b.jsonl.gz"
    assert main(["movie_reviews", str(tmp_path / "rt.tar.gz"), str(again)]) == 0
    assert again.read_bytes() == out.read_bytes(), "neither time nor name of the file may enter its bytes"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl.gz", "b.jsonl.gz", "rt.tar.gz"]


def test_reviews_are_shuffled(tmp_path):
    lines = {
        "rt-polaritydata/rt-polarity.pos": "".join(f"good {i}\n" for i in range(50)).encode(),
        "rt-polaritydata/rt-polarity.neg": "".join(f"bad {i}\n" for i in range(50)).encode(),
    }
    make_archive(tmp_path / "rt.tar.gz", lines)
    assert main(["movie_reviews", str(tmp_path / "rt.tar.gz"), str(tmp_path / "a.jsonl.gz")]) == 0
    assert 15 < sum(row["label"] for row in read(tmp_path / "a.jsonl.gz")[:50]) < 35


def test_hh_harmless_drops_identical_pairs(tmp_path, capsys):
    rows = [
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: b"},
        {"chosen": "\n\nHuman: é\n\nAssistant: d", "rejected": "\n\nHuman: é\n\nAssistant: e"},
    ]
    write_lines(tmp_path / "test.jsonl.gz", rows)
    assert main(["hh_harmless", str(tmp_path / "test.jsonl.gz"), str(tmp_path / "out.jsonl.gz")]) == 0
    assert read(tmp_path / "out.jsonl.gz") == [rows[0], rows[2]]
    assert "2 rows (1 identical pairs dropped)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dataset", "source", "out", "message"),
    [
        (
            "movie_reviews",
            "missing.tar.gz",
            "o.jsonl.gz",
            "expected the archive rt-polaritydata.tar.gz, got a fault (No",
        ),
        ("movie_reviews", "other.tar.gz", "o.jsonl.gz", "expected an archive with rt-polaritydata/rt-polarity.pos and"),
        ("movie_reviews", "text.gz", "o.jsonl.gz", "expected the archive rt-polaritydata.tar.gz, got a fault"),
        ("movie_reviews", "reviews.tar.gz", "o.txt", "o.txt: expected a name that ends in .jsonl.gz"),
        ("movie_reviews", "reviews.tar.gz", "no/o.jsonl.gz", "expected a place to write to, got No such file"),
        (
            "hh_harmless",
            "wrong.jsonl.gz",
            "o.jsonl.gz",
            "wrong.jsonl.gz:2: expected texts under `chosen` and `rejected`",
        ),
        ("hh_harmless", "missing.jsonl.gz", "o.jsonl.gz", "missing.jsonl.gz:1: expected a readable file"),
    ],
)
def test_faults(tmp_path, monkeypatch, capsys, dataset, source, out, message):
    monkeypatch.chdir(tmp_path)
    make_archive("other.tar.gz", {"readme": b"x"})
    make_archive(
        "reviews.tar.gz", {"rt-polaritydata/rt-polarity.pos": b"a\n", "rt-polaritydata/rt-polarity.neg": b"b\n"}
    )
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"no archive"))
    write_lines("wrong.jsonl.gz", [{"chosen": "a", "rejected": "b"}, {"chosen": "a"}])
    assert main([dataset, source, out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("o.jsonl.gz*"))
