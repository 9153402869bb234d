"""Adapters under FSDP2 on two gloo ranks: on, off, gradients, saving, and one base for value and reward model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
METHODS = ["lora", "rslora", "dora", "ia3", "bitfit"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One worker group for the whole file."""
    out = tmp_path_factory.mktemp("adapters") / "results.json"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(Path(__file__).with_name("adapter_ranks.py")), str(out)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", METHODS)
def test_switched_off_a_sharded_policy_is_the_base_before_and_after_a_backward(results, name):
    assert results[name]["policy"]["off"] == 0.0
    assert results[name]["policy"]["on"] < 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_a_sharded_adapter_are_those_of_one_process_and_the_base_has_none(results, name):
    assert results[name]["policy"]["gradient"] < 1e-5
    assert results[name]["scalar"]["gradient"] < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_whole_weights_and_adapter_files_come_back_from_the_shards(results, name):
    assert results[name]["policy"]["state"]
    assert results[name]["policy"]["files"] is (None if name == "bitfit" else True)


@pytest.mark.parametrize("name", METHODS)
def test_value_and_reward_from_one_sharded_base_are_those_of_two_models(results, name):
    found = results[name]["scalar"]
    assert found["value"] < 1e-5 and found["value_after_score"] == 0.0
    assert found["score"] < 1e-6 and found["score_after_backward"] < 1e-6
    assert found["frozen_head"]


@pytest.mark.parametrize("name", METHODS)
def test_base_weights_are_held_once_over_both_ranks(results, name):
    """Two models would give about 2; shards of tensors of odd length are padded."""
    assert 1.0 <= results[name]["scalar"]["bytes"] < 1.02
