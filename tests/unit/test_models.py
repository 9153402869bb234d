"""Nine architectures: a ragged batch padded on both sides gives what each sequence gives alone; folders stay plain."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from alignkit.algo.sampling import SamplingRule
from alignkit.data.corpus import Pair
from alignkit.errors import UserError
from alignkit.models.loading import (
    disable_dropout,
    load_causal,
    load_encoder,
    load_scorer,
    make_encoder,
    scalar_head,
    scorer_from_policy,
    start_policy,
)
from alignkit.models.policy import response_logprobs
from alignkit.models.scalar import ScalarModel, score_sequences
from alignkit.models.settings import ModelSettings
from alignkit.models.tokenizer import end_of_turn, ensure_pad, find_stop_ids, same_tokens
from alignkit.stages.common import save_model

ARCHITECTURES = ["llama", "qwen3", "gpt2", "gpt_neox", "mistral", "gemma3_text", "phi3", "opt", "falcon"]
PROMPTS, RESPONSES = [1, 7, 3, 5], [6, 2, 4, 1]  # real lengths: no two rows alike
WIDTH, LENGTH = 9, 8  # of the rectangle: two columns of nothing but padding on each side
DROPOUT = {
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "phi3": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5},
    "gpt_neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "falcon": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5},
}
RULE = SamplingRule(temperature=0.7, stop_ids=(1,), min_response=2)


def ragged(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """tokens and mask [B, T], padded on both sides with random tokens instead of PAD; and the rows on their own."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, vocab_size, (4, WIDTH + LENGTH), generator=generator)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        mask[row, WIDTH - prompt : WIDTH + response] = True
    return tokens, mask, [row[real][None] for row, real in zip(tokens, mask)]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, tiny_policy, tmp_path_factory):
    """The saved causal model of each architecture."""
    path = tmp_path_factory.mktemp(request.param)
    tiny_policy(request.param).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def policy(folder):
    return load_causal(folder).eval()


@pytest.fixture(scope="module")
def scorer(folder):
    return ScalarModel(scorer_from_policy(folder, seed=3)).eval()


def test_response_logprobs_of_a_ragged_batch_are_those_of_each_sequence_alone(policy):
    tokens, mask, rows = ragged(policy.config.vocab_size)
    with torch.no_grad():
        logprobs, entropy = response_logprobs(policy, tokens, mask, mask[:, -LENGTH:], RULE, entropy=True)
        for number, (row, prompt, response) in enumerate(zip(rows, PROMPTS, RESPONSES)):
            logits = policy(input_ids=row).logits[0, prompt - 1 : -1].double() / 0.7
            logits[: RULE.min_response, 1] = -torch.inf
            expected = logits.log_softmax(dim=-1)
            picked = expected.gather(1, row[0, prompt:, None])[:, 0]
            torch.testing.assert_close(logprobs[number, :response].double(), picked, rtol=0, atol=1e-5)
            exact = torch.distributions.Categorical(logits=logits).probs
            exact = -(exact * torch.where(exact > 0, exact, 1.0).log()).sum(dim=-1)
            torch.testing.assert_close(entropy[number, :response].double(), exact, rtol=0, atol=1e-5)
    assert torch.isfinite(logprobs[mask[:, WIDTH:]]).all()


def test_the_gradient_of_a_ragged_batch_is_the_sum_of_those_of_its_sequences(policy):
    """In float64; the RMS norms and rotary tables of some families compute in float32 all the same."""
    model = copy.deepcopy(policy).double()
    tokens, mask, rows = ragged(model.config.vocab_size)
    logprobs, _ = response_logprobs(model, tokens, mask, mask[:, -LENGTH:], SamplingRule(1.0, (1,)))
    torch.where(mask[:, WIDTH:], logprobs, 0.0).sum().backward()
    batch = gradient(model)
    for row, prompt in zip(rows, PROMPTS):
        logits = model(input_ids=row).logits[0, prompt - 1 : -1]
        (-torch.nn.functional.cross_entropy(logits, row[0, prompt:], reduction="sum")).backward()
    alone = gradient(model)
    limit = 1e-12 if model.config.model_type in ("gpt2", "gpt_neox", "opt", "falcon") else 1e-7
    assert float((batch - alone).norm() / alone.norm()) <= limit


