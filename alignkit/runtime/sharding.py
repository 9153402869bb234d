"""The one file that knows of processes: who this rank is, how models are sharded, how numbers are added up.

Every model is sharded by FSDP2, each decoder layer and the root, on one mesh; a single process is a mesh of one, so
there is one path for every size. Gradients are summed over ranks, never averaged: the losses are already divided by
the global token count.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import GenerationMixin, PreTrainedModel

from alignkit.algo.batching import Hand, deal, token_cuts
from alignkit.errors import UserError
from alignkit.models.loading import skeletons
from alignkit.models.policy import read_logprobs

if TYPE_CHECKING:
    from alignkit.runtime.config import RunConfig

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Cluster:
    """This rank among all ranks of the stage, and how models are laid out on them.

    compute_dtype: of forward and backward; None: that of the weights. activation_checkpointing, offload_frozen: see
    `ShardingSettings`.
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    compute_dtype: torch.dtype | None = None
    activation_checkpointing: bool = False
    offload_frozen: bool = False

    @classmethod
    def open(
        cls, *, shard_size: str | int = "all", compute_dtype: str = "float32",
        activation_checkpointing: bool = False, offload_frozen: bool = False,
    ) -> "Cluster":  # fmt: skip
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
        shares: dict[str | int, int] = {"all": world, "machine": int(os.environ.get("LOCAL_WORLD_SIZE", 1))}
        shards = shares.get(shard_size, 0) or int(shard_size)
        if world % shards:
            raise UserError(f"{world} ranks must be a multiple of sharding.shard_size={shards}")
        shape, names = (
            ((world,), ("shard",)) if shards == world else ((world // shards, shards), ("replicate", "shard"))
        )
        return cls(
            rank=dist.get_rank(),
            world_size=world,
            device=device,
            mesh=init_device_mesh(device.type, shape, mesh_dim_names=names),
            compute_dtype=None if compute_dtype == "float32" else getattr(torch, compute_dtype),
            activation_checkpointing=activation_checkpointing,
            offload_frozen=offload_frozen,
        )

    @classmethod
    def of(cls, config: "RunConfig") -> "Cluster":
        """As `open`, with what a run's settings say."""
        names = ("shard_size", "activation_checkpointing", "offload_frozen")
        return cls.open(compute_dtype=config.compute_dtype, **{name: getattr(config.sharding, name) for name in names})

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def place(self, load: Callable[[], Model], *, trainable: bool) -> Model:
        """The model that `load` gives, sharded as by `shard`, without any rank holding all of it: rank 0 reads the
        weights, which stay in their file until they are sent, one at a time; the others know no more than the shapes.
        """
        if self.world_size == 1:
            return self.shard(load(), trainable=trainable)
        source = load() if self.is_main else None
        with torch.random.fork_rng(devices=[]), skeletons():
            model = load()
        model = self.shard(model, trainable=trainable)
        home = torch.device("cpu") if self.offload_frozen and not trainable else self.device
        cast(Any, model)._apply(lambda held: torch.empty_like(held, device=home) if held.is_meta else held)
        weights = source.state_dict() if source is not None else {}
        with torch.no_grad():
            for name, held in model.state_dict().items():
                whole = torch.empty(held.shape, dtype=held.dtype, device=self.device)
                if self.is_main:
                    whole.copy_(weights[name])
                if isinstance(held, DTensor):
                    held.to_local().copy_(distribute_tensor(whole, held.device_mesh, held.placements).to_local())
                else:
                    dist.broadcast(whole, 0)
                    held.copy_(whole)
        return model

    def shard(self, model: Model, *, trainable: bool) -> Model:
        """Split `model` over the mesh in place: one unit a decoder layer (the classes that transformers says must not
        be split), and the root, which keeps embeddings and a tied head together. What is frozen in a trained model, all
        but its adapter, stays so. Trained weights stay as they are and compute in `compute_dtype`; the gradient is
        reduced in float32. Weights that are never trained are held in `compute_dtype`."""
        if not trainable:
            model.requires_grad_(False)
        dtype = self.compute_dtype
        if dtype is not None and not trainable:
            for parameter in model.parameters():  # not the buffers: tables of positions need their digits
                parameter.data = parameter.data.to(dtype)
        if trainable and self.activation_checkpointing:
            checkpointed: Any = getattr(model, "classifier", model)
            checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
        options: dict[str, Any] = {
            "mesh": self.mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32),
            "offload_policy": CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
            if self.offload_frozen and not trainable
            else OffloadPolicy(),
        }
        units = set(getattr(model, "_no_split_modules", None) or ())
        for module in list(model.modules()):
            if type(module).__name__ in units:
                fully_shard(module, **options)
        # The root of a trained model stays whole until its backward; a frozen one has none that would release it.
        fully_shard(model, reshard_after_forward=not trainable, **options)
        if isinstance(model, GenerationMixin):  # a language model
            model.logprobs_at = MethodType(read_logprobs, model)
            register_fsdp_forward_method(model, "logprobs_at")  # so that the root's hooks run around it
        for unit in _fsdp_modules(model):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # without it the factor of 1 is refused by gloo
        return model.train(trainable)

    @contextmanager
    def sampling(self, model: PreTrainedModel, *, unshard: bool) -> Iterator[PreTrainedModel]:
        """`model` ready to sample from. unshard: all of its weights are on every rank, and ranks may run different
        numbers of forwards; else layers are gathered as they come, and ranks must keep step."""
        modules, was, attention = list(_fsdp_modules(model)), model.training, model.config._attn_implementation
        model.eval()  # activation checkpointing would forbid the key-value cache
        if attention == "flex_attention":  # of packed rows; there are none in sampling
            model.config._attn_implementation = "sdpa"
        for module in modules if unshard else ():
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        try:
            yield model
        finally:
            for module in modules if unshard else ():
                module.set_reshard_after_forward(module is not modules[0] or not was, recurse=False)
            self.rest(model)
            model.train(was)
            model.config._attn_implementation = attention

    def rest(self, model: nn.Module) -> None:
        """Give back what forwards without a backward have left gathered (the root of a trained model)."""
        for module in _fsdp_modules(model):
            module.reshard()

    def accumulate(self, model: nn.Module, *, last: bool) -> None:
        """Before each micro-batch of an optimizer step. Where nothing is split, what a backward has gathered
        is there for the next forward, and the gradient is added up on each rank and over the ranks only with the last
        micro-batch; where models are split, that would take the memory that splitting saves."""
        if self.mesh["shard"].size() > 1:
            return
        for module in _fsdp_modules(model):
            module.set_requires_gradient_sync(last, recurse=False)
            module.set_reshard_after_backward(last, recurse=False)

    def deal(self, lengths: Tensor) -> Hand:
        """Rows of these lengths (tokens, [n]) dealt over the ranks. Every rank holds equally many, as all must make the
        same number of calls to a sharded model; `collect` drops what fills a short hand up."""
        return Hand(*deal(lengths.cpu(), self.world_size), self.rank)

    def microbatches(self, lengths: Tensor, budget: int) -> list[Tensor]:
        """This rank's rows (of these lengths in tokens, [n], equally many on every rank) in micro-batches of at most
        `budget` tokens, from the shortest to the longest: as many, of the same numbers of rows, on every rank."""
        order = lengths.argsort(stable=True)
        return list(order.split(token_cuts(self.max(lengths[order]), budget)))

    def collect(self, part: Tensor, hand: Hand) -> Tensor:
        """The inverse of `deal`: this rank's rows [share, ...] -> all rows [n, ...] in order, on every rank."""
        rows, real = hand.all_rows[hand.all_real], hand.all_real.to(part.device)
        parts = self.gather(part)[real]
        whole = torch.empty_like(parts)
        whole[rows.to(part.device)] = parts
        return whole

    def gather(self, part: Tensor) -> Tensor:
        """A tensor of every rank, stacked: [...] -> [ranks, ...]."""
        if self.world_size == 1:
            return part[None]
        parts = [torch.empty_like(part) for _ in range(self.world_size)]
        dist.all_gather(parts, part.contiguous())
        return torch.stack(parts)

    def gather_objects(self, value: Any) -> list[Any]:
        """Something small of every rank (it is pickled), in their order, on every rank."""
        if self.world_size == 1:
            return [value]
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, value)
        return parts

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, in place of the given tensor's copy."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """Maximum over ranks."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def any(self, value: bool) -> bool:
        """Whether it holds on any rank."""
        return bool(self.max(torch.tensor(int(value))))

    def all(self, value: bool) -> bool:
        """Whether it holds on every rank."""
        return not self.any(not value)

    def share(self, value: int) -> int:
        """Rank 0's number, on every rank."""
        return int(self.max(torch.tensor(value if self.is_main else -1)))

    def _reduce(self, value: Tensor, operation: Any) -> Tensor:
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
        """Whole weights on the CPU of rank 0, None elsewhere; one is gathered at a time, tied ones once."""
        state: dict[str, Tensor] = {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        gathered: dict[int, str] = {}
        for name, value in model.state_dict().items():
            owner = gathered.setdefault(id(parameters.get(name, value)), name)
            whole = value.full_tensor() if isinstance(value, DTensor) and owner == name else value
            if self.is_main:
                state[name] = whole.detach().cpu().clone() if owner == name else state[owner]
        return state if self.is_main else None


def _fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
