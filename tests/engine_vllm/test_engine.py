"""The engine `vllm`, really run: its weights are the policy's after every move, its rollouts keep native's promises.

.ci/vllm, or in an environment with vLLM: pytest -m vllm
"""

import copy
import random
from dataclasses import replace

import numpy
import pytest
import torch

from alignkit.algo.batching import pad_left
from alignkit.algo.sampling import SamplingRule, uniform_noise
from alignkit.algo.types import PromptBatch
from alignkit.errors import UserError
from alignkit.models.adapters import adapters_off, add_adapter
from alignkit.models.policy import response_logprobs
from alignkit.models.settings import PeftSettings
from alignkit.rollout import vllm

pytestmark = pytest.mark.vllm
STEPS = 14
LENGTHS = [1, 9, 4, 6, 2, 7, 3, 5]
STOPS = tuple(range(2, 42))  # every seventh token stops, so that rows end in different places
ENGINE = vllm.VLLM(
    temperature=0.7, min_response=3, max_response=STEPS, unshard=True, kv_cache_gib=0.125, gpu_memory_utilization=0.3,
    sleep=True, eager=True,
)  # fmt: skip
WIDE = {"head_dim": 32}  # vLLM's attention on a CPU knows no narrower heads
MODELS = {
    "tied": ("llama", WIDE),
    "untied": ("llama", {**WIDE, "tie_word_embeddings": False}),
    "qwen3": ("qwen3", WIDE),
    "mistral": ("mistral", WIDE),
    "gpt2": ("gpt2", {"n_head": 1}),
    "gpt_neox": ("gpt_neox", {"num_attention_heads": 1}),
}


def batch_of(lengths: list[int] = LENGTHS) -> PromptBatch:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(42, 280, (length,), generator=generator).tolist() for length in lengths]
    tokens, mask = pad_left(rows, 0)
    return PromptBatch(tokens=tokens, mask=mask, index=torch.arange(len(rows)))


def rule_of(engine: vllm.VLLM) -> SamplingRule:
    return SamplingRule(engine.temperature, STOPS, engine.min_response)


def generate(model, engine: vllm.VLLM = ENGINE, prompts: PromptBatch | None = None, iteration: int = 0):
    prompts = prompts or batch_of()
    noise = uniform_noise(0, iteration, prompts.index, engine.max_response)
    return engine.generate(model, prompts, rule_of(engine), noise, bool)


def difference(model, engine: vllm.VLLM = ENGINE) -> float:
    """The largest between the engine's log-probabilities and the trainer's, over all tokens of a rollout, nats."""
    rollout = generate(model, engine)
    with torch.no_grad():
        ours, _ = response_logprobs(model, rollout.tokens, rollout.mask, rollout.response_mask, rule_of(engine))
    assert rollout.engine_logprobs.dtype == torch.float32
    return float((ours - rollout.engine_logprobs)[rollout.response_mask].abs().max())


