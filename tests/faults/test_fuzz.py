"""Wild input at the two boundaries where strangers' bytes come in: files of data, and settings.

Whatever comes ends in success or in a `UserError` whose lines a person can read. A tenth of the cases by default, all
10,000 (`config.load` and the readers) and 100 of the command line, each of which takes a tenth of a second to compose,
with `-m slow`; the same cases every time.
"""

import copy
import gzip
import io
import json
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import alignkit.cli
import alignkit.runtime.recipe
from alignkit.data.files import Files
from alignkit.data.formats import FORMATS, convert_row
from alignkit.errors import UserError
from alignkit.runtime.config import RunConfig, conf_dir, load

SHARE = pytest.mark.parametrize("share", [0.1, pytest.param(1.0, marks=pytest.mark.slow)], ids=["a tenth", "all"])


def cases(number: float):
    """The settings of a property that is tried so many times: nothing random, nothing written, no clock."""
    unhurried = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=round(number), derandomize=True, deadline=None, database=None, suppress_health_check=unhurried
    )


def readable(error: Exception, longest: int = 2000) -> None:
    """A message for people: some lines, none of them endless, that any terminal and log can take; no Traceback."""
    text = str(error)
    assert text.strip() and "Traceback" not in text
    assert all(0 < len(line) < longest for line in text.split("\n")), text[:3000]
    text.encode("utf-8")


# ----------------------------------------------------------------------------------------------------- wild values

KEYS = sorted({key for one in FORMATS for key in one.name.split("+")})
KEYS += ["margin", "subset", "ranks", "scores", "input", "system", "role", "content", "from", "value", "zzz", ""]
TEXTS = st.one_of(
    st.sampled_from(["", " ", "a", "user", "assistant", "human", "gpt", "tool", "\n\nHuman: a\n\nAssistant: b"]),
    st.text(alphabet=st.characters(), max_size=8),  # with halves of surrogate pairs, NUL and U+2028
    st.sampled_from(["\ud83d", "\x00", "\u2028", "\n\nHuman:", "positive", "a" * 3000, "\x1b[31m"]),
)
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -0.0, 1e308]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
TURNS = st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), SCALARS, max_size=4)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(TURNS, max_size=3),
        st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    ),
    max_leaves=6,
)
"""Any JSON value, NaN and infinity among them as Python reads them, and chat turns more often than chance has them."""
ROWS = st.one_of(
    st.sampled_from([one.name.split("+") for one in FORMATS]).flatmap(
        lambda keys: st.fixed_dictionaries(
            dict.fromkeys(keys, VALUES), optional=dict.fromkeys(("margin", "subset", "scores", "system"), VALUES)
        )
    ),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5),
    VALUES,
)

# ------------------------------------------------------------------------------------------------------------ files

JSONL = yaml.safe_load((conf_dir() / "data/jsonl.yaml").read_text("utf-8"))
JSONL.pop("_target_")
GOOD = [json.dumps({"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"}) for i in range(4)]


def read(place: Path, name: str, data: bytes, **changes) -> None:
    """Read the bytes as a run would: digest, rows, formats, split."""
    (place / name).write_bytes(data)
    try:
        source = Files(**{**JSONL, "path": str(place / name), **changes})
        source.fingerprint()
        corpus = source.load(seed=0)
    except UserError as error:
        readable(error)
        return
    assert corpus.train.demonstrations
    for note in corpus.notes:
        note.encode("utf-8")


def mutated(data: bytes):
    """These bytes with some of them changed, cut out, doubled or cut off."""
    place = st.integers(0, len(data))
    change = st.tuples(place, st.integers(0, 12), st.binary(max_size=6))

    def apply(changes) -> bytes:
        text = bytearray(data)
        for start, length, new in changes:
            text[start : start + length] = new
        return bytes(text)

    return st.lists(change, min_size=1, max_size=4).map(apply)


def parquet_bytes() -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([json.loads(line) for line in GOOD]), buffer)
    return buffer.getvalue()


WHOLE = "\n".join(GOOD).encode()
LINES = st.lists(st.one_of(ROWS.map(json.dumps), st.sampled_from(GOOD), TEXTS), max_size=6).map(
    lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")
)
CONTENTS = {  # what is in the file -> its name, its bytes, and the number of cases
    "anything": ("a.jsonl", st.binary(max_size=200), 800),
    "rows": ("a.jsonl", LINES, 2000),
    "a list": ("a.json", st.lists(ROWS, max_size=4).map(json.dumps).map(str.encode), 800),
    "a damaged list": ("a.json", mutated(f"[{','.join(GOOD)}]".encode()), 600),
    "damaged lines": ("a.jsonl", mutated(WHOLE), 800),
    "damaged gzip": ("a.jsonl.gz", mutated(gzip.compress(WHOLE, mtime=0)), 600),
    "damaged parquet": ("a.parquet", mutated(parquet_bytes()), 400),
}