def gradient(model: torch.nn.Module) -> torch.Tensor:
    """All gradients as one vector; they are cleared."""
    parts = [value.grad.flatten() for value in model.parameters()]
    model.zero_grad()
    return torch.cat(parts)


def test_values_of_a_ragged_batch_are_those_of_each_sequence_alone(scorer):
    tokens, mask, rows = ragged(scorer.config.vocab_size)
    with torch.no_grad():
        scorer.bias.fill_(0.25)
        values, scores = scorer(tokens, mask), score_sequences(scorer, tokens, mask)
        for number, row in enumerate(rows):
            hidden = scorer.classifier.base_model(input_ids=row).last_hidden_state
            expected = scorer.classifier.score(hidden)[0, :, 0] + 0.25
            torch.testing.assert_close(values[number][mask[number]], expected, rtol=0, atol=1e-5)
            torch.testing.assert_close(scores[number], expected[-1], rtol=0, atol=1e-5)
        scorer.bias.zero_()
    assert float(scores.std()) > 0.05, "rows that all score alike would prove nothing"


def test_scores_are_what_the_hugging_face_classifier_pools(scorer, tiny_tokenizer):
    """Its own read-out: the last token that is not PAD, padding on the right, no positions given."""
    *_, rows = ragged(scorer.config.vocab_size)
    longest = max(row.shape[1] for row in rows)
    pads = [(0, longest - row.shape[1]) for row in rows]
    tokens = torch.cat(
        [torch.nn.functional.pad(row, pad, value=tiny_tokenizer.pad_token_id) for row, pad in zip(rows, pads)]
    )
    mask = tokens != tiny_tokenizer.pad_token_id
    with torch.no_grad():
        pooled = scorer.classifier(input_ids=tokens, attention_mask=mask.long()).logits[:, 0]
        torch.testing.assert_close(score_sequences(scorer, tokens, mask), pooled, rtol=0, atol=1e-5)


