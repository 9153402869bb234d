"""Best-of-n of the model that PPO started from: the yardstick for what PPO gets from the same reward at equal KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from alignkit.algo.comparison import best_of_n, best_of_n_kl, best_of_n_win_rate, mean_interval
from alignkit.data.tokens import Encoder
from alignkit.stages.judging import Judge, Scorer
from alignkit.stages.responses import Responses, respond

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from alignkit.data.corpus import Prompt
    from alignkit.runtime.config import RunConfig
    from alignkit.runtime.sharding import Cluster

SIZES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Samples:
    """Many responses to each prompt: the reward's and the judge's scores, [prompts, samples] float64."""

    reward: Tensor
    judge: Tensor


def draw(
    model: PreTrainedModel, prompts: list[tuple[Prompt, list[int]]], judge: Judge, reward: Scorer, encoder: Encoder,
    config: RunConfig, cluster: Cluster,
) -> Samples:  # fmt: skip
    """`evaluate.best_of_samples` responses to each of the prompts, scored twice."""
    assert judge.score is not None
    each = config.evaluate.best_of_samples
    many = [prompt for prompt in prompts for _ in range(each)]
    responses: Responses = respond(model, None, many, encoder, config, cluster, noise="many")
    texts = [prompt for prompt, _ in many]
    scores = reward(texts, responses).reshape(-1, each)
    return Samples(scores, judge.score(texts, responses).reshape(-1, each))


def curve(samples: Samples) -> list[dict[str, float]]:
    """A row for each n up to half the samples: KL in nats a sequence, expected reward and judge score, and the win rate
    over one more sample, each a mean over prompts with its 95% interval."""
    rows = []
    for n in (n for n in SIZES if n == 1 or 2 * n <= samples.reward.shape[1]):
        row = {"n": n, "kl": best_of_n_kl(n)}
        found = {
            "reward": best_of_n(samples.reward, samples.reward, n),
            "judge": best_of_n(samples.reward, samples.judge, n),
            "win_rate": best_of_n_win_rate(samples.reward, samples.judge, n),
        }
        for key, values in found.items():
            row |= dict(zip((key, f"{key}_low", f"{key}_high"), mean_interval(values, share=key == "win_rate")))
        rows.append(row)
    return rows


def at_kl(rows: list[dict[str, float]], kl: float) -> float | None:
    """Best-of-n's win rate at this KL, between its points in a line over sqrt(KL); None beyond the last."""
    for left, right in zip(rows, rows[1:]):
        if left["kl"] <= kl <= right["kl"]:
            ends = (left["kl"] ** 0.5, right["kl"] ** 0.5)
            share = (kl**0.5 - ends[0]) / (ends[1] - ends[0])
            return left["win_rate"] + share * (right["win_rate"] - left["win_rate"])
    return None
