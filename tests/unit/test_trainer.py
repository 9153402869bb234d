"""The TRL stages on one process: checkpoints go on to the last bit, no row twice and none missing, what is refused."""

import gc
import json
import resource
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from trainer_world import STEPS, FatalTracker, distance, make_base, make_job, rows_of, run, run_killed, weights_of
from trl import SFTConfig

from alignkit.errors import Interrupted, UserError
from alignkit.runtime.checkpoint import Checkpoints
from alignkit.runtime.sharding import Cluster
from alignkit.stages import reward_model, sft
from alignkit.stages.trainer import OURS, SplitCallback, trainer_arguments, trl_config


@pytest.fixture(scope="module")
def cluster():
    gc.freeze()  # the stages collect garbage; what was imported is none
    made = Cluster.open()
    yield made
    made.close()
    gc.unfreeze()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {kind: make_base(root / kind, kind) for kind in ("llama", "gpt2")}


@pytest.fixture(scope="module")
def straight(bases, cluster, tmp_path_factory):
    """SFT of all weights, with dropout, that nothing disturbs."""
    job = make_job("sft", bases["gpt2"], tmp_path_factory.mktemp("straight"), every=None)
    return job, run(job, cluster)


@pytest.fixture
def killed(straight, cluster, tmp_path):
    """The same, killed after step 7, with checkpoints after steps 3 and 6."""
    job = make_job("sft", straight[0].inputs["init"], tmp_path)
    run_killed(job, cluster, last=7)
    return job


def same(job, straight) -> None:
    assert distance(weights_of(job), weights_of(straight)) == 0.0
    assert rows_of(job) == rows_of(straight)


def test_a_killed_run_goes_on_to_the_same_bits_rows_and_results(killed, straight, cluster, capsys):
    assert rows_of(killed)[-1]["sft/step"] == 7
    assert run(killed, cluster) == straight[1]
    assert "sft: going on from step 6\n" in capsys.readouterr().out
    same(killed, straight[0])
    assert [row["sft/step"] for row in rows_of(killed)][:STEPS] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("stage", "peft"),
    [
        ("sft", "lora"),
        ("sft", "p_tuning"),
        ("reward_model", "prompt"),
        ("reward_model", "bitfit"),
        *(pytest.param("sft", peft, marks=pytest.mark.slow) for peft in ("ia3", "bitfit", "prompt")),
        *(pytest.param("reward_model", peft, marks=pytest.mark.slow) for peft in ("none", "lora", "ia3", "p_tuning")),
    ],
)
def test_every_way_of_training_resumes_to_the_same_bits(stage, peft, bases, cluster, tmp_path):
    jobs = [make_job(stage, bases["gpt2"], tmp_path / name, peft) for name in ("straight", "killed")]
    run(jobs[0], cluster)
    run_killed(jobs[1], cluster)
    run(jobs[1], cluster)
    same(jobs[1], jobs[0])


def test_a_checkpoint_holds_what_is_trained_and_where_it_stands(bases, cluster, tmp_path):
    """Not the frozen weights, nor the log of a long run."""
    job = make_job("sft", bases["llama"], tmp_path, "lora")
    run_killed(job, cluster)
    place = tmp_path / "state" / "checkpoint-3"
    names = FileSystemReader(place).read_metadata().state_dict_metadata
    held = {name.removeprefix("weights.") for name in names if name.startswith("weights.")}
    assert len(held) == 28 and all("lora_" in name for name in held)
    assert set(names) == {f"weights.{name}" for name in held} | {
        f"optimizer.{name}.{entry}" for name in held for entry in ("step", "exp_avg", "exp_avg_sq")
    }
    trainer = json.loads((place / "sealed.json").read_text())["facts"]["trainer"]
    assert (trainer["global_step"], trainer["epoch"], trainer["log_history"]) == (3, 0.75, [])


