"""The settings of the stages. `batch` is always global (sequences or pairs per optimizer step, over all ranks);
`microbatch` (rows) and `microbatch_tokens` are what one rank computes at once: memory only, never the result."""

from typing import Annotated, Any, Literal

from pydantic import Field

from alignkit.algo.schedule import Schedule
from alignkit.observe.alerts import Limits
from alignkit.schema import Count, CountOrZero, Fraction, NonNegative, Positive, Proportion, section, settings

Aggregation = Literal["token_mean", "seq_mean_token_mean"]  # as in algo/losses.py, which imports torch
Decay = Annotated[float, Field(ge=0, lt=1)]


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
    """Reward model from pairs and rankings; `trainer` is passed through to TRL's RewardConfig.

    loss = mean over rankings, in each over its pairs, of
    - (1 - label_smoothing) log sigmoid(d) - label_smoothing log sigmoid(-d) + center_coef * centring,  d: difference of
    the scores less the margin. center_form: see `algo.losses.centring`. patience: evaluations on a tenth of the
    training prompts without improvement after which training ends; null: train on all, to the end. num_pairs, half:
    which of the pairs are trained on. sft_samples: responses of the model that it starts from, for its report. gate:
    what PPO does about one that fails `reward.gate.verdict`.
    """

    epochs: Positive
    batch: Count
    microbatch: Count
    learning_rate: Positive
    warmup: Fraction
    max_length: Count
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)]
    center_coef: NonNegative
    center_form: Literal["sum", "squares"]
    patience: Count | None
    evaluate_every: Positive
    num_pairs: Count | None
    half: Count | None
    reference_responses: Annotated[int, Field(ge=2)]
    sft_samples: CountOrZero
    gate: Literal["stop", "warn"]
    trainer: dict[str, Any]


@settings
class PPOSettings:
    """The PPO loop: how many episodes, how they are cut into optimizer steps, and the loss.

    loss = policy + value_coef * value - entropy_coef * entropy [+ KL, + ptx], each a mean by loss_aggregation. joint:
    one gradient norm over both models; false: each model has its own. dual_clip, stop_kl, ema, clip_high: null leaves
    them out; stop_kl in nats per token, the mean of (log ratio)^2 / 2 over a minibatch, at which an iteration's
    remaining steps are left out. packing: rows of a micro-batch are laid end to end, without padding. importance_cap:
    null takes the engine that samples for the policy; else a token weighs min(policy / engine, cap) in the policy's
    loss. max_engine_gap: nats a token, mean of |log policy - log engine|,
    above which the run ends; null: by dtype, see `stages.ppo_checks`. evaluate_every: iterations between looks at
    held-out prompts under the judge, by which keep=best chooses the policy that is saved, and after `patience` of which
    without a better one the run ends. stop_if: a run that is beyond hope ends at once, with the policy as it then is;
    what comes after PPO still runs.
    """

    episodes: Count
    batch: Count
    samples_per_prompt: Count
    minibatch: Count
    microbatch_tokens: Count
    packing: bool
    epochs: Count
    learning_rate: Positive
    value_learning_rate: Positive
    schedule: Schedule
    warmup: CountOrZero
    value_warmup: CountOrZero
    adam_beta1: Decay
    adam_beta2: Decay
    adam_eps: Positive
    weight_decay: NonNegative
    joint: bool
    clip: Proportion
    clip_high: Positive | None
    dual_clip: Annotated[float, Field(gt=1)] | None
    value_clip: Positive | None
    value_coef: Positive
    entropy_coef: NonNegative
    loss_aggregation: Aggregation
    stop_kl: Positive | None
    max_grad_norm: Positive | None
    ema: Proportion | None
    importance_cap: Annotated[float, Field(ge=1)] | None
    max_engine_gap: Positive | None
    self_checks: bool
    evaluate_every: Count | None
    evaluate_prompts: Annotated[int, Field(ge=2)]
    keep: Literal["last", "best"]
    patience: Count | None
    stop_if: Annotated[Limits, section(Limits)]
    max_prompt: Count
    samples_every: Count

    def __post_init__(self) -> None:
        _divides("minibatch", self.minibatch, "batch", self.batch)
        _divides("samples_per_prompt", self.samples_per_prompt, "batch", self.batch)
        _divides("batch", self.batch, "episodes", self.episodes)
        if self.evaluate_every is None and (self.keep == "best" or self.patience is not None):
            raise ValueError(f"keep={self.keep} and patience={self.patience} need evaluate_every, which is null")
        iterations = self.episodes // self.batch
        for name in ("warmup", "value_warmup"):
            if getattr(self, name) >= iterations:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be below the {iterations} iterations that "
                    f"episodes={self.episodes} of batch={self.batch} make"
                )

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
    """The evaluation that ends the chain: policy against SFT on held-out prompts. best_of_samples: responses of SFT to
    each of `best_of_prompts` prompts, from which best-of-n is computed for n up to half of them (0: not)."""

    prompts: Count
    best_of_samples: CountOrZero
    best_of_prompts: Annotated[int, Field(ge=2)]
    show: CountOrZero

    def __post_init__(self) -> None:
        if self.best_of_samples == 1:
            raise ValueError("best_of_samples=1: nothing can be chosen from one; set it to 0 or to 2 and more")
