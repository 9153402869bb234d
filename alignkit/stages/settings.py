"""The settings of the stages. `batch` is always global (sequences or pairs per optimizer step, over all ranks);
`microbatch` is what one rank computes at once: memory only, never the result."""

from typing import Any, Literal

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
    reference_responses: Count
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
        if self.episodes < self.batch:
            raise ValueError(f"episodes={self.episodes} must be at least batch={self.batch}, one iteration")

    @property
    def iterations(self) -> int:
        """Iterations of `batch` episodes; a last part of a batch is not run."""
        return self.episodes // self.batch


@settings
class PtxSettings:
    """A language-model loss on the demonstrations, mixed into every policy step with weight `coef` (0: off)."""

    coef: NonNegative
    batch: Count
    max_length: Count


@settings
class EvaluateSettings:
    """The evaluation that ends the chain: policy against SFT on held-out prompts."""

    prompts: Count
    judge: Literal["auto", "gold", "bag_of_words", "reward_model"]
    show: CountOrZero