@pytest.mark.parametrize(
    "changes",
    [
        {"every": 4},  # at the end of an epoch
        {"trainer": {"train_sampling_strategy": "group_by_length"}},  # an order that is drawn in each epoch
        {"trainer": {"optim": "adafactor"}},  # remembers numbers too, not only tensors
        {"trainer": {"logging_steps": 2, "logging_first_step": False}},
        {"offload": True},
    ],
    ids=str,
)
def test_whatever_it_is_told_it_resumes_to_the_same_bits(changes, bases, cluster, tmp_path):
    last = 7 if "logging_steps" in changes.get("trainer", {}) else 5
    jobs = [make_job("sft", bases["gpt2"], tmp_path / name, **changes) for name in ("straight", "killed")]
    run(jobs[0], cluster)
    run_killed(jobs[1], cluster, last=last)
    run(jobs[1], cluster)
    same(jobs[1], jobs[0])


def test_between_two_rows_no_checkpoint_is_made(bases, cluster, tmp_path):
    job = make_job("sft", bases["llama"], tmp_path, every=3, trainer={"logging_steps": 2, "logging_first_step": False})
    run(job, cluster)
    assert [place.name for place in (tmp_path / "state").glob("checkpoint-*")] == ["checkpoint-6"]


def test_a_stage_that_is_asked_to_end_saves_and_goes_on_later(straight, cluster, tmp_path):
    class Asked(FatalTracker):
        def log(self, values, step):
            super().log(values, step)
            if step == 2:
                (tmp_path / "stop").touch()

    job = make_job("sft", straight[0].inputs["init"], tmp_path, every=None)
    with pytest.raises(Interrupted) as ended:
        run(job, cluster, tracker=Asked(tmp_path, "sft", True))
    assert ended.value.step == 2
    (tmp_path / "stop").unlink()
    run(job, cluster)
    same(job, straight[0])


def test_a_stage_that_is_asked_to_end_in_its_last_step_ends_well(straight, cluster, tmp_path):
    class Asked(FatalTracker):
        def log(self, values, step):
            super().log(values, step)
            if step == STEPS:
                (tmp_path / "stop").touch()

    job = make_job("sft", straight[0].inputs["init"], tmp_path, every=STEPS)
    assert run(job, cluster, tracker=Asked(tmp_path, "sft", True)) == straight[1]
    assert list((tmp_path / "state").glob("checkpoint-*")) == []


def test_a_checkpoint_that_was_never_finished_is_left_out(killed, straight, cluster, capsys):
    (killed.out / "state" / "checkpoint-6" / "sealed.json").unlink()
    run(killed, cluster)
    assert "sft: going on from step 3\n" in capsys.readouterr().out
    same(killed, straight[0])


def test_for_a_damaged_checkpoint_the_one_before_serves(killed, straight, cluster, capsys):
    (file,) = (killed.out / "state" / "checkpoint-6").glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    run(killed, cluster)
    told = capsys.readouterr().out
    assert f"checkpoint-6 is damaged ({file.name})" in told and "sft: going on from step 3\n" in told
    same(killed, straight[0])


def test_a_full_disk_costs_a_checkpoint_and_a_line_but_not_the_run(straight, cluster, tmp_path, monkeypatch, capsys):
    genuine = Checkpoints.save

    def on_a_full_disk(self, step, *args):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000 if step == 6 else before[1], before[1]))
        genuine(self, step, *args)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(Checkpoints, "save", on_a_full_disk)
    job = make_job("sft", straight[0].inputs["init"], tmp_path)
    run(job, cluster)
    told = capsys.readouterr().out
    assert "checkpoint 6 was not saved (" in told and "the last good one is checkpoint-3" in told
    same(job, straight[0])
    assert [place.name for place in (tmp_path / "state").glob("*checkpoint-*")] == ["checkpoint-3"]


