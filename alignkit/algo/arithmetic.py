"""What a decoder's work takes: floating-point operations and bytes read, by formulas, to be set against a machine's
limits.

Useful work alone is counted, whatever the code does: real tokens and no padding, the head only where its output is
read, nothing computed twice. A share of a limit then shows every waste.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """What a decoder's work follows from, its vectors (norms, biases) and table look-ups left out.

    matrices:   weights of the matrices in its layers, which every token goes through.
    frozen:     those of them that are not trained.
    head:       weights of the output's matrix: width x vocabulary, or of a scalar head width x 1.
    layers:     decoder layers.
    attention:  width of all query heads together: heads x width of a head.
    key_values: numbers that a token leaves in a layer's cache: 2 x key-value heads x width of a head.
    """

    matrices: int
    frozen: int
    head: int
    layers: int
    attention: int
    key_values: int

    def forward(self, tokens: Sequence[int], outputs: Sequence[int]) -> float:
        """FLOPs of a forward over rows of T real tokens, of which R have their output read. A row takes

            2 matrices T + 2 head R + layers * 2 * (2 attention T (T + 1) / 2)

        one multiplication and one addition a weight and token; and in a layer's causal attention the same for each pair
        of a token and one that it sees, once for the scores (q k) and once for the values they weigh.
        Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1, table 1 (here with causal attention and real lengths)
        Tests:  test_bench.py::test_flops_of_a_forward_by_hand
        """
        seen = sum(t * (t + 1) / 2 for t in tokens)
        through = self.matrices * sum(tokens) + self.head * sum(outputs)
        return 2.0 * through + self.layers * 4.0 * self.attention * seen

    def training(self, tokens: Sequence[int], outputs: Sequence[int]) -> float:
        """FLOPs of a forward and a backward, 3 forwards: the backward takes the gradient of each product's two factors.
        A frozen matrix has no gradient of its own, 2 a weight and token less.
        Tests:  test_bench.py::test_flops_of_training_by_hand
        """
        return 3.0 * self.forward(tokens, outputs) - 2.0 * self.frozen * sum(tokens)

    def decoding(self, prompts: Sequence[int], responses: Sequence[int]) -> float:
        """FLOPs of sampling with a cache: a forward over prompt and response but its last token, which is never fed,
        with an output for each token of the response.
        Tests:  test_bench.py::test_work_of_decoding_by_hand
        """
        return self.forward([p + r - 1 for p, r in zip(prompts, responses)], responses)

    def decoding_bytes(self, prompts: Sequence[int], responses: Sequence[int], width: int) -> float:
        """Bytes that must be read to sample these rows side by side, numbers of `width` bytes: all weights in each of
        max R forwards, the first over the prompts; and in forward k the cache of the p + k - 1 tokens that each row
        still running sees, its own included.
        Tests:  test_bench.py::test_work_of_decoding_by_hand
        """
        weights = (self.matrices + self.head) * max(responses, default=0)
        cached = sum((r - 1) * p + r * (r - 1) / 2 for p, r in zip(prompts, responses))
        return float(width) * (weights + self.layers * self.key_values * cached)
