"""Checkpoints of several gloo ranks: each holds its part, any number of ranks can go on from them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_ranks import ITERATIONS, loaded, save, train

from alignkit.runtime.sharding import Cluster

HERE = Path(__file__).parent
SAME = {"full": [], "lora": []}


@pytest.fixture(scope="module")
def folder(cluster, tmp_path_factory):
    """Where checkpoints of all numbers of ranks lie; here one of one rank."""
    folder = tmp_path_factory.mktemp("checkpoints")
    save(folder / "1", cluster)
    return folder


def run_ranks(folder, size: int, *words) -> tuple[dict, str]:
    """The results of a group of ranks and what they printed."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)),
        *(str(HERE / "checkpoint_ranks.py"), str(folder), *words),
    ]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((folder / f"{size}.json").read_text())
    assert results["world"] == size
    return results, done.stdout


@pytest.fixture(scope="module")
def two(folder):
    """One group of two ranks for the whole file."""
    return run_ranks(folder, 2, "1", "--facts")


def test_each_of_two_ranks_writes_its_part(two, folder):
    names = {file.name for file in (folder / "2" / "full" / "state" / "checkpoint-1").iterdir()}
    assert names == {"__0_0.distcp", "__1_0.distcp", ".metadata", "sealed.json"}
    sizes = [file.stat().st_size for file in (folder / "2" / "full" / "state" / "checkpoint-1").glob("*.distcp")]
    assert min(sizes) > 0.7 * max(sizes)


def test_what_one_rank_saved_two_load_to_the_last_bit(two):
    assert two[0]["loaded"] == {"1": SAME}
    assert two[0]["into_replicas"] == SAME


def test_what_two_ranks_saved_one_loads_to_the_last_bit(two, folder, cluster):
    assert loaded(folder / "2", cluster) == SAME


@pytest.mark.slow
def test_four_ranks_load_what_one_and_two_saved_and_the_other_way_round(two, folder, cluster):
    four, _ = run_ranks(folder, 4, "2", "1")
    assert four["loaded"] == {"1": SAME, "2": SAME} and four["into_replicas"] == SAME
    assert loaded(folder / "4", cluster) == SAME
    again, _ = run_ranks(folder, 2, "4")
    assert again["loaded"] == {"4": SAME}


def test_two_ranks_that_were_asked_to_end_after_any_iteration_go_on_with_the_same_bits(two):
    """Each rank's reward draws from its own generator."""
    expected = [[done, [True] * (ITERATIONS - done), []] for done in range(1, ITERATIONS)]
    assert two[0]["went_on"] == expected


def test_one_rank_goes_on_with_what_two_began(two, folder, cluster):
    place = folder / "facts" / "stopped1_for_one_rank"
    history, _ = train(place, cluster)
    assert [row["policy_steps"] for row in history] == [2] * (ITERATIONS - 1), "after the value warm-up"
    assert all(math.isfinite(row["kl"]) for row in history)


def test_each_rank_gets_its_own_generators_back(two):
    drawn, again = two[0]["generators"]
    assert drawn == again and drawn[0] != drawn[1]


def test_a_damaged_part_of_one_rank_sends_all_of_them_to_the_checkpoint_before(two):
    results, told = two
    assert results["damaged"] == [f"checkpoint-{ITERATIONS - 2}"] * 2
    line = f"ppo: checkpoint-{ITERATIONS - 1} is damaged (__1_0.distcp)"
    assert told.count(line) == told.count("is damaged") == 1


def test_every_rank_is_told_of_a_checkpoint_of_another_run(two):
    said = two[0]["refused"]
    assert said[0] == said[1] and said[0].endswith("is a checkpoint of ppo-abc, not of ppo-abd")


def test_a_full_disk_of_one_rank_costs_all_of_them_the_checkpoint_and_one_line(two):
    results, told = two
    assert results["faults_of_one_rank"] == [[], [], [], ["checkpoint-9"]]
    told = [line for line in told.splitlines() if "was not saved" in line]
    reason = "([Errno 28] No space left on device); there is none before it"
    assert told == [f"ppo: warning: checkpoint {number} was not saved {reason}" for number in range(3)]


def test_rank_0_decides_for_all_when_to_save(two):
    assert two[0]["asked"] == [["go on"] * 2, ["save"] * 2, ["stop"] * 2]


def test_what_training_does_meanwhile_is_in_no_ranks_part(two):
    found = two[0]["unchanged_meanwhile"]
    assert found["moved"] > 50 and found["differing"] == []
