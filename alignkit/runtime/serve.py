"""`alignkit serve-reward FOLDER`: a reward model behind HTTP, for `reward=http` (the protocol is in reward/http.py)."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from alignkit.data.corpus import Prompt
from alignkit.errors import UserError
from alignkit.reward.model import units
from alignkit.runtime.artifact import open_artifact
from alignkit.runtime.recipe import report

LARGEST = 256 * 2**20  # bytes of a request
Scorer = Callable[[list[Prompt], list[str], list[bool]], list[float]]


def serve_command(words: list[str]) -> int:
    """Serve until Ctrl-C. Returns the exit code: 0, or 2 after a mistake."""
    parser = argparse.ArgumentParser("alignkit serve-reward", description="Serve a reward model over HTTP.")
    parser.add_argument("folder", help="a finished reward_model stage, or a classifier of one output")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: from everywhere")
    parser.add_argument("--port", type=int, default=8321, help="0: any that is free")
    parser.add_argument("--normalise", default="none", choices=("none", "shift", "shift_scale", "temperature"))
    parser.add_argument("--batch", type=int, default=32, help="rows of a forward pass: memory only, not the result")
    options = parser.parse_args(words)
    try:
        if options.batch < 1:
            raise UserError(f"--batch {options.batch}: expected at least 1")
        server = open_server(options.folder, options.host, options.port, options.normalise, options.batch)
    except UserError as error:
        return report(str(error), 2)
    host, port = map(str, server.server_address[:2])
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/score"
    print(f"serving {shlex.quote(options.folder)} at {url}; Ctrl-C ends it\n\n"
          f"  alignkit ppo policy=FOLDER reward=http reward.url={url}\n", flush=True)  # fmt: skip
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()
    print("serve-reward: ended")
    return 0


def open_server(folder: str, host: str, port: int, normalise: str, batch: int) -> ThreadingHTTPServer:
    """A server that listens and has its model. Raises UserError."""
    score = load_scorer_of_texts(open_artifact(folder, ("reward_model",)).path, normalise, batch)
    try:
        return ThreadingHTTPServer((host, port), partial(Handler, Service(score, folder, threading.Lock())))
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
    """One model that many requests share: they are scored one after the other."""

    score: Scorer
    folder: str
    lock: Any

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
            return 500, f"{type(error).__name__}: {error}".splitlines()[0]
        return 200, {"scores": [score if math.isfinite(score) else None for score in scores]}


class Handler(BaseHTTPRequestHandler):
    """POST /score and GET /health."""

    def __init__(self, service: Service, *arguments: Any) -> None:
        self.service = service
        super().__init__(*arguments)

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
        elif not length.isdecimal() or int(length) > LARGEST:
            self._send(400, f"expected Content-Length, at most {LARGEST} bytes: send fewer rows at a time")
        else:
            self._send(*self.service.answer(self.rfile.read(int(length))))

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
