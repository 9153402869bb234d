"""Metric values that know how to combine over micro-batches and ranks.

A mean of means is wrong as soon as micro-batches differ in length or ranks in rows, so nothing here is averaged before
the end: a `Mean` carries its total and its count, and one division happens after everything has been added up. All
metrics of an iteration cross the ranks in two collectives, one of sums and one of maxima.

Tensors are kept as they come (0-dim, on their device) and become numbers in `unpack`, so that collecting metrics does
not make the host wait for the GPU in every micro-batch.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

Scalar = float | Tensor
Parts = tuple[tuple[Scalar, ...], tuple[Scalar, ...]]
"""What a value adds to the collective of sums and to the collective of maxima."""


@dataclass(frozen=True)
class Mean:
    """Mean over tokens, sequences or rows. A rank or micro-batch that has none contributes `Mean(0, 0)`."""

    total: Scalar
    count: Scalar

    def merge(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    def parts(self) -> Parts:
        return (self.total, self.count), ()

    @classmethod
    def from_parts(cls, sums: Iterator[float], maxima: Iterator[float]) -> "Mean":
        return cls(next(sums), next(sums))

    def result(self) -> float | None:
        count = float(self.count)
        return float(self.total) / count if count else None


@dataclass(frozen=True)
class Max:
    """The largest value anywhere. A rank that has none contributes `Max(-math.inf)`."""

    value: Scalar

    def merge(self, other: "Max") -> "Max":
        return Max(_larger(self.value, other.value))

    def parts(self) -> Parts:
        return (), (self.value,)

    @classmethod
    def from_parts(cls, sums: Iterator[float], maxima: Iterator[float]) -> "Max":
        return cls(next(maxima))

    def result(self) -> float:
        return float(self.value)


Metric = Mean | Max


class Metrics(Mapping[str, Metric]):
    """Named values. Every rank must hold the same names with the same kinds; `unpack` refuses anything else."""

    def __init__(self, values: Mapping[str, Metric] | None = None) -> None:
        self._values: dict[str, Metric] = {}
        for name, value in (values or {}).items():
            self.add(name, value)

    def __getitem__(self, name: str) -> Metric:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def add(self, name: str, value: Metric) -> None:
        """Merge a value into the one of this name. Tensors lose their graph here, or it would live on in the metric."""
        value = type(value)(*(_detached(getattr(value, field.name)) for field in fields(value)))
        held = self._values.get(name, value)
        if type(held) is not type(value):
            raise TypeError(f"metric {name!r} is a {type(held).__name__}, not a {type(value).__name__}")
        self._values[name] = value if held is value else held.merge(value)  # type: ignore[arg-type]  # of one kind

    def merge(self, other: "Metrics") -> "Metrics":
        merged = Metrics(self)
        for name, value in other.items():
            merged.add(name, value)
        return merged

    __add__ = merge

    def pack(self) -> tuple[Tensor, Tensor]:
        """Two float64 vectors, one to be summed over ranks and one whose maxima are to be taken.

        Names go in sorted order, as ranks may have met them in different orders. The maxima end with a fingerprint of
        the names and its negative: after the collective the two still cancel only if all ranks sent the same one.
        """
        sums: list[Scalar] = []
        maxima: list[Scalar] = []
        for name in sorted(self):
            to_sum, to_compare = self[name].parts()
            sums += to_sum
            maxima += to_compare
        fingerprint = float(zlib.crc32(self._layout().encode()))
        maxima += [fingerprint, -fingerprint]
        return _vector(sums), _vector(maxima)

    def unpack(self, sums: Tensor, maxima: Tensor) -> "Metrics":
        """The values after both collectives, as Python floats, under this object's names."""
        *compared, fingerprint, negative = maxima.tolist()
        if fingerprint != -negative:
            raise RuntimeError(f"ranks hold different metrics; this one has {self._layout()}")
        from_sums, from_maxima = iter(sums.tolist()), iter(compared)
        reduced = {name: self[name].from_parts(from_sums, from_maxima) for name in sorted(self)}
        return Metrics({name: reduced[name] for name in self})

    def values(self) -> dict[str, float]:  # type: ignore[override]  # no view of metrics: what they come to
        """Plain numbers, ready to be logged; `items()` gives the metrics themselves. A mean over nothing has no value
        and is left out."""
        results = {name: metric.result() for name, metric in self.items()}
        return {name: result for name, result in results.items() if result is not None}

    def _layout(self) -> str:
        return ", ".join(f"{name}: {type(self[name]).__name__}" for name in sorted(self))


def reduce(
    metrics: Metrics,
    all_reduce_sum: Callable[[Tensor], Tensor],
    all_reduce_max: Callable[[Tensor], Tensor],
) -> Metrics:
    """The metrics of all ranks together, on each of them. With one process both functions are the identity."""
    sums, maxima = metrics.pack()
    return metrics.unpack(all_reduce_sum(sums), all_reduce_max(maxima))


def _detached(value: Scalar) -> Scalar:
    """Float64, as totals over many micro-batches outgrow what float32 can count."""
    return value.detach().double().reshape(()) if isinstance(value, Tensor) else value


def _larger(left: Scalar, right: Scalar) -> Scalar:
    """The larger of two, NaN if either is: a broken value must not hide behind a sound one."""
    return torch.maximum(torch.as_tensor(left, dtype=torch.float64), torch.as_tensor(right, dtype=torch.float64))


def _vector(values: list[Scalar]) -> Tensor:
    device = next((value.device for value in values if isinstance(value, Tensor) and value.is_cuda), "cpu")
    if not values:
        return torch.zeros(0, dtype=torch.float64, device=device)
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
