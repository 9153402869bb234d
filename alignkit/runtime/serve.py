"""`alignkit serve-reward FOLDER`: a reward model behind HTTP, for `reward=http` (the protocol is in reward/http.py)."""

from __future__ import annotations

import argparse
import hmac
import ipaddress
import json
import math
import os
import shlex
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from alignkit.data.corpus import Prompt
from alignkit.errors import UserError
from alignkit.reward.model import units
from alignkit.runtime.artifact import open_artifact
from alignkit.runtime.recipe import report

LARGEST = 32 * 2**20  # bytes of a request
SECONDS = 30.0  # until a request has to be here, and for an answer to be taken
Scorer = Callable[[list[Prompt], list[str], list[bool]], list[float]]


def serve_command(words: list[str]) -> int:
    """Serve until Ctrl-C. Returns the exit code: 0, or 2 after a mistake."""
    parser = argparse.ArgumentParser("alignkit serve-reward", description="Serve a reward model over HTTP.")
    parser.add_argument("folder", help="a finished reward_model stage, or a classifier of one output")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; beyond this machine --token-env too")
    parser.add_argument("--token-env", metavar="NAME", help="environment variable with the token that requests bring")
    parser.add_argument("--port", type=int, default=8321, help="0: any that is free")
    parser.add_argument("--normalise", default="none", choices=("none", "shift", "shift_scale", "temperature"))
    parser.add_argument("--batch", type=int, default=32, help="rows of a forward pass: memory only, not the result")
    options = parser.parse_args(words)
    try:
        if options.batch < 1:
            raise UserError(f"--batch {options.batch}: expected at least 1")
        token = token_of(options.host, options.token_env)
        server = open_server(options.folder, options.host, options.port, options.normalise, options.batch, token)
    except UserError as error:
        return report(str(error), 2)
    host, port = map(str, server.server_address[:2])
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/score"
    named = f" reward.token_env={options.token_env}" if token else ""
    print(f"serving {shlex.quote(options.folder)} at {url}; Ctrl-C ends it\n\n"
          f"  alignkit ppo policy=FOLDER reward=http reward.url={url}{named}\n", flush=True)  # fmt: skip
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()
    print("serve-reward: ended")
    return 0


def token_of(host: str, variable: str | None) -> str:
    """The token that requests must bring, "" for none. Raises UserError for a host beyond this machine without one."""
    token = os.environ.get(variable, "").strip() if variable else ""
    if variable and not token:
        raise UserError(f"--token-env {variable}: the environment has no such variable")
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not (local or token):
        raise UserError(
            f"--host {host}: other machines could ask too, so a token is needed: put one into the environment, as in "
            "export REWARD_TOKEN=$(openssl rand -hex 16), and add --token-env REWARD_TOKEN; PPO has reward.token_env"
        )
    return token


def open_server(folder: str, host: str, port: int, normalise: str, batch: int, token: str = "") -> ThreadingHTTPServer:
    """A server that listens and has its model; token: see `token_of`. Raises UserError."""
    score = load_scorer_of_texts(open_artifact(folder, ("reward_model",)).path, normalise, batch)
    try:
        return ThreadingHTTPServer((host, port), partial(Handler, Service(score, folder, threading.Lock(), token)))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: cannot listen there: {reason}") from None


def load_scorer_of_texts(folder: Path, normalise: Any, batch: int) -> Scorer:
    """(prompts, responses, finished) -> scores, on the first GPU if there is one. Raises UserError."""
    import torch
    from transformers.utils import logging

    from alignkit.models.loading import model_folder
    from alignkit.models.scalar import open_scalar
    from alignkit.reward.rendered import own_encoder, render, require_positions, score_ids

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mean, std = units(folder, normalise)
    model, encoder = open_scalar(model_folder(folder)).to(device).eval(), own_encoder(model_folder(folder))

    def score(prompts: list[Prompt], responses: list[str], finished: list[bool]) -> list[float]:
        rows = [render(encoder, *row) for row in zip(prompts, responses, finished)]
        require_positions(model, max(map(len, rows)))
        micros = list(torch.tensor([len(row) for row in rows]).argsort().split(batch))
        with torch.no_grad():
            return ((score_ids(model, rows, encoder, micros, device) - mean) / std).tolist()

    return score


class Malformed(Exception):
    """A request that does not follow the protocol; the message is the answer."""


