"""PPO with rollout=vllm on the embedded task, shrunk: the chain in one process, then PPO with LoRA and on two ranks.
And vLLM by itself on what `alignkit export` made of the chain."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm
SMALL = [
    *("tracking=none", "data.num_prompts=200", "data.num_pairs=300", "data.num_demonstrations=200"),
    *("ppo.batch=16", "ppo.minibatch=8", "ppo.episodes=32"),
    *("evaluate.prompts=20", "evaluate.best_of_samples=2", "evaluate.best_of_prompts=2"),
    *("rollout=vllm", "rollout.max_response=24", "rollout.min_response=2", "rollout.temperature=0.8"),
    *("rollout.kv_cache_gib=0.125", "rollout.eager=true"),
]
CHAIN = ["rlhf", "launch=inline", "sft.epochs=1", "reward_model.epochs=1", "model.num_heads=2"]  # of 32 numbers each
PPO = ["ppo", "policy=runs/chain/sft", "reward.path=runs/chain/reward_model"]


def run(place: Path, name: str, *words: str) -> None:
    """`alignkit` with these words; two iterations have been run and evaluated."""
    command = [sys.executable, "-c", "from alignkit.cli import main; main()", *words, *SMALL, f"name={name}"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = place / "runs" / name
    rows = [json.loads(line) for line in (folder / "ppo/metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["ppo/episodes"] for row in rows] == [16, 32]
    assert max(row["ppo/ratio_error"] for row in rows) <= 1e-4
    assert 0 < max(row["ppo/engine_gap_max"] for row in rows) <= 1e-4
    assert rows[0]["ppo/kl"] == pytest.approx(0.0, abs=1e-5) and rows[1]["ppo/kl"] != 0.0
    assert "evaluate/win_rate" in json.loads((folder / "summary.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder with a finished chain in runs/chain."""
    place = tmp_path_factory.mktemp("vllm")
    run(place, "chain", *CHAIN)
    return place


@pytest.mark.parametrize("words", [["launch=inline", "peft=lora"], ["launch.processes=2"]], ids=["lora", "two ranks"])
def test_two_iterations_of_ppo_after_a_chain(words, chain):
    run(chain, "again", *PPO, *words, "force=true")


BOTH = """
import os, sys
sys.modules["alignkit"] = None
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams
tokenizer, model = (kind.from_pretrained("out") for kind in (AutoTokenizer, AutoModelForCausalLM))
engine = LLM("out", enforce_eager=True, kv_cache_memory_bytes=2**27)
for topic in ("snow", "trains", "bees"):
    turns = [{"role": "user", "content": f"I want to know more about {topic}."}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ours = model.generate(**ids, do_sample=False, max_new_tokens=24)[0, ids["input_ids"].shape[1] :].tolist()
    theirs = engine.chat(turns, SamplingParams(temperature=0, max_tokens=24))[0]
    assert theirs.prompt_token_ids == ids["input_ids"][0].tolist()
    assert list(theirs.outputs[0].token_ids) == ours, (topic, theirs.outputs[0], ours)
    print("SAME", len(ours))
"""


def test_an_exported_folder_loads_in_vllm_and_gives_the_greedy_tokens_of_transformers(chain):
    command = "from alignkit.cli import main; main()"
    subprocess.run([sys.executable, "-c", command, "export", "chain", "--to=out"], cwd=chain, check=True, timeout=300)
    done = subprocess.run([sys.executable, "-c", BOTH], cwd=chain, capture_output=True, text=True, timeout=600)
    assert done.stdout.count("SAME") == 3, done.stdout[-3000:] + done.stderr[-3000:]
