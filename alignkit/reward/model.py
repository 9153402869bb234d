"""The reward `model`: a pairwise reward model of the chain, its score brought to mean 0 and deviation 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from alignkit.errors import UserError
from alignkit.schema import settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from alignkit.data.tokens import Encoder
    from alignkit.models.scalar import ScalarModel
    from alignkit.models.settings import PeftSettings
    from alignkit.reward.source import Answers
    from alignkit.runtime.sharding import Cluster


@settings
class RewardModel:
    """path: the reward model's folder (null: the one that the chain has just trained); normalise: by the score's mean
    (shift) and deviation (scale) on reference responses, as the reward model's artifact has them."""

    path: str | None
    normalise: Literal["none", "shift", "shift_scale"]

    def open(self, folder: Path, encoder: Encoder, cluster: Cluster, peft: PeftSettings | None = None) -> ModelSource:
        """Load and shard the reward model in `folder`; with `peft` the value model is an adapter on the same weights.
        Raises UserError if it cannot score these tokens, or if the score is to be normalised and nobody measured by
        what."""
        from alignkit.models.loading import disable_dropout, model_folder, read_manifest
        from alignkit.models.scalar import SharedScalar, load_scalar

        measured = read_manifest(folder).get("metrics", {})
        mean, std = 0.0, 1.0
        if self.normalise != "none":
            if "score_mean" not in measured:
                raise UserError(
                    f"'{folder}' was not trained by alignkit, so the mean of its score is unknown: "
                    "set reward.normalise=none"
                )
            mean, std = measured["score_mean"], measured["score_std"] if self.normalise == "shift_scale" else 1.0

        def fresh_value() -> ScalarModel:
            value = load_scalar(model_folder(folder), encoder)
            value.absorb_affine(mean, std)
            return value

        def both() -> SharedScalar:
            shared = SharedScalar(load_scalar(model_folder(folder), encoder).classifier, peft)
            disable_dropout(shared.classifier)
            shared.absorb_affine(mean, std)
            return shared

        if peft is not None:
            shared = cluster.place(both, trainable=True)
            return ModelSource(shared.score, mean, std, lambda: shared)
        scorer = cluster.place(lambda: load_scalar(model_folder(folder), encoder), trainable=False)
        return ModelSource(scorer, mean, std, lambda: cluster.place(fresh_value, trainable=True))


@dataclass(frozen=True)
class ModelSource:
    """A (sharded) scalar model, or its reading without an adapter, as a reward source. initial_value: makes a value
    model that starts as this reward, in the units that PPO pays."""

    model: Callable[[Tensor, Tensor], Tensor]
    mean: float
    std: float
    initial_value: Callable[[], nn.Module] | None = None

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
