"""`data=hub` on a local folder: no network."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from alignkit.data.files import Files
from alignkit.data.hub import Hub
from alignkit.errors import UserError

ROOT = Path(__file__).parents[2]
DEFAULTS = yaml.safe_load((ROOT / "conf/data/hub.yaml").read_text(encoding="utf-8"))
DEFAULTS.pop("_target_")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    rows = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(80)]
    rows += [{"prompt": f"order {i}", "response": f"done {i}"} for i in range(40)]
    write(tmp_path / "set/train.jsonl", rows)
    write(tmp_path / "set/test.jsonl", rows[:60])
    return tmp_path / "set"


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def hub(path, **changes):
    return Hub(**{**DEFAULTS, "path": path if isinstance(path, list) else path and str(path), **changes})


def test_settings_file_and_dataclass_have_the_same_keys():
    assert set(DEFAULTS) == {field.name for field in dataclasses.fields(Hub)}


def test_a_folder_gives_the_same_corpus_as_its_file(folder):
    from_hub = hub(folder).load(seed=0)
    options = {key: DEFAULTS[key] for key in DEFAULTS if key not in ("path", "name", "split", "revision")}
    from_file = Files(path=str(folder / "train.jsonl"), **options).load(seed=0)
    assert from_hub.train == from_file.train and from_hub.heldout == from_file.heldout
    assert from_hub.notes[0] == "set[train]: 80 rows read as prompt+chosen+rejected (preference pairs)"
    assert from_hub.notes[1] == "set[train]: 40 rows read as prompt+response (demonstrations)"


def test_split_and_limit(folder):
    assert hub(folder, split="test").load(seed=0).notes[0].startswith("set[test]: 60 rows")
    assert hub(folder, limit=50).load(seed=0).notes[0].startswith("set[train]: 50 rows")


def test_fingerprint_changes_with_data_and_split(folder):
    first = hub(folder).fingerprint()
    assert hub(folder).fingerprint() == first != hub(folder, split="test").fingerprint()
    columns = {"chosen": "b", "rejected": "c", "response": "d"}
    write(folder / "train.jsonl", [{"prompt": "a", **columns}])
    assert hub(folder).fingerprint() != first


def test_several_data_sets_are_one_corpus_in_which_no_prompt_is_on_both_sides(folder, tmp_path):
    """Demonstrations here, preferences there, on the same prompts."""
    write(tmp_path / "sft/train.jsonl", [{"prompt": f"question {i}", "response": f"so {i}"} for i in range(80)])
    write(tmp_path / "pairs/dev.jsonl", [json.loads(line) for line in (folder / "train.jsonl").open()][:80])
    both = [str(tmp_path / "sft"), str(tmp_path / "pairs")]
    made = hub(both, split=["train", "validation"]).load(seed=0)
    assert made.notes[:2] == [
        "sft[train]: 80 rows read as prompt+response (demonstrations)",
        "pairs[validation]: 80 rows read as prompt+chosen+rejected (preference pairs)",
    ]
    sides = [{row.prompt for row in (*side.demonstrations, *side.pairs)} for side in (made.train, made.heldout)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 80
    assert all(row.response.startswith("so") for row in made.train.demonstrations)
    first = hub(both, split=["train", "validation"]).fingerprint()
    assert hub(both[:1]).fingerprint() != first
    write(tmp_path / "pairs/dev.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert hub(both, split=["train", "validation"]).fingerprint() != first


def test_a_list_beside_the_paths_has_one_value_for_each():
    with pytest.raises(ValueError, match="name must be one value for all data sets or a list of 2, got 3"):
        hub(["a", "b"], name=[None, "zh", None])
    with pytest.raises(ValueError, match="heldout \\+ judge must leave"):
        hub("a", heldout=0.5, judge=0.5)


def test_bad_rows_have_numbers(folder):
    (folder / "test.jsonl").unlink()
    write(folder / "train.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}])
    with pytest.raises(UserError, match=r"set\[train\]:2: expected `response` not to be empty"):
        hub(folder).load(seed=0)


def test_the_reason_underneath_is_told(folder):
    (folder / "train.jsonl").write_text("{broken", encoding="utf-8")
    with pytest.raises(UserError, match="(?i)expected a data set that can be loaded, got .*json"):
        hub(folder).load(seed=0)


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        (
            "no/such/folder",
            {},
            "data.path=no/such/folder .*data.split=train .*: expected a data set that can be loaded",
        ),
        (None, {}, "data.path=ID is required"),
        ("set", {"split": "dev"}, "data.split=dev .*got "),
    ],
)
def test_faults_are_one_line(folder, monkeypatch, path, changes, message):
    monkeypatch.chdir(folder.parent)
    for call in (lambda source: source.load(seed=0), lambda source: source.fingerprint()):
        with pytest.raises(UserError, match=message) as caught:
            call(hub(path, **changes))
        assert "\n" not in str(caught.value)
