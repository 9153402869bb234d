"""A reward source at work on all ranks: its scores joined, and what it could not score handled alike on every rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignkit.algo.batching import Hand
from alignkit.errors import NotFinite, TrainingError
from alignkit.observe.tracking import without_nonfinite
from alignkit.reward.outside import why
from alignkit.reward.source import Answers, CombinedSource, RewardSource

if TYPE_CHECKING:
    from alignkit.runtime.sharding import Cluster


def reward_scores(
    source: RewardSource | CombinedSource, answers: Answers, hand: Hand, cluster: Cluster, microbatch: int, out: Path,
    name: str = "reward",
) -> tuple[Tensor, float | None]:  # fmt: skip
    """Scores of all rows, [n], on every rank, from each rank's own; call it under no_grad. Also the share of the rows
    that a source gave no score and that have the mean of the others; None where no source may go without.

    Rows that could not be scored are saved first, with all others: out/state/failed-rewards-<number>.jsonl. Raises
    TrainingError on every rank alike where the source is to stop then, or scored no row. name: the source's setting.
    """
    scores, failed = _scores(source, answers, hand, cluster, microbatch, out, name)
    return scores, None if failed is None else float(failed.double().mean())


def _scores(
    source: RewardSource | CombinedSource, answers: Answers, hand: Hand, cluster: Cluster, microbatch: int, out: Path,
    name: str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As above, with the rows that failed, [n] bool, in place of their share."""
    if isinstance(source, CombinedSource):
        parts = [
            _scores(source.members[key], answers, hand, cluster, microbatch, out, f"{name}.members.{key}")
            for key in sorted(source.members)
        ]
        failures = [failed for _, failed in parts if failed is not None]
        scores = torch.stack([scores.double() for scores, _ in parts])
        return source.combine(scores).float(), torch.stack(failures).any(dim=0) if failures else None
    if getattr(source, "collective", False):
        return cluster.collect(source.score(answers, microbatch), hand), None
    mine, reasons = _attempt(source, answers, microbatch)
    exact = bool(cluster.any(mine.dtype == torch.float64))  # a rank that failed does not know what the others have
    scores = cluster.collect(mine.double(), hand)
    scores = scores if exact else scores.float()
    on_failure = getattr(source, "on_failure", None)
    failed = ~scores.isfinite()
    if bool(failed.any()):
        scores = _degraded(scores, failed, on_failure, _Failure(answers, hand, reasons, name), cluster, out)
    return scores, failed if on_failure == "mean" else None


def _attempt(source: RewardSource, answers: Answers, microbatch: int) -> tuple[Tensor, list[str]]:
    """This rank's scores, NaN for what failed, and the reasons. Raises nothing that is the source's."""
    count, device = len(answers.responses), answers.rollout.tokens.device
    try:
        scores = source.score(answers, microbatch)
        if not isinstance(scores, Tensor):
            raise TypeError(f"score() returned {type(scores).__name__}, expected a tensor of {count} numbers")
        if scores.shape != (count,):
            raise ValueError(f"score() returned the shape {tuple(scores.shape)} to {count} responses")
        scores = scores.to(device, torch.promote_types(scores.dtype, torch.float32))
        return scores, list(getattr(source, "reasons", ()))
    except Exception as error:
        return torch.full((count,), torch.nan, device=device), [why(error)]


class _Failure:
    """What this rank knows of a failure."""

    def __init__(self, answers: Answers, hand: Hand, reasons: list[str], name: str) -> None:
        own = zip(hand.rows.tolist(), hand.real.tolist(), answers.prompts, answers.responses)
        self.rows = [(row, prompt, response) for row, real, prompt, response in own if real]
        self.reasons, self.name = reasons, name


def _degraded(
    scores: Tensor, failed: Tensor, on_failure: str | None, failure: _Failure, cluster: Cluster, out: Path
) -> Tensor:
    """The scores with the mean of the sound ones where there is none, if the source allows that; else raises
    TrainingError. The batch is saved before either."""
    told = cluster.gather_objects((failure.rows, failure.reasons))
    count, total = int(failed.sum()), len(scores)
    reason = next((reason for _, reasons in told for reason in reasons), "")
    share = f"{reason}; {count} of {total} responses have no score" if reason else ""
    share = share or f"{count} of {total} scores are not finite"
    rows = sorted((row for part, _ in told for row in part), key=lambda row: row[0])
    number = cluster.share(_save(rows, scores, out) if cluster.is_main else 0)
    place = f"the batch is in {_place(out, number)}" if number else f"the batch could not be saved in {out / 'state'}"
    if on_failure == "mean" and count < total:
        if number == 1 and cluster.is_main:
            print(f"{failure.name}: {share} and get the mean of the others (on_failure=mean); {place}; told only once")
        return torch.where(failed, scores[~failed].mean(), scores)
    raise (TrainingError if reason else NotFinite)(f"{failure.name}: {share}; {place}")


def _save(rows: list[tuple[Any, ...]], scores: Tensor, out: Path) -> int:
    """Write the batch, one response a line, and return the number of the file, 0 if the disk would not have it."""
    number = 1 + sum(1 for _ in (out / "state").glob("failed-rewards-*.jsonl"))
    lines = [
        json.dumps({"prompt": prompt, "response": response, "score": score}, ensure_ascii=False, allow_nan=False)
        for (_, prompt, response), score in zip(rows, without_nonfinite(scores.tolist()))
    ]
    try:
        (out / "state").mkdir(parents=True, exist_ok=True)
        _place(out, number).write_bytes(("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))
    except OSError:
        return 0
    return number


def _place(out: Path, number: int) -> Path:
    return out / "state" / f"failed-rewards-{number}.jsonl"