def test_the_product_is_on_the_disk_before_it_is_measured(bases, cluster, tmp_path, monkeypatch):
    def fails(*args):
        raise RuntimeError("while measuring")

    monkeypatch.setattr(reward_model, "measure", fails)
    job = make_job("reward_model", bases["llama"], tmp_path)
    with pytest.raises(RuntimeError, match="while measuring"):
        run(job, cluster)
    assert "score.weight" in weights_of(job)


@pytest.mark.parametrize(("stage", "measuring"), [(sft, "heldout_loss"), (reward_model, "measure")])
def test_the_trained_model_is_gone_when_the_saved_one_is_measured(
    stage, measuring, bases, cluster, tmp_path, monkeypatch
):
    made, save, measure, gone = [], stage.save_trained, getattr(stage, measuring), []

    def saving(model, *args):
        made.append(weakref.ref(model))
        save(model, *args)

    def after(*args):
        gone.append(made[0]() is None)
        return measure(*args)

    monkeypatch.setattr(stage, "save_trained", saving)
    monkeypatch.setattr(stage, measuring, after)
    run(make_job(stage.__name__.rpartition(".")[2], bases["llama"], tmp_path, every=None, epochs=0.5), cluster)
    assert gone == [True]


@pytest.mark.parametrize("microbatch", [1, 5, 12])
def test_an_epoch_has_as_many_steps_whatever_the_microbatch(microbatch, bases, cluster, tmp_path):
    """Of 50 rows 4 batches of 12; the two that are left make no small batch of their own."""
    job = make_job("sft", bases["llama"], tmp_path, microbatch=microbatch, epochs=1.0)
    run(job, cluster)
    assert [row["sft/step"] for row in rows_of(job) if "sft/loss" in row] == [1, 2, 3, 4]


def test_moments_in_the_cpus_memory_change_nothing(bases, cluster, tmp_path):
    plain = make_job("sft", bases["llama"], tmp_path / "plain", trainer={"optim": "adamw_torch"})
    offloaded = make_job("sft", bases["llama"], tmp_path / "offloaded", offload=True)
    for job in (plain, offloaded):
        run(job, cluster)
    same(offloaded, plain)


def test_bfloat16_on_one_process_leaves_the_weights_in_float32(bases, cluster, tmp_path):
    jobs = [make_job("sft", bases["llama"], tmp_path / name, epochs=0.5) for name in ("plain", "short")]
    run(jobs[0], cluster)
    run(jobs[1], replace(cluster, compute_dtype=torch.bfloat16))
    losses = [rows_of(job)[0]["sft/loss"] for job in jobs]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)
    assert {value.dtype for value in weights_of(jobs[1]).values()} == {torch.float32}


@pytest.mark.parametrize("name", ["bf16", "fsdp_config", "save_steps"])
def test_arguments_that_go_past_our_own_settings_are_refused(name, cluster, tmp_path):
    job = make_job("sft", tmp_path, tmp_path, trainer={name: 1})
    with pytest.raises(UserError, match=f"^sft.trainer.{name}: not passed on; use {OURS[name]}"):
        trainer_arguments(job, job.config.sft, cluster, 50)


def test_an_argument_that_trl_does_not_know_is_told_in_one_line():
    with pytest.raises(UserError, match=r"^sft.trainer: SFTConfig says: .*unexpected keyword argument 'speed'"):
        trl_config(SFTConfig, {"speed": 1}, "sft")


def test_the_optimizer_that_is_offloaded_takes_no_other_kind(cluster, tmp_path):
    job = make_job("sft", tmp_path, tmp_path, offload=True, trainer={"optim": "adafactor"})
    with pytest.raises(UserError, match="sft.trainer.optim=adafactor: .* sharding.offload_optimizer=true"):
        trainer_arguments(job, job.config.sft, cluster, 50)


def test_a_model_that_accelerate_would_not_split_is_refused():
    with pytest.raises(UserError, match="^sharding: accelerate would not split the model over these ranks; set shard"):
        SplitCallback(SimpleNamespace(accelerator=SimpleNamespace(is_fsdp2=False)))
