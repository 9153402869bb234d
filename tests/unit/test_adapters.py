"""Adapters train through TRL in both stages, are saved as peft reads them, switched off and merged exactly."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from trainer_world import NO_CHECKPOINTS, NO_OFFLOADING, RANKING, run
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignkit.data.corpus import Corpus, Demonstration, Pair, Split
from alignkit.errors import UserError
from alignkit.models.adapters import (
    adapters_off,
    add_adapter,
    apply_adapter,
    attach,
    merge,
    quantization,
    save_adapter,
)
from alignkit.models.loading import load_causal, load_encoder, load_scorer, model_folder, scorer_from_policy
from alignkit.models.scalar import PromptedScalar, ScalarModel, SharedScalar, score_sequences
from alignkit.models.settings import PROMPT_METHODS, PeftSettings, refuse_in_ppo
from alignkit.runtime.artifact import open_artifact
from alignkit.runtime.sharding import Cluster
from alignkit.stages import reward_model, sft
from alignkit.stages.job import Job
from alignkit.stages.settings import RewardModelSettings, SFTSettings

LINEAR = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
TOKENS = {"num_virtual_tokens": 4}
METHODS = {
    "lora": ("lora", LINEAR),
    "rslora": ("lora", {**LINEAR, "use_rslora": True}),
    "dora": ("lora", {**LINEAR, "use_dora": True}),
    "ia3": ("ia3", {}),
    "bitfit": ("bitfit", {}),
    "prefix": ("prefix", TOKENS),
    "prompt": ("prompt", TOKENS),
    "p_tuning": ("p_tuning", {**TOKENS, "encoder_hidden_size": 16}),
}
IN_PLACE = ["lora", "rslora", "dora", "ia3", "bitfit"]
ARCHITECTURES = ["llama", "gpt2", "qwen3"]


def settings(name: str, merge: bool = False) -> PeftSettings:
    method, values = METHODS[name]
    return PeftSettings(method=method, settings=dict(values), quantization={}, merge=merge or name == "bitfit")


@pytest.fixture(scope="module")
def bases(tiny_policy, tiny_tokenizer, tmp_path_factory):
    """A folder with a pretrained model for each architecture."""

    def save(architecture: str) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        tiny_policy(architecture).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return {architecture: save(architecture) for architecture in ARCHITECTURES}


@pytest.fixture(scope="module")
def cluster():
    made = Cluster.open()
    yield made
    made.close()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask [3, 7], padded on the right with PAD."""
    tokens = torch.randint(2, 270, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(7) < torch.tensor([7, 3, 5])[:, None]
    return torch.where(mask, tokens, 0), mask


def logits(model, tokens, mask) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens, attention_mask=mask.long()).logits[:, -tokens.shape[1] :][mask]


