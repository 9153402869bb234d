"""The reward `model`: a pairwise reward model of the chain, its score brought to mean 0 and deviation 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from alignkit.errors import UserError
from alignkit.schema import NonNegative, settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from alignkit.data.tokens import Encoder
    from alignkit.models.scalar import ScalarModel
    from alignkit.reward.source import Answers
    from alignkit.runtime.sharding import Cluster


@settings
class RewardModel:
    """path: the reward model's folder (null: the one that the chain has just trained); normalise: by the score's mean
    (shift) and deviation (scale) on reference responses; missing_eos_penalty: taken off the score of a response that
    did not end within max_response tokens, in normalised units."""

    path: str | None
    normalise: Literal["none", "shift", "shift_scale"]
    missing_eos_penalty: NonNegative

    def open(self, folder: Path, encoder: Encoder, cluster: Cluster) -> ModelSource:
        """Load and shard the reward model in `folder`. Raises UserError if it cannot score these tokens, or if the
        score is to be normalised and nobody measured by what."""
        from alignkit.models.loading import model_folder, read_manifest
        from alignkit.models.scalar import load_scalar

        measured = read_manifest(folder).get("metrics", {})
        mean, std = 0.0, 1.0
        if self.normalise != "none":
            if "score_mean" not in measured:
                raise UserError(
                    f"'{folder}' was not trained by alignkit, so the mean of its score is unknown: "
                    "set reward.normalise=none"
                )
            mean, std = measured["score_mean"], measured["score_std"] if self.normalise == "shift_scale" else 1.0
        scorer = cluster.shard(load_scalar(model_folder(folder), encoder), trainable=False)
        return ModelSource(scorer, mean, std, lambda: load_scalar(model_folder(folder), encoder))


@dataclass(frozen=True)
class ModelSource:
    """A (sharded) ScalarModel as a reward source; `fresh` loads it once more, whole."""

    model: nn.Module
    mean: float
    std: float
    fresh: Callable[[], ScalarModel] | None = None

    def initial_value(self) -> ScalarModel:
        """A value model that starts as this reward, in the units that PPO pays."""
        value = self.fresh()
        value.absorb_affine(self.mean, self.std)
        return value

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
