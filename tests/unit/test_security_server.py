"""The reward server and those who ask one: who may ask, how much and how long, and that no token is told to anybody."""

import http.client
import json
import socket
import threading
import time

import pytest
from reward_world import Endpoint as Served

from alignkit.errors import UserError
from alignkit.reward.chat import ChatJudge, letter
from alignkit.reward.http import Endpoint, Http, _scores
from alignkit.reward.outside import Unscored
from alignkit.runtime import serve

TOKEN = "planted-token-of-the-server"


@pytest.fixture
def open_it(monkeypatch):
    """Opens a server whose model gives 1 to all; returns its port."""
    servers = []

    def open_server(token: str = "", score=lambda prompts, *_: [1.0] * len(prompts), host: str = "127.0.0.1") -> int:
        monkeypatch.setattr(serve, "open_artifact", lambda *_: type("", (), {"path": None}))
        monkeypatch.setattr(serve, "load_scorer_of_texts", lambda *_: score)
        server = serve.open_server("folder", host, 0, "none", 1, token)
        threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), daemon=True).start()
        servers.append(server)
        return server.server_address[1]

    yield open_server
    for server in servers:
        server.shutdown()
        server.server_close()


ROWS = json.dumps({"prompts": ["a"], "responses": ["b"]})


def ask(port: int, method: str = "POST", path: str = "/score", body: str = ROWS, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


def raw(port: int, *pieces: bytes, pause: float = 0.0) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
        return b"".join(parts)


# ------------------------------------------------------------------------------------------------------- who may ask


def command(monkeypatch, *words: str) -> list:
    """What `alignkit serve-reward FOLDER words` opens."""
    opened = []

    def open_server(folder, host, port, normalise, batch, token):
        opened.append((host, token))
        raise UserError("enough")

    monkeypatch.setattr(serve, "open_server", open_server)
    assert serve.serve_command(["FOLDER", *words]) == 2
    return opened


def test_it_listens_on_this_machine_alone_unless_told_otherwise(monkeypatch):
    assert command(monkeypatch) == [("127.0.0.1", "")]
    assert [command(monkeypatch, "--host", host) for host in ("localhost", "127.0.0.2", "::1")] == [
        [(host, "")] for host in ("localhost", "127.0.0.2", "::1")
    ]


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "10.0.0.1", "127.evil.org", "localhost.evil.org", "::ffff:8.8.8.8"]
)
def test_beyond_this_machine_it_does_not_listen_without_a_token(monkeypatch, capsys, host):
    assert command(monkeypatch, "--host", host) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --host {host}: other machines could ask too, so a token is needed")
    monkeypatch.setenv("REWARD_TOKEN", f"{TOKEN}\n")
    assert command(monkeypatch, "--host", host, "--token-env", "REWARD_TOKEN") == [(host, TOKEN)]


@pytest.mark.parametrize("value", ["", "  "])
def test_a_token_that_is_not_there_is_no_token(monkeypatch, value):
    monkeypatch.setenv("REWARD_TOKEN", value)
    with pytest.raises(UserError, match="--token-env REWARD_TOKEN: the environment has no such variable"):
        serve.token_of("127.0.0.1", "REWARD_TOKEN")


WRONG = ["", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN, f"Basic {TOKEN}", "Bearer \xe9"]


@pytest.mark.parametrize("given", [None, *WRONG])
def test_without_the_right_token_nothing_is_answered(open_it, given):
    port = open_it(TOKEN, score=lambda *_: pytest.fail("it was scored"))
    headers = {} if given is None else {"Authorization": given}
    for method, path in (("POST", "/score"), ("GET", "/health"), ("POST", "/nosuch")):
        status, said = ask(port, method, path, **headers)
        assert status == 401 and TOKEN not in said and "folder" not in said


