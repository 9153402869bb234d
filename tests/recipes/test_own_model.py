"""The chain on a user's own pretrained model and preference file: another architecture, PAD = EOS, no chat template."""

import gzip
import json

import pytest
import torch
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
    words += ["sft.max_length=90", "reward_model.max_length=90", "ppo.max_prompt=60"]
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


LENGTH_REWARD = """
from dataclasses import dataclass

import torch


class Source:
    def score(self, answers, microbatch):
        return torch.tensor([float(len(text)) for text in answers.responses])


@dataclass(frozen=True)
class Longest:
    missing_eos_penalty: float

    def open(self, folder, encoder, cluster):
        return Source()
"""


def test_a_reward_of_the_users_own_is_one_file_and_one_yaml(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_reward.py").write_text(LENGTH_REWARD)
    (tmp_path / "mine" / "reward").mkdir(parents=True)
    (tmp_path / "mine" / "reward" / "longest.yaml").write_text(
        "_target_: own_reward.Longest\nmissing_eos_penalty: 0.0 # score units\n"
    )
    words = ["reward=longest", "trusted=[own_reward]", "tracking=none", "name=long"]
    assert alignkit(monkeypatch, "rlhf", "--config-dir", "mine", *SMALL, *words) == 0
    rows = [json.loads(line) for line in (tmp_path / "runs/long/ppo/samples.jsonl").read_text("utf-8").splitlines()]
    assert all(row["score"] == len(row["response"]) for row in rows)


def test_ptx_learns_the_users_own_text_and_its_bytes_decide_reuse(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in GOOD + BAD))
    words = ["ptx.path=own.jsonl", "tracking=none"]
    assert alignkit(monkeypatch, "rlhf", *SMALL, *words, "name=a") == 0
    with (tmp_path / "own.jsonl").open("a") as file:
        file.write(json.dumps({"text": "a line more"}) + "\n")
    capsys.readouterr()
    assert alignkit(monkeypatch, "rlhf", *SMALL, *words, "name=b") == 0
    told = capsys.readouterr().out
    assert "reward_model: reused" in told and "ppo: done" in told


def test_sft_is_made_again_when_the_files_of_the_model_changed(pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_preferences(tmp_path / "pairs.jsonl.gz")
    words = ["data=jsonl", "data.path=pairs.jsonl.gz", "data.heldout=0.3", "model.path=gpt2", "tracking=none"]
    words += ["launch=inline", "sft.max_length=90", "sft.epochs=1"]
    assert alignkit(monkeypatch, "sft", *words) == 0
    config = json.loads((pretrained / "config.json").read_text())
    (pretrained / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-6}))
    capsys.readouterr()
    assert alignkit(monkeypatch, "sft", *words) == 0
    assert "sft: done" in capsys.readouterr().out


def test_inputs_of_the_wrong_kind_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert alignkit(monkeypatch, "sft", *SMALL, "tracking=none", "name=a", "sft.epochs=1") == 0
    assert alignkit(monkeypatch, "ppo", *SMALL, "policy=runs/a/sft", "reward.path=runs/a/sft/model") == 2
    assert "is the product of sft; expected one of reward_model" in capsys.readouterr().err
    assert alignkit(monkeypatch, "rlhf", *SMALL, "policy=runs/a/sft") == 2
    assert "policy=runs/a/sft is not used by alignkit rlhf" in capsys.readouterr().err


def test_a_model_without_its_tokenizer_is_refused(pretrained, tmp_path, monkeypatch, capsys):
    """transformers makes up an empty tokenizer for some families; training with it would learn nothing in silence."""
    monkeypatch.chdir(tmp_path)
    for file in pretrained.glob("token*"):
        file.unlink()
    assert alignkit(monkeypatch, "sft", *SMALL, "model.path=gpt2", "tracking=none") == 2
    assert "'gpt2' holds no tokenizer" in capsys.readouterr().err


def test_the_whole_chain_trains_adapters_that_peft_loads_onto_the_model_each_stage_started_from(
    pretrained, tmp_path, monkeypatch, capsys
):
    """Numbers, as peft and transformers load an adapter on top of another without a word as if that were not there."""
    monkeypatch.chdir(tmp_path)
    write_preferences(tmp_path / "pairs.jsonl.gz")
    kept = [word for word in SMALL if not word.startswith(("data.", "model.", "ptx"))]
    words = ["data=jsonl", "data.path=pairs.jsonl.gz", "data.heldout=0.3", "model.path=gpt2", "tracking=none"]
    words += ["sft.max_length=90", "reward_model.max_length=90", "ppo.max_prompt=60", "peft=lora"]
    words += ["sft.learning_rate=0.02", "reward_model.learning_rate=0.02", "ppo.learning_rate=0.02", "ppo.ema=0.5"]
    words += ["ppo.evaluate_every=2", "ppo.evaluate_prompts=2", "reward_model.gate=warn"]  # its start: the adapter off
    from alignkit.stages import ppo

    genuine, last = ppo.save_policy, {}

    def save_policy(actors, state, job):
        last.update(actors.ema.average)  # swapped: the weights of the last step, while the average is saved
        assert all(not torch.equal(state[name], value.full_tensor()) for name, value in last.items())
        genuine(actors, state, job)

    monkeypatch.setattr(ppo, "save_policy", save_policy)
    assert alignkit(monkeypatch, "rlhf", *kept, *words, "rollout.max_response=8", "name=own") == 0
    assert last and "ppo: weights on this rank: reference shared, policy" in capsys.readouterr().out
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    run, tokens = tmp_path / "runs" / "own", torch.arange(2, 12)[None]
    seen = []
    for stage in ("sft", "reward_model", "ppo"):
        scores = stage == "reward_model"
        merged = (AutoModelForSequenceClassification if scores else AutoModelForCausalLM).from_pretrained(
            run / stage / "model"
        )
        adapted = (AutoPeftModelForSequenceClassification if scores else AutoPeftModelForCausalLM).from_pretrained(
            str(run / stage / "adapter"), **({"num_labels": 1} if scores else {})
        )
        with torch.no_grad():
            ours, theirs = merged.eval()(tokens).logits, adapted.eval()(tokens).logits
        width = theirs.shape[-1]  # SFT's base has no row for the PAD that SFT adds
        torch.testing.assert_close(ours[..., :width], theirs, rtol=0, atol=1e-5)
        seen += [] if scores else [ours[..., :width]]
    assert float((seen[0] - seen[1]).abs().max()) > 1e-3, "PPO moved the policy"


def test_an_adapter_is_never_left_on_top_of_another(pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_preferences(tmp_path / "pairs.jsonl.gz")
    kept = [word for word in SMALL if not word.startswith(("data.", "model.", "ptx"))]
    words = [*kept, "data=jsonl", "data.path=pairs.jsonl.gz", "tracking=none", "peft=lora", "peft.merge=false"]
    words += ["sft.max_length=90", "reward_model.max_length=90", "data.heldout=0.3"]
    assert alignkit(monkeypatch, "rlhf", *words, "model.path=gpt2") == 2
    assert "the reward model and PPO would stand on the adapter of SFT" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert alignkit(monkeypatch, "sft", *words, "model.path=gpt2", "name=thin") == 0
    assert (tmp_path / "runs" / "thin" / "sft" / "model" / "adapter_model.safetensors").is_file()
    assert alignkit(monkeypatch, "reward_model", *words, "policy=runs/thin/sft") != 0
    told = capsys.readouterr().err
    assert "peft.merge=false: '" in told and "is an adapter itself" in told