def test_the_stop_token_is_the_one_that_is_scored(scorer, tiny_tokenizer):
    """PAD differs from EOS, so the read-out after `... EOS PAD PAD` is at EOS, in the classifier's own forward too."""
    pad, end = tiny_tokenizer.pad_token_id, tiny_tokenizer.eos_token_id
    finished = torch.tensor([[40, 41, 42, end]])
    padded = torch.tensor([[40, 41, 42, end, pad, pad]])
    with torch.no_grad():
        alone = score_sequences(scorer, finished, torch.ones_like(finished).bool())
        pooled = scorer.classifier(input_ids=padded, attention_mask=(padded != pad).long()).logits[:, 0]
        early = score_sequences(scorer, finished[:, :3], torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(pooled, alone, rtol=0, atol=1e-5)
    assert abs(float(early - alone)) > 1e-4


def test_absorbing_the_normalisation_makes_values_start_in_the_rewards_units(folder):
    mean, std = 1.75, 0.4
    reward, value = (ScalarModel(scorer_from_policy(folder, seed=3)).eval() for _ in range(2))
    value.absorb_affine(mean, std)
    tokens, mask, _ = ragged(reward.config.vocab_size)
    last = torch.tensor([WIDTH + response - 1 for response in RESPONSES])
    with torch.no_grad():
        at_the_end = value(tokens, mask)[torch.arange(4), last]
        expected = (score_sequences(reward, tokens, mask) - mean) / std
        torch.testing.assert_close(at_the_end, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(score_sequences(reward, tokens, mask, mean=mean, std=std), expected)
        twice = (value(tokens, mask)[mask] - 0.5) / 2.0
        value.absorb_affine(0.5, 2.0)
        torch.testing.assert_close(value(tokens, mask)[mask], twice, rtol=1e-5, atol=1e-5)


def test_the_fresh_head_is_deterministic_and_no_part_of_the_backbone_is(folder, policy):
    first, again, other = (scorer_from_policy(folder, seed) for seed in (3, 3, 4))
    assert scalar_head(first).weight.equal(scalar_head(again).weight)
    assert not scalar_head(first).weight.equal(scalar_head(other).weight)
    backbone = policy.base_model.state_dict()
    assert all(value.equal(backbone[name]) for name, value in first.base_model.state_dict().items())


def test_the_fresh_head_has_deviation_one_over_the_root_of_width_plus_one(tiny_policy, tmp_path):
    tiny_policy("llama", hidden_size=1024, intermediate_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
    weight = scalar_head(scorer_from_policy(tmp_path, seed=0)).weight.detach()
    assert float(weight.std()) * 1025**0.5 == pytest.approx(1.0, abs=4 / (2 * 1024) ** 0.5)
    assert abs(float(weight.mean())) * 1025**0.5 < 4 / 1024**0.5


def test_a_saved_reward_model_loads_plainly_and_scores_the_same(scorer, tmp_path):
    scorer.classifier.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokens = torch.tensor([[40, 41, 42, 43]])
    with torch.no_grad():
        expected = score_sequences(scorer, tokens, torch.ones_like(tokens).bool())
        torch.testing.assert_close(plain(input_ids=tokens).logits[:, 0], expected, rtol=0, atol=1e-6)
    assert load_scorer(tmp_path).config.num_labels == 1


def test_a_saved_policy_loads_plainly_with_tied_embeddings_intact(folder, policy, tiny_tokenizer, tmp_path):
    save_model(policy, make_encoder(tiny_tokenizer, policy.generation_config), tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tied = policy.config.tie_word_embeddings
    inputs, outputs = plain.get_input_embeddings().weight, plain.get_output_embeddings().weight
    assert (inputs.data_ptr() == outputs.data_ptr()) is tied
    keys = load_file(tmp_path / "model.safetensors").keys()
    heads = [key for key in keys if key in ("lm_head.weight", "embed_out.weight")]
    assert len(heads) == (0 if tied else 1)
    tokens = torch.tensor([[40, 41, 42, 43]])
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=tokens).logits, policy(input_ids=tokens).logits, rtol=0, atol=0)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tiny_tokenizer.get_vocab() and again.chat_template == tiny_tokenizer.chat_template


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_mode_computes_what_evaluation_mode_computes(architecture, tiny_policy):
    """Otherwise the ratio of new to old policy does not start at 1."""
    changes = DROPOUT.get(architecture, {"attention_dropout": 0.5})
    model = tiny_policy(architecture, **changes)
    tokens, mask, _ = ragged(model.config.vocab_size)
    rule = SamplingRule(1.0, (1,))
    with torch.no_grad():
        before, _ = response_logprobs(model, tokens, mask, mask[:, -LENGTH:], rule)
        noisy, _ = response_logprobs(model.train(), tokens, mask, mask[:, -LENGTH:], rule)
        assert not torch.allclose(noisy, before), "the architecture has no dropout to be turned off"
        disable_dropout(model)
        after, _ = response_logprobs(model.train(), tokens, mask, mask[:, -LENGTH:], rule)
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def settings(path: str | None, **changes) -> ModelSettings:
    source = {"path": path, "revision": None, "trust_remote_code": False, "architecture": "llama"}
    size = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 280, "context_length": 64}
    size |= {"intermediate_size": None, "num_kv_heads": None, "head_dim": None, "tie_embeddings": True}
    return ModelSettings(**{**source, **size, **changes})


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_model_from_scratch_knows_its_pad_and_its_stop_tokens(architecture, tmp_path):
    torch.manual_seed(0)
    model, tokenizer = start_policy(settings(None, architecture=architecture), lambda: ["a few words", "and more"])
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 32)
    save_model(model, make_encoder(tokenizer, model.generation_config), tmp_path)
    encoder = load_encoder(tmp_path)
    assert encoder.stop_ids == (tokenizer.eos_token_id,) and encoder.end_id == tokenizer.eos_token_id
    assert load_causal(tmp_path).config.pad_token_id == tokenizer.pad_token_id


def gpt2_like(tiny_policy, tiny_tokenizer, folder):
    """A folder as GPT-2 is published: one special token, which is PAD, EOS and BOS, and no chat template."""
    tiny_tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    config["pad_token"] = config["eos_token"]
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    model = tiny_policy("gpt2", pad_token_id=tiny_tokenizer.eos_token_id)
    model.save_pretrained(folder)
    return model


