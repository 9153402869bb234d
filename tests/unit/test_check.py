"""The preflight of data and machine: every finding is planted, and told in one line with what, where, why and mend."""

import os
import shutil
import socket
from importlib import metadata

import pytest
from stub_stage import composed

from alignkit.data.corpus import Corpus, Demonstration, Pair, Split
from alignkit.errors import UserError
from alignkit.runtime import check_machine
from alignkit.runtime.check import preflight
from alignkit.runtime.check_data import check_data
from alignkit.runtime.check_machine import (
    check_disk,
    check_memory,
    check_tracking,
    check_versions,
    cpu_memory,
    is_reached,
    visible_gpus,
)
from alignkit.runtime.config import RunConfig, load, with_changes
from alignkit.runtime.findings import lines

GIB = 2**30


@pytest.fixture(scope="module")
def raw():
    return composed("rlhf")


def config(raw: dict, **changes) -> RunConfig:
    return load(with_changes(raw, {key.replace("__", "."): value for key, value in changes.items()}))


def split(start: int, count: int, **changes) -> Split:
    """Rows on `count` prompts."""
    prompts = changes.pop("prompts", [f"prompt {number}" for number in range(start, start + count)])
    pairs = [Pair(prompt, "good", "bad") for prompt in prompts]
    return Split(
        **{"demonstrations": [Demonstration(p, "good") for p in prompts], "pairs": pairs, "prompts": prompts} | changes
    )


# --------------------------------------------------------------------------------------------------------------- data


def of_data(raw, train: Split, heldout: Split, recipe: str = "rlhf", reward_model: bool = True):
    return check_data(recipe, config(raw), Corpus(train, heldout), reward_model)


def test_sound_data_is_counted(raw):
    (found,) = of_data(raw, split(0, 300), split(300, 100))
    counts = "300 demonstrations and 100 held out, 300 pairs and 100 held out, 300 prompts and 100 held out"
    assert (found.level, found.line) == ("fact", f"data: {counts}, no prompt on both sides")


def test_rows_of_another_kind_are_refused_before_the_stages_that_come_first_have_run(raw):
    empty = split(0, 300, demonstrations=[], pairs=[], prompts=[])
    assert lines(of_data(raw, empty, split(300, 100)), "error") == [
        "data: no demonstrations: SFT needs prompt+response rows, texts or chosen responses",
        "data: no preference pairs; a reward model needs prompt+chosen+rejected rows or labelled texts",
        "data: no prompts: PPO needs rows with a prompt, or text+label rows, whose first words are one",
    ]
    assert lines(of_data(raw, empty, split(300, 100), "sft", False), "error") == [
        "data: no demonstrations: SFT needs prompt+response rows, texts or chosen responses"
    ]


def test_fewer_prompts_than_an_iteration_takes_are_refused(raw):
    there = config(raw).ppo.batch - 1
    assert lines(of_data(raw, split(0, there), split(300, 100)), "error") == [
        f"data: {there} training prompts: an iteration takes {there + 1} (ppo.batch / ppo.samples_per_prompt); lower "
        "ppo.batch or give more data"
    ]


