"""The preflight of models that the settings name: small folders, each spoilt in one way, and the line that tells it."""

import io
import json

import evil_world
import pytest
from safetensors.torch import load_file, save_file
from stub_stage import composed
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from alignkit.data.corpus import Corpus, Demonstration, Pair, Split
from alignkit.runtime.check import preflight
from alignkit.runtime.check_models import check_models, headers
from alignkit.runtime.config import load, with_changes
from alignkit.runtime.findings import lines
from alignkit.runtime.inputs import named_models

WORDS = "the harbour was quiet before the storm came in from the west"
FITTING = {"sft.max_length": 90, "reward_model.max_length": 90, "ppo.max_prompt": 60, "rollout.max_response": 30}
STAGES = {"rlhf": ("sft", "reward_model", "ppo"), "ppo": ("ppo",)}


def corpus(prompt="say something", response=WORDS) -> Corpus:
    """The same row a hundred times: nothing here looks at the split."""
    rows = Split([Demonstration(prompt, response)] * 100, [Pair(prompt, response, "no")] * 100, [prompt] * 100)
    return Corpus(rows, rows)


@pytest.fixture
def policy(tmp_path, tiny_policy, tiny_tokenizer):
    """A folder as SFT leaves it."""
    tiny_policy().save_pretrained(tmp_path / "policy")
    tiny_tokenizer.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def scorer(tmp_path, policy, tiny_tokenizer):
    """A reward model with the policy's tokens."""
    made = AutoConfig.from_pretrained(policy, num_labels=1)
    AutoModelForSequenceClassification.from_config(made).save_pretrained(tmp_path / "scorer")
    tiny_tokenizer.save_pretrained(tmp_path / "scorer")
    return tmp_path / "scorer"


@pytest.fixture(scope="module")
def raw():
    return composed("rlhf")


@pytest.fixture
def look(raw, policy, scorer):
    """What is found of the models of a recipe: (errors, warnings, facts, parameters of the first)."""

    def call(rows: Corpus | None = None, recipe: str = "ppo", **changes):
        given = {key.replace("__", "."): value for key, value in changes.items()}
        models = {"rlhf": {"model.path": str(policy)}, "ppo": {"policy": str(policy)}}
        ours = {} if recipe == "rlhf" or "reward" in given else {"reward.path": str(scorer), "reward.normalise": "none"}
        config = load(with_changes(raw, {**FITTING, **models[recipe], **ours, **given}))
        found, numbers = check_models(named_models(STAGES[recipe], config), STAGES[recipe], config, rows or corpus())
        return *(lines(found, level) for level in ("error", "warning", "fact")), numbers

    return call


def edit(file, **changes) -> None:
    found = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**found, **changes}), "utf-8")


SOUND = (
    "{}: llama of 0.02 M parameters, 280 tokens; PAD '<|pad|>'; answers end with '<|end|>', one of 1 stop tokens; "
    "prompts are padded on the left (its tokenizer says right)"
)


def test_sound_models_are_told_with_their_tokens(look, policy, tiny_policy):
    count = sum(weight.numel() for weight in tiny_policy().parameters())
    facts = [SOUND.format("policy"), SOUND.format("reward.path")]
    same = "reward.path: beside policy: the same tokens and chat template"
    assert look() == ([], [], [*facts, same], count)
    assert look(recipe="rlhf") == ([], [], [SOUND.format("model.path")], count)


def test_a_pretrained_model_whose_pad_is_eos_gets_one_of_its_own_and_ppo_cannot_start_from_it(
    look, policy, tiny_tokenizer
):
    other = Tokenizer.from_str(tiny_tokenizer.backend_tokenizer.to_str().replace("<|pad|>", "<|other|>"))
    PreTrainedTokenizerFast(tokenizer_object=other, eos_token="<|end|>", pad_token="<|end|>").save_pretrained(policy)
    errors, warnings, facts, _ = look(recipe="rlhf")
    assert (errors, warnings) == ([], [])
    assert "llama of 0.02 M parameters, 281 tokens; PAD '<|pad|>', which gets a row; answers end" in facts[0]
    assert look()[0] == [
        f"policy={policy}: '{policy}' has no PAD token apart from EOS: run SFT on it first, which adds one and keeps it"
    ]


def test_a_tokenizer_without_eos_is_refused(look, policy, tiny_tokenizer):
    PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="<|pad|>").save_pretrained(
        policy
    )
    (said,), *_ = look(recipe="rlhf")
    assert said == f"model.path={policy}: the tokenizer has no EOS token: set `eos_token` in its tokenizer_config.json"


def test_tokens_beyond_the_embeddings_are_an_error_or_where_sft_grows_them_a_warning(look, policy):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(policy)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(policy)
    what = "1 tokens from id 280 on have no row in its embeddings of 280"
    mend = "take tokenizer and model from one place, or resize the embeddings"
    (said,), *_ = look()
    assert said.startswith(f"policy={policy}: '{policy}': its tokenizer has 281 ")
    errors, warnings, *_ = look(recipe="rlhf")
    assert errors == []
    assert warnings == [f"model.path: {what}: SFT makes rows of which the model knows nothing; {mend}"]


def test_a_stop_token_that_there_is_not_is_refused(look, policy):
    edit(policy / "generation_config.json", eos_token_id=[1, 999])
    (said,), *_ = look(recipe="rlhf")
    assert said.startswith("model.path: 1 tokens from id 999 on have no row in its embeddings of 280: the first text ")


CHAT = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "no"}]


