"""Files to corpora: every container, every fault in one line, the split, labelled texts, and the real data."""

import dataclasses
import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from alignkit.data.files import Files, read_rows, resolve
from alignkit.errors import UserError

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data"
DEFAULTS = yaml.safe_load((ROOT / "conf/data/jsonl.yaml").read_text(encoding="utf-8"))
DEFAULTS.pop("_target_")


def files(path, **changes):
    path = [str(one) for one in path] if isinstance(path, list) else str(path)
    return Files(**{**DEFAULTS, "path": path, **changes})


def write(path, rows, ending="\n"):
    path.write_text("".join(json.dumps(row) + ending for row in rows), encoding="utf-8", newline="")
    return path


def demonstrations(count, tag=""):
    return [{"prompt": f"question {tag}{i}", "response": f"answer {i}"} for i in range(count)]


def pairs(count, tag=""):
    return [{"prompt": f"question {tag}{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)]


def reviews(good, bad):
    rows = [
        {"text": f"a film number {i} that I liked from the first to the last scene", "label": 1} for i in range(good)
    ]
    return rows + [{"text": f"a film number {i} that was a waste of my time and money", "label": 0} for i in range(bad)]


# ---------------------------------------------------------------------------------------------------- containers


def test_settings_file_and_dataclass_have_the_same_keys():
    assert set(DEFAULTS) == {field.name for field in dataclasses.fields(Files)}
    lines = (ROOT / "conf/data/jsonl.yaml").read_text(encoding="utf-8").splitlines()
    assert all("#" in line for line in lines if not line.startswith("_target_")), "each key says what it means"


def test_all_containers_give_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [*demonstrations(30), {"prompt": "ünïcode\u2028line", "response": "é"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    (tmp_path / "gaps.jsonl").write_text("\n" + text.replace("\n", "\n\n").rstrip(), encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "bom.jsonl", "gaps.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"):
        assert [row.content for row in read_rows(str(tmp_path / name))] == rows, name


def test_rows_know_their_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n', encoding="utf-8")
    (tmp_path / "a.json").write_text('\n[\n {"text":\n  "a"},\n\n {"text": "b"}]\n', encoding="utf-8")
    assert [row.line for row in read_rows(str(tmp_path / "a.jsonl"))] == [1, 3]
    assert [row.line for row in read_rows(str(tmp_path / "a.json"))] == [3, 6]


def test_paths_globs_and_lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "odd[1].jsonl"):
        write(tmp_path / name, demonstrations(1))
    assert resolve("a.jsonl") == ["a.jsonl"]
    assert resolve("[ab].jsonl") == ["a.jsonl", "b.jsonl"]
    assert resolve("odd[1].jsonl") == ["odd[1].jsonl"]
    assert resolve(["b.jsonl", "*.jsonl"]) == ["b.jsonl", "a.jsonl", "odd[1].jsonl"]


def test_fingerprint_is_of_the_bytes_in_path_order(tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_bytes(b"1" * (1 << 20) + b"2")
    b.write_bytes(b"3")
    assert files(a).fingerprint() == hashlib.sha256(a.read_bytes()).hexdigest()
    assert files([a, b]).fingerprint() == hashlib.sha256(a.read_bytes() + b"3").hexdigest()
    assert files([b, a]).fingerprint() != files([a, b]).fingerprint()
    assert files(a, heldout=0.2).fingerprint() == files(a).fingerprint()


GOOD = b'{"prompt": "a", "response": "b"}\n'
FAULTS = [
    (
        "latin.jsonl",
        GOOD + b'{"prompt": "caf\xe9"}\n',
        "latin.jsonl:2: expected UTF-8 text, got byte 0xe9 at column 16",
    ),
    ("cut.jsonl.gz", gzip.compress(GOOD * 99)[:-9], "expected gzip data, got its end (the file is cut off)"),
    ("plain.jsonl.gz", GOOD, "plain.jsonl.gz:1: expected gzip data, got Not a gzipped file"),
    (
        "packed.jsonl",
        gzip.compress(GOOD),
        "packed.jsonl:1: expected UTF-8 text, got gzip data: let the file's name end",
    ),
    ("wide.jsonl", GOOD.decode().encode("utf-16"), "wide.jsonl:1: expected UTF-8 text, got UTF-16"),
    ("half.jsonl", GOOD + b'{"prompt": "a"', "half.jsonl:2: expected one JSON object, got a fault at column 15"),
    ("deep.jsonl", b"[" * 200_000, "deep.jsonl:1: expected one JSON object, got one that is nested too deeply"),
    ("digits.jsonl", b"1" * 5000, "digits.jsonl:1: expected one JSON object, got one that is nested too deeply or has"),
    ("keys.jsonl", GOOD + b'{"q": 1}\n', "keys.jsonl:2: expected the keys of one format"),
    ("empty.jsonl", b"", "empty.jsonl:1: expected at least one row, got an empty file"),
    ("blank.jsonl", b"\n\n", "expected at least one row, got an empty file"),
    ("empty.jsonl.gz", b"", "expected at least one row, got an empty file"),
    ("empty.json", b" ", "expected at least one row, got an empty file"),
    ("none.json", b"[]", "expected at least one row, got an empty file"),
    ("object.json", b'{"a": 1}', "object.json:1: expected a list [...] of objects; one object a line needs a name"),
    (
        "broken.json",
        b'[\n{"text": "a"},\n{"text" 2}]',
        "broken.json:3: expected a JSON object, got a fault (Expecting ':'",
    ),
    ("ends.json", b'[\n{"text": "a"}\n', "ends.json:3: expected `,` and an object or the final `]`, got ''"),
    ("more.json", b'[{"text": "a"}] 2', "more.json:1: expected `,` and an object or the final `]`, got '] 2'"),
    ("latin.json", b'[\n"\xe9"]', "latin.json:2: expected UTF-8 text, got byte 0xe9"),
    ("deep.json", b"[" * 200_000, "deep.json:1: expected a JSON object, got one that is nested too deeply"),
    ("false.parquet", GOOD, "false.parquet:1: expected Parquet data, got a fault"),
    ("table.csv", b"a,b\n", "table.csv: expected a name that ends in .jsonl, .json"),
    ("x.parquet.gz", b"", "x.parquet.gz: expected a name that ends in .jsonl, .json"),
]


@pytest.mark.parametrize(("name", "data", "message"), FAULTS)
def test_faults_of_files_are_one_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        files(tmp_path / name).load(seed=0)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_bad_row_names_the_setting_that_skips_it(tmp_path):
    with pytest.raises(UserError, match="mend the row or set data.on_bad_row=skip"):
        files(write(tmp_path / "a.jsonl", [{"prompt": "a", "response": ""}])).load(seed=0)


@pytest.mark.parametrize("call", [lambda source: source.load(seed=0), lambda source: source.fingerprint()])
def test_faults_of_paths(tmp_path, call):
    for path, message in [
        (tmp_path / "no.jsonl", "no.jsonl: expected a file, got no such file in "),
        (tmp_path / "*.jsonl", "expected at least one file, got no match in "),
        (tmp_path, "expected a file, got a folder; name its files, as in "),
    ]:
        with pytest.raises(UserError) as caught:
            call(files(path))
        assert message in str(caught.value) and str(caught.value).startswith("data.path=")
    for empty in (None, "", []):
        with pytest.raises(UserError, match="data.path=FILE is required"):
            call(Files(**{**DEFAULTS, "path": empty}))


def test_skipped_rows_are_counted_with_their_first_reasons(tmp_path):
    lines = [json.dumps(row).encode() for row in demonstrations(60)]
    lines[3:3] = [b"{", b'{"prompt": "\xff"}', b"[1]", b"{}"]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    corpus = files(tmp_path / "a.jsonl", on_bad_row="skip").load(seed=0)
    assert "a.jsonl: 60 rows read as prompt+response (demonstrations)" in corpus.notes
    (note,) = [note for note in corpus.notes if "skipped" in note]
    assert note.startswith("4 rows skipped: a.jsonl:4: expected one JSON object") and note.count("a.jsonl:") == 3
    assert len(corpus.train.demonstrations) + len(corpus.heldout.demonstrations) == 60

    (tmp_path / "b.jsonl").write_bytes(b"{\n{\n")
    with pytest.raises(UserError, match=r"expected at least one good row, got none \(2 bad, the first: b.jsonl:1: "):
        files(tmp_path / "b.jsonl", on_bad_row="skip").load(seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout": 0.6, "judge": 0.4}, "got 0.6 . 0.4"),
        ({"prompt_words": [4]}, r"got \[4\]"),
        ({"prompt_words": [8, 4]}, r"got \[8, 4\]"),
        ({"heldout": 0.0}, "greater than 0"),
        ({"limit": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_contradict_themselves(changes, message):
    with pytest.raises(ValueError, match=message):
        files("a.jsonl", **changes)


def test_import_is_light():
    code = "import sys, alignkit.data.files, alignkit.data.hub; print([m for m in %r if m in sys.modules])"
    heavy = ["torch", "datasets", "pandas", "pyarrow"]
    assert subprocess.check_output([sys.executable, "-c", code % heavy], cwd=ROOT, text=True).strip() == "[]"


# ------------------------------------------------------------------------------------------------ real data


def real(name, **changes):
    if not (REAL / name).exists():
        pytest.skip(f"needs {name} in shared/data beside the checkout")
    return files(REAL / name, **changes).load(seed=0)


def test_movie_reviews():
    corpus = real("movie_reviews.jsonl.gz", judge=0.1)
    assert corpus.notes[0] == "movie_reviews.jsonl.gz: 9,600 rows read as text+label (labelled texts)"
    texts = [row.response for row in corpus.train.demonstrations + corpus.heldout.demonstrations]
    assert len({*texts, *(text for text, _ in corpus.judge)}) == 9600 == len(texts) + len(corpus.judge)
    assert 0.08 < len(corpus.heldout.demonstrations) / 9600 < 0.12
    assert 0.08 < len(corpus.judge) / 9600 < 0.12
    assert len(corpus.heldout.prompts) > 700


@pytest.mark.parametrize(("name", "count"), [("dpo_en_demo.jsonl.gz", 295), ("dpo_zh_demo.jsonl.gz", 289)])
def test_sharegpt_preferences(name, count):
    corpus = real(name)
    assert len(corpus.train.pairs) + len(corpus.heldout.pairs) == count, "300 rows, of which some are doubles"
    assert all(pair.prompt[-1]["role"] == "user" for pair in corpus.train.pairs)


def test_alpaca_zh():
    corpus = real("alpaca_zh_demo.jsonl.gz")
    assert len(corpus.train.demonstrations) + len(corpus.heldout.demonstrations) == 992
    assert not corpus.train.pairs


def test_hh_harmless():
    with pytest.raises(UserError, match=r"hh_harmless.jsonl.gz:87: expected `chosen` not to be empty"):
        real("hh_harmless.jsonl.gz")
    corpus = real("hh_harmless.jsonl.gz", on_bad_row="skip")
    pairs = corpus.train.pairs + corpus.heldout.pairs
    assert len(pairs) == 1896 and any(note.startswith("4 rows skipped") for note in corpus.notes)
    for pair in pairs:
        roles = [turn["role"] for turn in pair.prompt]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"], "turns alternate, whatever models wrote"
    everything = json.dumps([dataclasses.asdict(pair) for pair in pairs])
    assert "\\n\\nHuman:" not in everything and "\\n\\nAssistant:" not in everything