def test_a_prompt_on_both_sides_is_an_error_and_one_that_differs_in_capitals_a_warning(raw):
    chat = [{"role": "user", "content": "prompt 7"}]  # counts as its text
    two = [
        [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I"}, {"role": "user", "content": "A"}]
    ]
    train = split(0, 300, prompts=[*split(0, 300).prompts, *two])
    heldout = split(300, 0, prompts=[*split(300, 120).prompts, chat, " PROMPT \n 8", *two])
    found = of_data(raw, train, heldout)
    assert lines(found, "error") == [
        "data: 2 prompts ('prompt 7') on both sides of the split: held-out figures would be those of what was learnt "
        "by heart; mend the source that splits them"
    ]
    assert lines(found, "warning") == [
        "data: 1 prompt ('PROMPT 8') on both sides of the split but for capitals and white space: held-out figures "
        "would be those of what was learnt by heart; write each in one way, or leave the doubles out"
    ]


def test_rows_without_a_prompt_are_compared_by_their_texts(raw):
    train = split(0, 300, demonstrations=[Demonstration("", "a film"), Demonstration("", "b film")])
    heldout = split(300, 100, demonstrations=[Demonstration("", "a film"), Demonstration("", "B  film")])
    found = of_data(raw, train, heldout)
    assert lines(found, "error")[0].startswith("data: 1 text ('a film') on both sides of the split: ")
    assert lines(found, "warning")[0].startswith("data: 1 text ('B film') on both sides of the split but for capitals ")


def test_few_held_out_rows_are_told_with_what_can_be_known_by_them(raw):
    contrast = (["good"] * 49, ["bad"] * 60)
    assert lines(of_data(raw, split(0, 300), split(300, 100, contrast=contrast, prompts=[])), "warning") == [
        "data.heldout: 49 held-out pairs: the reward model's accuracy will be known only to +-0.14 (95%); raise it or "
        "give more data",
        "data.heldout: 0 held-out prompts: the win rate will be known not at all; raise it or give more data",
    ]
    assert lines(of_data(raw, split(0, 300), split(300, 3), "sft", False), "warning") == []


# ----------------------------------------------------------------------------------------------------------- packages


@pytest.fixture
def declared(monkeypatch):
    """Pretend that alignkit declares these requirements."""
    genuine = metadata.version
    there = {"torch": "2.10.0+cpu", "wandb": "0.31.0"}

    def version(name: str) -> str:
        if name == "missing":
            raise metadata.PackageNotFoundError(name)
        return there.get(name) or genuine(name)

    required = ["torch<2.14,>=2.11", "missing>=1", "wandb>=0.30", "pytest>=999; extra == 'test'"]
    monkeypatch.setattr(check_machine.metadata, "requires", lambda _: required)
    monkeypatch.setattr(check_machine.metadata, "version", version)
    monkeypatch.setattr(check_machine.metadata, "metadata", lambda _: {"Requires-Python": "<3.14,>=3.11"})
    monkeypatch.setattr(check_machine.platform, "python_version", lambda: "3.14.1")


def test_versions_outside_the_declared_ranges_are_told_and_what_lacks_is_refused(declared):
    found = list(check_versions())
    assert lines(found, "warning") == [
        "Python: version 3.14.1 is outside <3.14,>=3.11: alignkit was never tried with it; take Python <3.14,>=3.11",
        "torch: version 2.10.0+cpu is outside <2.14,>=2.11: alignkit was never tried with it; "
        "pip install 'torch<2.14,>=2.11'",
    ]
    assert lines(found, "error") == ["missing: not installed: alignkit imports it; pip install 'missing>=1'"]
    assert lines(found, "fact") == ["versions: Python 3.14.1, torch 2.10.0+cpu, wandb 0.31.0"]


def test_an_alignkit_that_is_not_installed_declares_nothing(monkeypatch):
    def absent(name: str):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(check_machine.metadata, "metadata", absent)
    assert [finding.level for finding in check_versions()] == ["fact"]


# ---------------------------------------------------------------------------------------------------------------- W&B


def test_a_server_that_does_not_answer_is_a_warning(monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert lines(check_tracking("auto", "online"), "warning") == [
        "tracking: http://127.0.0.1:9 does not answer within 3 s: the run will wait for it, then go on offline; or set "
        "tracking.mode=offline"
    ]


def test_online_without_a_key_is_a_warning_and_offline_a_fact():
    assert lines(check_tracking("online", "offline"), "warning") == [
        "tracking.mode=online: no API key was found: the run will be tracked offline; run `wandb login`, set "
        "WANDB_API_KEY or choose tracking.mode=offline"
    ]
    assert [(f.level, f.line) for f in check_tracking("auto", "offline")] == [("fact", "W&B: offline")]


def test_a_server_is_reached_itself_or_through_the_proxy_before_it(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        assert lines(check_tracking("online", "online"), "fact") == [f"W&B: online, http://127.0.0.1:{port} answers"]
        assert not is_reached("http://nowhere.invalid")
        monkeypatch.setenv("http_proxy", f"127.0.0.1:{port}")
        assert is_reached("http://nowhere.invalid")
    assert not is_reached("http://nowhere.invalid")


# --------------------------------------------------------------------------------------------------------------- disk


@pytest.fixture
def free(monkeypatch):
    """Say how much room there is on the disk."""

    def tell(size: int) -> None:
        monkeypatch.setattr(check_machine.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(size, 0, size))

    return tell


def test_a_disk_is_measured_against_models_and_checkpoints(raw, free, tmp_path):
    """100 M parameters: three models of 4 bytes each, and three checkpoints of two models with moments at 12 each."""
    where = tmp_path / "not" / "there"
    settings, number = config(raw, runs_dir=str(where)), 100 * 2**20
    what = "free, the run writes up to 1.17 GiB of models and 7.03 GiB of checkpoints"
    free(int(8.3 * GIB))
    assert lines(check_disk("rlhf", settings, number), "fact") == [f"disk: 8.30 GiB {what}"]
    free(3 * GIB)
    mend = "make room, choose another runs_dir or lower checkpoint.keep_last"
    assert lines(check_disk("rlhf", settings, number), "warning") == [
        f"runs_dir={where}: 3.00 GiB {what}: unless some of it is there already, the disk will be full before the end; "
        f"{mend}"
    ]
    free(2 * GIB)
    assert lines(check_disk("rlhf", settings, number), "warning") == [
        f"runs_dir={where}: 2.00 GiB {what}: unless they are there already, there is no room for one model and one "
        f"checkpoint; {mend}"
    ]
    (several,) = check_disk("frontier", settings, number)
    assert "the run writes at least 1.17 GiB" in several.line
    (judged,) = check_disk("evaluate", settings, number)
    assert judged.line == "disk: 2.00 GiB free; what the run takes is not known before it begins"
    assert not where.exists()


def test_a_runs_dir_below_a_file_is_refused(raw, tmp_path):
    (tmp_path / "file").touch()
    assert lines(check_disk("rlhf", config(raw, runs_dir=str(tmp_path / "file" / "runs")), 1), "error") == [
        f"runs_dir={tmp_path}/file/runs: nothing can be written in {tmp_path}/file: the run keeps all it makes there; "
        "choose another"
    ]


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.fixture
def planned(monkeypatch):
    """A plan whose peak takes 8 GiB on each rank, instead of one that is counted."""
    from alignkit.runtime.plan_types import Footprint, Phase

    peak = Phase("rollout", "sampling", {"policy": Footprint(weights=8 * GIB)})
    monkeypatch.setattr("alignkit.runtime.plan.plan", lambda *_: [Phase("sft", "step", {}), peak])


def test_a_plan_that_does_not_fit_or_hardly_fits_is_a_warning(raw, planned, monkeypatch):
    def found(total: float, free: float):
        monkeypatch.setattr(check_machine, "visible_gpus", lambda: [(int(total * GIB), int(free * GIB))] * 2)
        return check_memory("rlhf", config(raw, launch__processes=2), None)

    mend = "`alignkit plan rlhf ... --gpu-memory={}` says what helps"
    takes = "memory: rollout (sampling) takes 8.00 GiB of the {} of each GPU"
    why = "are free, and buffers and fragmentation take more than is planned"
    assert [f.line for f in found(10, 9)] == [takes.format("10.00 GiB")]
    assert lines(found(10, 7), "warning") == [f"{takes.format('10.00 GiB')}: 7.00 GiB {why}; {mend.format(10)}"]
    assert lines(found(8.5, 8.5), "warning") == [f"{takes.format('8.50 GiB')}: 8.50 GiB {why}; {mend.format(8.5)}"]
    why = "with rows of full length, which the plan is for, the run would end there"
    assert lines(found(7, 7), "warning") == [f"{takes.format('7.00 GiB')}: {why}; {mend.format(7)}"]
    monkeypatch.setattr(check_machine, "visible_gpus", lambda: None)
    (unknown,) = check_memory("rlhf", config(raw), None)
    assert unknown.line == "memory: not planned: nvidia-smi does not tell what the GPUs have"


def test_small_models_are_not_planned_and_ranks_of_a_cpu_share_its_memory(raw, planned, monkeypatch):
    monkeypatch.setattr(check_machine, "visible_gpus", list)
    monkeypatch.setattr(check_machine, "cpu_memory", lambda: (12 * GIB, 12 * GIB))
    (small,) = check_memory("rlhf", config(raw), 144_384)
    assert small.line == "memory: not planned, as little is taken of the 12.00 GiB of this machine"
    (one,) = check_memory("rlhf", config(raw), 10**9)
    (two,) = check_memory("rlhf", config(raw, launch__processes=2), 10**9)
    assert (one.level, one.what) == ("fact", "rollout (sampling) takes 8.00 GiB of the 12.00 GiB of this machine")
    assert (two.level, two.what) == ("warning", "rollout (sampling) takes 16.00 GiB of the 12.00 GiB of this machine")


def test_more_ranks_than_gpus_are_refused(raw, monkeypatch):
    monkeypatch.setattr(check_machine, "visible_gpus", lambda: [(80 * GIB, 80 * GIB)] * 2)
    assert lines(check_memory("rlhf", config(raw, launch__processes=4), 1), "error") == [
        "launch.processes=4: 2 GPUs to be seen here: each rank takes one; set it to 2"
    ]


def test_gpus_are_asked_of_the_driver_and_only_those_that_a_rank_sees(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\necho "$@" > said\necho "81559, 80000"\necho "81559, 1000"\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(check_machine.metadata, "version", lambda name: "2.13.0+cpu")
    assert visible_gpus() == [], "torch would not take them"
    monkeypatch.setattr(check_machine.metadata, "version", lambda name: "2.13.0")
    assert visible_gpus() == [(81559 * 2**20, 80000 * 2**20), (81559 * 2**20, 1000 * 2**20)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-ab")
    visible_gpus()
    assert (tmp_path / "said").read_text().split()[-1] == "--id=3,GPU-ab"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert not visible_gpus()


def test_the_memory_of_this_machine_is_known():
    total, free = cpu_memory()
    assert 0 < free <= total


def test_what_cannot_be_planned_is_said_and_no_reason_to_stop(raw, monkeypatch):
    monkeypatch.setattr(check_machine, "visible_gpus", list)

    def refuse(*_):
        raise UserError("peft.method=prompt: learnt tokens are not counted")

    monkeypatch.setattr("alignkit.runtime.plan.plan", refuse)
    (found,) = check_memory("rlhf", config(raw), None)
    assert found.line == "memory: not planned: peft.method=prompt: learnt tokens are not counted"


def test_the_embedded_default_has_nothing_to_warn_of(raw):
    settings = config(raw)
    found = preflight("rlhf", settings, "offline", settings.data.load(0))
    assert {finding.where for finding in found} == {"data", "disk", "memory", "W&B", "versions"}
    assert lines(found, "warning") == lines(found, "error") == []
