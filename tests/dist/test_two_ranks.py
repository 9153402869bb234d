"""Two gloo ranks against one: the same gradients, the same samples, everything dealt and joined."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One worker group for the whole file."""
    out = tmp_path_factory.mktemp("ranks") / "results.json"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(Path(__file__).with_name("ranks.py")), str(out)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def test_there_are_two_ranks(results):
    assert results["world"] == 2


@pytest.mark.parametrize("sharding", ["fsdp", "replicas"])
def test_gradients_equal_those_of_one_rank_though_ranks_hold_different_numbers_of_rows(results, sharding):
    policy, value = results[f"gradient_{sharding}"]
    assert policy < 1e-6
    assert value < 1e-6


def test_sampling_gives_the_same_tokens_on_any_number_of_ranks(results):
    assert results["same_tokens"]


def test_after_sampling_the_policy_is_sharded_again_and_computes_the_same(results):
    assert results["sharded_again"]
    assert results["same_logits_after"] < 1e-5


def test_whole_weights_come_back_from_the_shards(results):
    assert results["full_state"]


def test_rows_are_dealt_and_joined_in_order(results):
    assert results["dealt"] == list(range(7))


def test_sums_and_maxima_are_over_all_ranks(results):
    assert results["summed"] == 3.0
    assert results["largest"] == 1.0


@pytest.fixture(params=["ema_and_stop_kl", "slot_after_the_stop", "rloo", "lora"])
def loop(results, request):
    """Three whole iterations on two ranks against one."""
    return request.param, results["loops"][request.param]


def test_iterations_tell_the_same_numbers_as_on_one_rank(loop):
    _, found = loop
    assert {"kl", "score_mean", "entropy", "response_length", "policy_loss"} <= found["metrics"].keys()
    assert max(found["metrics"].values()) <= 1e-4, found["metrics"]


def test_iterations_end_with_the_same_weights_as_on_one_rank(loop):
    name, found = loop
    models = {
        "policy",
        *(["value"] if name != "rloo" else []),
        *(["ema"] if name in ("ema_and_stop_kl", "lora") else []),
    }
    assert found["weights"].keys() == models
    assert max(found["weights"].values()) <= 1e-5, found["weights"]
    assert min(found["moved"].values()) > 1e-3, "weights that did not move prove nothing"


def test_what_the_variants_are_for_happens_on_two_ranks(loop):
    name, found = loop
    full = [4, 4, 4]  # two passes over two minibatches
    steps = {"ema_and_stop_kl": found["steps"], "slot_after_the_stop": [0, 4, 4]}.get(name, full)
    assert found["steps"] == steps
    if name == "ema_and_stop_kl":
        assert all(1 <= taken < 8 for taken in steps), "stop_kl stopped nothing"
        assert found["value_steps"] == steps
    else:
        assert found["value_steps"] == ([0, 0, 0] if name == "rloo" else full)
    assert all(0 < share < 1 for share in found["eos_fraction"]), "rows that end early and rows that do not"
