"""SFT and reward model on two gloo ranks: split by FSDP2 or whole in DDP, killed and resumed, here and elsewhere."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from trainer_world import (
    RANKED,
    STEPS,
    distance,
    make_base,
    make_encoder_base,
    make_job,
    ranked_corpus,
    rows_of,
    run,
    run_killed,
    weights_of,
)

from alignkit.runtime.sharding import Cluster

REPOSITORY = Path(__file__).parents[2]
RESUMED = ["fsdp-sft-llama-none", "ddp-sft-llama-none", "fsdp-sft-gpt2-lora", "fsdp-reward_model-gpt2-ia3"]
BY_MICROBATCH = {  # TRL's means over micro-batches, which more ranks cut otherwise
    *("sft/entropy", "sft/mean_token_accuracy", "reward_model/min_reward", "reward_model/max_reward"),
}
RANKED_HERE = [("fsdp", "none"), ("ddp", "lora")]
RESUMED_SLOW = [
    "fsdp-sft-gpt2-bitfit", "fsdp-reward_model-gpt2-none", "fsdp-reward_model-gpt2-lora", "ddp-sft-gpt2-lora",
    "ddp-sft-gpt2-bitfit", "ddp-sft-gpt2-prompt", "ddp-sft-gpt2-p_tuning", "ddp-reward_model-gpt2-none",
    "ddp-reward_model-gpt2-prompt",
]  # fmt: skip


def ranks(root: Path, scenarios: list[str], count: int = 2, code: int = 0) -> None:
    """Run scenarios of trainer_ranks.py, each of which leaves its findings in root."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)),
        *(str(Path(__file__).with_name("trainer_ranks.py")), str(root), *scenarios),
    ]
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert (done.returncode != 0) == bool(code), done.stdout[-2000:] + done.stderr[-4000:]