def test_with_the_token_it_is_answered_and_the_comparison_takes_equal_time(open_it, monkeypatch):
    compared, compare = [], serve.hmac.compare_digest
    monkeypatch.setattr(serve.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    assert ask(open_it(TOKEN), Authorization=f"Bearer {TOKEN}") == (200, '{"scores": [1.0]}')
    assert compared == [(f"Bearer {TOKEN}".encode(),) * 2]


# --------------------------------------------------------------------------------------------- how much and how long


@pytest.mark.parametrize("length, status", [
    (str(serve.LARGEST + 1), 413), ("9" * 5000, 413), ("-1", 411), ("1e3", 411), ("", 411), ("\xb2", 411),
])  # fmt: skip
def test_a_request_that_is_too_large_or_does_not_say_how_large_is_refused_unread(open_it, length, status):
    head = f"POST /score HTTP/1.0\r\nContent-Length: {length}\r\n\r\n".encode("latin-1")
    assert raw(open_it(), head).split()[1] == str(status).encode()


def test_who_sends_a_byte_now_and_then_is_not_waited_for(open_it, monkeypatch):
    monkeypatch.setattr(serve, "SECONDS", 0.3)
    port, began = open_it(), time.monotonic()
    head = b"POST /score HTTP/1.0\r\nContent-Length: 100\r\n\r\n"
    assert raw(port, head, b" ", b" ", pause=0.08).startswith(b"HTTP/1.0 408 ")
    assert b"Bad request" in raw(port, b"POST /sc"), "nor who does not end his head"
    assert raw(port) == b"", "nor who says nothing"
    assert time.monotonic() - began < 5.0


def test_a_model_that_takes_long_is_waited_for(open_it, monkeypatch):
    monkeypatch.setattr(serve, "SECONDS", 0.1)
    assert ask(open_it(score=lambda prompts, *_: time.sleep(0.3) or [1.0])) == (200, '{"scores": [1.0]}')


@pytest.mark.parametrize("body", ["{", "[" * 100_000, '{"prompts": 1e999, "responses": []}', "\x00"])
def test_nonsense_is_told_in_one_line(open_it, body):
    status, said = ask(open_it(), body=body)
    assert status == 400 and said.count("\n") == 1 and "Traceback" not in said


def test_a_fault_of_the_model_is_told_to_the_terminal_and_not_to_who_asked(open_it, capsys):
    def score(*_):
        raise RuntimeError("/home/me/secret place")

    status, said = ask(open_it(score=score))
    assert (status, said) == (500, "RuntimeError: the terminal of serve-reward says more\n")
    assert "/home/me/secret place" in capsys.readouterr().err


def test_nothing_is_said_of_the_versions_of_this_machine(open_it):
    head = raw(open_it(), b"GET /health HTTP/1.0\r\n\r\n").decode()
    assert "Server: alignkit" in head and "Python" not in head
    assert b"Traceback" not in raw(open_it(), b"\xff\xfe nonsense\r\n\r\n")


# -------------------------------------------------------------------------------------------------------- those who ask

USUAL = {"concurrency": 1, "timeout": 5.0, "retries": 0, "backoff": 0.0, "token_env": "MY_TOKEN"}


@pytest.mark.parametrize("status", [200, 401, 500, 302])
@pytest.mark.parametrize("read", [_scores, letter])
def test_an_endpoint_that_says_the_token_back_is_told_without_it(monkeypatch, status, read):
    served = Served((status, f"no: \x1b[31mBearer {TOKEN}\x07"))
    endpoint = Endpoint(served.url, {"Authorization": f"Bearer {TOKEN}"}, 5.0, 0, 0.0)
    try:
        with pytest.raises(Unscored) as told:
            endpoint.ask({}, read)
    finally:
        served.close()
    assert TOKEN not in str(told.value) and "***" in str(told.value)
    assert str(told.value).isprintable(), "an escape code could rewrite the terminal"
    assert TOKEN not in repr(endpoint)


def test_the_settings_of_those_who_ask_hold_the_name_of_the_variable_alone(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    judge = ChatJudge(url="http://127.0.0.1:1", model="m", criterion="c", max_tokens=1, **USUAL)
    reward = Http(url="http://127.0.0.1:1", batch=1, on_failure="stop", **USUAL)
    for held in (judge, reward, judge.open(None, None, None), reward.open(None, None, None)):
        assert TOKEN not in repr(held)


def test_an_address_with_a_password_is_refused_without_being_shown():
    for url in ("https://me:hunter2@host/a", "ftp://me:hunter2@host"):
        with pytest.raises(ValueError) as told:
            Http(url=url, batch=1, on_failure="stop", **USUAL)
        assert "hunter2" not in str(told.value.args)
