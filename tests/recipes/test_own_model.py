"""The chain on a user's own pretrained model and preference file: another architecture, PAD = EOS, no chat template."""

import gzip
import json

import pytest
from test_chain import SMALL, alignkit

GOOD, BAD = ["the harbour was quiet", "she wrote three letters"], ["why would anyone count", "a small lamp burned"]


@pytest.fixture
def pretrained(tmp_path, tiny_policy, tiny_tokenizer):
    """A GPT-2 folder as the Hub has it."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|end|>")
    tokenizer.pad_token = tokenizer.eos_token
    tiny_policy("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def write_preferences(file):
    with gzip.open(file, "wt", encoding="utf-8") as out:
        for number in range(120):
            prompt = f"\n\nHuman: tell me about number {number}\n\nAssistant:"
            chosen, rejected = GOOD[number % 2], BAD[number % 2]
            out.write(json.dumps({"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"}) + "\n")


def test_chain_runs_from_a_pretrained_folder_and_a_file_of_transcripts(pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_preferences(tmp_path / "pairs.jsonl.gz")
    kept = [word for word in SMALL if not word.startswith(("data.", "model.", "ptx"))]
    words = ["data=jsonl", "data.path=pairs.jsonl.gz", "data.heldout=0.3", "model.path=gpt2", "tracking=none"]
    assert alignkit(monkeypatch, "rlhf", *kept, *words, "rollout.max_response=8", "name=own") == 0
    told = capsys.readouterr().out
    assert "the model has no chat template" in told
    assert "120 rows read as chosen+rejected" in told
    assert "Human: tell me about number" in told and "[[ the harbour" in told or "[[ she wrote" in told
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "runs" / "own" / "ppo" / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "own" / "ppo" / "model")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.get_input_embeddings().weight.shape[0] >= len(tokenizer)
    summary = json.loads((tmp_path / "runs" / "own" / "summary.json").read_text())
    assert summary["evaluate/judge"] == "reward_model"
