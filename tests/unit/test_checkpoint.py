"""A checkpoint holds everything, is whole or is not used, and going on from it is as if nothing had happened."""

import json
import os
import random
import resource
import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoint_world import (
    EVERY,
    ITERATIONS,
    NEVER,
    SETTINGS,
    WARMUP,
    asking,
    config_for,
    open_checkpoints,
    result_of,
    rows,
    train,
)
from torch.distributed.checkpoint import FileSystemWriter

from alignkit.errors import Interrupted, UserError
from alignkit.models.loading import scorer_from_policy
from alignkit.runtime import checkpoint
from alignkit.runtime.random_state import random_state, set_random_state
from alignkit.runtime.seal import SEAL, read_seal
from alignkit.stages.actors import load_actors
from alignkit.stages.job import Job
from alignkit.stages.ppo import restore
from alignkit.stages.state import PPOState

KINDS = ["full", "lora", "rloo", "offloaded"]


@pytest.fixture(scope="module")
def folders(tiny_policy, tiny_tokenizer, tmp_path_factory):
    """Saved policy and reward model."""
    place = tmp_path_factory.mktemp("bases")
    tiny_policy().save_pretrained(place / "policy")
    scorer_from_policy(place / "policy", seed=1).save_pretrained(place / "reward")
    for name in ("policy", "reward"):
        tiny_tokenizer.save_pretrained(place / name)
    return {"policy": place / "policy", "reward": place / "reward"}


@pytest.fixture(scope="module")
def unbroken(folders, cluster, tmp_path_factory):
    """kind -> what a run leaves that was neither stopped nor saved a checkpoint."""
    done = {}

    def result(kind: str) -> dict:
        if kind not in done:
            out = tmp_path_factory.mktemp(kind)
            train(folders, cluster, out, kind, checkpoint=NEVER)
            assert not list(out.glob("state/*"))
            done[kind] = result_of(out)
        return done[kind]

    return result


# ------------------------------------------------------------------------------------------------- all of it comes back


def step(actors, names) -> None:
    """One optimizer step of the named models whose gradient is a function of the weights, and the average with it."""
    for name in names:
        model = actors.policy if name == "policy" else actors.value_model
        optimizer = actors.policy_optimizer if name == "policy" else actors.value_optimizer
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.grad = parameter.detach() * 0.3 + 0.1
        optimizer.step()
        optimizer.zero_grad()
    if actors.ema and "policy" in names:
        actors.ema.update(actors.policy)


def copied(tensors: dict) -> dict:
    """A plain copy of nested dicts of tensors."""
    if isinstance(tensors, dict):
        return {name: copied(value) for name, value in tensors.items()}
    return (tensors.full_tensor() if hasattr(tensors, "full_tensor") else tensors).clone()


