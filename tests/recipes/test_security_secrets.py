"""Secrets are planted wherever a run could find them, and afterwards looked for in all that it left and said."""

import json
import sys
from pathlib import Path

import pytest
from test_chain import alignkit
from test_gate import TINY, WORDS

from alignkit.errors import TrainingError, UserError
from alignkit.observe.secrets import redacted, secrets_in, without_secrets
from alignkit.runtime import recipe, worker

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from reward_world import Endpoint

PLANTED = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "planted1",
    "HF_TOKEN": "hf_" + "plantedTokenOfTheHub" * 2,
    "MY_TOKEN": "planted-token-of-the-reward",
    "JUDGE_KEY": "planted-token-of-the-judge",
    "DB_PASSWORD": "planted-password",
}


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)


def found(content: bytes) -> list[str]:
    return [name for name, value in PLANTED.items() if value.encode() in content]


def test_no_secret_is_in_what_a_run_leaves_or_says_even_if_an_endpoint_says_it_back(tmp_path, monkeypatch, capfd):
    """The reward works first, and then fails with every secret in its words."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"number {i}:", "chosen": " ".join(WORDS[i % 5 :]), "rejected": "no"} for i in range(200)]
    (tmp_path / "coin.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fault = " ".join(["no: Bearer", *PLANTED.values()])
    served = Endpoint(lambda request: (200, json.dumps({"scores": [0.0] * len(request["responses"])})), (401, fault))
    words = ["tracking=wandb", "tracking.mode=offline", "reward=http", f"reward.url={served.url}", "reward.batch=64"]
    words += ["reward.concurrency=1", "reward.token_env=MY_TOKEN", "name=a", "judge=reward_model", "judge=auto"]
    try:
        assert alignkit(monkeypatch, "rlhf", *(w for w in TINY if w != "tracking=none"), *words) == 1
    finally:
        served.close()
    assert {headers["Authorization"] for headers in served.headers} == {f"Bearer {PLANTED['MY_TOKEN']}"}
    told = capfd.readouterr()
    assert "answered 401: no: Bearer" in told.err and found((told.out + told.err).encode()) == []
    left = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {".wandb", ".html", ".jsonl"} <= {file.suffix for file in left}
    assert any("ended.json" in file.name and "answered 401" in file.read_text() for file in left)
    assert {str(file): names for file in left if (names := found(file.read_bytes()))} == {}


@pytest.mark.parametrize("kind", [UserError, TrainingError, RuntimeError])
def test_no_secret_is_in_what_a_rank_leaves_of_its_failure(tmp_path, monkeypatch, kind):
    def fail(_):
        raise kind("cannot ask https://me:hunter2@host/a?token=abcdef&b=1 with " + " ".join(PLANTED.values()))

    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(worker, "run_job", fail)
    monkeypatch.setattr(worker, "die_with_parent", lambda _: None)
    monkeypatch.setattr(worker, "leave", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "job.json")])
    with pytest.raises(SystemExit):
        worker.main()
    files = list((tmp_path / "logs").iterdir())
    assert (tmp_path / "logs" / "rank0.error.json") in files
    for file in files:
        text = file.read_text()
        assert found(text.encode()) == [] and "hunter2" not in text and "abcdef" not in text
        assert "cannot ask https://***@host/a?token=***&b=1 with *** ***" in text


def test_no_secret_is_in_an_error_on_the_terminal(capsys):
    recipe.report("job 0 (reward.url=https://me:hunter2@host): " + " ".join(PLANTED.values()), 2)
    told = capsys.readouterr().err
    assert told == "error: job 0 (reward.url=https://***@host): *** *** *** *** ***\n"


SHAPES = ["hf_" + "a1" * 17, "sk-" + "A1" * 24, "sk-proj-" + "a_1-" * 8, "ghp_" + "a1" * 18, "AKIA" + "A1" * 8,
          "github_pat_" + "a1" * 20, "wandb_v1_" + "a1" * 20]  # fmt: skip


@pytest.mark.parametrize("key", SHAPES)
def test_what_has_the_shape_of_a_key_is_known_under_any_name(key):
    assert redacted({"tracking": {"notes": f"see {key}, please"}}) == {"tracking": {"notes": "see ***, please"}}
    assert list(secrets_in({"tracking": {"tags": ["a", key]}})) == ["tracking.tags"]
    assert without_secrets(f"no: {key}\n") == "no: ***\n"


@pytest.mark.parametrize(
    "text", ["sk-learn-experiments-of-2024", "hf_hub", "token: set it", "a?key", "hf_transfer_is_on"]
)
def test_words_stay_words(text):
    assert without_secrets(text) == text and not list(secrets_in({"notes": text}))