def nudge(model) -> None:
    """Move what is trained, as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape, generator=generator) * 0.1)


FITTING = [  # of these architectures only GPT-2 has biases to train
    (name, architecture)
    for name in IN_PLACE
    for architecture in ARCHITECTURES
    if name != "bitfit" or architecture == "gpt2"
]


# ------------------------------------------------------------------------------------- put on, switched off, taken off


@pytest.mark.parametrize("name, architecture", FITTING)
def test_an_adapter_starts_as_the_identity_can_be_switched_off_and_merged(name, architecture, bases):
    method = settings(name)
    model, tokens_mask = load_causal(bases[architecture]), batch()
    names, before = list(model.state_dict()), logits(model, *tokens_mask)
    kind = type(model)
    add_adapter(model, method, "CAUSAL_LM")
    assert type(model) is kind and logits(model, *tokens_mask).equal(before)
    nudge(model)
    moved, gradients = logits(model, *tokens_mask), [value.requires_grad for value in model.parameters()]
    assert float((moved - before).abs().max()) > 1e-3
    with adapters_off(model):
        assert logits(model, *tokens_mask).equal(before)
    assert logits(model, *tokens_mask).equal(moved)
    assert [value.requires_grad for value in model.parameters()] == gradients and 0 < sum(gradients) < len(gradients)
    merge(model)
    assert list(model.state_dict()) == names and all(value.requires_grad for value in model.parameters())
    torch.testing.assert_close(logits(model, *tokens_mask), moved, rtol=1e-5, atol=1e-5)


def test_switched_off_by_an_error_it_comes_back(bases):
    model = load_causal(bases["llama"])
    add_adapter(model, settings("lora"), "CAUSAL_LM")
    nudge(model)
    moved = logits(model, *batch())
    with pytest.raises(RuntimeError, match="on the way"), adapters_off(model):
        raise RuntimeError("on the way")
    assert logits(model, *batch()).equal(moved)


@pytest.mark.parametrize("name, architecture", FITTING)
def test_value_and_reward_model_share_one_set_of_base_weights(name, architecture, bases):
    method, mean, std = settings(name), 0.7, 0.5
    tokens, mask = batch()
    alone = ScalarModel(scorer_from_policy(bases[architecture], seed=3)).eval()
    shared = SharedScalar(scorer_from_policy(bases[architecture], seed=3), method).eval()
    shared.absorb_affine(mean, std)
    with torch.no_grad():
        expected = alone(tokens, mask)
        torch.testing.assert_close(shared(tokens, mask)[mask], ((expected - mean) / std)[mask], rtol=1e-5, atol=1e-5)
    nudge(shared)
    assert shared.score(tokens, mask).equal(expected)
    assert score_sequences(shared.score, tokens, mask).equal(score_sequences(lambda *_: expected, tokens, mask))
    shared(tokens, mask).square().sum().backward()
    touched = {key for key, value in shared.named_parameters() if value.grad is not None}
    assert {"bias", "value_head.weight"} < touched and "classifier.score.weight" not in touched
    assert all(any(part in key for part in ("lora_", "ia3_", "offset", "value_head", "bias")) for key in touched)
    base = sum(value.numel() for value in alone.classifier.parameters())
    extra = sum(value.numel() for value in shared.parameters() if value.requires_grad)
    assert storage(shared) == 4 * (base + extra)


def storage(model) -> int:
    """Bytes of all parameters, those that share memory counted once."""
    held = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in model.parameters()}
    return sum(held.values())


# ----------------------------------------------------------------------------------------------------- learnt tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", PROMPT_METHODS)
def test_behind_learnt_tokens_the_score_is_read_at_the_last_real_token(name, architecture, bases):
    model = attach(scorer_from_policy(bases[architecture], seed=3), settings(name), "SEQ_CLS").eval()
    model.config.pad_token_id = 0
    scorer = PromptedScalar(model)
    tokens, mask = batch()
    with torch.no_grad():
        together = score_sequences(scorer, tokens, mask)
        trained = model(input_ids=tokens, attention_mask=mask.long(), use_cache=False).logits[:, 0]
        alone = [model(input_ids=row[real][None]).logits[0, 0] for row, real in zip(tokens, mask)]
        torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-5)
        torch.testing.assert_close(trained, together, rtol=0, atol=0)
    assert float(together.std()) > 0.05


# ------------------------------------------------------------------------------------------------ training through TRL

WORDS = ["the harbour", "three letters", "a small lamp", "the street", "the storm", "a beach"]


def corpus() -> Corpus:
    rows = [Demonstration(f"why {a} and {b}?", f" because of {a}") for a in WORDS for b in WORDS]
    pairs = [Pair(row.prompt, row.response, " none of them") for row in rows]
    sides = [Split(rows[n::2], pairs[n::2], [row.prompt for row in rows[n::2]]) for n in (0, 1)]
    return Corpus(*sides, notes=())


def job(stage: str, base: Path, out: Path, method: PeftSettings) -> Job:
    shared = {"epochs": 1.0, "batch": 6, "microbatch": 3, "learning_rate": 0.05, "warmup": 0.0, "max_length": 60}
    config = SimpleNamespace(
        seed=0,
        data=SimpleNamespace(load=lambda seed: corpus()),
        model=SimpleNamespace(path=str(base), revision=None, trust_remote_code=False),
        peft=method,
        sft=SFTSettings(**shared, trainer={}),
        reward_model=RewardModelSettings(**shared, **RANKING, trainer={}),
        checkpoint=NO_CHECKPOINTS,
        sharding=NO_OFFLOADING,
    )
    return Job(stage, config, {"init": base}, out, first=False)


def train(stage: str, base: Path, out: Path, method: PeftSettings, cluster, monkeypatch):
    """Run the stage; returns its result, the model before and after training, and which weights moved."""
    module, seen = {"sft": sft, "reward_model": reward_model}[stage], {}

    def watched(model, *args):
        model = attach(model, *args)
        seen["model"] = model
        seen["before"] = {name: value.clone() for name, value in model.state_dict().items()}
        return model

    def save(model, *args):
        after = model.state_dict()
        seen["moved"] = {name for name, value in seen["before"].items() if not value.equal(after[name])}
        tokens, mask = batch()
        if stage == "sft":
            seen["output"] = logits(model, tokens, mask)
        else:
            with torch.no_grad():
                seen["output"] = model.eval()(input_ids=tokens, attention_mask=mask.long()).logits
        kept(model, *args)

    kept = module.save_trained
    monkeypatch.setattr(module, "attach", watched)
    monkeypatch.setattr(module, "save_trained", save)
    seen["result"] = run(job(stage, base, out, method), cluster)
    return seen


def reload(stage: str, base: Path, folder: Path):
    """The product as peft's own users load it."""
    if stage == "sft":
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    plain.config.pad_token_id = 0
    return PeftModel.from_pretrained(plain, folder).eval()