def found(root: Path, scenario: str) -> dict:
    return json.loads((root / f"{scenario}.json").read_text())


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Models to start from; `wide`: large enough that padding of shards does not count."""
    root = tmp_path_factory.mktemp("trainers")
    make_base(root / "llama", "llama")
    make_base(root / "gpt2", "gpt2")
    make_encoder_base(root / "bert", "bert")
    make_base(root / "wide", "llama", hidden_size=128, intermediate_size=256, tie_word_embeddings=False)
    return root


@pytest.fixture(scope="module")
def root(bases, cluster):
    """One process here, straight and killed; then one worker group for the whole file."""
    straight = make_job("sft", bases / "llama", bases / "one-straight")
    run(straight, cluster)
    run_killed(replace(straight, out=bases / "one-killed"), cluster)
    rankings = [f"{layout}-ranked-{peft}" for layout, peft in RANKED_HERE]
    ranks(bases, [*RESUMED, *rankings, "encoder", "moved_here", "precision", "memory", "refused"])
    return bases


def check_resumed(root: Path, scenario: str) -> None:
    result = found(root, scenario)
    assert result["distance"] == 0.0
    assert result["same_rows"] and result["same_results"]
    steps = [row[f"{scenario.split('-')[1]}/step"] for row in result["rows"]]
    assert steps[:STEPS] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("scenario", RESUMED)
def test_killed_and_resumed_on_two_ranks_ends_in_the_same_bits_and_rows(root, scenario):
    check_resumed(root, scenario)


@pytest.mark.parametrize("scenario", RESUMED)
def test_every_row_is_used_once_an_epoch_over_all_ranks(root, scenario):
    """Also with dropout, which moves the generators of the ranks apart, and an order that is drawn from them."""
    stage = scenario.split("-")[1]
    tokens = [row[f"{stage}/num_tokens"] for row in found(root, scenario)["rows"] if f"{stage}/num_tokens" in row]
    assert tokens[STEPS - 1] == 2 * tokens[STEPS // 2 - 1]


@pytest.mark.slow
def test_every_way_of_training_resumes_on_two_ranks_to_the_same_bits(bases):
    ranks(bases, RESUMED_SLOW)
    for scenario in RESUMED_SLOW:
        check_resumed(bases, scenario)


@pytest.mark.slow
def test_four_ranks_resume_to_the_same_bits_and_hold_a_quarter_of_what_is_split_over_all(bases):
    """Also split over pairs, and whole: there more than two numbers are summed, in an order that must not change."""
    scenarios = ["hsdp-sft-gpt2-lora", "hsdp-reward_model-llama-none", "ddp-reward_model-gpt2-lora"]
    ranks(bases, [*scenarios, "memory"], count=4)
    for scenario in scenarios:
        check_resumed(bases, scenario)
    check_memory(bases, 4)


@pytest.mark.slow
def test_ranks_that_die_at_once_while_a_checkpoint_is_written_go_on(bases):
    ranks(bases, ["died"], code=9)
    ranks(bases, ["resumed"])
    assert found(bases, "resumed") == {"distance": 0.0, "same_rows": True}


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_two_ranks_train_what_one_process_trains(root, layout):
    """Weights, and what is told of every step; the names in the product are the same, a tied head is there once."""
    one = make_job("sft", root / "llama", root / "one-straight")
    two = replace(one, out=root / f"{layout}-sft-llama-none-straight")
    assert distance(weights_of(two), weights_of(one)) < 1e-5
    assert "lm_head.weight" not in weights_of(two)
    check_rows(two, one)


def check_rows(job, wanted) -> None:
    compare(rows_of(job), rows_of(wanted))


def compare(rows: list[dict], wanted: list[dict]) -> None:
    for ours, theirs in zip(rows, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs.keys() - BY_MICROBATCH:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def test_two_ranks_start_a_reward_model_from_the_same_fresh_head_as_one_process(root, cluster):
    job = make_job("reward_model", root / "llama", root / "one-reward_model", every=None, epochs=0.5)
    run(job, cluster)
    compare(found(root, "precision")["reward_model-plain"]["rows"], rows_of(job))


@pytest.mark.parametrize(("layout", "peft"), RANKED_HERE)
def test_two_ranks_train_rankings_as_one_process_does_and_resume_to_the_same_bits(root, layout, peft, cluster):
    """A rank's rankings are larger than another's; each still weighs the same. With early stopping."""
    result, name = found(root, f"{layout}-ranked-{peft}"), f"{layout}-ranked-{peft}-straight"
    assert result["distance"] == 0.0 and result["same_rows"] and result["same_results"]
    out, data = root / f"one-{name}", ranked_corpus()
    one = make_job("reward_model", root / "llama", out, peft, every=None, data=data, **RANKED)
    outcome = run(one, cluster)
    assert {"best_step", "stopped_early"} <= outcome.keys()
    assert distance(weights_of(replace(one, out=root / name)), weights_of(one)) < 1e-5
    compare(result["rows"], rows_of(one))
    assert sum("reward_model/validation_loss" in row for row in result["rows"]) == 5


def test_two_ranks_train_an_encoder_as_one_process_does(root, cluster):
    """Also what is new in it: head and pooler are drawn on rank 0."""
    one = make_job("reward_model", root / "bert", root / "one-encoder", every=None, epochs=0.5)
    result, two = run(one, cluster), found(root, "encoder")
    assert distance(weights_of(replace(one, out=root / "encoder")), weights_of(one)) < 1e-5
    compare(two["rows"], rows_of(one))
    assert two["result"]["eval_loss"] == pytest.approx(result["eval_loss"], rel=1e-4)


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_one_process_goes_on_from_a_checkpoint_of_two_ranks(root, layout, cluster):
    one = make_job("sft", root / "llama", root / "one-straight")
    moved = replace(one, out=root / f"{layout}-sft-llama-none-killed")
    run(moved, cluster)
    assert distance(weights_of(moved), weights_of(one)) < 1e-5
    check_rows(moved, one)


def test_two_ranks_go_on_from_a_checkpoint_of_one_process(root):
    assert found(root, "moved_here")["distance"] < 1e-5


def check_memory(root: Path, count: int) -> None:
    for rank in found(root, "memory")["ranks"]:
        assert len(rank) == 2, "both stages"
        for held in rank:
            assert held["mine"] <= 1.05 * held["total"] / count
            assert held["alive"] <= 1.05 * held["total"] / count + held["layer"]


def test_weights_gradients_and_moments_are_divided_in_a_real_step_of_both_stages(root):
    check_memory(root, 2)


def test_activations_computed_twice_change_nothing(root):
    results = found(root, "precision")
    assert results["sft-twice"]["rows"] == results["sft-plain"]["rows"]


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_bfloat16_changes_little_and_weights_stay_in_float32(root, stage):
    plain, short = (found(root, "precision")[f"{stage}-{name}"] for name in ("plain", "bfloat16"))
    assert short["rows"] != plain["rows"] and short["dtypes"] == ["torch.float32"]
    losses = [[row.get(f"{stage}/loss") for row in result["rows"]] for result in (short, plain)]
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=0.02)
    finest = 2**-11  # of the mean of four losses below 1 that are in bfloat16 themselves
    assert any(loss % finest for loss in losses[0][:2]), "losses are computed in float32"


def test_a_model_behind_learnt_tokens_is_refused_in_one_line(root):
    told = found(root, "refused")["told"]
    assert told == "peft.method=prompt: a model behind learnt tokens cannot be split: set sharding=none"
