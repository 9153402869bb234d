"""Rows of token ids as rectangles, and a mask that says which entries are real."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor


def pad_left(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of ids -> tokens [B, T] int64 and mask [B, T] bool, padding on the left (prompts)."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(width)[None, :] >= (width - lengths)[:, None]


def pad_right(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of ids -> tokens [B, T] int64 and mask [B, T] bool, padding on the right (whole texts)."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([list(row) + [pad_id] * (width - len(row)) for row in rows], dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(width)[None, :] < lengths[:, None]


def deal(lengths: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """Rows dealt over ranks like cards, from the longest to the shortest, there and back: every rank gets equally many
    (within one) and about as many tokens. Returns row numbers [ranks, share] int64 and which are real [ranks, share]:
    a short hand is filled up with row 0, which is not.

    Tests:  test_batching.py::test_every_rank_is_dealt_about_as_many_tokens
    """
    order = lengths.argsort(descending=True, stable=True)
    share = -(-len(order) // ranks)
    filled = torch.cat([order, order.new_full((share * ranks - len(order),), -1)]).view(share, ranks)
    filled[1::2] = filled[1::2].flip(1)
    hands = filled.T.contiguous()
    return hands.clamp(min=0), hands >= 0


@dataclass(frozen=True)
class Hand:
    """Rows dealt over the ranks. all_rows, all_real [ranks, share]: as in `deal`; rank: whose hand."""

    all_rows: Tensor
    all_real: Tensor
    rank: int

    @property
    def rows(self) -> Tensor:
        """This rank's row numbers, [share] int64."""
        return self.all_rows[self.rank]

    @property
    def real(self) -> Tensor:
        """Which of them are this rank's own and not there to keep step, [share] bool."""
        return self.all_real[self.rank]


def token_cuts(lengths: Tensor, budget: int) -> list[int]:
    """How many rows each micro-batch takes, cut from rows that get longer: as many as fit into `budget` tokens, padding
    to the longest counted; a row that is longer than that is alone. lengths [n] ascending; the result adds up to n.

    Tests:  test_batching.py::test_micro_batches_hold_no_more_than_their_budget
    """
    sizes: list[int] = []
    for length in lengths.tolist():
        if sizes and (sizes[-1] + 1) * length <= budget:
            sizes[-1] += 1
        else:
            sizes.append(1)
    return sizes


def permutation(n: int, *seeds: int) -> Tensor:
    """A permutation of range(n) that depends on the seeds alone, the same on every rank and device."""
    generator = torch.Generator().manual_seed(random.Random(repr(seeds)).getrandbits(63))
    return torch.randperm(n, generator=generator)


def prompt_indices(start: int, count: int, num_prompts: int, seed: int) -> Tensor:
    """The prompts number start .. start + count - 1 of an endless sequence of shuffled passes over the data. [count]"""
    first, last = start // num_prompts, (start + count - 1) // num_prompts
    passes = torch.cat([permutation(num_prompts, seed, number) for number in range(first, last + 1)])
    offset = start - first * num_prompts
    return passes[offset : offset + count]
