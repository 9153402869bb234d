"""The decoding loop against Hugging Face's own, row by row, and against the log-probabilities of training."""

import pytest
import torch
from pydantic import ValidationError

from alignkit.algo.batching import pad_left
from alignkit.algo.sampling import SamplingRule, uniform_noise
from alignkit.algo.types import PromptBatch
from alignkit.models.policy import response_logprobs
from alignkit.rollout.native import Native, decode

STEPS = 14
LENGTHS = [1, 9, 4, 6, 2, 7, 3, 5]
STOPS = tuple(range(2, 42))  # every seventh token stops, so that rows end in different places
GREEDY = 1e-5  # a temperature at which the most probable token has all of the probability


def batch_of(lengths: list[int] = LENGTHS) -> PromptBatch:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(42, 280, (length,), generator=generator).tolist() for length in lengths]
    tokens, mask = pad_left(rows, 0)
    return PromptBatch(tokens=tokens, mask=mask, index=torch.arange(len(rows)))


def engine(batch: int = 64, min_response: int = 0, temperature: float = 1.0) -> Native:
    return Native(temperature=temperature, min_response=min_response, max_response=STEPS, batch=batch, unshard=True)


def rule_of(native: Native, stops: tuple[int, ...] = STOPS) -> SamplingRule:
    return SamplingRule(native.temperature, stops, native.min_response)


def generate(model, native: Native, prompts: PromptBatch, stops: tuple[int, ...] = STOPS):
    noise = uniform_noise(0, 0, prompts.index, native.max_response)
    return native.generate(model, prompts, rule_of(native, stops), noise, bool)


@pytest.fixture(scope="module")
def sampled(tiny_policy):
    """A policy in float64, where no token can flip at a boundary, its prompts and their rollout."""
    model, prompts = tiny_policy("llama").double(), batch_of()
    return model, prompts, generate(model, engine(), prompts)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "mistral", "falcon", "opt"])
def test_greedy_decoding_equals_hugging_face_token_for_token(architecture, tiny_policy):
    """Left-padded ragged prompts, two of the families with a sliding window shorter than the prompts."""
    model, prompts = tiny_policy(architecture, seed=2).double(), batch_of()
    common = {"do_sample": False, "max_new_tokens": STEPS, "pad_token_id": 0}
    inputs = {"input_ids": prompts.tokens, "attention_mask": prompts.mask.long()}
    model.generation_config.eos_token_id = None
    free = model.generate(**inputs, **common)[:, prompts.tokens.shape[1] :]
    stops = tuple({int(free[0, 2]), int(free[1, 5]), int(free[2, 0])})
    expected = model.generate(**inputs, **common, eos_token_id=list(stops))[:, prompts.tokens.shape[1] :]
    rollout = generate(model, engine(temperature=GREEDY), prompts, stops)
    width = expected.shape[1]
    torch.testing.assert_close(rollout.response[:, :width], expected, rtol=0, atol=0)
    lengths = rollout.response_mask.sum(dim=1)
    assert len(set(lengths.tolist())) >= 2, "rows that all end together would not test the dropping of rows"


def test_rows_that_leave_the_batch_change_no_other_row(sampled):
    model, prompts, rollout = sampled
    noise = uniform_noise(0, 0, prompts.index, STEPS)
    lengths = rollout.response_mask.sum(dim=1)
    assert int(lengths.min()) < int(lengths.max()) and len(lengths.unique()) >= 4
    for row in range(len(LENGTHS)):
        tokens = prompts.tokens[row][prompts.mask[row]][None]
        alone, logprobs = decode(
            model, tokens, torch.ones_like(tokens).bool(), rule_of(engine()), noise[row : row + 1], bool
        )
        real = rollout.response_mask[row]
        assert alone[0][real].equal(rollout.response[row][real])
        torch.testing.assert_close(logprobs[0][real], rollout.engine_logprobs[row][real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 8, 100])
def test_the_result_does_not_depend_on_how_many_rows_are_decoded_at_once(sampled, batch):
    model, prompts, rollout = sampled
    split = generate(model, engine(batch=batch), prompts)
    assert split.response_mask.equal(rollout.response_mask) and split.finished.equal(rollout.finished)
    assert split.response[split.response_mask].equal(rollout.response[rollout.response_mask])


def test_the_order_of_prompts_moves_rows_and_changes_none(sampled):
    model, prompts, rollout = sampled
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    moved = generate(model, engine(batch=3), PromptBatch(prompts.tokens[order], prompts.mask[order], order))
    assert moved.response_mask.equal(rollout.response_mask[order])
    assert moved.response[moved.response_mask].equal(rollout.response[order][rollout.response_mask[order]])


def test_more_padding_on_the_left_changes_nothing(sampled):
    model, prompts, rollout = sampled
    pad = (6, 0)
    wide = PromptBatch(
        torch.nn.functional.pad(prompts.tokens, pad, value=77),
        torch.nn.functional.pad(prompts.mask, pad),
        prompts.index,
    )
    again = generate(model, engine(), wide)
    assert again.response_mask.equal(rollout.response_mask)
    assert again.response[again.response_mask].equal(rollout.response[rollout.response_mask])


