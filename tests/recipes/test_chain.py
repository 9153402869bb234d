"""The whole chain on the embedded task, shrunk: what it leaves behind, what it reuses, and how it fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from offline_run import OfflineRun

SMALL = [
    *("launch=inline", "tracking.mode=offline", "data.num_prompts=200", "data.num_pairs=600"),
    *("data.num_demonstrations=400", "sft.epochs=2", "reward_model.epochs=1", "model.hidden_size=32"),
    *("ppo.batch=16", "ppo.minibatch=8", "ppo.episodes=48", "ppo.samples_every=1", "rollout.max_response=24"),
    *(
        "evaluate.prompts=20",
        "evaluate.best_of_samples=8",
        "evaluate.best_of_prompts=4",
        "kl.target=3.0",
        "ptx=demonstrations",
        "ptx.batch=4",
    ),
]
SUMMARY = {
    *("sft/eval_loss", "reward_model/eval_accuracy", "ppo/kl", "ppo/kl_target", "ppo/score_mean", "ppo/gold_mean"),
    *(
        "evaluate/win_rate",
        "evaluate/distinct_2",
        "seconds/sft",
        "seconds/reward_model",
        "seconds/ppo",
        "seconds/total",
    ),
}
PPO_METRICS = {
    *("kl", "kl_coef", "score_mean", "score_std", "gold_mean", "entropy", "approx_kl", "clip_fraction", "ptx_loss"),
    *("value_clip_fraction", "explained_variance", "response_length", "eos_fraction", "policy_grad_norm"),
    *("value_grad_norm", "tokens_per_second", "seconds/rollout", "seconds/scoring", "seconds/update", "ratio_error"),
}


def alignkit(monkeypatch, *words) -> int:
    """Run the command in this process; its exit code."""
    from alignkit.cli import main

    monkeypatch.setattr(sys, "argv", ["alignkit", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run `a` in <folder>/runs."""
    place = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert alignkit(patch, "rlhf", *SMALL, "name=a") == 0
    return place


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder / "runs" / "a"


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_summary_holds_the_documented_keys(here):
    assert json.loads((here / "summary.json").read_text()).keys() >= SUMMARY


def test_run_folder_keeps_the_settings_that_were_used(here):
    settings = yaml.safe_load((here / "config.yaml").read_text("utf-8"))
    assert settings["kl"]["target"] == 3.0 and settings["ppo"]["episodes"] == 48


@pytest.mark.parametrize("stage", ["sft", "reward_model", "ppo"])
def test_models_load_with_plain_transformers_and_the_manifest_seals_every_file(here, stage):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    factory = AutoModelForSequenceClassification if stage == "reward_model" else AutoModelForCausalLM
    model, tokenizer = (f.from_pretrained(here / stage / "model") for f in (factory, AutoTokenizer))
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.chat_template
    manifest = json.loads((here / stage / "manifest.json").read_text())
    on_disk = {f"model/{file.name}" for file in (here / stage / "model").iterdir()}
    assert set(manifest["files"]) == on_disk
    assert manifest["stage"] == stage and manifest["metrics"]["seconds"] > 0


def test_what_is_exported_runs_by_the_lines_of_its_card_and_without_alignkit(here, tmp_path, monkeypatch, capsys):
    lines = ["import sys", 'sys.modules["alignkit"] = None']
    for stage in ("ppo", "reward_model"):
        assert alignkit(monkeypatch, "export", "a", f"--stage={stage}", f"--to={tmp_path / stage}") == 0
        assert "with the logits of the stage's model (largest difference 0)" in capsys.readouterr().out
        card = (tmp_path / stage / "README.md").read_text("utf-8")
        lines.append(card.partition("```python\n")[2].partition("```")[0].replace("path/to/this/folder", stage))
        assert str(here.parents[1]) not in card
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, score = done.stdout.splitlines()
    assert len(done.stdout) > len(score) + 1 and -9 < float(score) < 9


def test_every_iteration_has_a_row_with_every_metric(here):
    logged = rows(here / "ppo" / "metrics.jsonl")
    assert [row["ppo/episodes"] for row in logged] == [16, 32, 48]
    assert all({f"ppo/{name}" for name in PPO_METRICS} <= row.keys() for row in logged)


def test_policy_starts_at_the_reference_and_each_update_at_ratio_one(here):
    logged = rows(here / "ppo" / "metrics.jsonl")
    assert logged[0]["ppo/kl"] == pytest.approx(0.0, abs=1e-5)
    assert logged[1]["ppo/kl"] != 0.0
    assert max(row["ppo/ratio_error"] for row in logged) <= 1e-4


def test_samples_are_readable(here):
    samples = rows(here / "ppo" / "samples.jsonl")
    assert {"prompt", "response", "score", "kl", "length", "gold", "ppo/episodes"} <= samples[0].keys()
    assert samples[0]["prompt"].startswith("user: ")
    assert not any("<|" in row["response"] for row in samples)


def test_policy_was_trained(here):
    from safetensors.torch import load_file

    before, after = (load_file(here / stage / "model" / "model.safetensors") for stage in ("sft", "ppo"))
    assert before.keys() == after.keys()
    assert all(not before[name].equal(after[name]) for name in before)