def named(tensors: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    return dict(checkpoint.leaves(tensors, prefix))


def assert_equal(found: dict, expected: dict) -> None:
    """The same tensors, bit for bit."""
    found, expected = named(copied(found)), named(expected)
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def spoil(actors) -> None:
    """Other weights than a fresh start has, so that what is not loaded shows."""
    with torch.no_grad():
        for model in (actors.policy, actors.value_model):
            for parameter in model.parameters() if model else ():
                parameter.add_(1.0 if parameter.requires_grad else 0.0)
        for value in actors.ema.average.values() if actors.ema else ():
            value.add_(1.0)


STATE = PPOState(0.1 + 1 / 3, 2, (16.0, -0.1 / 3, 1e-17 / 7), ptx_rows=5, policy_steps=4, value_steps=8)


@pytest.mark.parametrize("warming", [True, False], ids=["in_the_value_warm_up", "later"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_and_every_number_comes_back_to_the_last_bit(folders, cluster, tmp_path, kind, warming):
    job = Job("ppo", config_for(kind), folders, tmp_path, first=False)
    actors, other = load_actors(job, cluster), load_actors(job, cluster)
    actors.state = replace(STATE, policy_steps=0 if warming else 4, value_steps=0 if kind == "rloo" else 8)
    values = ["value"] if actors.value_model else []
    for names in [values] if warming else [values, ["policy", *values], ["policy", *values]]:
        step(actors, names)
    saved = copied(actors.tensors())
    assert ("policy_adam" in saved) is not warming and ("value" in saved) is (kind != "rloo")
    assert ("policy_average" in saved) is (kind != "rloo")
    assert all("lora" in name for name in saved["policy"]) is (kind == "lora")
    open_checkpoints(tmp_path, cluster).save(2, actors.tensors(), {"ppo": actors.state.state_dict(), "seconds": 1.5})
    spoil(other)
    assert restore(other, open_checkpoints(tmp_path, cluster)) == 1.5
    assert other.state == actors.state
    assert_equal(other.tensors(), saved)
    for one in (actors, other):  # the next step too: what Adam holds besides its moments
        step(one, ["policy", *values])
    assert_equal(other.tensors(), copied(actors.tensors()))


def test_generators_come_back_with_the_normal_number_that_each_holds_back(tmp_path):
    def draw() -> list[float]:
        return [float(torch.randn(1)), float(np.random.standard_normal()), random.gauss(0, 1), random.random()]

    draw()  # an odd number: NumPy's and Python's generators draw normal numbers in pairs
    state = json.loads(json.dumps(random_state()))
    expected = [draw() for _ in range(3)]
    set_random_state(state)
    assert [draw() for _ in range(3)] == expected


@pytest.fixture(scope="module")
def saved_each_time(folders, cluster, unbroken, tmp_path_factory):
    """A run that wrote a checkpoint after each iteration."""
    out = tmp_path_factory.mktemp("each")
    train(folders, cluster, out)
    return out


def test_saving_checkpoints_changes_nothing(saved_each_time, unbroken):
    names = [place.name for place in sorted((saved_each_time / "state").iterdir())]
    assert names == [f"checkpoint-{done}" for done in range(1, ITERATIONS + 1)]
    assert result_of(saved_each_time) == unbroken("full")


@pytest.mark.parametrize("done", range(1, ITERATIONS + 1))
def test_going_on_after_any_iteration_ends_with_the_same_bits(
    saved_each_time, unbroken, folders, cluster, tmp_path, done, capsys
):
    """Also where the power went after the last row but before the model was saved: later rows are written once."""
    assert 1 <= WARMUP < ITERATIONS - 1, "some iterations must be in the value warm-up and some after it"
    out = tmp_path / "ppo"
    shutil.copytree(saved_each_time, out)
    for later in range(done + 1, ITERATIONS + 1):
        shutil.rmtree(out / "state" / f"checkpoint-{later}")
    shutil.rmtree(out / "model")
    train(folders, cluster, out)
    assert f"ppo: going on from iteration {done}\n" in capsys.readouterr().out
    assert result_of(out) == unbroken("full")


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_stage_that_was_asked_to_end_goes_on_with_the_same_bits(unbroken, folders, cluster, tmp_path, kind, capsys):
    with pytest.raises(Interrupted) as end:
        train(folders, cluster, tmp_path, kind, checkpoint=NEVER, then=asking(tmp_path, 2))
    assert end.value.step == 2 and len(rows(tmp_path / "metrics.jsonl")) == 2
    train(folders, cluster, tmp_path, kind, checkpoint=NEVER)
    assert "ppo: going on from iteration 2\n" in capsys.readouterr().out
    assert result_of(tmp_path) == unbroken(kind)


# ----------------------------------------------------------------------------------------------- while training goes on


@contextmanager
def held_back(monkeypatch):
    """Within, a checkpoint that is written in the background does not get to the disk before the end."""
    go, write = threading.Event(), FileSystemWriter.write_data

    def waiting(*arguments):
        assert go.wait(timeout=60)
        return write(*arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", waiting)
    try:
        yield
    finally:
        go.set()


BACKGROUND = replace(EVERY, background=True)


def test_what_training_does_meanwhile_is_not_in_the_checkpoint(folders, cluster, tmp_path, monkeypatch):
    job = Job("ppo", config_for("full"), folders, tmp_path, first=False)
    actors, other = load_actors(job, cluster), load_actors(job, cluster)
    actors.state = replace(STATE)
    step(actors, ["policy", "value"])
    saved, state = copied(actors.tensors()), actors.state.state_dict()
    checkpoints = open_checkpoints(tmp_path, cluster, BACKGROUND)
    with held_back(monkeypatch):
        checkpoints.save(2, actors.tensors(), {"ppo": actors.state.state_dict(), "seconds": 0.0})
        step(actors, ["policy", "value"])
        actors.state.kl_coef, actors.state.iteration = 7.0, 3
        checkpoints.tracker.log({"kl": 1.0}, step=1)
        torch.rand(3)
    checkpoints.finish()
    restore(other, open_checkpoints(tmp_path, cluster))
    assert other.state.state_dict() == state
    assert_equal(other.tensors(), saved)
    assert rows(tmp_path / "metrics.jsonl") == []


def test_a_checkpoint_in_the_background_holds_nobody_up_and_is_sealed_when_it_is_written(
    cluster, tmp_path, monkeypatch
):
    checkpoints = open_checkpoints(tmp_path, cluster, BACKGROUND)
    with held_back(monkeypatch):
        checkpoints.save(1, TENSORS, {})
        assert checkpoints.ask(2, every=None) == "go on"
        assert steps_of(tmp_path) == []
    checkpoints._writing.files.result(timeout=60)
    assert checkpoints.ask(3, every=None) == "go on"
    assert [place.name for place in (tmp_path / "state").iterdir()] == ["checkpoint-1"]


def test_the_next_checkpoint_waits_for_the_one_that_is_being_written(cluster, tmp_path):
    checkpoints = open_checkpoints(tmp_path, cluster, BACKGROUND)
    for number in (1, 2, 3):
        checkpoints.save(number, TENSORS, {"number": number})
    checkpoints.finish()
    assert steps_of(tmp_path) == [1, 2, 3]
    assert [read_seal(tmp_path / "state" / f"checkpoint-{n}")["facts"]["number"] for n in (1, 2, 3)] == [1, 2, 3]


# ------------------------------------------------------------------------------------------------------- when, how many

TENSORS = {"policy": {"weight": torch.arange(5000.0)}, "value": {"weight": torch.arange(7.0)}}


def steps_of(folder) -> list[int]:
    return sorted(int(place.name.split("-")[1]) for place in (folder / "state").glob("checkpoint-*"))


def save(checkpoints, number: int) -> None:
    """A row, then a checkpoint of numbers that tell which it is."""
    checkpoints.tracker.log({"kl": number / 3}, step=number)
    tensors = {model: {"weight": kept["weight"] + number} for model, kept in TENSORS.items()}
    checkpoints.save(number, tensors, {"number": number})


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_only_the_last_ones_are_kept(cluster, tmp_path, kept):
    checkpoints = open_checkpoints(tmp_path, cluster, replace(EVERY, keep_last=kept))
    for number in (2, 9, 10, 11):  # in the order of numbers, not of names
        save(checkpoints, number)
    assert steps_of(tmp_path) == [2, 9, 10, 11][-kept:]


def test_checkpoints_come_every_so_many_steps(cluster, tmp_path):
    checkpoints = open_checkpoints(tmp_path, cluster)
    assert [checkpoints.ask(number, every=3) for number in range(1, 7)] == ["go on", "go on", "save"] * 2
    assert [checkpoints.ask(number, every=None) for number in range(1, 4)] == ["go on"] * 3


def test_checkpoints_come_every_so_many_minutes_counted_from_the_last_one(cluster, tmp_path, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=1000.0)
    monkeypatch.setattr(checkpoint, "time", clock)
    checkpoints = open_checkpoints(tmp_path, cluster, replace(NEVER, every_minutes=2.5))
    said = []
    for second in range(0, 601, 50):
        clock.now = 1000.0 + second
        said.append(checkpoints.ask(1, every=None))
        if said[-1] == "save":
            checkpoints.save(second, TENSORS, {})
    assert [50 * place for place, word in enumerate(said) if word == "save"] == [150, 300, 450, 600]
    clock.now += 149
    assert checkpoints.ask(1, every=None) == "go on"
    assert checkpoints.ask(7, every=7) == "save", "whichever comes first"


def test_a_file_named_stop_asks_for_a_last_checkpoint(cluster, tmp_path):
    checkpoints = open_checkpoints(tmp_path, cluster, NEVER)
    (tmp_path / "stop").touch()
    assert checkpoints.ask(1, every=None) == "stop"


# -------------------------------------------------------------------------------------------------- damaged, unfinished


def flip(file, place: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 1
    file.write_bytes(content)


def cut(file) -> None:
    os.truncate(file, file.stat().st_size - 1)


def other_number(file) -> None:
    text = file.read_text("utf-8")
    assert text.count('"number": 3') == 1
    file.write_text(text.replace('"number": 3', '"number": 8'), "utf-8")


DAMAGES = {
    "a_flipped_bit_in_a_shard": ("__0_0.distcp", flip),
    "a_cut_shard": ("__0_0.distcp", cut),
    "a_lost_shard": ("__0_0.distcp", lambda file: file.unlink()),
    "a_flipped_bit_in_the_table_of_contents": (".metadata", flip),
    "a_lost_table_of_contents": (".metadata", lambda file: file.unlink()),
    "another_number_in_the_seal": (SEAL, other_number),
    "a_cut_seal": (SEAL, lambda file: os.truncate(file, 100)),
    "an_empty_seal": (SEAL, lambda file: file.write_text("")),
    "a_seal_of_nothing": (SEAL, lambda file: file.write_text("null")),
    "a_seal_of_no_files": (SEAL, lambda file: file.write_text('{"files": {}, "facts": {"position": {}}}')),
    "a_seal_that_is_no_text": (SEAL, lambda file: file.write_bytes(b"\xff\xfe")),
    "cut_metrics": ("../../metrics.jsonl", cut),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_a_damaged_checkpoint_the_one_before_is_used_and_a_line_says_so(cluster, tmp_path, damage, capsys):
    checkpoints = open_checkpoints(tmp_path, cluster)
    for number in (1, 2, 3):
        save(checkpoints, number)
    name, harm = DAMAGES[damage]
    harm(tmp_path / "state" / "checkpoint-3" / name)
    again = open_checkpoints(tmp_path, cluster)
    capsys.readouterr()
    place, facts = again.newest()
    assert (place.name, facts["number"]) == ("checkpoint-2", 2)
    loaded = {model: {"weight": torch.zeros_like(kept["weight"])} for model, kept in TENSORS.items()}
    again.load(place, loaded)
    assert all(loaded[model]["weight"].equal(kept["weight"] + 2) for model, kept in TENSORS.items())
    assert capsys.readouterr().out == (
        f"ppo: checkpoint-3 is damaged ({name.split('/')[-1]}): it is left out and kept as damaged-checkpoint-3\n"
    )
    assert (tmp_path / "state" / "damaged-checkpoint-3").is_dir() and steps_of(tmp_path) == [1, 2]
    assert [row["ppo/kl"] for row in rows(tmp_path / "metrics.jsonl")] == [1 / 3, 2 / 3]
    save(again, 3)
    assert again.newest()[1]["number"] == 3


def test_where_all_are_damaged_the_stage_starts_anew(cluster, tmp_path, capsys):
    checkpoints = open_checkpoints(tmp_path, cluster)
    for number in (1, 2):
        save(checkpoints, number)
        flip(tmp_path / "state" / f"checkpoint-{number}" / "__0_0.distcp", place=0.9)
    capsys.readouterr()
    assert open_checkpoints(tmp_path, cluster).newest() is None
    assert rows(tmp_path / "metrics.jsonl") == []
    told = capsys.readouterr().out.splitlines()
    assert [line.split(" is damaged")[0] for line in told[:2]] == ["ppo: checkpoint-2", "ppo: checkpoint-1"]
    assert told[2:] == ["ppo: no sound checkpoint is left: the stage starts again"]


def test_what_was_never_finished_is_removed_and_a_line_says_so(cluster, tmp_path, capsys):
    """Written aside, or in place by a trainer, when the power went."""
    checkpoints = open_checkpoints(tmp_path, cluster)
    save(checkpoints, 1)
    for name in (".checkpoint-2", "checkpoint-3"):
        shutil.copytree(tmp_path / "state" / "checkpoint-1", tmp_path / "state" / name)
        (tmp_path / "state" / name / SEAL).unlink()
    capsys.readouterr()
    assert open_checkpoints(tmp_path, cluster).newest()[1]["number"] == 1
    assert [place.name for place in (tmp_path / "state").iterdir()] == ["checkpoint-1"]
    assert capsys.readouterr().out.splitlines() == [
        f"ppo: checkpoint-{number} was never finished and is removed" for number in (2, 3)
    ]


def test_with_nothing_saved_the_rows_of_an_attempt_before_go(cluster, tmp_path, capsys):
    checkpoints = open_checkpoints(tmp_path, cluster)
    checkpoints.tracker.log({"kl": 1.0}, step=1)
    checkpoints.tracker.samples([{"prompt": "a"}], step=1)
    assert checkpoints.newest() is None
    assert rows(tmp_path / "metrics.jsonl") == rows(tmp_path / "samples.jsonl") == []
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------ of another run, stage


def test_a_checkpoint_of_another_run_is_refused_with_the_settings_that_differ(cluster, tmp_path):
    save(open_checkpoints(tmp_path, cluster), 1)
    settings = {**SETTINGS, "ppo": {"clip": 0.3, "batch": 8}, "kl": {"target": 3.0, "horizon": 9}}
    other = open_checkpoints(tmp_path, cluster, digest="abd", settings=settings)
    with pytest.raises(UserError) as refusal:
        other.newest()
    assert str(refusal.value) == (
        f"{tmp_path}/state/checkpoint-1 is a checkpoint of ppo-abc, not of ppo-abd (kl.horizon: then None, now 9; "
        "ppo.clip: then 0.2, now 0.3): take it away, or go on with the settings that it was made with"
    )
    assert steps_of(tmp_path) == [1] and len(rows(tmp_path / "metrics.jsonl")) == 1, "nothing of it is touched"


@pytest.mark.parametrize("identity", [{"digest": "abd"}, {"stage": "sft"}], ids=["model", "stage"])
def test_a_checkpoint_of_another_model_or_stage_is_refused(cluster, tmp_path, identity):
    save(open_checkpoints(tmp_path, cluster, **identity), 1)
    with pytest.raises(UserError, match="is a checkpoint of .* not of ppo-abc .other data or another model to start f"):
        open_checkpoints(tmp_path, cluster).newest()


# ---------------------------------------------------------------------------------------------------------- a full disk


@contextmanager
def full_disk():
    """Within, no file can grow beyond 20 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("background", [False, True], ids=["at_once", "in_the_background"])
def test_a_full_disk_costs_a_checkpoint_and_a_line(cluster, tmp_path, background, capsys):
    checkpoints = open_checkpoints(tmp_path, cluster, replace(EVERY, background=background))
    save(checkpoints, 1)
    checkpoints.finish()
    capsys.readouterr()
    with full_disk():
        save(checkpoints, 2)
        if background:
            assert checkpoints._writing.files.exception(timeout=60)
            assert list((tmp_path / "state" / ".checkpoint-2").iterdir()) == [], "room for the metrics at once"
            assert checkpoints.ask(3, every=None) == "go on"
    assert capsys.readouterr().out == (
        "ppo: warning: checkpoint 2 was not saved ([Errno 27] File too large); the last good one is checkpoint-1\n"
    )
    assert [place.name for place in (tmp_path / "state").iterdir()] == ["checkpoint-1"]
    save(checkpoints, 3)
    checkpoints.finish()
    assert open_checkpoints(tmp_path, cluster).newest()[1]["number"] == 3
    assert [row["ppo/episodes"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_run_whose_disk_was_full_for_a_while_goes_on_and_ends_the_same(unbroken, folders, cluster, tmp_path, capsys):
    limit = []

    def then(done: int) -> None:
        if done == 2:
            limit.append(full_disk())
            limit[0].__enter__()
        elif done == 3:
            limit[0].__exit__(None, None, None)

    train(folders, cluster, tmp_path, then=then)
    told = [line for line in capsys.readouterr().out.splitlines() if "warning: checkpoint" in line]
    assert len(told) == 1 and told[0].endswith("; the last good one is checkpoint-1")
    assert steps_of(tmp_path) == [1, 3, 4]
    assert result_of(tmp_path) == unbroken("full")


FULL = OSError(28, "No space left on device")
HIDDEN = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
FAULTS = {
    "when_its_tensors_are_copied": (checkpoint.dcp, "async_save", MemoryError()),
    "when_its_tensors_are_written": (FileSystemWriter, "write_data", FULL),
    "when_torch_hides_what_the_system_said": (FileSystemWriter, "write_data", HIDDEN),
    "when_memory_runs_out_meanwhile": (FileSystemWriter, "write_data", MemoryError()),
    "when_its_contents_are_listed": (FileSystemWriter, "finish", FULL),
    "when_its_files_are_read_again": (checkpoint, "file_facts", OSError(5, "Input/output error")),
    "when_it_is_sealed": (checkpoint, "write_seal", FULL),
}


@pytest.mark.parametrize("moment", FAULTS)
def test_a_checkpoint_that_fails_anywhere_on_its_way_is_left_out(cluster, tmp_path, monkeypatch, moment, capsys):
    owner, name, fault = FAULTS[moment]

    def fail(*_, **__):
        raise fault

    checkpoints = open_checkpoints(tmp_path, cluster)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        save(checkpoints, 1)
    cause = str(fault) or "MemoryError"  # which has no text of its own
    cause = f"a file could not be written, as on a full disk: {cause}" if fault is HIDDEN else cause
    assert capsys.readouterr().out == f"ppo: warning: checkpoint 1 was not saved ({cause}); there is none before it\n"
    assert not list((tmp_path / "state").glob("*"))
    save(checkpoints, 2)
    assert steps_of(tmp_path) == [2]
