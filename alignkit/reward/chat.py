"""The judge `chat`: a language model behind an OpenAI-compatible endpoint that reads two responses and names the better
one.

Each pair is asked in both orders, as such judges favour a place; answers that contradict each other are a tie (Zheng et
al. 2023, arXiv:2306.05685, section 3.4).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from alignkit.reward.http import Endpoint, Http
from alignkit.reward.outside import LONGEST, Unscored
from alignkit.schema import Count, CountOrZero, NonNegative, settings

if TYPE_CHECKING:
    from alignkit.data.corpus import Prompt
    from alignkit.data.tokens import Encoder
    from alignkit.runtime.sharding import Cluster

QUESTION = """{criterion}

[Prompt]
{prompt}

[Response A]
{first}

[Response B]
{second}

Which response is better? Answer with one letter alone: A, B, or C if they are equally good."""
WON = {"A": 1.0, "B": 0.0, "C": 0.5}


@settings
class ChatJudge:
    """url: of the endpoint's chat completions; model: its name there; criterion: what makes a response better;
    max_tokens: of an answer; concurrency, timeout, retries, backoff, token_env: see `reward/http.py`."""

    url: str | None
    model: str
    criterion: str
    max_tokens: Count
    concurrency: Count
    timeout: Annotated[float, Field(gt=0, le=LONGEST)]
    retries: CountOrZero
    backoff: NonNegative
    token_env: str | None

    def __post_init__(self) -> None:
        Http(self.url, 1, self.concurrency, self.timeout, self.retries, self.backoff, "stop", self.token_env)

    def open(self, folder: Path | None, encoder: Encoder, cluster: Cluster) -> ChatComparer:
        """Ready to ask, on every rank for its own pairs."""
        assert self.url is not None
        headers = {"Content-Type": "application/json"}
        if self.token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.token_env].strip()}"
        endpoint = Endpoint(self.url, headers, self.timeout, self.retries, self.backoff)

        def ask(prompt: str, first: str, second: str) -> float:
            question = QUESTION.format(criterion=self.criterion, prompt=prompt, first=first, second=second)
            content = {
                "model": self.model,
                "messages": [{"role": "user", "content": question}],
                "temperature": 0.0,
                "max_tokens": self.max_tokens,
            }
            return endpoint.ask(content, letter)

        return ChatComparer(ask, self.concurrency)


@dataclass(frozen=True)
class ChatComparer:
    """ask: (prompt, first, second) -> 1 if the first is better, 0.5 or 0; workers: questions at a time."""

    ask: Callable[[str, str, str], float]
    workers: int

    def compare(self, prompts: list[Prompt], first: list[str], second: list[str]) -> list[float]:
        """1, 0.5 or 0 for each pair. Raises Unscored if a question is not answered."""
        from alignkit.data.tokens import show

        def both(row: tuple[Prompt, str, str]) -> float:
            prompt, ours, theirs = row
            one, other = self.ask(show(prompt), ours, theirs), 1.0 - self.ask(show(prompt), theirs, ours)
            return one if one == other else 0.5

        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(both, zip(prompts, first, second)))


def letter(body: bytes) -> float:
    """The verdict in a chat completion. Raises Unscored if there is none."""
    try:
        text = json.loads(body)["choices"][0]["message"]["content"]
        return WON[re.findall(r"\b[ABC]\b", text)[0]]
    except (ValueError, LookupError, TypeError):
        start = body[:200].decode("utf-8", "replace").replace("\n", " ")
        raise Unscored(f"answered neither A, B nor C in a chat completion, but {start!r}") from None
