"""Models, adapters and checkpoints from strangers are data: whatever they hold, nothing of it is run."""

import builtins
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_world import open_checkpoints
from evil_world import Evil, remote, works
from torch.distributed.checkpoint import filesystem, metadata
from transformers import Trainer

from alignkit.errors import UserError
from alignkit.models.loading import load_causal, load_encoder, load_scorer, scorer_from_policy
from alignkit.models.pooled import is_pooled
from alignkit.models.scalar import open_scalar
from alignkit.models.tokenizer import load_tokenizer
from alignkit.runtime import plan_models
from alignkit.runtime.artifact import file_facts
from alignkit.runtime.random_state import random_state, set_random_state
from alignkit.runtime.seal import read_seal, write_seal
from alignkit.stages.trainer_checkpoint import CheckpointCallback


@pytest.fixture
def mark(tmp_path) -> Path:
    works(tmp_path)
    return tmp_path / "it ran"


@pytest.fixture(scope="module")
def sound(tiny_policy, tiny_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "sound"
    tiny_policy("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------- pickles in models


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "pytorch_model-00001-of-00001.bin"])
@pytest.mark.parametrize("load", [load_causal, load_scorer])
def test_weights_in_a_pickle_are_refused(sound, tmp_path, mark, load, name):
    folder = tmp_path / "bad"
    shutil.copytree(sound, folder)
    (folder / "model.safetensors").unlink()
    torch.save(Evil(mark), folder / name)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="no model could be loaded"):
        load(folder)
    assert not mark.exists()


def test_an_adapter_in_a_pickle_is_refused_by_its_name_alone(sound, tmp_path, mark, monkeypatch):
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(sound)}))
    torch.save(Evil(mark), folder / "adapter_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
        load_causal(folder)
    assert not mark.exists()


def test_other_pickles_in_a_model_folder_are_not_looked_at(sound, tmp_path, mark):
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"):
        torch.save(Evil(mark), folder / name)
    load_causal(folder)
    load_encoder(folder)
    assert not mark.exists()


def test_what_lies_in_the_folder_that_a_trainer_goes_on_from_is_not_read(tmp_path, mark):
    """`state/resumed` of a run that was handed on: Hugging Face's Trainer would open all of these."""
    folder = tmp_path / "resumed"
    (folder / "optimizer_0").mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "optimizer_0/.metadata"):
        (folder / name).write_bytes(pickle.dumps(Evil(mark)))
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path)), _save_rng_state=lambda place: (Path(place) / "rng").touch()
    )
    cluster = SimpleNamespace(is_main=True, barrier=lambda: None)
    facts = {"trainer": {"epoch": 0.5}, "order": "00"}
    checkpoints = SimpleNamespace(newest=lambda: (tmp_path, facts), stage="sft")
    assert CheckpointCallback(trainer, cluster, checkpoints, None).find() == str(folder)
    assert {file.name for file in folder.iterdir()} == {"rng", "trainer_state.json"}


def test_the_trainer_reads_the_state_of_generators_as_data(tmp_path, mark):
    torch.save(Evil(mark), tmp_path / "rng_state.pth")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        Trainer._load_rng_state(SimpleNamespace(args=SimpleNamespace(world_size=1)), str(tmp_path))
    assert not mark.exists()


# -------------------------------------------------------------------------------------------------------- remote code


def skeleton(folder: Path) -> None:
    plan_models._load(folder, "policy")


OPENED = {
    "policy": load_causal, "tokenizer": load_tokenizer, "encoder": load_encoder, "reward model and judge": open_scalar,
    "new reward model": lambda folder: scorer_from_policy(folder, seed=0), "plan": skeleton,
}  # fmt: skip


@pytest.mark.parametrize("what", OPENED)
def test_code_that_comes_with_a_model_is_not_run_and_nobody_is_asked(sound, tmp_path, mark, monkeypatch, what):
    folder = tmp_path / "bad"
    shutil.copytree(sound, folder)
    remote(folder, mark)
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("the terminal was asked"))
    with pytest.raises(UserError):
        OPENED[what](folder)
    assert not is_pooled(folder)
    assert not mark.exists()


