"""A connection between two launchers: JSON objects, one a line, and an empty line every two seconds as a sign of life,
so that the loss of a machine is noticed whatever it died of."""

import json
import queue
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from alignkit.errors import UserError

BEAT, SILENCE = 2.0, 15.0  # seconds between signs of life; without one for so long the other end is lost


class Lost(Exception):
    """The other end of a link is gone; the message says how."""


class Link:
    """One connection between two launchers. A thread of its own reads it and gives signs of life."""

    def __init__(self, connection: socket.socket, on_signal: Callable[[int, bool], None] | None = None) -> None:
        connection.settimeout(SILENCE)
        self._socket, self._on_signal = connection, on_signal
        self._inbox: queue.SimpleQueue[dict[str, Any] | Lost] = queue.SimpleQueue()
        self._sending, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    def send(self, **message: Any) -> None:
        """Send one message, {} a sign of life. A link that is lost says so when it is read."""
        text = json.dumps(message) if message else ""
        with suppress(OSError), self._sending:
            self._socket.sendall(f"{text}\n".encode())

    def next(self, timeout: float = 0.0) -> dict[str, Any] | None:
        """The next message, None if there is none within `timeout` seconds. Raises Lost."""
        try:
            item = self._inbox.get(timeout=timeout) if timeout else self._inbox.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, Lost):
            self._inbox.put(item)
            raise item
        return item

    def close(self) -> None:
        """Close the link once the other end has read what was sent and left, or after a second."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        self._closed.wait(1.0)
        self._socket.close()

    def _serve(self) -> None:
        rest, heard, beaten = b"", time.monotonic(), 0.0
        try:
            while True:
                if time.monotonic() - beaten >= BEAT:
                    self.send()
                    beaten = time.monotonic()
                if not select.select([self._socket], [], [], BEAT)[0]:
                    if time.monotonic() - heard > SILENCE:
                        raise Lost(f"nothing was heard of it for {SILENCE:.0f} s")
                    continue
                if not (chunk := self._socket.recv(65536)):
                    raise Lost("its launcher ended")
                heard = time.monotonic()
                *lines, rest = (rest + chunk).split(b"\n")
                for message in (json.loads(line) for line in lines if line):
                    if self._on_signal and "signal" in message:
                        self._on_signal(message["signal"], message["again"])
                    else:
                        self._inbox.put(message)
        except Lost as lost:
            self._inbox.put(lost)
        except ConnectionResetError:  # it left before it had read all
            self._inbox.put(Lost("its launcher ended"))
        except (OSError, ValueError, TypeError, KeyError) as error:  # the connection broke, or this is no launcher
            self._inbox.put(Lost(f"the connection to it broke ({error})"))
        self._closed.set()


def address(rendezvous: str | None) -> tuple[str, int]:
    """HOST:PORT, also with an IPv6 address in brackets. Raises UserError."""
    host, _, port = (rendezvous or "").rpartition(":")
    if not host or not 0 < int(port) < 2**16:
        raise UserError(f"launch.rendezvous={rendezvous}: expected HOST:PORT with a port from 1 to 65535")
    return host.strip("[]"), int(port)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket for all of this machine's addresses, as a host's name may stand for another one here than
    elsewhere; a loopback address stays one."""
    if host in ("localhost", "::1") or host.startswith("127."):
        family = socket.AF_INET6 if host == "::1" else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    elif socket.has_dualstack_ipv6():
        listening = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        listening = socket.create_server(("", port))
    listening.settimeout(0.2)
    return listening
