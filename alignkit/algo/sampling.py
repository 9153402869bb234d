"""How a token is drawn: one rule for the logits everywhere, noise that is a function of its place, inverse CDF.

The rule (temperature, stop tokens forbidden before `min_response`) is applied by the sampler and by every
log-probability alike; otherwise the ratio of new to old policy would not start at 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingRule:
    """temperature > 0 divides the logits; the tokens of `stop_ids` end a response and cannot be among its first
    `min_response` tokens (0: they may come at once)."""

    temperature: float
    stop_ids: tuple[int, ...]
    min_response: int = 0

    def stops(self, device: torch.device) -> Tensor:
        """[S] int64 on `device`."""
        return torch.tensor(self.stop_ids, dtype=torch.long, device=device)

    def apply(self, logits: Tensor, place: Tensor | int) -> Tensor:
        """Logits [..., V] of the distribution that is sampled. place [...]: tokens before it in its response."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.min_response and (isinstance(place, Tensor) or place < self.min_response):
            early = torch.as_tensor(place, device=logits.device)[..., None] < self.min_response
            stop = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            stop[self.stops(logits.device)] = True
            logits = logits.masked_fill(early & stop, float("-inf"))
        return logits


def uniform_noise(seed: int, iteration: int, index: Tensor, num_positions: int) -> Tensor:
    """One number in (0, 1) for each (seed, iteration, prompt index, position), from a counter-based generator.

    Shapes: index [B] int64 -> [B, num_positions] float64. The same place gives the same number in any batch, on any
    rank, on any device; repeated prompts in one iteration need distinct indices.
    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), chained over the four coordinates.
    Tests:  test_sampling.py::test_the_generator_is_the_published_one,
            test_sampling.py::test_noise_is_uniform_along_rows_and_positions
    """
    state = _mix(torch.full_like(index, seed))
    state = _mix(state ^ _mix(torch.full_like(index, iteration) + 0x51))
    state = _mix(state ^ _mix(index + 0xA3))
    positions = torch.arange(num_positions, dtype=torch.long, device=index.device)
    bits = _mix(state[:, None] ^ _mix(positions + 0xE7)[None, :])
    return (_shift(bits, 12).double() + 0.5) * 2.0**-52  # 53 bits would round up to 1


def draw(logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the cumulative probability passes `noise`, in float64, and its log-probability.

    Shapes: logits [B, V] after the sampling rule, noise [B] in (0, 1) -> [B] int64, [B] float64 nats. A token of
    probability 0 is never drawn. In float64 the choice does not depend on how the batch was laid out, but for the last
    bits of the logits.
    Source: inversion of the distribution function (Devroye 1986, "Non-uniform random variate generation").
    Tests:  test_sampling.py::test_a_draw_is_the_inverse_of_the_cumulative_probability,
            test_sampling.py::test_a_draw_follows_the_probabilities
    """
    probabilities = logits.double().softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    threshold = noise[:, None] * cumulative[:, -1:]
    token = (cumulative <= threshold).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
    return token, probabilities.gather(-1, token[:, None]).squeeze(-1).log()


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right of int64 (torch's own carries the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser; multiplication wraps around at 64 bits."""
    x = x + -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)
