"""What must hold in every iteration before anything is learnt, each failure with the cause that usually explains it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignkit.algo.kl import kl_estimate
from alignkit.algo.sampling import SamplingRule
from alignkit.algo.sequence import last_token_index
from alignkit.algo.types import Rollout, ScoredRollout, ShapedReward
from alignkit.errors import NotFinite, TrainingError
from alignkit.rollout.compiled import dtype_of

if TYPE_CHECKING:
    from alignkit.runtime.config import RunConfig
    from alignkit.stages.actors import Actors

LOG_RATIO_LIMITS = {  # dtype of the weights that compute -> largest mean and maximum of |log ratio|, nats
    torch.float64: (1e-9, 1e-8),
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (1e-3, 0.1),
    torch.float16: (1e-3, 0.1),
}
ENGINE_LIMITS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.02, torch.float16: 0.02}  # mean, nats


def check_rollout(
    actors: Actors, rollout: Rollout, scored: ScoredRollout, shaped: ShapedReward, paid: Tensor, config: RunConfig
) -> None:
    """Everything that can be checked before the update. shaped: before whitening; paid: the scores in it, [B]."""
    if not bool(torch.isfinite(scored.scores).all()):
        raise NotFinite("score is not finite (NaN or infinity)")
    if config.ppo.self_checks:
        check_masks(rollout, actors.rule)
    if config.ppo.max_engine_gap is not None or config.ppo.self_checks:
        check_engine(rollout, scored, config.ppo.max_engine_gap or ENGINE_LIMITS[sampling_dtype(actors, config)])
    if not config.ppo.self_checks:
        return
    if actors.state.policy_steps == 0:
        check_reference(scored, rollout.response_mask, computing_dtype(actors))
    kl = config.kl
    penalty = kl_estimate(scored.logprobs, scored.ref_logprobs, rollout.response_mask, estimator=kl.estimator)
    check_score_position(shaped, paid, penalty, actors.state.kl_coef if kl.place == "reward" else 0.0)


def computing_dtype(actors: Actors) -> torch.dtype:
    """The dtype of the policy's forward pass, which decides how much rounding there is."""
    return actors.cluster.compute_dtype or next(actors.policy.parameters()).dtype


def sampling_dtype(actors: Actors, config: RunConfig) -> torch.dtype:
    """The less exact of the policy's dtype and that of an engine with weights of its own."""
    own = getattr(config.rollout, "dtype", None)
    computing = computing_dtype(actors)
    if own is None:
        return computing
    return min(computing, dtype_of(own, next(actors.policy.parameters())), key=lambda dtype: dtype.itemsize)


def engine_gap(rollout: Rollout, scored: ScoredRollout) -> tuple[float, float]:
    """Mean and maximum of |log-probability in training - in the engine| over the sampled tokens, nats."""
    mask = rollout.response_mask
    gap = torch.where(mask, scored.logprobs - rollout.engine_logprobs, 0.0).abs()
    return float(gap.sum() / mask.sum()), float(gap.max())


def check_engine(rollout: Rollout, scored: ScoredRollout, limit: float) -> None:
    """What sampled and what is trained are one policy, but for rounding."""
    mean, largest = engine_gap(rollout, scored)
    if not mean <= limit:
        raise TrainingError(
            f"the engine that samples is not the policy that is trained: log-probabilities differ by {mean:.2g} nats a "
            f"token (at most {largest:.2g}; limit {limit:g}). Usual causes: weights not handed over, dropout left on, "
            "another dtype or other sampling settings in the engine; where the difference is wanted, raise "
            "ppo.max_engine_gap and set ppo.importance_cap=2"
        )


def check_ratio(mean: float, largest: float, dtype: torch.dtype) -> None:
    """Before the first step of an iteration the new policy is the old one: the ratio is 1 (so approx_kl 0) at every
    token. mean, largest: of |log ratio| over the first minibatch, all ranks."""
    if beyond := _beyond_limits(mean, largest, dtype):
        raise TrainingError(
            f"the ratio of new to old policy is off by {beyond} before the first step: scoring and training do not see "
            "the same network. Usual causes: dropout left on, another dtype, padding side, an adapter left on or off, "
            "sampling settings that the log-probabilities do not share"
        )


