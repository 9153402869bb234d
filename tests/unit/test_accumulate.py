"""Micro-batches of one optimizer step on models that are not split: one reduction, the same gradient."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig

from alignkit.runtime.sharding import Cluster

TINY = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
)  # fmt: skip


@pytest.fixture(params=["float32", "bfloat16"])
def cluster(request):
    """A group of one, with and without mixed precision."""
    yield Cluster.open(compute_dtype=request.param)
    dist.destroy_process_group()


def test_the_gradient_is_reduced_with_the_last_micro_batch_alone_and_is_the_same(cluster):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TINY)
    rows = torch.randint(0, 32, (3, 2, 8))

    def backward(model, part: torch.Tensor) -> None:
        model(input_ids=part).logits.float().logsumexp(-1).sum().backward()

    each = cluster.shard(copy.deepcopy(model), trainable=True)
    for part in rows:
        backward(each, part)
    added = cluster.shard(model, trainable=True)
    for number, part in enumerate(rows, start=1):
        cluster.accumulate(added, last=number == len(rows))
        backward(added, part)
        reduced = [isinstance(p, DTensor) and p.grad is not None for p in added.parameters()]
        assert all(reduced) if number == len(rows) else not any(reduced)
    for one, other in zip(each.parameters(), added.parameters(), strict=True):
        one, other = one.grad.full_tensor(), other.grad.full_tensor()
        assert one.dtype == other.dtype == torch.float32
        assert (one - other).norm() <= (1e-6 if cluster.compute_dtype is None else 1e-2) * one.norm()
