"""The settings of the stages. `batch` is always global (sequences or pairs per optimizer step, over all ranks);
`microbatch` is what one rank computes at once: memory only, never the result."""

from typing import Annotated, Any, Literal

from pydantic import Field

from alignkit.schema import Count, CountOrZero, Fraction, NonNegative, Positive, Proportion, settings


def _divides(small: str, small_value: int, large: str, large_value: int) -> None:
    if large_value % small_value:
        raise ValueError(f"{large}={large_value} must be a multiple of {small}={small_value}")


@settings
class SFTSettings:
    """Supervised fine-tuning; `trainer` is passed through to TRL's SFTConfig."""

    epochs: Positive
    batch: Count
    microbatch: Count
    learning_rate: Positive
    warmup: Fraction
    max_length: Count
    trainer: dict[str, Any]


@settings
class RewardModelSettings:
    """Pairwise reward model; `trainer` is passed through to TRL's RewardConfig."""

    epochs: Positive
    batch: Count
    microbatch: Count
    learning_rate: Positive
    warmup: Fraction
    max_length: Count
    center_coef: NonNegative
    reference_responses: Annotated[int, Field(ge=2)]
    trainer: dict[str, Any]


@settings
class PPOSettings:
    """The PPO loop: how many episodes, how they are cut into optimizer steps, and the two losses."""

    episodes: Count
    batch: Count
    minibatch: Count
    microbatch: Count
    epochs: Count
    learning_rate: Positive
    value_learning_rate: Positive
    adam_eps: Positive
    clip: Proportion
    value_clip: Positive | None
    max_grad_norm: Positive
    max_prompt: Count
    samples_every: Count

    def __post_init__(self) -> None:
        _divides("minibatch", self.minibatch, "batch", self.batch)
        _divides("batch", self.batch, "episodes", self.episodes)

    @property
    def iterations(self) -> int:
        """Iterations of `batch` episodes."""
        return self.episodes // self.batch


@settings
class PtxSettings:
    """A language-model loss, mixed into every policy step with weight `coef` (0: off), on the texts of `path` (files as
    data.path takes them) or, if null, on the demonstrations."""

    coef: NonNegative
    path: str | list[str] | None
    batch: Count
    max_length: Count


@settings
class EvaluateSettings:
    """The evaluation that ends the chain: policy against SFT on held-out prompts."""

    prompts: Count
    judge: Literal["auto", "gold", "bag_of_words", "reward_model"]
    show: CountOrZero
