"""`alignkit export`: what is written, that others read the same model from it, and every way in which it says no."""

import functools
import json
import re

import pytest
import torch
import yaml
from export_world import CHAIN, call, card_of, defaults, make_run

from alignkit.models import exporting
from alignkit.models.loading import load_causal
from alignkit.runtime.artifact import link


@pytest.fixture
def run(tmp_path, monkeypatch, tiny_policy, tiny_tokenizer):
    """Makes runs/a in this folder: `make_run` but for its first three words."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(make_run, tmp_path, tiny_policy, tiny_tokenizer)


@pytest.mark.parametrize("dtype, most", [("float32", 0.0), ("bfloat16", 0.4), ("float16", 0.05)])
def test_a_policy_leaves_with_tokenizer_template_and_all_stop_tokens(dtype, most, run, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = run(*CHAIN)
    code, out, err = call(monkeypatch, capsys, "a", f"--dtype={dtype}")
    assert (code, err) == (0, "") and "export: ppo (merged" in out
    target = folder / "export" / "ppo"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    stage = AutoModelForCausalLM.from_pretrained(folder / "ppo" / "model")
    assert model.dtype is getattr(torch, dtype) and model.config.use_cache
    assert all(value.equal(stage.state_dict()[name].to(model.dtype)) for name, value in model.state_dict().items())
    assert GenerationConfig.from_pretrained(target).eos_token_id == [1, 7]
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(folder / "ppo" / "model").chat_template
    told = float(re.search(r"largest difference ([^)]*)\)", out)[1])
    ids = torch.tensor([tokenizer("why would anyone count")["input_ids"]])
    assert told <= most and float((model(ids).logits - stage(ids).logits).detach().abs().max()) <= most
    assert yaml.safe_load((target / "config.yaml").read_text("utf-8"))["kl"]["target"] == 6.0
    assert [file.name for file in (folder / "export").iterdir()] == ["ppo"], "what was written aside is gone"


def test_a_reward_model_leaves_as_a_classifier_and_its_card_says_how_to_read_it(run, monkeypatch, capsys):
    from transformers import AutoModelForSequenceClassification

    folder = run(*CHAIN)
    assert call(monkeypatch, capsys, "a", "--stage=reward_model", "--to=scorer")[0::2] == (0, "")
    model = AutoModelForSequenceClassification.from_pretrained("scorer")
    before = AutoModelForSequenceClassification.from_pretrained(folder / "reward_model" / "model")
    assert model.config.num_labels == 1 and model.score.weight.equal(before.score.weight)
    head, body = card_of(folder.parents[1] / "scorer")
    assert head["pipeline_tag"] == "text-classification" and "not folded into the weights" in body
    assert "print((float(model(**ids).logits) - 0.25) / 2.0)" in body
    assert "PPO" not in body.partition("## Warnings")[0], "what came after it is not its own"


def test_the_card_says_where_the_model_comes_from_and_how_good_it_is(run, monkeypatch, capsys):
    folder = run(*CHAIN)
    assert call(monkeypatch, capsys, "a")[0] == 0
    head, body = card_of(folder / "export" / "ppo")
    assert head == {"license": "other", "license_name": "not-determined", "datasets": ["Anthropic/hh-rlhf"],
                    "library_name": "transformers", "pipeline_tag": "text-generation",
                    "tags": ["alignkit", "rlhf", "ppo"]}  # fmt: skip
    for words in ("begun from random weights", "| PPO | ppo-222222222222 | policy: sft-000000000000, reward: reward_",
                  "| kl.target | 6.0 |", "fingerprint: `0123abcd`", "4,000 preference pairs to learn from",
                  "15% of the prompts", "(95% 88.1% to 91.9%), better than a bag of words (87.5%); it passed the gate",
                  "near its target of 6", "it wins 88.0% of 100 held-out prompts (95% 81.1% to 92.6%; judge gold)",
                  "- Reward model: it likes length", "AutoModelForCausalLM", "from vllm import LLM", "learnt to please",
                  "commit c0ffee, with changes", "largest difference 0"):  # fmt: skip
        assert words in body, words


def test_no_secret_and_no_path_of_this_machine_leaves(run, monkeypatch, capsys):
    data = {**defaults()["data"], "path": ["~/mine/x.jsonl", "/home/me/pairs.jsonl.gz"], "token": "abc123"}
    folder = run("sft", "reward_model", "ppo", data=data)
    assert call(monkeypatch, capsys, "a")[0] == 0
    for name in ("README.md", "config.yaml"):
        text = (folder / "export" / "ppo" / name).read_text("utf-8")
        assert "pairs.jsonl.gz" in text and "***" in text
        assert not re.search(r"abc123|/home|/opt|work/x|" + re.escape(str(folder.parents[1])), text), name
    written = b"".join(file.read_bytes() for file in (folder / "export" / "ppo").glob("*.json"))
    assert str(folder.parents[1]).encode() not in written


@pytest.mark.parametrize("said, kept", [({"license": "apache-2.0", "tags": ["x"]}, "apache-2.0"), (None, "other")])
def test_the_licence_is_the_bases_if_its_card_has_one(said, kept, run, tmp_path, monkeypatch, capsys):
    (tmp_path / "base").mkdir()
    if said:
        (tmp_path / "base" / "README.md").write_text(f"---\n{yaml.safe_dump(said)}---\n# Base\n")
    run("sft", "reward_model", "ppo", model={**defaults()["model"], "path": str(tmp_path / "base")})
    assert call(monkeypatch, capsys, "a", "--to=out")[0] == 0
    head, body = card_of(tmp_path / "out")
    assert head["license"] == kept and "base_model" not in head, "a folder is no id of the Hub"
    assert "begun from `base`" in body and f"whose card says: {said['license'] if said else 'nothing'}" in body


def test_a_base_of_the_hub_is_named_by_its_id(run, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    (tmp_path / "card.md").write_text("---\nlicense: other\nlicense_link: https://a.example/b/c/LICENSE\n---\n")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: "there")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: tmp_path / "card.md")
    run("sft", "reward_model", "ppo", model={**defaults()["model"], "path": "Qwen/Qwen3-0.6B"})
    assert call(monkeypatch, capsys, "a", "--to=out")[0] == 0
    head, _ = card_of(tmp_path / "out")
    assert head["base_model"] == "Qwen/Qwen3-0.6B" and head["base_model_relation"] == "finetune"
    assert head["license_link"] == "https://a.example/b/c/LICENSE" and head["license"] == "other"


def test_an_export_that_is_there_stays_and_anything_else_is_never_overwritten(run, tmp_path, monkeypatch, capsys):
    target = run(*CHAIN) / "export" / "ppo"
    assert call(monkeypatch, capsys, "a")[0] == 0
    (target / "README.md").write_text("my own card")
    assert "holds it already" in call(monkeypatch, capsys, "a")[1]
    assert (target / "README.md").read_text() == "my own card"
    mend = f"export: {target.relative_to(tmp_path)} holds something else: remove it, or choose another --to=FOLDER"
    for words in (["--stage=sft", f"--to={target}"], ["--dtype=bfloat16"]):
        assert call(monkeypatch, capsys, "a", *words) == (2, "", f"error: {mend}\n")
    (target / "model.safetensors").write_bytes(b"cut off")
    assert call(monkeypatch, capsys, "a")[2] == f"error: {mend}\n"
    (tmp_path / "file").write_text("")
    assert call(monkeypatch, capsys, "a", "--to=file")[0] == 2
    (tmp_path / "empty").mkdir()
    assert call(monkeypatch, capsys, "a", "--to=empty")[0] == 0


def test_large_weights_are_written_in_parts(run, monkeypatch, capsys):
    monkeypatch.setattr(exporting, "SHARD", "40KB")
    folder = run("sft", "reward_model", "ppo")
    assert call(monkeypatch, capsys, "a")[0] == 0
    parts = list((folder / "export" / "ppo").glob("model-*.safetensors"))
    assert len(parts) > 1 and (folder / "export" / "ppo" / "model.safetensors.index.json").is_file()


def test_a_model_that_reads_otherwise_once_it_is_written_does_not_leave(
    run, tmp_path, tiny_policy, monkeypatch, capsys
):
    folder = run("sft", "reward_model", "ppo")
    genuine = exporting.as_others_load
    monkeypatch.setattr(exporting, "as_others_load", lambda *place: tiny_policy(seed=9))
    code, _, err = call(monkeypatch, capsys, "a", "--to=new/out")
    assert code == 2 and err.startswith("error: export: written in float32 and read again, its logits differ by ")
    assert list((tmp_path / "new").iterdir()) == [], "nothing half-written"
    monkeypatch.setattr(exporting, "as_others_load", genuine)
    large = load_causal(folder / "ppo" / "model")
    large.get_output_embeddings().weight.data *= 1e6

    def save(place, stage):
        large.save_pretrained(place / "model")
        exporting.load_encoder(folder / "ppo" / "model").tokenizer.save_pretrained(place / "model")

    run("sft", save=save)
    code, _, err = call(monkeypatch, capsys, "a", "--stage=sft", "--dtype=float16", "--to=half")
    assert code == 2 and "logits differ by nan" in err and "choose another --dtype" in err
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize(
    "words, told",
    [
        (["nothing"], "export: 'nothing' is not the folder of a run: it holds no config.yaml"),
        ([], "the following arguments are required: RUN; `alignkit export --help`"),
        (["a", "--stge=sft"], "unrecognized arguments: --stge=sft; `alignkit export --help`"),
        (["a", "kl.coef=1"], "unrecognized arguments: kl.coef=1"),
        (["a", "--dtype=int8"], "argument --dtype: invalid choice: 'int8'"),
        (["a", "--stage=evaluate"], "--stage=evaluate: runs/a has no finished model of that name; finished models are "
                                    "sft, reward_model"),
        (["a"], "ppo of runs/a is not finished: `alignkit resume runs/a` goes on with it; finished models are sft, "
                "reward_model, which --stage=NAME takes as they are"),
        (["a", "--stage=sft", "--form=adapter"], "sft has no adapter (peft.method=none): leave it out"),
        (["a", "--stage=sft", "--public"], "--public says how to push: add --push=OWNER/NAME"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(words, told, run, monkeypatch, capsys):
    run("sft", "reward_model")
    code, out, err = call(monkeypatch, capsys, *words)
    assert (code, out) == (2, "") and told in err and err.startswith("error: export: ") and err.count("\n") == 1


def test_a_run_of_several_policies_asks_which(run, monkeypatch, capsys):
    folder = run(*CHAIN)
    link(folder / "ppo-0.3", (folder / "ppo").resolve())
    assert "which model of runs/a? name it with --stage=NAME" in call(monkeypatch, capsys, "a")[2]
    assert call(monkeypatch, capsys, "a", "--stage=ppo-0.3")[0] == 0
    assert json.loads((folder / "export" / "ppo-0.3" / "alignkit.json").read_text())["digest"] == "2" * 12


def test_a_damaged_stage_does_not_leave(run, monkeypatch, capsys):
    folder = run(*CHAIN)
    (folder / "ppo" / "model" / "model.safetensors").write_bytes(b"")
    assert "is damaged: model/model.safetensors" in call(monkeypatch, capsys, "a")[2]
