"""Two and four gloo ranks in every layout against one: the same tokens, numbers and weights; memory truly divided."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LAYOUTS = ["one_row_at_a_time", "layer_by_layer", "replicas", "groups", "recomputed"]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def results(tmp_path_factory, request):
    """One worker group for the whole file and number of ranks."""
    out = tmp_path_factory.mktemp("scale") / "results.json"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param)),
        *(str(HERE / "scale_ranks.py"), str(out)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["world"] == request.param
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_iterations_in_float64_do_not_depend_on_ranks_layout_or_micro_batch(results, layout):
    found = results["loops"][layout]
    assert found["same_responses"]
    assert {"kl", "score_mean", "policy_loss", "value_loss", "policy_grad_norm"} <= found["metrics"].keys()
    assert max(found["metrics"].values()) <= 1e-8, found["metrics"]
    assert max(found["weights"].values()) <= 1e-8
    assert min(found["moved"].values()) > 1e-3


def test_a_model_is_placed_as_it_is_in_its_file_though_one_rank_alone_reads_it(results):
    loads = results["placed"]["loads"]
    assert results["placed"]["gaps"] == [0.0, 0.0] and results["placed"]["tied"]
    assert loads[0] == [["cpu"], ["meta"]] and all(kinds == [["meta"]] for kinds in loads[1:])


def test_weights_gradients_and_moments_of_the_four_models_are_divided(results):
    held = results["bytes_held"]
    assert held["largest"] <= 1.05 * held["total"] / results["world"] + held["layer"]
    assert held["largest"] >= held["total"] / results["world"], "all of it must be somewhere"


def test_fewer_rows_than_ranks_leave_no_rank_waiting(results):
    assert results["few"]["response"] == results["few_alone"]["response"]
    assert results["few"]["scores"] == pytest.approx(results["few_alone"]["scores"], abs=1e-6)


def test_bf16_computes_while_weights_and_gradients_stay_in_float32(results):
    half = results["half"]
    computed, weights, gradient, frozen = half["dtypes"]
    assert (computed, weights, gradient, frozen) == (
        "torch.bfloat16",
        "torch.float32",
        "torch.float32",
        "torch.bfloat16",
    )
    assert half["position_table"] == "torch.float32" and half["same_frozen"]
    assert 1e-4 < half["gap"] < 2e-2, "far from float32 by bf16's digits, and by no more"
    assert half["ratio_error"] <= 0.1 and min(half["moved"].values()) > 1e-3
