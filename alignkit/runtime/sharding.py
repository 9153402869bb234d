"""The one file that knows of processes: who this rank is, how models are sharded, how numbers are added up.

Every model is sharded by FSDP2, each decoder layer and the root, on one mesh; a single process is a mesh of one, so
there is one path for every size. Gradients are summed over ranks, never averaged: the losses are already divided by
the global token count.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from alignkit.errors import UserError


@dataclass(frozen=True)
class Cluster:
    """This rank among all ranks of the stage."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh

    @classmethod
    def open(cls, shard_size: int | None = None) -> "Cluster":
        """Join the process group that the launcher described in the environment, or a group of one."""
        cuda = torch.cuda.is_available()
        local = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda and local >= torch.cuda.device_count():
            asked, there = os.environ["LOCAL_WORLD_SIZE"], torch.cuda.device_count()
            raise UserError(f"launch.processes={asked} is more than the {there} GPUs that are there")
        if cuda:
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            if "RANK" in os.environ:
                dist.init_process_group(backend, timeout=timedelta(minutes=30))
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        world = dist.get_world_size()
        shards = shard_size or world
        if world % shards:
            raise UserError(f"launch.processes={world} must be a multiple of sharding.shard_size={shards}")
        shape, names = (
            ((world,), ("shard",)) if shards == world else ((world // shards, shards), ("replicate", "shard"))
        )
        return cls(dist.get_rank(), world, device, init_device_mesh(device.type, shape, mesh_dim_names=names))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def shard(self, model: nn.Module, *, trainable: bool) -> nn.Module:
        """Split `model` over the mesh in place: one unit a decoder layer (the classes that transformers says must not
        be split), and the root, which keeps embeddings and a tied head together. What is frozen in a trained model, all
        but its adapter, stays so."""
        model.to(self.device)
        if not trainable:
            model.requires_grad_(False)
        units = set(getattr(model, "_no_split_modules", None) or ())
        for module in list(model.modules()):
            if type(module).__name__ in units:
                fully_shard(module, mesh=self.mesh)
        # The root of a trained model stays whole until its backward; a frozen one has none that would release it.
        fully_shard(model, mesh=self.mesh, reshard_after_forward=not trainable)
        for module in _fsdp_modules(model):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # without it the factor of 1 is refused by gloo
        return model.train(trainable)

    @contextmanager
    def whole(self, model: nn.Module) -> Iterator[nn.Module]:
        """All weights of `model` on every rank, for sampling: inside, ranks may run different numbers of forwards."""
        modules = list(_fsdp_modules(model))
        for module in modules:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        try:
            yield model
        finally:
            for module in modules:
                module.reshard()
                module.set_reshard_after_forward(module is not modules[0] or not model.training, recurse=False)

    def deal(self, count: int) -> tuple[Tensor, Tensor]:
        """This rank's row numbers of 0 .. count - 1, and which of them are real: [share] int64, [share] bool.

        Every rank holds equally many, as all must make the same number of calls to a sharded model: a short hand is
        filled up with row 0, which is not real, and which `collect` drops.
        """
        rows = torch.arange(-(-count // self.world_size)) * self.world_size + self.rank
        return torch.where(rows < count, rows, 0), rows < count

    def collect(self, part: Tensor, count: int) -> Tensor:
        """The inverse of `deal`: this rank's rows [share, ...] -> all rows [count, ...] in order, on every rank."""
        if self.world_size == 1:
            return part[:count]
        parts = [torch.empty_like(part) for _ in range(self.world_size)]
        dist.all_gather(parts, part.contiguous())
        return torch.stack(parts, dim=1).flatten(0, 1)[:count]

    def gather(self, part: Tensor) -> Tensor:
        """A small tensor of every rank, stacked: [...] -> [ranks, ...]."""
        return self.collect(part[None], self.world_size)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, in place of the given tensor's copy."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """Maximum over ranks."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def _reduce(self, value: Tensor, operation: dist.ReduceOp) -> Tensor:
        value = value.clone().to(self.device)
        if self.world_size > 1:
            dist.all_reduce(value, operation)
        return value

    def clip_gradient(self, models: list[nn.Module], max_norm: float | None) -> Tensor:
        """Scale the gradient of these models to at most `max_norm` (L2 norm over all of them and all shards; None:
        leave it); returns the norm before."""
        parameters = [parameter for model in models for parameter in model.parameters()]
        norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def full_state(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Whole weights on the CPU of rank 0, None elsewhere; one parameter at a time is gathered."""
        state = {}
        for name, value in model.state_dict().items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if self.is_main:
                state[name] = whole.detach().cpu().clone()
        return state if self.is_main else None


def _fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