def test_what_dashboards_count_on_is_logged(here):
    for stage, names in json.loads((Path(__file__).parents[1] / "logged_metrics.json").read_text()).items():
        logged = json.loads((here / stage / "summary.json").read_text()).keys()
        logged |= {name for row in rows(here / stage / "metrics.jsonl") for name in row}
        assert set(names) <= logged


def test_wandb_has_one_run_a_stage_in_one_group(here):
    runs = [OfflineRun(folder) for folder in sorted((here / "wandb").glob("offline-run-*"))]
    assert {run.run["job_type"] for run in runs} == {"sft", "reward_model", "ppo", "evaluate"}
    assert {run.run["run_group"] for run in runs} == {"a"}
    assert all(run.exit_code == 0 for run in runs)
    ppo = next(run for run in runs if run.run["job_type"] == "ppo")
    assert ppo.config["cfg"]["ppo"]["episodes"] == 48
    assert [step for step, _ in ppo.series("ppo/kl", "ppo/episodes")] == [16, 32, 48]


def test_the_same_command_reuses_every_stage(here, monkeypatch, capsys):
    assert alignkit(monkeypatch, "rlhf", *SMALL, "name=b") == 0
    told = capsys.readouterr().out
    assert told.count("reused runs/.store/") == 4
    assert (here.parent / "b" / "ppo").resolve() == (here / "ppo").resolve()


def test_settings_without_effect_on_the_result_do_not_end_reuse(here, monkeypatch, capsys):
    words = ["ppo.microbatch_tokens=400", "tracking.mode=disabled", "sft.microbatch=8", "rollout.batch=7"]
    assert alignkit(monkeypatch, "rlhf", *SMALL, *words, "name=c") == 0
    assert capsys.readouterr().out.count("reused") == 4


def test_a_changed_setting_runs_only_what_depends_on_it(here, monkeypatch, capsys):
    assert alignkit(monkeypatch, "rlhf", *SMALL, "kl.target=5.0", "tracking=none", "name=d") == 0
    told = capsys.readouterr().out
    assert "sft: reused" in told and "reward_model: reused" in told
    assert "ppo: done" in told and "evaluate: done" in told


def test_a_single_stage_recipe_finds_what_the_chain_made(here, monkeypatch, capsys):
    words = ["policy=runs/a/sft", "reward.path=runs/a/reward_model", "name=e"]
    assert alignkit(monkeypatch, "ppo", *SMALL, *words) == 0
    assert capsys.readouterr().out.count("reused") == 2


def test_a_product_that_lost_a_file_is_made_again(here, monkeypatch, capsys):
    words = ["data.heldout=0.3", "tracking=none", "name=f"]
    assert alignkit(monkeypatch, "sft", *SMALL, *words) == 0
    (here.parent / "f" / "sft" / "model" / "model.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert alignkit(monkeypatch, "sft", *SMALL, *words) == 0
    assert "sft: done" in capsys.readouterr().out


def test_force_runs_a_finished_stage_again(here, monkeypatch, capsys):
    assert alignkit(monkeypatch, "sft", *SMALL, "tracking=none", "name=g", "force=true") == 0
    assert "sft: done" in capsys.readouterr().out


def test_packing_is_an_option_and_knows_when_too_few_rows_are_left(here, monkeypatch, capsys):
    words = ["+sft.trainer.packing=true", "tracking=none", "name=p"]
    assert alignkit(monkeypatch, "sft", *SMALL, *words, "sft.batch=8") == 0
    steps = rows(here.parent / "p" / "sft" / "metrics.jsonl")[-1]["sft/step"]
    assert 0 < steps < 2 * 340 // 8, "packed rows hold several demonstrations each"
    assert alignkit(monkeypatch, "sft", *SMALL, *words, "sft.batch=200") == 2
    assert "packed rows: lower sft.batch" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_with_the_data_saved(here, monkeypatch, capsys):
    words = ["ppo.learning_rate=1.0e+30", "ppo.max_grad_norm=1.0e+30", "tracking=none", "name=h"]
    assert alignkit(monkeypatch, "rlhf", *SMALL, *words) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: iteration ") and "not finite" in told and "Traceback" not in told
    evidence = next((here.parent / "h" / "ppo" / "state").glob("failed-iteration-*"))
    assert (evidence / "batch.safetensors").stat().st_size > 1000
    assert len(rows(evidence / "samples.jsonl")) == 16


def test_fewer_prompts_than_a_batch_is_an_error_and_no_hang(here, monkeypatch, capsys):
    words = ["ppo.batch=512", "ppo.episodes=512", "tracking=none", "name=i"]
    assert alignkit(monkeypatch, "rlhf", *SMALL, *words) == 2
    told = capsys.readouterr().err
    assert "an iteration takes 512 (ppo.batch" in told and "lower ppo.batch" in told


@pytest.mark.slow
def test_a_reward_model_with_other_tokens_reads_the_texts(here, monkeypatch, capsys):
    words = ["model.vocab_size=600", "tracking=none", "name=j"]
    assert alignkit(monkeypatch, "sft", *SMALL, *words) == 0
    words = ["policy=runs/j/sft", "reward.path=runs/a/reward_model", "tracking=none", "name=k"]
    assert alignkit(monkeypatch, "ppo", *SMALL, *words) == 0
    assert "it reads the texts" in capsys.readouterr().out
