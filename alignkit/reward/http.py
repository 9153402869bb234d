"""The reward `http`: an endpoint that scores texts, such as `alignkit serve-reward`.

    POST url    {"prompts": [text or chat messages, ...], "responses": [text, ...], "finished": [true, ...]}
    200         {"scores": [number, ...]}

`finished` says whether each response came to its end or was cut off at its greatest length; an endpoint may ignore it.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Field

from alignkit.reward.outside import LONGEST, OnFailure, OutsideSource, Unscored
from alignkit.schema import Count, CountOrZero, NonNegative, settings

if TYPE_CHECKING:
    from alignkit.data.corpus import Prompt
    from alignkit.data.tokens import Encoder
    from alignkit.runtime.sharding import Cluster

Answer = TypeVar("Answer")


@settings
class Http:
    """url: of the endpoint; batch: rows of a request; concurrency: requests at a time, on each rank; timeout: seconds
    of a request; retries: further attempts after no connection, no answer in time, 429 or 5xx; backoff: seconds before
    the first of them, doubled each time; token_env: the environment variable that holds a bearer token, null: none;
    on_failure: of a request that has failed for good, or of scores that are not finite."""

    url: str | None
    batch: Count
    concurrency: Count
    timeout: Annotated[float, Field(gt=0, le=LONGEST)]
    retries: CountOrZero
    backoff: NonNegative
    on_failure: OnFailure
    token_env: str | None
    needs_reward_model = False

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url or "")
        if parts.username is not None or parts.password is not None:  # first, as the next line shows the address
            raise ValueError("url holds a user or a password: leave it out, and name a variable in token_env")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:  # port: or it raises
            raise ValueError(f"url={self.url or 'null'}: expected http://HOST:PORT/PATH or https://...")
        if self.token_env is not None and not os.environ.get(self.token_env, "").strip():
            raise ValueError(f"token_env={self.token_env}: the environment has no such variable")

    def open(self, folder: Path | None, encoder: Encoder, cluster: Cluster) -> OutsideSource:
        """Ready to ask, on every rank for its own rows."""
        assert self.url is not None
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.token_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.token_env].strip()}"
        endpoint = Endpoint(self.url, headers, self.timeout, self.retries, self.backoff)
        return OutsideSource(self.url, endpoint, self.batch, self.on_failure, workers=self.concurrency)


class _Later(Unscored):
    """A failure that another attempt may mend."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A POST must not become a GET, nor its token go to another host: a redirect is an answer of its own."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """Posts JSON and reads the answer. timeout, backoff in seconds; retries: further attempts."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    timeout: float
    retries: int
    backoff: float

    def __call__(self, prompts: list[Prompt], responses: list[str], finished: list[bool]) -> list[Any]:
        """The list in "scores", unchecked. Raises Unscored with the endpoint's own words."""
        return self.ask({"prompts": prompts, "responses": responses, "finished": finished}, _scores)

    def ask(self, content: Any, read: Callable[[bytes], Answer]) -> Answer:
        """What `read` makes of the answer to this content. Raises Unscored once no further attempt is left."""
        body = json.dumps(content).encode()
        for attempt in range(self.retries + 1):
            try:
                return read(self._post(body))
            except _Later as error:
                if attempt == self.retries:
                    raise self._told(f"{error}" + f" ({attempt + 1} attempts)" * (attempt > 0)) from None
            except Unscored as error:
                raise self._told(str(error)) from None
            time.sleep(self.backoff * 2**attempt)
        raise AssertionError("unreachable")

    def _told(self, words: str) -> Unscored:
        """What the endpoint said without the token, should it say it back, and without what controls a terminal."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return Unscored("".join(c if c.isprintable() else " " for c in words.replace(token or "\0", "***")))

    def _post(self, body: bytes) -> bytes:
        request = urllib.request.Request(self.url, body, dict(self.headers), method="POST")
        end = time.monotonic() + self.timeout
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as reply:
                return _read(reply, end)
        except urllib.error.HTTPError as error:
            kind = _Later if error.code >= 500 or error.code == 429 else Unscored
            raise kind(f"answered {error.code}: {_first_line(error)}") from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, TimeoutError):
                raise _Later(f"no answer within {self.timeout:g} s") from None
            raise _Later(f"no answer: {str(cause) or type(cause).__name__}") from None


def _read(reply: http.client.HTTPResponse, end: float) -> bytes:
    """The whole body; a timeout of the socket alone would let an endpoint send a byte now and then for ever."""
    parts = []
    while part := reply.read1(1 << 16):
        parts.append(part)
        if time.monotonic() > end:
            raise TimeoutError
    return b"".join(parts)


def _first_line(error: urllib.error.HTTPError) -> str:
    body = b""
    with suppress(OSError, http.client.HTTPException):
        body = error.read(2000)
    lines = body.decode("utf-8", "replace").strip().splitlines()
    return (lines[0] if lines else str(error.reason))[:200]


def _scores(body: bytes) -> list[Any]:
    try:
        return json.loads(body)["scores"]
    except (ValueError, LookupError, TypeError):
        start = body[:80].decode("utf-8", "replace").strip().replace("\n", " ")
        raise Unscored(f'answered no JSON like {{"scores": [...]}}, but {start!r}') from None
