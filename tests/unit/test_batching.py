"""Padding, length order, and the endless shuffled passes over the prompts."""

import pytest
import torch

from alignkit.algo.batching import deal, pad_left, pad_right, permutation, prompt_indices, token_cuts

ROWS = [[5, 6, 7], [8], [9, 10]]


def test_prompts_are_padded_on_the_left_and_texts_on_the_right():
    tokens, mask = pad_left(ROWS, 0)
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8], [0, 9, 10]] and tokens.dtype == torch.long
    assert mask.tolist() == [[True] * 3, [False, False, True], [False, True, True]]
    tokens, mask = pad_right(ROWS, 0)
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0]] and tokens.dtype == torch.long
    assert mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]


def test_padding_is_known_by_the_mask_alone():
    """A real token that happens to have PAD's id stays real."""
    for pad in (pad_left, pad_right):
        tokens, mask = pad([[0, 0], [0]], 0)
        assert mask.sum(dim=1).tolist() == [2, 1]
        assert [row[keep].tolist() for row, keep in zip(tokens, mask)] == [[0, 0], [0]]


@pytest.mark.parametrize("budget", [1, 7, 40, 64, 1000])
def test_micro_batches_hold_no_more_than_their_budget(budget):
    lengths = torch.tensor([1, 1, 2, 5, 8, 8, 13, 20, 21, 64])
    sizes = token_cuts(lengths, budget)
    assert sum(sizes) == len(lengths)
    parts = lengths.split(sizes)
    for part, following in zip(parts, [*parts[1:], None]):
        assert len(part) * int(part.max()) <= budget or len(part) == 1
        if following is not None:
            assert (len(part) + 1) * int(following[0]) > budget, "another row would have fitted"


def test_a_permutation_depends_on_its_seeds_alone():
    first = permutation(50, 1, 2)
    torch.rand(3)  # the global stream is neither read nor moved
    assert permutation(50, 1, 2).equal(first) and sorted(first.tolist()) == list(range(50))
    state = torch.get_rng_state()
    others = [permutation(50, *seeds) for seeds in [(2, 1), (1, 2, 0), (12,), (1, 3)]]
    assert not any(other.equal(first) for other in others) and torch.get_rng_state().equal(state)


@pytest.mark.parametrize("num_prompts", [1, 7, 10])
def test_every_pass_shows_each_prompt_once(num_prompts):
    passes = prompt_indices(0, 4 * num_prompts, num_prompts, seed=3).reshape(4, num_prompts)
    assert all(sorted(row.tolist()) == list(range(num_prompts)) for row in passes)
    if num_prompts > 1:
        assert len({tuple(row.tolist()) for row in passes}) > 1, "each pass has an order of its own"


@pytest.mark.parametrize("batch", [1, 3, 7, 10, 23])
def test_the_sequence_does_not_depend_on_how_it_is_cut(batch):
    """So a resumed run, or one with another batch size, sees the same prompts in the same order."""
    whole = prompt_indices(0, 70, 10, seed=3)
    parts = [prompt_indices(start, min(batch, 70 - start), 10, seed=3) for start in range(0, 70, batch)]
    assert torch.cat(parts).equal(whole)


def test_a_batch_larger_than_the_data_goes_round():
    assert sorted(prompt_indices(0, 6, 2, seed=0).tolist()) == [0, 0, 0, 1, 1, 1]


def test_another_seed_gives_another_order():
    assert not prompt_indices(0, 40, 40, seed=0).equal(prompt_indices(0, 40, 40, seed=1))


@pytest.mark.parametrize("count, ranks", [(64, 8), (7, 2), (3, 4), (1, 3), (130, 16)])
def test_every_rank_is_dealt_about_as_many_tokens(count, ranks):
    lengths = torch.randint(1, 513, (count,), generator=torch.Generator().manual_seed(count))
    rows, real = deal(lengths, ranks)
    assert sorted(rows[real].tolist()) == list(range(count)), "each row once"
    assert rows.shape == real.shape == (ranks, -(-count // ranks)) and not rows[~real].any()
    assert int(real.sum(dim=1).max() - real.sum(dim=1).min()) <= 1
    tokens = torch.where(real, lengths[rows], 0).sum(dim=1)
    assert int(tokens.max() - tokens.min()) <= int(lengths.max()), "no rank has more than one row's tokens more"


def test_dealing_by_length_is_better_than_in_order():
    lengths = torch.randint(1, 513, (128,), generator=torch.Generator().manual_seed(0)).sort().values
    rows, _ = deal(lengths, 8)
    share = lengths.sum() / 8
    assert float(lengths[rows].sum(dim=1).max() / share) < 1.02
    assert float(lengths.view(8, 16).sum(dim=1).max() / share) > 1.8