def test_masks_and_finished_flags_follow_the_stop_token(sampled):
    _, prompts, rollout = sampled
    width = prompts.tokens.shape[1]
    assert rollout.prompt_width == width and rollout.tokens.shape == (8, width + STEPS)
    assert rollout.tokens[:, :width].equal(prompts.tokens) and rollout.mask[:, :width].equal(prompts.mask)
    assert rollout.mask[:, width:].equal(rollout.response_mask)
    for row in range(8):
        response, length = rollout.response[row].tolist(), int(rollout.response_mask[row].sum())
        stops = [place for place, token in enumerate(response) if token in STOPS]
        assert bool(rollout.finished[row]) is bool(stops)
        assert length == (stops[0] + 1 if stops else STEPS)
        assert set(response[length:]) <= {0}, "after its stop token a row holds PAD"
    assert 0 < int(rollout.finished.sum()) < 8, "both kinds of row are needed here"


@pytest.mark.parametrize("min_response", [1, 3, STEPS - 1])
def test_no_response_ends_before_min_response(sampled, min_response):
    """Stop tokens are forbidden among the first `min_response`: a response has at least one token more."""
    model, prompts, _ = sampled
    native = engine(min_response=min_response)
    rollout = generate(model, native, prompts)
    assert int(rollout.response_mask.sum(dim=1).min()) >= min_response + 1
    assert not torch.isin(rollout.response[:, :min_response], torch.tensor(STOPS)).any()
    assert rollout.finished.any() or min_response > 3, "a later token may end it"
    mask = rollout.response_mask
    logprobs, _ = response_logprobs(model, rollout.tokens, rollout.mask, rollout.response_mask, rule_of(native))
    assert torch.isfinite(logprobs[mask]).all(), "what was sampled is possible under the rule of training"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "qwen3"])
def test_training_gives_the_log_probabilities_that_the_sampler_saw(architecture, tiny_policy):
    """Step by step without a cache, on each row alone, in the order in which tokens were drawn."""
    model, prompts, native = tiny_policy(architecture, seed=1).double(), batch_of(), engine(temperature=0.7)
    rollout, rule = generate(model, native, prompts), rule_of(native)
    with torch.no_grad():
        logprobs, _ = response_logprobs(model, rollout.tokens, rollout.mask, rollout.response_mask, rule)
        for row in range(8):
            ids = rollout.tokens[row][rollout.mask[row]][None]
            start = int(prompts.mask[row].sum())
            for step in range(int(rollout.response_mask[row].sum())):
                seen = rule.apply(model(input_ids=ids[:, : start + step]).logits[:, -1:], place=step)[0, 0]
                expected = seen.log_softmax(-1)[ids[0, start + step]]
                torch.testing.assert_close(logprobs[row, step], expected, rtol=0, atol=1e-6)


def test_sampling_explores(sampled):
    """Other noise, other responses: a sampler that falls back to greedy decoding learns nothing."""
    model, prompts, rollout = sampled
    noise = uniform_noise(0, 1, prompts.index, STEPS)
    other = engine().generate(model, prompts, rule_of(engine()), noise, bool)
    first = torch.stack([rollout.response[:, 0], other.response[:, 0]])
    assert int((first[0] != first[1]).sum()) >= 6


def test_first_tokens_follow_the_models_probabilities(tiny_policy):
    """Chi-square over 4,000 samples of one prompt, tokens expected fewer than 20 times taken together."""
    model, count = tiny_policy("llama", seed=4), 4_000
    tokens = torch.tensor([[50, 60, 70]])
    prompts = PromptBatch(tokens.expand(count, -1), torch.ones(count, 3, dtype=torch.bool), torch.arange(count))
    native = Native(temperature=0.8, min_response=0, max_response=1, batch=1_000, unshard=True)
    drawn = generate(model, native, prompts).response[:, 0].bincount(minlength=280).double()
    with torch.no_grad():
        expected = (model(input_ids=tokens).logits[0, -1].double() / 0.8).softmax(-1) * count
    often = expected >= 20
    seen = torch.cat([drawn[often], drawn[~often].sum()[None]])
    hoped = torch.cat([expected[often], expected[~often].sum()[None]])
    freedom = len(seen) - 1
    assert freedom >= 10
    assert float(((seen - hoped) ** 2 / hoped).sum()) < freedom + 4 * (2 * freedom) ** 0.5


def test_a_minimum_that_leaves_no_room_is_refused():
    with pytest.raises(ValidationError, match="min_response=14 must be below max_response=14"):
        engine(min_response=STEPS)


def test_a_prompt_with_several_responses_is_read_once(tiny_policy):
    model, seen = tiny_policy("gpt_neox").double(), []
    alone = [[5, 6, 7], [8], [9, 10, 11, 12]]
    tokens, mask = pad_left([row for row in alone for _ in range(3)], 0)
    order = torch.tensor([8, 0, 4, 1, 3, 7, 2, 6, 5])
    prompts = PromptBatch(tokens[order], mask[order], order)
    noise = uniform_noise(0, 0, order, STEPS)
    handle = model.register_forward_pre_hook(
        lambda _, __, named: seen.append(len(named["input_ids"])), with_kwargs=True
    )
    rollout = engine().generate(model, prompts, rule_of(engine()), noise, bool)
    handle.remove()
    assert seen[:2] == [3, 9]
    for row, number in enumerate(order.tolist()):
        one = PromptBatch(tokens[number : number + 1], mask[number : number + 1], order[row : row + 1])
        single = engine().generate(model, one, rule_of(engine()), noise[row : row + 1], bool)
        assert single.response.equal(rollout.response[row : row + 1])
