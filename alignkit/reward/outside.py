"""What rewards share that alignkit does not compute itself: calls of some rows each, whose answers are not trusted."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from alignkit.errors import in_words
from alignkit.reward.source import RewardSource

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.data.corpus import Prompt
    from alignkit.reward.source import Answers

OnFailure = Literal["stop", "mean"]
LONGEST = 1500  # seconds that a call may take: the other ranks wait half an hour for this one, then give up


class Unscored(Exception):
    """A call that gave no scores; the message says why, for a person."""


@dataclass(frozen=True)
class OutsideSource(RewardSource):
    """A reward source that asks somebody else.

    name: who is asked; ask: (prompts, responses, whether each came to its end) -> numbers, one a response; batch: rows
    of a call; workers: calls at a time; on_failure: see `RewardSource`; reasons: why calls of the last `score` failed.
    """

    name: str
    ask: Callable[[list[Prompt], list[str], list[bool]], Any]
    batch: int
    on_failure: OnFailure
    workers: int = 1
    reasons: list[str] = field(default_factory=list)

    def score(self, answers: Answers, microbatch: int) -> Tensor:
        """See `RewardSource.score`; NaN for the rows of a call that failed. With on_failure=stop nothing more is asked
        once a call has failed."""
        import torch

        rows = list(zip(answers.prompts, answers.responses, answers.rollout.finished.tolist()))
        calls = [rows[start : start + self.batch] for start in range(0, len(rows), self.batch)]
        ended = threading.Event()
        with ThreadPoolExecutor(self.workers) as pool:
            parts = list(pool.map(lambda call: self._scores(call, ended), calls))
        self.reasons[:] = [reason for _, reason in parts if reason]
        scores = [score for part, _ in parts for score in part]
        return torch.tensor(scores, dtype=torch.float32, device=answers.rollout.tokens.device)

    def _scores(self, rows: list[tuple[Prompt, str, bool]], ended: threading.Event) -> tuple[list[float], str]:
        """The scores of one call, or NaN and the reason."""
        reason = ""
        if not ended.is_set():
            try:
                return numbers(self.ask(*map(list, zip(*rows))), len(rows)), ""
            except Exception as error:
                reason = f"{self.name}: {why(error)}"
                if self.on_failure == "stop":
                    ended.set()
        return [math.nan] * len(rows), reason


def numbers(answer: Any, count: int) -> list[float]:
    """An answer as `count` floats, None as NaN; raises Unscored if it is anything else."""
    answer = answer.tolist() if hasattr(answer, "tolist") else answer
    if not isinstance(answer, list | tuple):
        raise Unscored(f"answered {type(answer).__name__} where a list of {count} numbers was expected")
    if len(answer) != count:
        raise Unscored(f"answered {len(answer)} scores to {count} responses")
    return [_number(score) for score in answer]


def _number(score: Any) -> float:
    score = score.item() if hasattr(score, "item") else score
    if score is None:
        return math.nan
    if isinstance(score, bool) or not isinstance(score, Real):
        raise Unscored(f"answered {repr(score)[:80]} where a number was expected")
    return float(score)


def why(error: BaseException) -> str:
    """An error in one line, with the place in the code that raised it; what is made for people as it is."""
    return str(error) if isinstance(error, Unscored) else in_words(error)
