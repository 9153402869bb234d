"""Log-probabilities without a tensor of all logits: pieces, scales after the head, packed and padded rows."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from alignkit.algo.sampling import SamplingRule
from alignkit.errors import UserError
from alignkit.models import policy as policy_module
from alignkit.models.policy import logits_of, logprobs_at, response_logprobs
from alignkit.models.scalar import ScalarModel
from alignkit.stages.actors import pack

RULE = SamplingRule(temperature=0.8, stop_ids=(1,), min_response=2)
COMMON = {"vocab_size": 90, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 48, "head_dim": 16, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
AFTER_THE_HEAD = {  # what these make of the head's output, none of which alignkit names
    "gemma2": {**SMALL, "final_logit_softcapping": 3.0, "sliding_window": 8},
    "cohere": {**SMALL, "logit_scale": 0.25},
    "granite": {**SMALL, "logits_scaling": 4.0},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "n_positions": 64},
    "qwen2_moe": {
        **SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    },
}  # fmt: skip


def model_of(architecture: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**COMMON, **AFTER_THE_HEAD[architecture]})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def rows_of(vocab_size: int, lengths: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(2, vocab_size, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    return tokens, torch.arange(width) >= width - torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("architecture", sorted(AFTER_THE_HEAD))
def test_what_a_model_does_after_its_head_is_done(architecture):
    model = model_of(architecture)
    tokens, mask = rows_of(COMMON["vocab_size"], [12, 12, 12], 12)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        hidden = model.base_model(input_ids=tokens).last_hidden_state
        torch.testing.assert_close(logits_of(model, hidden[1]), expected[1], rtol=1e-5, atol=1e-5)
        logprobs, _ = response_logprobs(model, tokens, mask, mask[:, -5:], SamplingRule(1.0, (1,)))
        exact = expected.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)[:, -5:]
        torch.testing.assert_close(logprobs, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entropy", [False, True])
def test_logits_in_pieces_give_the_same_values_and_gradients(entropy, tiny_policy, monkeypatch):
    """And no piece holds more than its bytes."""
    model, largest = tiny_policy("gpt_neox").double(), []
    tokens, mask = rows_of(model.config.vocab_size, [9, 5, 14], 14)
    wanted = mask & (torch.arange(14) >= torch.tensor([7, 12, 3])[:, None])
    genuine = policy_module.token_logprobs

    def seen(logits, targets):
        largest.append(logits.numel())
        return genuine(logits, targets)

    monkeypatch.setattr(policy_module, "token_logprobs", seen)
    found = []
    for rows in (1000, 5, 1):
        monkeypatch.setattr(policy_module, "LOGITS_BYTES", rows * 4 * model.config.vocab_size)
        largest.clear()
        model.zero_grad()
        parts = logprobs_at(model, tokens, mask, wanted, RULE, entropy=entropy)
        assert all(len(part) == int(wanted.sum()) for part in parts)
        sum((part * torch.arange(1.0, len(part) + 1)).sum() for part in parts).backward()
        found.append([part.detach() for part in parts] + [p.grad.clone() for p in model.parameters()])
        assert max(largest) <= rows * model.config.vocab_size
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


def test_a_micro_batch_without_a_response_still_has_a_gradient(tiny_policy):
    """As a rank that fills a short hand up has nothing to learn there, but must keep step."""
    model = tiny_policy("llama")
    tokens, mask = rows_of(model.config.vocab_size, [4, 6], 6)
    (logprobs,) = logprobs_at(model, tokens, mask, torch.zeros_like(mask), RULE)
    assert logprobs.shape == (0,)
    logprobs.sum().backward()
    assert all(float(p.grad.abs().sum()) == 0.0 for p in model.parameters() if p.grad is not None)


def test_what_padding_holds_is_not_computed(tiny_policy):
    """Prompts padded on the left and responses on the right take no more columns than the longest row."""
    model, widths = tiny_policy("llama"), []
    handle = model.base_model.register_forward_pre_hook(
        lambda _, __, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    tokens = torch.randint(2, 90, (2, 20))
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[0, :12], mask[1, 9:] = True, True  # a long prompt with a short response, and the other way round
    response_logprobs(model, tokens, mask, mask[:, 10:], RULE)
    handle.remove()
    assert widths == [12]


PACKED = ["llama", "qwen3", "mistral", "gemma3_text", "phi3", "gpt_neox", "gpt2"]
BEGIN = [15, 1, 6, 10]  # where the responses of the rows begin, one of them with the second token


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("architecture", PACKED)
def test_packed_rows_give_what_padded_rows_give(architecture, dtype, limit, tiny_policy):
    """And their gradient. (Gemma computes its norms in float32 whatever its weights are.)"""
    limit = 1e-5 if architecture == "gemma3_text" else limit
    model = tiny_policy(architecture).to(dtype)
    tokens, mask = rows_of(model.config.vocab_size, [9, 14, 16, 2], 16)
    mask = mask.flip(0)  # a row that is long after one that is short
    response = mask & (torch.arange(16) >= torch.tensor(BEGIN)[:, None])
    found = []
    for packed in (False, True):
        if packed:
            pack(model)
        model.zero_grad()
        logprobs, _ = response_logprobs(model, tokens, mask, response[:, 1:], RULE)
        logprobs.square().sum().backward()
        found.append([logprobs.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        assert float((a - b).norm()) <= limit * float(a.norm())


@pytest.mark.parametrize("architecture", ["opt", "falcon"])
def test_where_rows_would_see_each_other_packing_is_refused(architecture, tiny_policy):
    with pytest.raises(UserError, match="ppo.packing=true: the rows of a .*ForCausalLM cannot be laid end to end"):
        pack(tiny_policy(architecture))


def test_a_packed_scalar_model_reads_the_same_values(tiny_policy, tmp_path):
    from alignkit.models.loading import scorer_from_policy

    tiny_policy("llama").save_pretrained(tmp_path)
    model = ScalarModel(scorer_from_policy(tmp_path, seed=1)).double()
    tokens, mask = rows_of(90, [3, 8, 5], 8)
    before = model(tokens, mask)
    pack(model)
    torch.testing.assert_close(model(tokens, mask), before, rtol=1e-10, atol=1e-12)
    assert model(tokens, mask)[~mask].abs().sum() == 0


def test_a_value_model_of_the_users_own_is_left_as_it_is():
    """A reward source may bring one: any module of (tokens, mask)."""
    model = torch.nn.Linear(1, 1)
    pack(model)
    assert not hasattr(model, "rows_are_packed")