def test_a_chat_template_that_ends_an_answer_with_no_token_is_told(look, policy):
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    (policy / "chat_template.jinja").write_text(plain)
    assert look()[1] == [], "no chat in the data"
    errors, warnings, facts, _ = look(corpus(CHAT))
    assert errors == [] and warnings == [
        "policy: its chat template ends an answer with no special token: answers end with '<|end|>', which the turns "
        "before them lack; let the template put eos_token after the assistant's content"
    ]
    assert facts[-1] == "reward.path: beside policy: it reads the texts, as its tokens or template differ"


def test_a_chat_template_that_refuses_the_data_is_an_error(look, policy):
    (policy / "chat_template.jinja").write_text("{{ raise_exception('no system') }}")
    assert look(corpus(CHAT))[0] == [
        "policy: the model's chat template refuses turns of user, assistant, user: no system"
    ]


def test_settings_that_need_more_positions_than_a_model_has_are_refused(look):
    errors, *_ = look(recipe="rlhf", sft__max_length=97, ppo__max_prompt=70, ptx__coef=1.0, ptx__max_length=100)
    assert sorted(errors) == [
        "model.path: ppo.max_prompt=70 and rollout.max_response=30 need 100 tokens, but the model has 96 positions: "
        "lower them",
        "model.path: ptx.max_length=100 need 100 tokens, but the model has 96 positions: lower them",
        "model.path: sft.max_length=97 need 97 tokens, but the model has 96 positions: lower them",
    ]
    assert [line.partition(":")[0] for line in look(ppo__max_prompt=70)[0]] == ["policy", "reward.path"]


def test_rows_that_are_longer_than_the_settings_allow_are_told(look):
    errors, warnings, *_ = look(
        corpus(WORDS), "rlhf", sft__max_length=20, reward_model__max_length=20, ppo__max_prompt=10
    )
    what = "100 of 100 rows that were looked at are longer: these are"
    assert errors == [] and warnings == [
        f"sft.max_length=20: {what} cut; raise sft.max_length, if memory allows",
        f"reward_model.max_length=20: {what} left out; raise reward_model.max_length, if memory allows",
        f"ppo.max_prompt=10: {what} left out; raise ppo.max_prompt, if memory allows",
    ]


def test_weights_that_are_cut_off_missing_or_of_another_format_are_refused(look, policy):
    file = policy / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    sizes = f"expected {len(whole):,} bytes, got {len(whole) - 1:,}"
    assert look()[0] == [f"policy={policy}: {file}: {sizes}; copy or download the model again"]
    file.write_bytes(b"<html>")
    (said,), *_ = look()
    assert said.startswith(f"policy={policy}: {file}: expected a .safetensors file, got something else")
    file.rename(policy / "pytorch_model.bin")
    (said,), *_ = look()
    assert said.startswith(
        f"policy={policy}: '{policy}': expected weights in .safetensors files, got pytorch_model.bin"
    )
    (policy / "pytorch_model.bin").unlink()
    assert look()[0] == [
        f"policy={policy}: holds no .safetensors file, and others are not read: save it anew with transformers"
    ]
    index = policy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    (said,), *_ = look()
    assert said.startswith(f"policy={policy}: {index}: model-1.safetensors is not there (1 of 1 files missing)")


def test_headers_tell_every_shape_without_the_weights(policy):
    weights = load_file(policy / "model.safetensors")
    assert headers(policy) == {name: list(weight.shape) for name, weight in weights.items()}


def test_a_reward_model_without_a_score_is_refused(look, scorer, policy):
    weights = load_file(scorer / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "score" not in name}, scorer / "model.safetensors")
    said = f"reward.path={scorer}: holds no weights of a score, which would be random: it is no reward model"
    assert look()[0] == [said]
    edit(scorer / "config.json", id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    assert look()[0] == [f"reward.path={scorer}: has 2 labels; a reward model has one score (num_labels: 1)"]


def test_a_score_of_which_the_mean_is_not_known_is_refused(look, scorer):
    assert look(reward__normalise="shift")[0] == [
        f"reward.path={scorer}: '{scorer}' was not trained by alignkit, so the mean of its score is unknown: set its "
        "normalise to none"
    ]


def test_a_judge_and_the_members_of_a_reward_are_looked_at_too(look, raw, scorer, policy):
    members = {name: {**raw["reward"], "path": str(scorer), "normalise": "none"} for name in ("a", "b")}
    both = {"_target_": "alignkit.reward.ensemble.Ensemble", "members": members, "how": "mean", "uncertainty_coef": 1.0}
    judge = {**members["a"], "path": str(policy)}
    errors, _, facts, _ = look(reward=both, judge=judge)
    assert errors == [f"judge.path={policy}: has 2 labels; a reward model has one score (num_labels: 1)"]
    assert {fact.partition(":")[0] for fact in facts} == {"policy", "reward.members.a.path", "reward.members.b.path"}


def test_a_hub_id_that_is_neither_cached_nor_within_reach_is_refused(look):
    assert look(recipe="rlhf", model__path="nobody/nothing")[0] == [
        "model.path=nobody/nothing: no folder here and not in the Hub's cache, and https://huggingface.co is out of "
        "reach"
    ]


@pytest.mark.parametrize("name", ["policy", "scorer"])
def test_code_of_a_model_is_not_run_though_the_terminal_would_say_yes(
    look, policy, scorer, name, tmp_path, monkeypatch
):
    evil_world.remote({"policy": policy, "scorer": scorer}[name], tmp_path / "mark")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    (said, *_), *_ = look()
    assert "its config cannot be read" in said and not (tmp_path / "mark").exists()


def test_a_secret_in_what_is_found_is_hidden(raw, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://bob:hunter2secret@127.0.0.1:9")
    found = preflight("rlhf", load(raw), "online", None)
    assert any("127.0.0.1:9" in each.line for each in found)
    assert not any("hunter2secret" in each.line for each in found)
