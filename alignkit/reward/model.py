"""The reward `model`: a pairwise reward model of the chain, its score brought to mean 0 and deviation 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from alignkit.errors import UserError
from alignkit.reward.source import RewardSource
from alignkit.schema import settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from alignkit.data.tokens import Encoder
    from alignkit.models.settings import PeftSettings
    from alignkit.reward.rendered import RenderedSource
    from alignkit.reward.source import Answers
    from alignkit.runtime.sharding import Cluster

Normalise = Literal["none", "shift", "shift_scale", "temperature"]


@settings
class RewardModel:
    """path: the reward model's folder (null: the one that the chain has just trained); normalise: by the score's mean
    (shift) and deviation (scale) on reference responses, or by mean and calibration temperature (so that a difference
    of scores is the log-odds of a preference), as the reward model's artifact has them."""

    path: str | None
    normalise: Normalise

    def open(
        self, folder: Path | None, encoder: Encoder, cluster: Cluster, peft: PeftSettings | None = None
    ) -> ModelSource | RenderedSource:
        """Load and shard the reward model in `folder`; with `peft` the value model is an adapter on the same weights.
        One with other tokens or another chat template than `encoder` reads the texts, and gives no value model.
        Raises UserError if there is no folder, or if the score is to be normalised and nobody measured by what."""
        from alignkit.models.loading import disable_dropout, model_folder
        from alignkit.models.scalar import SharedScalar, load_scalar, open_scalar
        from alignkit.reward.rendered import RenderedSource, own_encoder, same_rendering

        if folder is None:
            raise UserError("path=FOLDER is required: the folder of a reward model")
        mean, std = units(folder, self.normalise)
        theirs = own_encoder(model_folder(folder))
        if not same_rendering(theirs, encoder):
            if cluster.is_main:
                print(f"reward model '{folder}': other tokens or chat template than the policy's; it reads the texts")
            scorer = cluster.place(lambda: open_scalar(model_folder(folder)), trainable=False)
            return RenderedSource(scorer, mean, std, theirs, cluster)

        def fresh_value() -> nn.Module:
            value = load_scalar(model_folder(folder), encoder)
            value.absorb_affine(mean, std)
            return value

        if peft is not None:

            def both() -> SharedScalar:
                shared = SharedScalar(load_scalar(model_folder(folder), encoder).classifier, peft)
                disable_dropout(shared.classifier)
                shared.absorb_affine(mean, std)
                return shared

            shared = cluster.place(both, trainable=True)
            return ModelSource(shared.score, mean, std, cluster, lambda: shared)
        scorer = cluster.place(lambda: load_scalar(model_folder(folder), encoder), trainable=False)
        return ModelSource(scorer, mean, std, cluster, lambda: cluster.place(fresh_value, trainable=True))


def units(folder: Path, normalise: Normalise) -> tuple[float, float]:
    """What is taken from a score, and by what it is then divided. Raises UserError where the artifact does not say."""
    from alignkit.models.loading import read_manifest

    if normalise == "none":
        return 0.0, 1.0
    measured = read_manifest(folder).get("metrics", {})
    if "score_mean" not in measured:
        raise UserError(
            f"'{folder}' was not trained by alignkit, so the mean of its score is unknown: set its normalise to none"
        )
    if normalise == "shift":
        return measured["score_mean"], 1.0
    name = "score_std" if normalise == "shift_scale" else "temperature"
    if name not in measured:
        raise UserError(
            f"'{folder}' holds no {name}, by which normalise={normalise} divides: train it again with this alignkit, "
            "or set its normalise to shift"
        )
    return measured["score_mean"], measured[name]


@dataclass(frozen=True)
class ModelSource(RewardSource):
    """A (sharded) scalar model, or its reading without an adapter, as a reward source. initial_value: makes a value
    model that starts as this reward, in the units that PPO pays."""

    model: Callable[[Tensor, Tensor], Tensor]
    mean: float
    std: float
    cluster: Cluster
    initial_value: Callable[[], nn.Module] | None = None
    collective = True

    def score(self, answers: Answers, microbatch: int) -> Tensor:
        """See `RewardSource.score`; the score is read at the response's last token."""
        import torch

        from alignkit.models.scalar import score_sequences

        rollout = answers.rollout
        micros = self.cluster.microbatches(rollout.mask.sum(dim=1), microbatch)
        parts = [rollout.rows(rows) for rows in micros]
        scores = [score_sequences(self.model, p.tokens, p.mask, mean=self.mean, std=self.std) for p in parts]
        joined = torch.cat(scores)[torch.cat(micros).argsort()]
        return joined.to(torch.promote_types(joined.dtype, torch.float32))