def output(stage: str, model) -> torch.Tensor:
    tokens, mask = batch()
    if stage == "sft":
        return logits(model, tokens, mask)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        PromptedScalar(model)
    with torch.no_grad():
        return model.eval()(input_ids=tokens, attention_mask=mask.long()).logits


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "bitfit"])
def test_a_stage_trains_the_adapter_alone_and_saves_what_peft_loads(
    stage, name, bases, tmp_path, cluster, monkeypatch, capsys
):
    architecture = ARCHITECTURES[list(METHODS).index(name) % 3]
    seen = train(stage, bases[architecture], tmp_path, settings(name), cluster, monkeypatch)
    marks = ("lora_", "ia3_", "prompt_encoder", "score")
    assert seen["moved"] and all(any(mark in key for mark in marks) for key in seen["moved"])
    assert stage == "sft" or any("score" in key for key in seen["moved"])
    assert f"{stage}: training 0.0" in capsys.readouterr().out
    folder = tmp_path / "model"
    facts = json.loads((folder / "adapter_config.json").read_text())
    assert facts["base_model_name_or_path"] == str(bases[architecture].resolve())
    assert (folder / "adapter_model.safetensors").stat().st_size < 80_000 and not list(
        folder.glob("model*.safetensors")
    )
    assert model_folder(tmp_path) == folder and load_encoder(folder).stop_ids
    loaded = output(stage, reload(stage, bases[architecture], folder))
    torch.testing.assert_close(loaded, seen["output"], rtol=1e-5, atol=1e-5)
    load = load_causal if stage == "sft" else load_scorer
    if name in PROMPT_METHODS:
        with pytest.raises(UserError, match="learnt tokens .*no stage can start from it"):
            load(folder)
        return
    merged = load(folder)
    assert not hasattr(merged, "peft_config") and all(value.requires_grad for value in merged.parameters())
    torch.testing.assert_close(output(stage, merged), seen["output"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_merged_the_product_is_plain_weights_and_the_adapter_lies_beside(stage, bases, tmp_path, cluster, monkeypatch):
    seen = train(stage, bases["llama"], tmp_path, settings("lora", merge=True), cluster, monkeypatch)
    factory = AutoModelForCausalLM if stage == "sft" else AutoModelForSequenceClassification
    plain = factory.from_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    assert sorted(plain.state_dict()) == sorted(factory.from_pretrained(bases["llama"]).state_dict())
    torch.testing.assert_close(output(stage, plain), seen["output"], rtol=1e-5, atol=1e-5)
    beside = reload(stage, bases["llama"], tmp_path / "adapter")
    torch.testing.assert_close(output(stage, beside), seen["output"], rtol=1e-5, atol=1e-5)
    assert load_encoder(tmp_path / "model").stop_ids == load_encoder(tmp_path / "adapter").stop_ids


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_bitfit_moves_biases_and_saves_plain_weights(stage, bases, tmp_path, cluster, monkeypatch):
    seen = train(stage, bases["gpt2"], tmp_path, settings("bitfit"), cluster, monkeypatch)
    assert all("bias_offset" in key or "score" in key for key in seen["moved"])
    factory = AutoModelForCausalLM if stage == "sft" else AutoModelForSequenceClassification
    plain, before = factory.from_pretrained(tmp_path / "model"), load_causal(bases["gpt2"]).base_model.state_dict()
    torch.testing.assert_close(output(stage, plain), seen["output"], rtol=1e-5, atol=1e-5)
    changed = {name for name, value in plain.base_model.state_dict().items() if not value.equal(before[name])}
    assert changed and all(name.endswith("bias") for name in changed)


def test_an_adapter_stands_on_an_adapter(bases, tmp_path, cluster, monkeypatch):
    """SFT with LoRA alone, then a reward model with an adapter from it: merged weights only, as peft would load the
    second adapter without the first, and without a word."""
    train("sft", bases["llama"], tmp_path / "sft", settings("lora"), cluster, monkeypatch)
    monkeypatch.undo()
    first = tmp_path / "sft" / "model"
    with pytest.raises(UserError, match="peft.merge=false: .* is an adapter itself"):
        train("reward_model", first, tmp_path / "reward", settings("dora"), cluster, monkeypatch)
    monkeypatch.undo()
    seen = train("reward_model", first, tmp_path / "reward", settings("dora", merge=True), cluster, monkeypatch)
    assert not (tmp_path / "reward" / "adapter").exists()
    scorer = load_scorer(tmp_path / "reward" / "model")
    torch.testing.assert_close(output("reward_model", scorer), seen["output"], rtol=1e-5, atol=1e-5)
    backbone = load_causal(first).base_model.state_dict()
    fresh = scorer_from_policy(first, seed=5)
    assert all(value.equal(backbone[name]) for name, value in fresh.base_model.state_dict().items())
    with pytest.raises(UserError, match="2 labels; a reward model has one score"):
        load_scorer(first)


def test_transformers_loads_the_adapter_folder_by_itself(bases, tmp_path, cluster, monkeypatch):
    seen = train("sft", bases["llama"], tmp_path, settings("lora"), cluster, monkeypatch)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(output("sft", loaded), seen["output"], rtol=1e-5, atol=1e-5)


def test_a_base_without_a_pad_of_its_own_grows_the_same_row_again(
    tiny_policy, tiny_tokenizer, tmp_path, monkeypatch, cluster
):
    """GPT-2's way: PAD is EOS and the vocabulary has no spare token, so SFT adds a row, which the adapter lacks."""
    base = tmp_path / "base"
    tiny_policy("gpt2", pad_token_id=tiny_tokenizer.eos_token_id).save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    known = json.loads((base / "tokenizer_config.json").read_text()) | {"pad_token": tiny_tokenizer.eos_token}
    (base / "tokenizer_config.json").write_text(json.dumps(known))
    renamed = (base / "tokenizer.json").read_text().replace("<|pad|>", "<|was_pad|>")
    (base / "tokenizer.json").write_text(renamed)
    seen = train("sft", base, tmp_path / "out", settings("lora"), cluster, monkeypatch)
    again = load_causal(tmp_path / "out" / "model")
    assert again.get_input_embeddings().weight.shape[0] == len(tiny_tokenizer) + 1
    assert again.config.pad_token_id == len(tiny_tokenizer)
    torch.testing.assert_close(output("sft", again), seen["output"], rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------- folders and digests


@pytest.fixture
def adapter(bases, tmp_path):
    """A saved LoRA on a llama folder of its own."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model = load_causal(bases["llama"])
    model.save_pretrained(base)
    add_adapter(model, settings("lora"), "CAUSAL_LM")
    nudge(model)
    save_adapter(model, model.state_dict(), folder, base)
    return base, folder


def test_a_folder_with_an_adapter_alone_is_a_model_named_by_its_bytes_and_its_bases(adapter):
    base, folder = adapter
    before = open_artifact(str(folder)).digest
    assert open_artifact(str(folder)).digest == before
    model = load_causal(base)
    nudge(model)
    model.save_pretrained(base)
    assert open_artifact(str(folder)).digest != before


def test_a_base_that_is_gone_is_named(adapter):
    base, folder = adapter
    base.rename(base.with_name("elsewhere"))
    with pytest.raises(UserError, match=f"'{folder}' is an adapter and its base '{base}' is not there: put it back"):
        load_causal(folder)


def test_an_adapter_of_another_model_or_cut_off_is_refused(adapter, bases):
    base, folder = adapter
    with pytest.raises(UserError, match="does not go on its base"):
        apply_adapter(load_causal(bases["gpt2"]), folder)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="does not go on its base"):
        load_causal(folder)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"method": "none", "settings": {"r": 8}}, "method=none has no settings"),
        ({"method": "none", "merge": True}, "nothing to merge"),
        ({"method": "bitfit"}, "biases are part of the weights; set merge=True"),
        ({"method": "prompt", "merge": True}, "learnt tokens are no part of a weight"),
        ({"method": "ia3", "quantization": {"load_in_4bit": True}}, "needs method=lora, got method=ia3"),
        ({"method": "lora", "settings": {"bias": "all"}}, "settings.bias='all': expected 'none'"),
        ({"method": "lora", "settings": {"init_lora_weights": "pissa"}}, "expected True or 'gaussian'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values, reason):
    with pytest.raises(ValueError, match=reason):
        PeftSettings(**{"settings": {}, "quantization": {}, "merge": False, **values})


MISTAKES = {
    "sft peft=lora": "with model.path=null the model starts from random weights, which an adapter would freeze",
    "sft peft=lora model.path=x +peft.settings.rr=2": "peft.settings.rr: unknown key; did you mean peft.settings.r?",
    "sft peft=qlora model.path=x launch.processes=2": "peft.quantization runs on one GPU, got launch.processes=2",
    "rlhf peft=prompt model.path=x": "peft.method=prompt: PPO cannot train learnt tokens",
    "ppo peft=prefix policy=x reward.path=x": "peft.method=prefix: PPO cannot train learnt tokens",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_the_command_line_refuses_before_anything_is_made(words, tmp_path, monkeypatch, capsys):
    from hydra.core.global_hydra import GlobalHydra

    from alignkit.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["alignkit", *words.split()])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and MISTAKES[words] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_learnt_tokens_take_positions_too(bases, tmp_path, cluster):
    method = PeftSettings(method="prompt", settings={"num_virtual_tokens": 40}, quantization={}, merge=False)
    with pytest.raises(UserError, match="sft.max_length=60 and 40 learnt tokens need 100 tokens, but the model has 96"):
        run(job("sft", bases["gpt2"], tmp_path, method), cluster)


def test_the_digest_of_every_stage_that_trains_depends_on_the_adapter():
    from alignkit.runtime.artifact import SECTIONS, stage_digest

    sections = {section for sections in SECTIONS.values() for section in sections}
    plain = {"seed": 0, "compute_dtype": "float32", **{section: {} for section in sections}}

    def digest(stage: str, **changes) -> str:
        return stage_digest(stage, {**plain, "peft": {"method": "lora", "settings": {"r": 4}, **changes}}, "bytes", {})

    for stage in ("sft", "reward_model", "ppo"):
        assert len({digest(stage), digest(stage, merge=True), digest(stage, settings={"r": 8})}) == 3
    assert digest("evaluate") == digest("evaluate", settings={"r": 8})


def test_the_keys_of_each_method_are_those_of_pefts_config_class():
    import dataclasses

    import peft

    from alignkit.models.settings import CONFIG_CLASS

    for method, name in CONFIG_CLASS.items():
        known = PeftSettings(method=method, settings={}, quantization={}, merge=False).known_keys()
        fields = {field.name for field in dataclasses.fields(getattr(peft, name))}
        common = {field.name for field in dataclasses.fields(peft.PeftConfig)}
        assert set(known) == fields - common


def test_what_peft_says_of_a_wrong_value_is_told_with_the_key(bases):
    wrong = PeftSettings(method="lora", settings={**LINEAR, "r": 0}, quantization={}, merge=False)
    with pytest.raises(UserError, match="peft.settings: with method=lora the library says: .*r"):
        add_adapter(load_causal(bases["llama"]), wrong, "CAUSAL_LM")
    nowhere = PeftSettings(method="lora", settings={"target_modules": ["nothing"]}, quantization={}, merge=False)
    with pytest.raises(UserError, match="Target modules .*nothing"):
        add_adapter(load_causal(bases["llama"]), nowhere, "CAUSAL_LM")


@pytest.mark.parametrize("key, value", [("target_modules", ["lm_head"]), ("modules_to_save", ["embed_tokens"])])
def test_embeddings_and_head_keep_their_weights(key, value, bases):
    reaching = PeftSettings(method="lora", settings={**LINEAR, key: value}, quantization={}, merge=False)
    with pytest.raises(UserError, match="reaches embeddings or head"):
        add_adapter(load_causal(bases["llama"]), reaching, "CAUSAL_LM")


def test_bitfit_without_biases_is_refused(bases):
    with pytest.raises(UserError, match="bitfit trains biases, and this LlamaForCausalLM has none"):
        add_adapter(load_causal(bases["llama"]), settings("bitfit"), "CAUSAL_LM")


def test_quantised_training_says_what_it_needs():
    method = PeftSettings(method="lora", settings={}, quantization={"load_in_4bit": True}, merge=False)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="needs a CUDA GPU and the package bitsandbytes"):
            quantization(method)
    with pytest.raises(UserError, match="FSDP2, which cannot split quantised weights"):
        refuse_in_ppo(method)


@pytest.mark.parametrize("name", PROMPT_METHODS)
def test_ppo_refuses_learnt_tokens_with_the_reason(name):
    with pytest.raises(UserError, match=f"peft.method={name}: PPO cannot train learnt tokens"):
        refuse_in_ppo(settings(name))
    refuse_in_ppo(settings("lora"))
