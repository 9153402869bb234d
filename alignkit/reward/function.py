"""The reward `function`: a Python function of the user's own."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from alignkit.reward.outside import LONGEST, OnFailure, OutsideSource, Unscored, why
from alignkit.schema import Count, settings

if TYPE_CHECKING:
    import torch

    from alignkit.data.corpus import Prompt
    from alignkit.data.tokens import Encoder
    from alignkit.runtime.sharding import Cluster


@settings
class Function:
    """function: module.name of score(prompts, responses) -> list of numbers, `def` or `async def`; the prompts come as
    the data has them, texts or lists of chat messages; batch: rows of a call; timeout: seconds of a call; on_failure:
    of a call that raises, is late, answers too few or too many numbers, or ones that are not finite."""

    function: str | None
    batch: Count
    timeout: Annotated[float, Field(gt=0, le=LONGEST)]
    on_failure: OnFailure
    needs_reward_model = False
    CODE = "function"

    def __post_init__(self) -> None:
        if "." not in (self.function or "").strip("."):
            named = self.function or "null"
            raise ValueError(f"function={named}: expected module.name of score(prompts, responses) -> list of numbers")

    def open(self, folder: Path | None, encoder: Encoder, cluster: Cluster) -> OutsideSource:
        """Ready to call, on every rank for its own rows."""
        assert self.function is not None
        module, _, name = self.function.rpartition(".")
        call = InTime(getattr(importlib.import_module(module), name), self.timeout, cluster.device)
        return OutsideSource(self.function, call, self.batch, self.on_failure)


class InTime:
    """A function called in a thread of its own, so that a late one is not waited for (it cannot be ended: it goes on
    beside the run). Coroutines run in one event loop, which stays open between the calls."""

    def __init__(self, function: Callable[..., Any], timeout: float, device: torch.device) -> None:
        self.function, self.timeout, self.device = function, timeout, device
        self.loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, prompts: list[Prompt], responses: list[str], finished: list[bool]) -> Any:
        """What the function answers or raises; Unscored if it is late."""
        answer: Future[Any] = Future()
        threading.Thread(target=self._run, args=(answer, prompts, responses), daemon=True).start()
        try:
            return answer.result(self.timeout)
        except TimeoutError:
            if answer.done():  # the function's own
                raise
            raise Unscored(f"no answer within {self.timeout:g} s") from None

    def _run(self, answer: Future[Any], prompts: list[Prompt], responses: list[str]) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # of this thread, which would else begin with the first
        try:
            with torch.no_grad():  # of this thread too
                result = self.function(prompts, responses)
            if inspect.isawaitable(result):
                late = self.timeout + 1.0  # by then it has been given up, and is told so
                result = asyncio.run_coroutine_threadsafe(asyncio.wait_for(result, late), self._open_loop()).result()
            answer.set_result(result)
        except Exception as error:
            answer.set_exception(error)
        except BaseException as error:  # sys.exit() in the user's code must not end the rank
            answer.set_exception(Unscored(why(error)))

    def _open_loop(self) -> asyncio.AbstractEventLoop:
        if self.loop is None:
            self.loop = asyncio.new_event_loop()
            threading.Thread(target=self.loop.run_forever, daemon=True).start()
        return self.loop