def move(model, seed: int = 0) -> None:
    """A random step of every parameter that is trained."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)


ADAPTERS = {
    "lora": ("lora", {"r": 4, "target_modules": "all-linear"}),
    "dora": ("lora", {"r": 4, "target_modules": "all-linear", "use_dora": True}),
    "ia3": ("ia3", {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "bitfit": ("bitfit", {}),
}


def put_on(model, name: str):
    method, settings = ADAPTERS[name]
    add_adapter(model, PeftSettings(method=method, settings=settings, quantization={}, merge=True), "CAUSAL_LM")
    return model


@pytest.mark.parametrize("name", MODELS)
def test_engine_and_trainer_agree_after_every_parameter_has_moved(name, tiny_policy):
    architecture, changes = MODELS[name]
    model = tiny_policy(architecture, **changes)
    assert difference(model) < 1e-4
    for step in (1, 2):
        before = copy.deepcopy(model.state_dict())
        move(model, step)
        assert all(not before[key].equal(value) for key, value in model.state_dict().items() if key in before)
        assert difference(model) < 1e-4


PARTS = ("lm_head", "embed_tokens", "q_proj", "down_proj", "layernorm", "model.norm")


@pytest.mark.parametrize("name, part", [("tied", "lm_head"), *(("untied", part) for part in PARTS)])
def test_the_check_sees_a_weight_that_was_not_handed_over(name, part, tiny_policy, monkeypatch):
    """Above all the tied head: vLLM keeps a copy of it, which goes stale without a word."""
    architecture, changes = MODELS[name]
    model = tiny_policy(architecture, **changes)
    difference(model)
    move(model)
    whole = vllm.whole_weights
    monkeypatch.setattr(vllm, "whole_weights", lambda model: (pair for pair in whole(model) if part not in pair[0]))
    assert not difference(model) <= 1e-3, "a weight that nobody has written may hold anything, NaN too"
    monkeypatch.undo()
    assert difference(model) < 1e-4


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_adapter_is_handed_over_merged_and_stays_as_it_was(method, tiny_policy):
    architecture, changes = MODELS["gpt2" if method == "bitfit" else "tied"]
    model = put_on(tiny_policy(architecture, **changes), method)
    start = generate(model)
    move(model)
    before = copy.deepcopy(model.state_dict())
    assert difference(model) < 1e-4
    assert all(before[key].equal(value) for key, value in model.state_dict().items())
    moved = generate(model)
    assert not moved.tokens.equal(start.tokens)
    with adapters_off(model):
        assert difference(model) < 1e-4
        assert generate(model).tokens.equal(start.tokens), "switched off, it is the base"


def test_the_names_are_those_of_the_base(tiny_policy):
    model = tiny_policy("llama", **WIDE)
    plain = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in vllm.whole_weights(put_on(model, "lora"))} == plain


def test_masks_and_finished_flags_follow_the_stop_token(tiny_policy):
    model, prompts = tiny_policy("llama", **WIDE), batch_of()
    rollout, width = generate(model), prompts.tokens.shape[1]
    assert rollout.prompt_width == width and rollout.tokens.shape == (8, width + STEPS)
    assert rollout.tokens[:, :width].equal(prompts.tokens) and rollout.mask[:, :width].equal(prompts.mask)
    assert rollout.mask[:, width:].equal(rollout.response_mask)
    assert (rollout.engine_logprobs[~rollout.response_mask] == 0).all()
    assert (rollout.engine_logprobs[rollout.response_mask] < 0).all()
    for row in range(8):
        response, length = rollout.response[row].tolist(), int(rollout.response_mask[row].sum())
        stops = [place for place, token in enumerate(response) if token in STOPS]
        assert bool(rollout.finished[row]) is bool(stops)
        assert length == (stops[0] + 1 if stops else STEPS)
        assert set(response[length:]) <= {0}, "after its stop token a row holds PAD"
    assert 0 < int(rollout.finished.sum()) < 8, "both kinds of row are needed here"


@pytest.mark.parametrize("min_response", [1, 3, STEPS - 1])
def test_no_response_ends_before_min_response(min_response, tiny_policy):
    model, engine = tiny_policy("llama", **WIDE), replace(ENGINE, min_response=min_response)
    rollout = generate(model, engine)
    assert int(rollout.response_mask.sum(dim=1).min()) >= min_response + 1
    assert not torch.isin(rollout.response[:, :min_response], torch.tensor(STOPS)).any()
    assert rollout.finished.any() or min_response > 3, "a later token may end it"
    assert difference(model, engine) < 1e-4


def test_eos_is_forbidden_and_ends_a_response_only_if_the_rule_says_so(tiny_policy):
    """The model's EOS is none of the stop tokens here and comes often."""
    model = tiny_policy("llama", **WIDE, tie_word_embeddings=False, eos_token_id=100)
    with torch.no_grad():
        model.model.norm.weight[0], model.model.embed_tokens.weight[:, 0], model.lm_head.weight[100, 0] = 3.0, 3.0, 3.0
    rollout = generate(model)
    places = rollout.response[:, : ENGINE.min_response] == 100
    assert places.any() and rollout.response_mask[:, ENGINE.min_response].all()
    assert difference(model) < 1e-4


