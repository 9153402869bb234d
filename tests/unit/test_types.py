"""The values passed between the steps: trimming keeps every real entry, nothing broadcasts, masks are bool."""

from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from alignkit.algo.types import Minibatch, Rollout, require_bool, same_shape

PROMPTS, RESPONSES = [2, 4, 1], [3, 1, 2]  # real lengths, in rectangles 5 and 4 wide


def rollout() -> Rollout:
    mask = torch.tensor(
        [[i >= 5 - p for i in range(5)] + [i < r for i in range(4)] for p, r in zip(PROMPTS, RESPONSES)]
    )
    tokens = torch.arange(100, 127).reshape(3, 9)
    return Rollout(
        tokens=tokens,
        mask=mask,
        response_mask=mask[:, 5:],
        finished=torch.tensor([True, False, True]),
        engine_logprobs=torch.zeros(mask[:, 5:].shape),
    )


def minibatch(extra_slot: bool = False) -> Minibatch:
    """extra_slot: a value on the slot after the response, as with score_position=eos_plus_one."""
    whole = rollout()
    value_mask = whole.response_mask.clone()
    if extra_slot:
        value_mask[:, 1:] |= whole.response_mask[:, :-1]
    names = ["old_logprobs", "ref_logprobs", "old_values", "advantages", "importance", "returns"]
    numbers = {name: torch.arange(12.0).reshape(3, 4) + 50 * k for k, name in enumerate(names)}
    return Minibatch(
        tokens=whole.tokens, mask=whole.mask, response_mask=whole.response_mask, value_mask=value_mask, **numbers
    )


def test_prompt_and_response_are_cut_where_the_response_mask_begins():
    whole = rollout()
    assert whole.prompt_width == 5
    torch.testing.assert_close(whole.response, whole.tokens[:, 5:], rtol=0, atol=0)


def test_rows_of_a_rollout_are_trimmed_to_the_longest_prompt_and_response_among_them():
    part = rollout().rows(torch.tensor([2, 0]))
    assert part.prompt_width == 2 and part.response_mask.shape == (2, 3)
    assert part.tokens.tolist() == [[121, 122, 123, 124, 125], [103, 104, 105, 106, 107]]
    assert part.mask.tolist() == [[False, True, True, True, False], [True] * 5]
    assert part.finished.tolist() == [True, True]


@pytest.mark.parametrize("index", [[0], [1], [2], [0, 1], [2, 1, 0]])
def test_trimming_loses_no_real_token(index):
    whole, part = rollout(), rollout().rows(torch.tensor(index))
    for row, number in enumerate(index):
        torch.testing.assert_close(part.tokens[row][part.mask[row]], whole.tokens[number][whole.mask[number]])
        real = part.response_mask[row]
        torch.testing.assert_close(part.response[row][real], whole.response[number][whole.response_mask[number]])
    assert part.mask[:, 0].any() and part.response_mask[:, -1].any(), "a column that no row needs is left"


@pytest.mark.parametrize("extra_slot, longest", [(False, 3), (True, 4)])
def test_rows_of_a_minibatch_keep_every_field_in_step(extra_slot, longest):
    whole, part = minibatch(extra_slot), minibatch(extra_slot).rows(torch.tensor([2, 0]))
    assert len(part) == 2
    for field in fields(Minibatch):
        before, after = getattr(whole, field.name), getattr(part, field.name)
        if field.name in ("tokens", "mask"):
            torch.testing.assert_close(after, before[[2, 0]][:, 3 : 5 + longest])
        else:
            torch.testing.assert_close(after, before[[2, 0]][:, :longest])


def test_the_slot_after_the_longest_response_is_not_trimmed():
    part = minibatch(extra_slot=True).rows(torch.tensor([1]))
    assert part.response_mask.tolist() == [[True, False]] and part.value_mask.tolist() == [[True, True]]
    assert part.tokens.shape[1] == 4 + 2, "the prompt and the slots"


def test_rows_that_are_not_real_have_nothing_to_learn():
    part = minibatch(extra_slot=True).only(torch.tensor([True, False, True]))
    assert part.response_mask.sum(dim=1).tolist() == [3, 0, 2] and part.value_mask.sum(dim=1).tolist() == [4, 0, 3]
    assert part.mask.equal(minibatch().mask), "the model still sees the row, so that all ranks make the same calls"
    assert part.rows(torch.tensor([1])).response_mask.shape == (1, 1)


def test_values_are_frozen():
    with pytest.raises(FrozenInstanceError):
        rollout().tokens = torch.zeros(1)


def test_shapes_that_would_broadcast_are_refused_with_both_names():
    with pytest.raises(ValueError, match=r"'a': \(2, 3\).*'b': \(3,\)"):
        same_shape(a=torch.zeros(2, 3), b=torch.zeros(3))
    same_shape(a=torch.zeros(2, 3), b=torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.uint8])
def test_a_mask_that_is_not_bool_is_refused(dtype):
    with pytest.raises(ValueError, match=f"response_mask must be a bool tensor, got {dtype}"):
        require_bool(response_mask=torch.ones(2, dtype=dtype))
