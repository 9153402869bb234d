"""The reward `model`: a pairwise reward model of the chain, its score brought to mean 0 and deviation 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from alignkit.schema import NonNegative, settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from alignkit.reward.source import Answers


@settings
class RewardModel:
    """path: the reward model's folder (null: the one that the chain has just trained); normalise: by the score's mean
    (shift) and deviation (scale) on reference responses; missing_eos_penalty: taken off the score of a response that
    did not end within max_response tokens, in normalised units."""

    path: str | None
    normalise: Literal["none", "shift", "shift_scale"]
    missing_eos_penalty: NonNegative

    def affine(self, metrics: Mapping[str, float]) -> tuple[float, float]:
        """(mean, std) of the map (score - mean) / std, from what the reward-model stage measured; (0, 1) without."""
        if self.normalise == "none" or "score_mean" not in metrics:
            return 0.0, 1.0
        return metrics["score_mean"], metrics["score_std"] if self.normalise == "shift_scale" else 1.0


@dataclass(frozen=True)
class ModelSource:
    """A (sharded) ScalarModel as a reward source."""

    model: nn.Module
    mean: float
    std: float

    def score(self, answers: Answers, microbatch: int) -> Tensor:
        """See `RewardSource.score`; the score is read at the response's last token."""
        import torch

        from alignkit.algo.batching import length_order
        from alignkit.models.scalar import score_sequences

        rollout = answers.rollout
        order = length_order(rollout.mask)
        parts = [rollout.rows(rows) for rows in order.split(microbatch)]
        scores = [score_sequences(self.model, p.tokens, p.mask, mean=self.mean, std=self.std) for p in parts]
        joined = torch.cat(scores)[order.argsort()]
        return joined.to(torch.promote_types(joined.dtype, torch.float32))