def test_the_code_of_a_model_would_run_where_that_is_asked_for(sound, tmp_path, mark, monkeypatch):
    """Else the test above could not fail."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "trusted_model"
    shutil.copytree(sound, folder)
    remote(folder, mark)
    with pytest.raises(Exception):  # noqa: B017  its classes are none
        load_causal(folder, trust_remote_code=True)
    assert mark.exists()


# -------------------------------------------------------------------------------------------------------- checkpoints


def saved(cluster, folder: Path):
    """A sealed checkpoint of two tensors."""
    checkpoints = open_checkpoints(folder, cluster)
    checkpoints.save(1, {"weights": {"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}}, {})
    checkpoints.finish()
    return checkpoints, checkpoints.place(1)


def seal_again(place: Path) -> None:
    """As a stranger would who packs a run: the seal fits."""
    seal = read_seal(place)
    seal["files"] = {name: file_facts(place / name) for name in seal["files"]}
    write_seal(place, seal)


def with_bytes(place: Path, mark: Path) -> bytes:
    """Metadata by which the tensor a is something pickled instead."""
    known = pickle.loads((place / ".metadata").read_bytes())
    (index,) = [index for index in known.storage_data if index.fqn == "weights.a"]
    content = place / "__0_0.distcp"
    start = content.stat().st_size
    torch.save(Evil(mark), place / "aside")
    content.write_bytes(content.read_bytes() + (place / "aside").read_bytes())
    size = (place / "aside").stat().st_size
    (place / "aside").unlink()
    del known.storage_data[index]
    known.storage_data[metadata.MetadataIndex("weights.a")] = filesystem._StorageInfo("__0_0.distcp", start, size)
    known.state_dict_metadata["weights.a"] = metadata.BytesStorageMetadata()
    return pickle.dumps(known)


def elsewhere(place: Path, mark: Path) -> bytes:
    known = pickle.loads((place / ".metadata").read_bytes())
    for info in known.storage_data.values():
        info.relative_path = f"../{place.name}/{info.relative_path}"
    return pickle.dumps(known)


ATTACKS = {
    "a pickle": (lambda place, mark: pickle.dumps(Evil(mark)), "it names "),
    "an old pickle": (lambda place, mark: pickle.dumps(Evil(mark), protocol=0), "it names "),
    "no metadata": (lambda place, mark: pickle.dumps(3), "has no attribute"),
    "no pickle": (lambda place, mark: b"\x80\x04 nonsense", ""),
    "a pickle for a tensor": (with_bytes, r"weights\.a is no tensor"),
    "another folder": (elsewhere, "is not in a file of it"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_checkpoint_of_a_stranger_is_read_as_data_or_not_at_all(cluster, tmp_path, mark, attack):
    checkpoints, place = saved(cluster, tmp_path / "stage")
    make, said = ATTACKS[attack]
    (place / ".metadata").write_bytes(make(place, mark))
    seal_again(place)
    assert checkpoints.newest()[0] == place, "its seal is sound"
    with pytest.raises(UserError, match=f"is no checkpoint of alignkit and is not read: .*{said}"):
        checkpoints.load(place, {"weights": {"a": torch.empty(3)}})
    assert not mark.exists()


def test_the_library_itself_would_run_it(cluster, tmp_path, mark):
    """Else the test above could not fail."""
    _, place = saved(cluster, tmp_path / "stage")
    (place / ".metadata").write_bytes(with_bytes(place, mark))
    dcp.load({"weights": {"a": torch.empty(3)}}, checkpoint_id=place)
    assert mark.exists()


def test_a_sound_checkpoint_comes_back(cluster, tmp_path):
    checkpoints, place = saved(cluster, tmp_path / "stage")
    tensors = {"weights": {"a": torch.empty(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}}
    checkpoints.load(place, tensors)
    assert tensors["weights"]["a"].tolist() == [1.0] * 3 and not tensors["weights"]["b"].any()


def test_the_state_of_the_generators_is_plain_json():
    state = json.loads(json.dumps(random_state()))
    expected = torch.rand(3)
    set_random_state(state)
    assert torch.equal(torch.rand(3), expected)