@SHARE
@pytest.mark.parametrize("content", CONTENTS)
def test_any_file_is_read_or_refused_in_words(tmp_path, content, share):
    name, contents, count = CONTENTS[content]

    @cases(count * share)
    @given(data=contents, skip=st.booleans(), chat=st.booleans(), judge=st.sampled_from([0.0, 0.2]))
    def holds(data, skip, chat, judge):
        read(tmp_path, name, data, on_bad_row="skip" if skip else "stop", as_chat=chat, judge=judge)

    holds()


@SHARE
def test_any_row_is_converted_or_refused_in_words(share):
    @cases(2000 * share)
    @given(row=ROWS)
    def holds(row):
        try:
            convert_row(row)
        except ValueError as error:
            readable(error, longest=600)
            assert str(error).startswith("expected ") and "\n" not in str(error)

    holds()


# --------------------------------------------------------------------------------------------------------- settings


def composed(recipe: str) -> dict:
    import hydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose(recipe), resolve=True)


PLAIN = composed("rlhf")


def places(node, path=()):
    """The path of every key."""
    for key, value in node.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


PLACES = list(places(PLAIN))
NEW = st.one_of(st.sampled_from(sorted({path[-1] for path in PLACES}) + ["eopchs", "top_p", ""]), TEXTS)
OTHER_VALUES = st.one_of(
    SCALARS,
    VALUES,
    st.sampled_from([0, 1, -1, 2, 0.5, 1e9, "auto", "none", "alignkit.algo.control.FixedKL", "os.path"]),
)
CHANGES = st.lists(
    st.tuples(st.sampled_from(["drop", "replace", "replace", "add"]), st.sampled_from(PLACES), NEW, OTHER_VALUES),
    min_size=1, max_size=4,
)  # fmt: skip


def with_changes(changes) -> dict:
    raw = copy.deepcopy(PLAIN)
    for kind, path, key, value in changes:
        node = raw
        for name in path[:-1]:
            node = node.get(name) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            continue
        if kind == "drop":
            node.pop(path[-1], None)
        else:
            node[path[-1] if kind == "replace" else key] = value
    return raw


@SHARE
def test_any_settings_are_taken_or_refused_in_words(share):
    @cases(3000 * share)
    @given(changes=CHANGES)
    def holds(changes):
        try:
            config = load(with_changes(changes))
        except UserError as error:
            readable(error, longest=5000)
        else:
            assert isinstance(config, RunConfig)

    holds()


# ----------------------------------------------------------------------------------------------------- command line

SIGNS = st.text(alphabet="abe.=+~@/$-_0129'\"[]{}(),:# \\\x1b\u00e9\ud83d", max_size=10)
KEY = st.one_of(st.sampled_from([".".join(path) for path in PLACES]), SIGNS)
WORD = st.one_of(
    st.tuples(st.sampled_from(["", "", "+", "++", "~"]), KEY, st.sampled_from(["=", "=", ""]), SIGNS).map("".join),
    st.tuples(KEY, st.sampled_from(["=0", "=1", "=null", "=a,b", "=[1]", "={a:1}", "=${seed}", "=1e400"])).map("".join),
    st.tuples(st.sampled_from(["kl", "data", "reward", "experiment", "judge"]), SIGNS).map("=".join),
)


def check_alone(name, chain, raw: dict) -> int:
    """What the command does with composed settings, without the run."""
    try:
        load(raw)
    except UserError as error:
        return alignkit.runtime.recipe.report(str(error), 2)
    return 0


@SHARE
def test_any_word_of_the_command_line_is_taken_or_refused_in_words(monkeypatch, capsys, tmp_path, share):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(alignkit.runtime.recipe, "run_job", check_alone)
    monkeypatch.setattr(sys, "path", list(sys.path))

    @cases(100 * share)
    @given(words=st.lists(WORD.filter(lambda word: not word.startswith("-")), min_size=1, max_size=2))
    def holds(words):
        monkeypatch.setattr(sys, "argv", ["alignkit", "rlhf", *words])
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as ended:
            alignkit.cli.main()
        told = capsys.readouterr().err
        assert (ended.value.code, bool(told)) in ((0, False), (2, True))
        assert all(line.startswith("error: ") for line in told.splitlines())
        if told:
            readable(UserError(told.strip()))
        assert not list(tmp_path.iterdir())

    holds()
