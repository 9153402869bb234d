"""A product is named by what made it, is whole or not there, and is made once however many runs want it."""

import ast
import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hydra
import numpy
import pytest
from omegaconf import OmegaConf
from safetensors.numpy import save_file

from alignkit.data.files import Files
from alignkit.errors import UserError
from alignkit.runtime import artifact
from alignkit.runtime.artifact import (
    MEASURES,
    SECTIONS,
    STAGE_VERSION,
    WITHOUT_EFFECT,
    Store,
    file_digest,
    link,
    open_artifact,
    stage_digest,
    write_json,
)
from alignkit.runtime.config import conf_dir

STAGES = list(SECTIONS)
FACTS = {"metrics": {"seconds": 1.0, "loss": 2.0}, "inputs": {}, "data": "d", "settings": {}, "alignkit": "0"}


@pytest.fixture(scope="module")
def raw() -> dict:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        raw = OmegaConf.to_container(hydra.compose("rlhf"), resolve=True)
    studies = {"overoptimize": {"gold_model": {}, "num_pairs": 30, "proxy_pairs": [10]}, "denoise": {"members": 2}}
    return {**raw, **studies, "bench": {"stage": "ppo", "prompts": "p", "updates": 2, "against": None}}


def changed(raw: dict, key: str) -> dict:
    """The settings with another value under a dotted key."""
    other = copy.deepcopy(raw)
    *groups, last = key.split(".")
    place = other
    for group in groups:
        place = place[group]
    assert last in place, f"{key} is no setting"
    place[last] = f"not {place[last]}"
    return other


def digest(stage: str, raw: dict, data: str = "bytes", **inputs: str) -> str:
    return stage_digest(stage, raw, data, inputs or {"policy": "a", "reward": "b"})


# ------------------------------------------------------------------------------------------------------------ digests

DECIDES = {
    "sft": ["seed", "compute_dtype", "model.hidden_size",
            "model.revision", "sft.learning_rate", "sft.batch", "sft.trainer",
            "data.num_demonstrations", "data._target_"],
    "reward_model": ["seed", "reward_model.center_coef", "reward_model.batch", "data.label_noise",
                     "reward_model.sft_samples", "reward_model.half", "reward_model.num_pairs", "data.denoise_by"],
    "ppo": ["seed", "ppo.clip", "ppo.stop_if.kl_ratio", "ppo.batch", "ppo.minibatch", "ppo.episodes", "ptx.coef",
            "rollout.temperature",
            "rollout.max_response", "reward.normalise", "advantage.lam", "kl.target", "kl._target_", "data.heldout"],
    "strength": ["seed", "data.label_noise", "reward_model.max_length"],
    "preferences": ["seed", "judge.by", "rollout.temperature", "overoptimize.num_pairs", "ppo.max_prompt"],
    "evaluate": ["seed", "evaluate.prompts", "judge.by", "rollout.temperature", "reward.normalise", "ppo.max_prompt",
                 "data.heldout"],
    "bench": ["bench.updates", "bench.stage"],
}  # fmt: skip
DECIDES_NOTHING = [
    "name", "runs_dir", "force", "trusted", "policy", "sft.microbatch", "reward_model.microbatch", "reward_model.gate",
    "ppo.microbatch_tokens", "ppo.packing", "rollout.batch", "ppo.samples_every", "reward.path", "tracking.mode",
    "tracking.project", "tracking.tags", "launch.processes", "launch.threads",
    "launch.inline", "sharding.shard_size",
]  # fmt: skip


@pytest.mark.parametrize("stage, key", [(stage, key) for stage in STAGES for key in DECIDES[stage]])
def test_the_digest_depends_on_every_setting_that_decides_the_product(raw, stage, key):
    assert digest(stage, changed(raw, key)) != digest(stage, raw)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("key", DECIDES_NOTHING)
def test_the_digest_does_not_depend_on_where_or_how_fast_it_is_made(raw, stage, key):
    assert digest(stage, changed(raw, key)) == digest(stage, raw)


@pytest.mark.parametrize("key", ["ppo.clip", "kl.target", "reward_model.learning_rate", "judge.by"])
def test_sft_does_not_depend_on_later_stages(raw, key):
    assert digest("sft", changed(raw, key)) == digest("sft", raw)