def rows_of(body: bytes) -> tuple[list[Prompt], list[str], list[bool]]:
    """Prompts, responses and which of them came to their end. Raises Malformed."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"expected JSON, got something else: {error}") from None
    if not isinstance(request, dict) or not {"prompts", "responses"} <= request.keys():
        raise Malformed('expected {"prompts": [...], "responses": [...]}')
    prompts, responses = request["prompts"], request["responses"]
    finished: Any = request.get("finished", [True] * len(responses) if isinstance(responses, list) else None)
    kinds = {"responses": (responses, lambda row: isinstance(row, str), "texts"),
             "prompts": (prompts, _is_prompt, "texts or lists of chat messages"),
             "finished": (finished, lambda row: isinstance(row, bool), "true or false")}  # fmt: skip
    for name, (rows, sound, kind) in kinds.items():
        if not isinstance(rows, list) or not all(map(sound, rows)):
            raise Malformed(f"{name}: expected a list of {kind}")
        if len(rows) != len(responses):
            raise Malformed(f"{name}: {len(rows)} of them to {len(responses)} responses")
    return prompts, responses, finished


def _is_prompt(row: Any) -> bool:
    turns = row if isinstance(row, list) and row else [None]
    said = (isinstance(t, dict) and all(isinstance(t.get(key), str) for key in ("role", "content")) for t in turns)
    return isinstance(row, str) or all(said)


@dataclass(frozen=True)
class Service:
    """One model that many requests share: they are scored one after the other. token: that each must bring, or ""."""

    score: Scorer
    folder: str
    lock: Any
    token: str = field(repr=False)

    def answer(self, body: bytes) -> tuple[int, Any]:
        """Status, and what to send: scores (null where one is not finite), or why there are none."""
        try:
            rows = rows_of(body)
            with self.lock:
                scores = self.score(*rows) if rows[1] else []
        except (Malformed, UserError) as error:
            return 400, str(error)
        except Exception as error:
            print(f"serve-reward: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return 500, f"{type(error).__name__}: the terminal of serve-reward says more"
        return 200, {"scores": [score if math.isfinite(score) else None for score in scores]}


class Handler(BaseHTTPRequestHandler):
    """POST /score and GET /health. Who sends his request a byte now and then is not waited for."""

    server_version, sys_version = "alignkit", ""

    def __init__(self, service: Service, *arguments: Any) -> None:
        self.service = service
        super().__init__(*arguments)

    def setup(self) -> None:
        """The time that a request has begins."""
        self.request.settimeout(2 * SECONDS)  # for who does not take the answer
        super().setup()
        self.reading = threading.Timer(SECONDS, self._stop_reading)
        self.reading.daemon = True
        self.reading.start()

    def finish(self) -> None:
        """It ends."""
        self.reading.cancel()
        super().finish()

    def _stop_reading(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def parse_request(self) -> bool:
        """Whether there is a request to answer; one without the token is refused here."""
        if not super().parse_request():
            return False
        given, token = self.headers.get("Authorization", ""), self.service.token
        known = not token or hmac.compare_digest(given.encode("utf-8", "replace"), f"Bearer {token}".encode())
        if not known:
            self._send(401, "expected the header Authorization: Bearer TOKEN with the token of this server")
        return known

    def do_GET(self) -> None:
        """{"status": "ok"} at /health."""
        if self.path != "/health":
            self._send(404, "POST /score gives scores, GET /health says whether this works")
            return
        self._send(200, {"status": "ok", "model": self.service.folder})

    def do_POST(self) -> None:
        """Scores."""
        length = self.headers.get("Content-Length", "")
        if self.path not in ("/", "/score"):
            self._send(404, "scores are at /score")
        elif not length.isdecimal():
            self._send(411, "expected the header Content-Length")
        elif len(length) > 12 or int(length) > LARGEST:
            self._send(413, f"expected at most {LARGEST} bytes: send fewer rows at a time")
        else:
            body = self.rfile.read(int(length))
            self.reading.cancel()
            whole = len(body) == int(length)
            self._send(*self.service.answer(body) if whole else (408, f"expected {length} bytes within {SECONDS:g} s"))

    def _send(self, status: int, content: Any) -> None:
        kind = "text/plain; charset=utf-8" if isinstance(content, str) else "application/json"
        text = " ".join(content.split()) + "\n" if isinstance(content, str) else json.dumps(content)
        body = text.encode("utf-8", "replace")
        with suppress(ConnectionError):  # who asked has gone
            self.send_response(status)
            for name, value in (("Content-Type", kind), ("Content-Length", str(len(body)))):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing of each request."""
