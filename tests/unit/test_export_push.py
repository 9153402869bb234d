"""`alignkit export --push`: what is asked of the Hub, by the real client, on a server of this machine."""

import base64
import functools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest
from export_world import CHAIN, call, make_run


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a push takes. status: of whoami; there: {"private": ...} of the repository if it is."""

    status, there, seen = 200, None, []

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            self.answer(self.status, {"name": "me"} if self.status == 200 else {"error": "no such token"})
        elif self.path.startswith("/api/models/me/mine/tree/"):
            self.answer(200, [{"type": "file", "path": "model-00001-of-00002.safetensors", "size": 1, "oid": "0"}])
        elif self.there is None:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            self.answer(200, {"id": "me/mine", "modelId": "me/mine", "siblings": [], "tags": [], **self.there})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.seen.append((self.path, self.headers["Authorization"], body))
        if self.path == "/api/repos/create":
            self.answer(200, {"url": f"http://{self.headers['Host']}/me/mine"})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for file in json.loads(body)["files"]]  # fmt: skip
            self.answer(200, {"files": files})
        elif "/commit/" in self.path:
            self.answer(200, {"commitUrl": f"http://{self.headers['Host']}/me/mine/commit/1", "commitOid": "1"})
        else:
            self.answer(200, {"errors": [], "warnings": []})  # validate-yaml

    def answer(self, status: int, content, headers: dict | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def run(tmp_path, monkeypatch, tiny_policy, tiny_tokenizer):
    """Makes runs/a in this folder: `make_run` but for its first three words."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(make_run, tmp_path, tiny_policy, tiny_tokenizer)


@pytest.fixture
def hub(monkeypatch):
    """A Hub at this machine's own address, and a token for it."""
    Hub.status, Hub.there, Hub.seen = 200, None, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield Hub
        server.shutdown()


@pytest.mark.parametrize("words, private", [([], True), (["--public"], False)])
def test_what_is_sent_is_the_folder_and_nothing_else(words, private, hub, run, monkeypatch, capsys):
    folder = run(*CHAIN) / "export" / "ppo"
    code, out, err = call(monkeypatch, capsys, "a", "--push=me/mine", *words)
    assert (code, err) == (0, "") and f"/me/mine ({'private' if private else 'public'})" in out
    asked = {path: body for path, _, body in hub.seen}
    assert {token for _, token, _ in hub.seen} == {"Bearer hf_of_a_test"}
    made = json.loads(asked["/api/repos/create"])
    assert (made["name"], made["organization"]) == ("mine", "me")
    assert made.get("private", made.get("visibility") == "private") is private
    lines = [json.loads(line) for line in asked["/api/models/me/mine/commit/main"].splitlines()]
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    assert sent == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert 'AutoModelForCausalLM.from_pretrained("me/mine")' in sent["README.md"].decode()
    gone = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
    assert gone == ["model-00001-of-00002.safetensors"], "of the model that was there before"


def test_a_folder_that_is_there_is_sent_as_a_person_has_left_it(hub, run, monkeypatch, capsys):
    folder = run(*CHAIN) / "export" / "ppo"
    assert call(monkeypatch, capsys, "a")[0] == 0 and hub.seen == []
    (folder / "README.md").write_text("my own card")
    code, out, _ = call(monkeypatch, capsys, "a", "--push=me/mine")
    assert code == 0 and "stays as it is\npushed to " in out
    assert base64.b64encode(b"my own card").decode() in hub.seen[-1][2]


@pytest.mark.parametrize(
    "words, there, status, code, told",
    [
        (["--push=mine"], None, 200, 2, "--push=mine: expected OWNER/NAME"),
        (["--push=me/mine--"], None, 200, 2, "--push=me/mine--: expected OWNER/NAME: Repo id must use"),
        (["--push=me/mine"], None, 401, 2, "may this token write there? the Hub says: "),
        (["--push=me/mine"], None, 500, 1, "--push=me/mine: HfHubHTTPError: "),
        (["--push=me/mine"], {"private": False}, 200, 2, "is there and public: add --public, or choose another name"),
        (["--push=me/mine", "--public"], {"private": True}, 200, 2, "is there and private: leave --public out, or"),
    ],
)
def test_what_the_hub_will_not_take_is_a_line_before_any_work(
    words, there, status, code, told, hub, run, monkeypatch, capsys
):  # fmt: skip
    folder = run(*CHAIN)
    hub.there, hub.status = there, status
    seen = call(monkeypatch, capsys, "a", *words)
    assert seen[0] == code and told in seen[2] and seen[2].count("\n") == 1
    assert hub.seen == [] and not (folder / "export").exists()


def test_without_token_or_network_it_says_so(hub, run, monkeypatch, capsys):
    folder = run(*CHAIN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _, err = call(monkeypatch, capsys, "a", "--push=me/mine")
    assert code == 1 and err.startswith("error: export: --push=me/mine: ConnectError") and err.count("\n") == 1
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "nowhere")
    code, _, err = call(monkeypatch, capsys, "a", "--push=me/mine")
    assert code == 2 and err.endswith("no token of the Hub here: `hf auth login`, or set HF_TOKEN\n")
    assert not (folder / "export").exists()