def test_pad_equal_to_eos_is_parted_once_and_stays_parted(tiny_policy, tiny_tokenizer, tmp_path):
    """The vocabulary of GPT-2 has no spare token, so one is added and the embeddings grow by its row."""
    folder, out = tmp_path / "gpt2", tmp_path / "out"
    before = gpt2_like(tiny_policy, tiny_tokenizer, folder)
    known = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    text = json.dumps(known).replace("<|pad|>", "<|was_pad|>")  # no token of a usual PAD name is left
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="no PAD token apart from EOS"):
        load_encoder(folder)
    model, tokenizer = start_policy(settings(str(folder)), None)
    assert tokenizer.pad_token_id == len(tokenizer) - 1 == before.config.vocab_size
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    grown, old = model.get_input_embeddings().weight, before.get_input_embeddings().weight
    assert grown.shape[0] == old.shape[0] + 1 and grown[:-1].equal(old)
    save_model(model, make_encoder(tokenizer, model.generation_config), out)
    again, tokenizer_again = start_policy(settings(str(out)), None)
    assert again.get_input_embeddings().weight.equal(grown) and len(tokenizer_again) == len(tokenizer)
    assert again.config.pad_token_id == tokenizer_again.pad_token_id == tokenizer.pad_token_id
    assert load_encoder(out).stop_ids == (tokenizer.eos_token_id,)


def test_a_spare_pad_token_is_used_before_one_is_added(tiny_policy, tiny_tokenizer, tmp_path):
    before = gpt2_like(tiny_policy, tiny_tokenizer, tmp_path)
    model, tokenizer = start_policy(settings(str(tmp_path)), None)
    assert tokenizer.pad_token == "<|pad|>" and len(tokenizer) == len(tiny_tokenizer)
    assert model.get_input_embeddings().weight.equal(before.get_input_embeddings().weight)


def test_a_folder_without_a_model_is_a_mistake_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no model could be loaded") as error:
        load_causal(tmp_path)
    assert "\n" not in str(error.value)


def test_a_classifier_with_several_labels_is_no_reward_model(folder, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="3 labels"):
        load_scorer(tmp_path)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
THINKING = CHATML.replace(
    "m['content']", "('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content']"
)
TEMPLATES = {
    # name: template, special tokens, EOS, PAD, end of turn
    "chatml": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|pad|>", "<|im_end|>"),
    "qwen": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", "<|endoftext|>", "<|im_end|>"),
    "thinking": (THINKING, ["<|im_start|>", "<|im_end|>"], "<|im_end|>", "<|endoftext|>", "<|im_end|>"),
    "llama3": (
        LLAMA3,
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|end_of_text|>",
        "<|finetune_right_pad_id|>",
        "<|eot_id|>",
    ),
}
CHATS = [
    ([{"role": "user", "content": "why the stones?"}], "for the beach."),
    (
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a lamp"}],
        "in the window\n\nof a street",
    ),
    (
        [
            {"role": "user", "content": "three letters"},
            {"role": "assistant", "content": "none sent"},
            {"role": "user", "content": "and the harbour?"},
        ],
        "",
    ),
]


@pytest.fixture(params=TEMPLATES)
def chat_tokenizer(request, tiny_tokenizer):
    """A tokenizer as chat models have it: the tiny vocabulary, the special tokens and template of a known family."""
    template, special, eos, pad, _ = TEMPLATES[request.param]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(tiny_tokenizer.backend_tokenizer),
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=special,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer, TEMPLATES[request.param][4]


def test_the_end_of_turn_is_a_stop_token_beside_eos(chat_tokenizer):
    tokenizer, end = chat_tokenizer
    end_id = tokenizer.convert_tokens_to_ids(end)
    assert end_of_turn(tokenizer) == end_id
    assert find_stop_ids(tokenizer) == tuple(sorted({tokenizer.eos_token_id, end_id}))
    assert make_encoder(tokenizer, None).end_id == end_id


@pytest.mark.parametrize("listed", [None, 7, [7, 9], [9, 9]])
def test_stop_tokens_of_the_generation_config_are_added(chat_tokenizer, listed):
    tokenizer, end = chat_tokenizer
    generation = GenerationConfig(eos_token_id=listed)
    own = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)}
    more = set() if listed is None else {listed} if isinstance(listed, int) else set(listed)
    assert find_stop_ids(tokenizer, generation) == tuple(sorted(own | more))


