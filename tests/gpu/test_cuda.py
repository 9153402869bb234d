"""What only a GPU can show: the chain on it in both dtypes, an interrupted run that goes on, memory that is given back.

pytest -m gpu
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

pytestmark = pytest.mark.gpu
SMALL = [
    *("data.num_prompts=200", "data.num_pairs=600", "data.num_demonstrations=400", "sft.epochs=2", "tracking=none"),
    *("reward_model.epochs=1", "ppo.batch=16", "ppo.minibatch=8", "ppo.episodes=320", "rollout.max_response=24"),
    *("evaluate.prompts=20", "kl.target=3.0", "ptx=demonstrations", "ptx.batch=4", "checkpoint.every_iterations=2"),
]


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", "from alignkit.cli import main; main()", *words]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_chain_runs_and_its_self_checks_hold(tmp_path, dtype):
    words = ["rlhf", *SMALL, "name=a", f"compute_dtype={dtype}"]
    done = subprocess.run(command(*words), cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    rows = [json.loads(line) for line in (tmp_path / "runs/a/ppo/metrics.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 20 and max(row["ppo/ratio_error"] for row in rows) <= (1e-4 if dtype == "float32" else 0.1)
    assert all(row[f"ppo/peak_memory_gib/{phase}"] > 0 for row in rows for phase in ("rollout", "scoring", "update"))


@pytest.mark.parametrize("words", [["rollout=compiled", "ppo.importance_cap=2"], ["ppo.packing=true"]])
def test_compiled_sampling_and_packed_rows_agree_with_the_plain_ones(tmp_path, words):
    """CUDA graphs sample from the trained policy but for rounding; the ratio of packed rows starts at 1."""
    words = ["rlhf", *SMALL, "name=a", "compute_dtype=bfloat16", *words]
    done = subprocess.run(command(*words), cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    rows = [json.loads(line) for line in (tmp_path / "runs/a/ppo/metrics.jsonl").read_text("utf-8").splitlines()]
    assert max(row["ppo/engine_gap"] for row in rows) <= 0.05 and max(row["ppo/ratio_error"] for row in rows) <= 0.1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_goes_on(tmp_path, number):
    run = subprocess.Popen(command("rlhf", *SMALL, "name=a"), cwd=tmp_path, env={**os.environ})
    metrics, limit = tmp_path / "runs/a/ppo/metrics.jsonl", time.monotonic() + 600
    while not (metrics.exists() and metrics.read_text("utf-8").count("\n") >= 5):
        assert time.monotonic() < limit and run.poll() is None
        time.sleep(0.05)
    run.send_signal(number)
    assert run.wait(timeout=60) == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    done = subprocess.run(command("resume", "runs/a"), cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-1500:]
    assert "ppo: going on from iteration" in done.stdout
    assert [json.loads(line)["ppo/episodes"] for line in metrics.read_text("utf-8").splitlines()] == [
        16 * number for number in range(1, 21)
    ]


def test_offloading_gives_memory_back_and_changes_no_result(tmp_path):
    """Frozen weights leave the GPU between their forwards, Adam's moments between steps; the weights are the same."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.optimizer import adamw

    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
    config = AutoConfig.for_model("llama", vocab_size=8000, **sizes)
    cluster = Cluster.open()
    tokens = torch.arange(2, 66, device=cluster.device).view(2, 32)

    def fresh():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    def frozen(offload: bool):
        before = torch.cuda.memory_allocated()
        model = replace(cluster, offload_frozen=offload).shard(fresh(), trainable=False)
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits
        return logits, (torch.cuda.memory_allocated() - before - logits.nbytes) / sum(
            p.nbytes for p in model.parameters()
        )

    def trained(offload: bool):
        before = torch.cuda.memory_allocated()
        model = cluster.shard(fresh(), trainable=True)
        optimizer = adamw(model.parameters(), 1e-3, offload=offload)
        for _ in range(2):
            model(input_ids=tokens, use_cache=False).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        size = sum(p.to_local().nbytes for p in model.parameters())
        held = (torch.cuda.memory_allocated() - before) / size
        return torch.cat([p.detach().to_local().flatten().cpu() for p in model.parameters()]), held

    (whole, at_home), (streamed, away) = frozen(False), frozen(True)
    assert whole.equal(streamed) and 0.95 < at_home < 1.15 and away < 0.1
    (plain, kept), (moved, given_back) = trained(False), trained(True)
    assert torch.allclose(plain, moved, rtol=0, atol=1e-6) and kept > 2.9 and given_back < 1.2
    cluster.close()