def test_the_same_seeds_give_the_same_tokens_and_others_others(tiny_policy):
    model = tiny_policy("llama", **WIDE)
    first, again, other = generate(model), generate(model), generate(model, iteration=1)
    assert first.tokens.equal(again.tokens) and first.engine_logprobs.equal(again.engine_logprobs)
    assert int((first.response[:, 0] != other.response[:, 0]).sum()) >= 6


def test_the_order_of_prompts_moves_rows_and_changes_none(tiny_policy):
    model, prompts = tiny_policy("llama", **WIDE), batch_of()
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    rollout = generate(model)
    moved = generate(model, prompts=PromptBatch(prompts.tokens[order], prompts.mask[order], order))
    assert moved.response.equal(rollout.response[order])
    half = generate(model, prompts=PromptBatch(prompts.tokens[:4], prompts.mask[:4], prompts.index[:4]))
    assert half.response.equal(rollout.response[:4])


def test_first_tokens_follow_the_models_probabilities(tiny_policy):
    """Chi-square over 2,000 samples of one prompt, tokens expected fewer than 20 times taken together."""
    model, count = tiny_policy("llama", seed=4, **WIDE), 2_000
    tokens = torch.tensor([[50, 60, 70]])
    prompts = PromptBatch(tokens.expand(count, -1), torch.ones(count, 3, dtype=torch.bool), torch.arange(count))
    engine = replace(ENGINE, temperature=0.8, min_response=0, max_response=1)
    drawn = generate(model, engine, prompts).response[:, 0].bincount(minlength=280).double()
    with torch.no_grad():
        expected = (model(input_ids=tokens).logits[0, -1].double() / 0.8).softmax(-1) * count
    often = expected >= 20
    seen = torch.cat([drawn[often], drawn[~often].sum()[None]])
    hoped = torch.cat([expected[often], expected[~often].sum()[None]])
    freedom = len(seen) - 1
    assert freedom >= 8
    assert float(((seen - hoped) ** 2 / hoped).sum()) < freedom + 4 * (2 * freedom) ** 0.5


def test_starting_the_engine_leaves_the_generators_alone(tiny_policy):
    model = tiny_policy("llama", **WIDE, num_hidden_layers=1)  # a config that no other test has: a new engine
    torch.manual_seed(7), random.seed(7), numpy.random.seed(7)
    expected = torch.rand(3), random.random(), numpy.random.rand()
    torch.manual_seed(7), random.seed(7), numpy.random.seed(7)
    generate(model)
    generate(model)
    seen = torch.rand(3), random.random(), numpy.random.rand()
    assert seen[0].equal(expected[0]) and seen[1:] == expected[1:]


def test_a_compiled_engine_agrees_as_well(tiny_policy):
    model, engine = tiny_policy("llama", **WIDE), replace(ENGINE, eager=False)
    assert difference(model, engine) < 1e-4
    move(model)
    assert difference(model, engine) < 1e-4


def test_what_vllm_cannot_do_is_told_in_a_line(tiny_policy):
    with pytest.raises(UserError, match="on a CPU vLLM has attention heads of .* not of 16"):
        generate(tiny_policy("llama"))
    with pytest.raises(UserError, match="rollout=vllm: vLLM says: .*[Mm]emory"):
        generate(tiny_policy("llama", **WIDE), replace(ENGINE, kv_cache_gib=100_000.0))
    with pytest.raises(UserError, match="room for 96 tokens of a sequence, 109 are needed"):
        generate(tiny_policy("llama", **WIDE), replace(ENGINE, max_response=100))