def test_every_stop_token_reaches_the_saved_folder(tiny_policy, chat_tokenizer, tmp_path):
    """As Llama 3, which lists <|eot_id|> beside <|end_of_text|> in generation_config.json: each ends a response."""
    tokenizer, end = chat_tokenizer
    policy = tiny_policy("llama", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    policy.generation_config.eos_token_id = [tokenizer.eos_token_id, 9]
    policy.save_pretrained(tmp_path / "in"), tokenizer.save_pretrained(tmp_path / "in")
    model, tokenizer = start_policy(settings(str(tmp_path / "in")), None)
    save_model(model, make_encoder(tokenizer, model.generation_config), tmp_path / "out")
    expected = {tokenizer.eos_token_id, 9, tokenizer.convert_tokens_to_ids(end)}
    assert set(load_encoder(tmp_path / "out").stop_ids) == expected
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert set(plain.generation_config.eos_token_id) == expected


@pytest.mark.parametrize("number", range(len(CHATS)))
def test_prompt_and_response_are_the_rendered_chat_up_to_the_end_of_turn(chat_tokenizer, number):
    tokenizer, end = chat_tokenizer
    prompt, response = CHATS[number]
    encoder = make_encoder(tokenizer, None)
    whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": response}], tokenize=False)
    text = whole[: whole.rindex(end) + len(end)]  # the newline that ChatML puts behind it is no part of the response
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = encoder.response(prompt, response)
    assert encoder.prompt(prompt) + ids == expected
    assert ids[-1] == tokenizer.convert_tokens_to_ids(end) and not set(ids[:-1]) & set(encoder.stop_ids)
    assert encoder.text(ids).endswith(response)


def test_a_prompt_ends_where_generation_begins(chat_tokenizer):
    tokenizer, _ = chat_tokenizer
    encoder, (prompt, _) = make_encoder(tokenizer, None), CHATS[1]
    expected = tokenizer.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True)
    assert encoder.prompt(prompt) == list(getattr(expected, "input_ids", expected))


def test_a_pair_shares_the_ids_of_its_prompt(chat_tokenizer):
    tokenizer, _ = chat_tokenizer
    encoder, (prompt, response) = make_encoder(tokenizer, None), CHATS[0]
    chosen, rejected = encoder.pair(Pair(prompt, response, "no"))
    start = encoder.prompt(prompt)
    assert chosen[: len(start)] == rejected[: len(start)] == start and chosen != rejected
    assert chosen[-1] == rejected[-1] == encoder.end_id


def test_raw_text_is_continued_and_ends_with_the_stop_token(tiny_tokenizer):
    encoder = make_encoder(tiny_tokenizer, None)
    prompt, response = encoder.prompt("the harbour"), encoder.response("the harbour", " was quiet")
    assert encoder.text(prompt + response) == "the harbour was quiet"
    assert response[-1] == tiny_tokenizer.eos_token_id and response.count(response[-1]) == 1
    assert encoder.prompt("") == [] and encoder.response("", "") == [encoder.end_id]


def test_text_behind_a_stop_token_in_the_data_is_cut(tiny_tokenizer):
    encoder = make_encoder(tiny_tokenizer, None)
    assert encoder.response("a", " quiet<|end|> and more") == encoder.response("a", " quiet")


def test_an_eos_that_the_tokenizer_appends_by_itself_does_not_end_the_prompt(tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tiny_tokenizer)
    end = ("<|end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|end|>", special_tokens=[end])
    assert tokenizer("the lamp")["input_ids"][-1] == tokenizer.eos_token_id
    assert make_encoder(tokenizer, None).prompt("the lamp") == make_encoder(tiny_tokenizer, None).prompt("the lamp")


def test_chat_messages_without_a_chat_template_are_a_mistake_of_the_user(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    encoder = make_encoder(tokenizer, None)
    assert end_of_turn(tokenizer) is None and encoder.end_id == tokenizer.eos_token_id
    with pytest.raises(UserError, match="no chat template"):
        encoder.prompt([{"role": "user", "content": "why?"}])


def test_a_tokenizer_without_eos_is_a_mistake_of_the_user(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        ensure_pad(tokenizer)


def test_tokenizers_are_the_same_if_every_token_has_the_same_id(tiny_tokenizer, chat_tokenizer):
    assert same_tokens(tiny_tokenizer, copy.deepcopy(tiny_tokenizer))
    assert not same_tokens(tiny_tokenizer, chat_tokenizer[0])