def check_advantages(target: object, estimator: object, shape: torch.Size) -> None:
    """An estimator from outside alignkit has returned what is asked of it."""
    found = [tuple(getattr(getattr(target, name, None), "shape", ())) for name in ("advantages", "returns")]
    if found != [tuple(shape)] * 2:
        kind = type(estimator)
        raise TrainingError(
            f"advantage: '{kind.__module__}.{kind.__qualname__}' returned {type(target).__name__}"
            f"{' of ' + str(found) if any(found) else ''}, expected alignkit.Advantages of two {tuple(shape)}"
        )


def check_reference(scored: ScoredRollout, mask: Tensor, dtype: torch.dtype) -> None:
    """Before the first policy step the policy is the reference: KL(policy || reference) is 0 at every token."""
    gap = torch.where(mask, scored.logprobs - scored.ref_logprobs, 0.0).abs()
    mean, largest = float(gap.sum() / mask.sum()), float(gap.max())
    if beyond := _beyond_limits(mean, largest, dtype):
        raise TrainingError(
            "KL(policy || reference) is not 0 before the first step: log-probabilities differ by "
            f"{beyond}. Usual causes: reference and policy loaded from different folders or in different dtypes, an "
            "adapter left on in the reference, dropout left on"
        )


def _beyond_limits(mean: float, largest: float, dtype: torch.dtype) -> str:
    """How far |log ratio| is beyond what rounding explains, in words; empty if it is not."""
    mean_limit, limit = LOG_RATIO_LIMITS[dtype]
    if mean <= mean_limit and largest <= limit:
        return ""
    return f"{largest:.2g} (mean {mean:.2g}; limits {limit:g} and {mean_limit:g} nats in {dtype})"


def check_masks(rollout: Rollout, rule: SamplingRule) -> None:
    """Both masks agree, real tokens are a prefix of the response, and a stop token stands at the end of each finished
    one and nowhere else."""
    mask, response = rollout.response_mask, rollout.response
    tail = rollout.mask[:, rollout.prompt_width :]
    if not bool((tail == mask).all()):
        raise TrainingError(
            f"the attention mask counts {int(tail.sum())} response tokens, the response mask {int(mask.sum())}. Usual "
            "causes: prompts padded on the right, a rollout engine that pads on the left"
        )
    if not bool((mask[:, 1:] <= mask[:, :-1]).all() and mask[:, 0].all()):
        raise TrainingError("a response is empty or has a gap. Usual cause: a rollout engine that pads on the left")
    is_stop = torch.isin(response, rule.stops(response.device)) & mask
    at_end = is_stop.gather(1, last_token_index(mask)[:, None]).squeeze(1)
    if not bool((at_end == rollout.finished).all() and (is_stop.sum(dim=1) == at_end.long()).all()):
        raise TrainingError(
            "a response goes on after a stop token, or is called finished and does not end with one. Usual causes: PAD "
            "equal to EOS, a rollout engine with other stop tokens than the tokenizer's"
        )


def check_score_position(shaped: ShapedReward, scores: Tensor, penalty: Tensor, coef: float) -> None:
    """Beside the KL penalty a row is paid its score on its last slot and nothing elsewhere."""
    paid = shaped.per_token + coef * penalty
    last = last_token_index(shaped.mask)[:, None]
    elsewhere = paid.scatter(1, last, 0.0).abs()
    tolerance = 1e-5 * (1.0 + scores.abs().max() + (coef * penalty).abs().max())
    wrong = torch.maximum((paid.gather(1, last).squeeze(1) - scores).abs().max(), elsewhere.max())
    if not bool(wrong <= tolerance):
        raise TrainingError(
            f"the score is not where the response ends: off by {float(wrong):.2g}. Usual cause: PAD equal to EOS, "
            "which hides the end of the response"
        )