@pytest.mark.parametrize("stage", STAGES)
def test_the_digest_depends_on_data_inputs_stage_and_version(raw, stage, monkeypatch):
    before = digest(stage, raw)
    others = [
        digest(stage, raw, data="other bytes"),
        digest(stage, raw, policy="other", reward="b"),
        digest(stage, raw, policy="b", reward="a"),
        *(digest(other, raw) for other in STAGES if other != stage),
    ]
    monkeypatch.setitem(STAGE_VERSION, stage, STAGE_VERSION[stage] + 1)
    assert len({before, *others, digest(stage, raw)}) == len(others) + 2


def test_the_digest_does_not_depend_on_the_order_of_keys(raw):
    turned = {key: dict(reversed(value.items())) if isinstance(value, dict) else value for key, value in raw.items()}
    assert digest("ppo", dict(reversed(turned.items())), "d", a="1", b="2") == digest("ppo", raw, "d", b="2", a="1")


def test_the_path_of_the_data_does_not_count_but_its_bytes_do(tmp_path):
    options = {"heldout": 0.1, "judge": 0.0, "on_bad_row": "stop", "as_chat": False, "prompt_words": [4, 8]}
    options |= {"pairs_per_text": 1, "limit": None, "margin_column": "margin", "subset_column": "subset"}
    options |= {"denoise": None, "denoise_by": "smooth"}

    def fingerprint(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return Files(path=str(tmp_path / name), **options).fingerprint()

    assert fingerprint("a.jsonl", '{"text": "a"}\n') == fingerprint("b.jsonl", '{"text": "a"}\n')
    assert fingerprint("a.jsonl", '{"text": "a"}\n') != fingerprint("a.jsonl", '{"text": "b"}\n')
    assert "path" in WITHOUT_EFFECT["data"]


def test_every_hidden_setting_is_a_setting(raw):
    for section, keys in WITHOUT_EFFECT.items():
        options = [
            OmegaConf.load(file) for file in (conf_dir() / section).glob("*.yaml")
        ]  # some are of one option only
        assert set(keys) <= raw[section].keys() | {key for option in options for key in option}


MODULES = {
    "sft": ["sft"],
    "reward_model": ["reward_model", "heldout", "reward_report", "reward_samples"],
    "preferences": ["preferences"],
    "strength": ["strength"],
    "ppo": ["ppo", "actors", "ptx", "ppo_report"],
    "evaluate": ["evaluate"],
}


@pytest.mark.parametrize("stage", sorted(MODULES))
def test_the_digest_covers_every_section_that_the_stage_reads(raw, stage):
    folder = Path(artifact.__file__).parents[1] / "stages"
    assert {*MODULES, *MEASURES} == set(STAGES), "what measures is made anew each time"
    read = set()
    for module in MODULES[stage]:
        for node in ast.walk(ast.parse((folder / f"{module}.py").read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "config":
                read.add(node.attr)
    assert read & raw.keys(), "a stage that reads no settings: does MODULES name its files?"
    always, never = {"seed", "compute_dtype"}, {"sharding", "checkpoint"}  # in every digest; how, not what, is computed
    assert read & raw.keys() - always - never <= set(SECTIONS[stage])


# -------------------------------------------------------------------------------------------------------------- store


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "runs")


def write_product(store: Store, text: str = "weights") -> Path:
    """What a stage leaves in its partial folder."""
    partial = store.start("sft", "abc")
    (partial / "model").mkdir()
    (partial / "model" / "config.json").write_text("{}")
    (partial / "model" / "model.safetensors").write_text(text)
    (partial / "metrics.jsonl").write_text("{}\n")
    return partial


def make(store: Store, text: str = "weights", **metrics: float) -> artifact.Artifact:
    write_product(store, text)
    return store.publish("sft", "abc", {**FACTS, "metrics": metrics or FACTS["metrics"]})


def test_a_published_product_is_found_with_its_metrics_and_its_seal(store):
    product = make(store)
    assert store.find("sft", "abc") == product
    assert product.metrics == FACTS["metrics"]
    manifest = json.loads((product.path / "manifest.json").read_text())
    weights = product.path / "model" / "model.safetensors"
    assert manifest["files"]["model/model.safetensors"] == {"bytes": 7, "sha256": file_digest(weights)}
    assert {"stage", "digest", "finished", "metrics", "inputs", "data", "settings", "alignkit"} <= manifest.keys()
    assert not list(store.folder.glob("*.partial"))


def test_another_digest_or_stage_is_not_found(store):
    make(store)
    assert store.find("sft", "abd") is None
    assert store.find("ppo", "abc") is None


def test_a_partial_folder_is_never_found(store):
    partial = write_product(store)
    assert store.find("sft", "abc") is None
    write_json(partial / "manifest.json", {"digest": "abc", "metrics": {}, "files": {}})
    assert store.find("sft", "abc") is None


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/config.json", "manifest.json"])
def test_a_product_that_lost_a_file_is_not_found(store, name):
    (make(store).path / name).unlink()
    assert store.find("sft", "abc") is None


@pytest.mark.parametrize("name", ["model/model.safetensors", "manifest.json"])
def test_a_product_whose_file_was_cut_off_is_not_found(store, name):
    file = make(store).path / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert store.find("sft", "abc") is None
    file.write_bytes(b"")
    assert store.find("sft", "abc") is None


def test_a_damaged_product_is_replaced(store):
    (make(store).path / "model" / "model.safetensors").unlink()
    make(store, "new weights", loss=1.0)
    assert store.find("sft", "abc").metrics == {"loss": 1.0}


def test_what_a_crash_left_is_kept_beside_and_never_overwritten(store):
    for number in (1, 2, 3):
        (store.start("sft", "abc") / "logs" / "rank0.log").write_text(f"attempt {number}")
    shutil.rmtree(store.folder / "sft-abc.failed-1")
    store.start("sft", "abc")
    logs = {place.name: (place / "logs" / "rank0.log").read_text() for place in store.folder.glob("*.failed-*")}
    assert logs == {"sft-abc.failed-1": "attempt 3", "sft-abc.failed-2": "attempt 2"}
    assert list((store.folder / "sft-abc.partial").iterdir()) == [store.folder / "sft-abc.partial" / "logs"]


def test_making_it_again_replaces_the_product(store):
    make(store, "old weights", loss=2.0)
    product = make(store, "new weights", loss=1.0)
    assert store.find("sft", "abc").metrics == {"loss": 1.0}
    assert (product.path / "model" / "model.safetensors").read_text() == "new weights"
    assert sorted(place.name for place in store.folder.iterdir()) == ["sft-abc"]


class PowerCut(BaseException):
    """Ends the process between two steps; nothing may catch it."""


@pytest.fixture
def power_cut(monkeypatch):
    """Call with n: the n-th of the steps that touch the disk does not happen, and the process ends there."""

    def arm(number: int) -> None:
        left = [number]

        def before(step):
            def run(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    raise PowerCut
                return step(*args, **kwargs)

            return run

        for place, name in ((Path, "rename"), (Path, "replace"), (os, "fsync"), (shutil, "rmtree")):
            monkeypatch.setattr(place, name, before(getattr(place, name)))

    return arm


@pytest.mark.parametrize("replacing", [False, True], ids=["first", "force"])
@pytest.mark.parametrize("step", range(1, 8))
def test_a_power_cut_between_any_two_steps_leaves_a_whole_product_or_none(store, power_cut, step, replacing):
    if replacing:
        make(store, "old weights", loss=2.0)
    write_product(store, "new weights")
    power_cut(step)
    with contextlib.suppress(PowerCut):
        store.publish("sft", "abc", {**FACTS, "metrics": {"loss": 1.0}})
    found = store.find("sft", "abc")
    if found:
        weights = (found.path / "model" / "model.safetensors").read_text()
        assert (weights, found.metrics["loss"]) in [("old weights", 2.0), ("new weights", 1.0)]
        assert replacing or weights == "new weights"


@pytest.mark.parametrize("replacing", [False, True], ids=["first", "force"])
@pytest.mark.parametrize("step", range(1, 8))
def test_after_a_power_cut_the_next_run_makes_the_product(store, power_cut, step, replacing, monkeypatch):
    if replacing:
        make(store, "old weights", loss=2.0)
    write_product(store, "lost weights")
    power_cut(step)
    with contextlib.suppress(PowerCut):
        store.publish("sft", "abc", FACTS)
    monkeypatch.undo()
    make(store, "new weights", loss=1.0)
    assert store.find("sft", "abc").metrics == {"loss": 1.0}


# --------------------------------------------------------------------------------------------------- several processes

MAKER = """
import sys
from pathlib import Path
from alignkit.runtime.artifact import Store
store = Store(Path(sys.argv[1]))
with store.locked("sft", "abc"):
    if store.find("sft", "abc"):
        print("reused", flush=True)
    else:
        model = store.start("sft", "abc") / "model"
        model.mkdir()
        print("making", flush=True)
        sys.stdin.readline()
        (model / "config.json").write_text("{}")
        store.publish("sft", "abc", {"metrics": {"seconds": 1.0}})
        print("made", flush=True)
"""


@pytest.fixture
def maker(tmp_path):
    """Start a process that wants the product: it makes it when told so, or reuses it. All are ended afterwards."""
    started = []

    def start() -> subprocess.Popen:
        root = str(Path(artifact.__file__).parents[2])
        process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{MAKER}", str(tmp_path / "runs")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=60)


def test_a_second_process_that_wants_the_product_waits_and_reuses_it(maker):
    first = maker()
    assert first.stdout.readline() == "making\n"
    second = maker()
    assert "waiting" in second.stdout.readline()
    first.stdin.write("go on\n")
    first.stdin.flush()
    assert first.stdout.readline() == "made\n"
    assert second.stdout.readline() == "reused\n"
    assert (first.wait(timeout=60), second.wait(timeout=60)) == (0, 0)


def test_a_process_that_dies_gives_the_product_up_to_the_one_that_waits(maker, store):
    first = maker()
    assert first.stdout.readline() == "making\n"
    second = maker()
    assert "waiting" in second.stdout.readline()
    first.kill()
    assert second.stdout.readline() == "making\n"
    assert second.communicate("go on\n", timeout=60)[0] == "made\n"
    assert store.find("sft", "abc")
    assert (store.folder / "sft-abc.failed-1").is_dir()


# ------------------------------------------------------------------------------------------ models from the user, links


def test_a_finished_stage_opens_with_its_digest_and_metrics_through_a_link_too(store, tmp_path):
    product = make(store)
    link(tmp_path / "mine", product.path)
    opened = open_artifact(str(tmp_path / "mine"))
    assert (opened.path, opened.digest, opened.metrics) == (product.path.resolve(), "abc", FACTS["metrics"])


def test_a_hugging_face_model_is_known_by_the_bytes_of_its_files(tmp_path):
    def saved(name: str, weights: float, note: str = "") -> str:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text("{}")
        save_file({"weight": numpy.full(2, weights)}, folder / "model.safetensors")
        (folder / "README.md").write_text(note)
        return open_artifact(str(folder)).digest

    assert saved("a", 1.0) == saved("b", 1.0, note="a note does not count")
    assert saved("a", 1.0) != saved("b", 2.0)


def test_what_is_no_model_is_refused_with_the_reason(store, tmp_path):
    partial = write_product(store)
    link(tmp_path / "unfinished", partial)
    (tmp_path / "empty").mkdir()
    damaged = make(store).path
    (damaged / "model" / "model.safetensors").write_text("cut")
    reasons = {
        str(tmp_path / "nowhere"): "does not exist: expected the folder of a finished stage or of a Hugging Face model",
        str(tmp_path / "empty"): "has neither manifest.json (a finished stage) nor config.json (a Hugging Face model)",
        str(damaged): "is damaged: model/model.safetensors is missing, cut off or changed; make it again",
    }
    for path, reason in reasons.items():
        with pytest.raises(UserError) as refusal:
            open_artifact(path)
        assert str(refusal.value) == f"'{path}' {reason}"


def test_an_unfinished_stage_is_refused(store, tmp_path):
    link(tmp_path / "unfinished", write_product(store))
    with pytest.raises(UserError, match="'.*unfinished' is an unfinished stage: run the command that makes it again"):
        open_artifact(str(tmp_path / "unfinished"))


def test_a_manifest_that_was_cut_off_is_refused(store):
    product = make(store)
    (product.path / "manifest.json").write_text('{"digest": ')
    with pytest.raises(UserError, match="is damaged: manifest.json is missing, cut off or changed"):
        open_artifact(str(product.path))


def test_a_link_replaces_the_one_before_and_moves_with_the_folder(store, tmp_path):
    partial = write_product(store)
    place = tmp_path / "runs" / "mine" / "sft"
    place.parent.mkdir()
    link(place, partial)
    product = store.publish("sft", "abc", FACTS)
    link(place, product.path)
    assert place.resolve() == product.path.resolve()
    assert [entry.name for entry in place.parent.iterdir()] == ["sft"]
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "mine" / "sft" / "manifest.json").is_file()


def test_a_reader_of_json_sees_the_old_or_the_new_text(tmp_path, power_cut, monkeypatch):
    file = tmp_path / "summary.json"
    write_json(file, {"a": 1})
    for step in (1, 2):
        power_cut(step)
        with pytest.raises(PowerCut):
            write_json(file, {"a": 2})
        monkeypatch.undo()
        assert json.loads(file.read_text()) == {"a": 1}
    write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 2}
