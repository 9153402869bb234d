"""What a machine can do at most, measured on the spot: matrix products of a model's own shapes, and reading memory.

A machine's speed changes from minute to minute, so the limits are measured between the updates that they judge, in
buffers that are smaller than what an update takes: they do not show in its peak of memory.
"""

from __future__ import annotations

import os
import platform
import resource
import time
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import version
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alignkit import __version__
from alignkit.algo.arithmetic import Network

if TYPE_CHECKING:
    from alignkit.runtime.sharding import Cluster

WARM_UP = 1  # updates that do not count
Shape = tuple[int, int]  # of a linear layer: inputs, outputs
LARGEST = {"cpu": 2**24, "cuda": 2**28}  # numbers in a buffer; the rows of wider products are fewer
WIDEST_READ = 2**28  # bytes of the buffer that is read
REPETITIONS = 3  # of each measurement; a GPU's are ten each, so that waiting for it does not count


def linear_layers(model: nn.Module) -> tuple[list[tuple[Shape, bool]], list[Shape]]:
    """The matrices of a model: (shape, whether it is trained) of those in its layers, and the shapes of its heads (the
    vocabulary's, or of one output)."""
    outputs = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers, heads = [], []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shape = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            shape = (module.nx, module.nf)
        else:
            continue
        if module is outputs or module.__dict__.get("out_features") == 1:
            heads.append(shape)
        else:
            layers.append((shape, module.weight.requires_grad))
    return layers, heads


def network_of(model: nn.Module) -> Network:
    """A model's own figures. Of a value model that shares the reward model's weights one head is counted."""
    layers, heads = linear_layers(model)
    config = cast(Any, model).config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Network(
        matrices=sum(a * b for (a, b), _ in layers),
        frozen=sum(a * b for (a, b), trained in layers if not trained),
        head=max((a * b for a, b in heads), default=0),
        layers=config.num_hidden_layers,
        attention=config.num_attention_heads * width,
        key_values=2 * shared * width,
    )


def products_of(model: nn.Module, tokens: int, outputs: int) -> Counter[tuple[int, int, int]]:
    """(rows, inputs, outputs) -> how often, of the products in a forward of a micro-batch of `tokens` real tokens, of
    which `outputs` go through the vocabulary's head."""
    layers, heads = linear_layers(model)
    products = Counter((tokens, *shape) for shape, _ in layers)
    products.update((outputs, *shape) for shape in heads if shape[1] > 1)
    return products


class Limits:
    """Measures both limits of this rank, as often as it is asked to.

    flops: FLOPs per second of a forward and a backward through linear layers of these shapes (the product, and the
    gradients of both of its factors), each shape weighing what it takes in the model; bytes: per second read from a
    buffer as large as the weights are (on a GPU copied, read and written)."""

    def __init__(self, products: Mapping[tuple[int, int, int], int], num_weights: int, cluster: Cluster) -> None:
        self.products, self.device = dict(products), cluster.device
        self.dtype = cluster.compute_dtype or torch.float32
        self.weight_bytes = min(max(num_weights * self.dtype.itemsize, 2**20), WIDEST_READ)
        self.flops: list[float] = []
        self.bytes: list[float] = []

    def measure(self) -> None:
        """Add measurements; not for the clock of what is judged."""
        seconds = {shape: self._product(*shape) for shape in self.products}
        work = sum(6.0 * m * n * k * count for (m, n, k), count in self.products.items())
        for number in range(REPETITIONS):
            self.flops.append(work / sum(seconds[shape][number] * count for shape, count in self.products.items()))
        self.bytes += self._reading()

    def around(self, cluster: Cluster) -> list[tuple[float, float]]:
        """FLOPs and bytes per second of all ranks together, one pair for each update between two calls of `measure`:
        the medians of what was measured just before it and just after, as a shared machine's speed comes and goes."""
        spans = range(0, len(self.flops) - REPETITIONS, REPETITIONS)
        pairs = [[median(rates[i : i + 2 * REPETITIONS]) for rates in (self.flops, self.bytes)] for i in spans]
        summed = cluster.sum(torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2))
        return [(flops, read) for flops, read in summed.tolist()]

    def _product(self, rows: int, inputs: int, outputs: int) -> list[float]:
        """Seconds of the three products of a layer over so many rows, for each repetition."""
        fewer = max(1, min(rows, LARGEST[self.device.type] // max(inputs, outputs)))
        x, gradient = self._numbers(fewer, inputs), self._numbers(fewer, outputs)
        weight, y = self._numbers(outputs, inputs), self._numbers(fewer, outputs)
        back, step = torch.empty_like(x), torch.empty_like(weight)

        def products() -> None:
            torch.mm(x, weight.T, out=y)
            torch.mm(gradient, weight, out=back)
            torch.mm(gradient.T, x, out=step)

        return [seconds * rows / fewer for seconds in self._timed(products)]

    def _reading(self) -> list[float]:
        columns = 1024
        if self.device.type == "cuda":
            buffer = torch.ones(self.weight_bytes, dtype=torch.uint8, device=self.device)
            other = torch.empty_like(buffer)
            return [2 * buffer.nbytes / seconds for seconds in self._timed(lambda: other.copy_(buffer))]
        buffer = torch.ones(max(1, self.weight_bytes // (4 * columns)), columns)
        vector, out = torch.ones(columns), torch.empty(buffer.shape[0])
        return [buffer.nbytes / seconds for seconds in self._timed(lambda: torch.mv(buffer, vector, out=out))]

    def _timed(self, call: Callable[[], Any]) -> list[float]:
        call()
        cuda = self.device.type == "cuda"
        each = 10 if cuda else 1
        seconds = []
        for _ in range(REPETITIONS):
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(each):
                call()
            if cuda:
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() - began) / each)
        return seconds

    def _numbers(self, rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=self.dtype, device=self.device).uniform_(-1.0, 1.0)


def peak_memory(device: torch.device) -> int:
    """Bytes: of this process at its largest; on a GPU what torch has allocated at most since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def hardware(cluster: Cluster) -> dict[str, Any]:
    """What it ran on."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cluster.device.type == "cuda" else None,
        "ranks": cluster.world_size,
    }


def versions() -> dict[str, str]:
    """What it ran with."""
    libraries = {name: version(name) for name in ("torch", "transformers", "trl", "accelerate")}
    return {"alignkit": __version__, "python": platform.python_version(), **libraries}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
