"""`alignkit export` of adapters: peft's own folder or merged, and what each says of the base."""

import json

import pytest
import torch
from export_world import call, card_of, defaults, make_run

from alignkit.models.adapters import attach, save_adapter
from alignkit.models.loading import load_causal
from alignkit.models.settings import PeftSettings

LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture
def adapted(tmp_path, monkeypatch, tiny_policy, tiny_tokenizer):
    """Makes a run whose SFT is an adapter on `base/` and was moved, merged too or not."""
    monkeypatch.chdir(tmp_path)

    def make(method: str, merge: bool):
        base, values = tiny_policy(), LORA if method == "lora" else {"num_virtual_tokens": 4}
        base.save_pretrained(tmp_path / "base")
        tiny_tokenizer.save_pretrained(tmp_path / "base")
        settings = PeftSettings(method=method, settings=values, quantization={}, merge=merge)

        def save(place, stage):
            model = attach(load_causal(tmp_path / "base"), settings, "CAUSAL_LM")
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for value in model.parameters():
                    if value.requires_grad:
                        value.add_(torch.randn(value.shape, generator=generator) * 0.1)
            folder = place / ("adapter" if merge else "model")
            save_adapter(model, model.state_dict(), folder, tmp_path / "base")
            base.generation_config.save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
            if merge:
                load_causal(folder).save_pretrained(place / "model")
                tiny_tokenizer.save_pretrained(place / "model")

        peft = {"method": method, "settings": values, "quantization": {}, "merge": merge}
        changed = {"peft": peft, "model": {**defaults()["model"], "path": "base"}}
        return make_run(tmp_path, tiny_policy, tiny_tokenizer, "sft", save=save, **changed)

    return make


@pytest.mark.parametrize("merge", [True, False])
def test_lora_leaves_merged_or_as_an_adapter_and_both_are_one_model(merge, adapted, tmp_path, monkeypatch, capsys):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    adapted("lora", merge)
    for form in ("merged", "adapter"):
        code, out, err = call(monkeypatch, capsys, "a", "--stage=sft", f"--form={form}", f"--to={form}")
        assert (code, err) == (0, "") and ("peft" if form == "adapter" else "transformers") + " alone reads it" in out
    ids = torch.arange(2, 12)[None]
    kinds = {"merged": AutoModelForCausalLM, "adapter": AutoPeftModelForCausalLM, "base": AutoModelForCausalLM}
    with torch.no_grad():
        whole, thin, base = (kind.from_pretrained(tmp_path / place).eval()(ids).logits for place, kind in kinds.items())
    torch.testing.assert_close(whole, thin, rtol=0, atol=1e-4)
    assert float((whole - base).abs().max()) > 1e-2
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert {file.name for file in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}
    head, body = card_of(tmp_path / "adapter")
    assert head["library_name"] == "peft" and "a lora adapter in float32, which stands on `base`" in body
    assert "AutoPeftModelForCausalLM" in body and "vllm" not in body and str(tmp_path) not in body
    facts = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert facts["base_model_name_or_path"] == str(tmp_path / "base")
    pushed = call(monkeypatch, capsys, "a", "--stage=sft", "--form=adapter", "--to=adapter", "--push=me/mine")
    assert pushed[0] == 2 and "the adapter stands on 'base', which is not of the Hub; push --form=merged" in pushed[2]


def test_learnt_tokens_leave_as_an_adapter_alone(adapted, tmp_path, monkeypatch, capsys):
    adapted("prompt", merge=False)
    told = call(monkeypatch, capsys, "a", "--stage=sft")[2]
    assert told == "error: export: sft is learnt tokens (peft.method=prompt): add --form=adapter\n"
    assert call(monkeypatch, capsys, "a", "--stage=sft", "--form=adapter", "--to=out")[0] == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_an_adapter_whose_base_is_gone_says_so(adapted, tmp_path, monkeypatch, capsys):
    adapted("lora", merge=False)
    (tmp_path / "base").rename(tmp_path / "moved")
    for form in ("merged", "adapter"):
        code, _, err = call(monkeypatch, capsys, "a", "--stage=sft", f"--form={form}", "--to=out")
        assert code == 2 and err.count("\n") == 1 and "base" in err and not (tmp_path / "out").exists()
