"""`alignkit bench` on tiny models: what its report holds, how it is set against another's, and the scripts beside it.
Nothing here asks how fast anything is."""

import json
import math
import runpy
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_chain import alignkit

from alignkit.runtime.config import conf_dir

SCRIPTS = conf_dir().parent / "recipes" / "bench"
SMALL = [
    *("launch=inline", "reward.normalise=none", "policy=made/policy", "reward.path=made/reward", "bench.updates=2"),
    *("ppo.batch=8", "ppo.minibatch=8", "ppo.epochs=1", "ppo.max_prompt=64", "rollout.max_response=6"),
]
FIGURES = {
    *(
        "seconds_per_update",
        "cpu_seconds_per_update",
        "sequences_per_second",
        "tokens_per_second",
        "non_pad_tokens_per_update",
        "peak_bytes",
    ),
    *("training", "limits", "hardware", "versions", "settings", "updates", "all_seconds", "system", "stage"),
}
WORDS = (
    *("the", "harbour", "was", "quiet", "before", "a", "storm", "came", "in", "from"),
    *("west", "and", "she", "wrote", "three", "letters", "sent", "none", "of", "them"),
)


def transcripts(count: int) -> list[dict[str, str]]:
    """Rows as HH-RLHF has them."""
    rows = []
    for n in range(count):
        start = f"\n\nHuman: {WORDS[n % 19]} {WORDS[n % 17]} {WORDS[n % 13]} {n}\n\nAssistant:"
        rows.append({"chosen": f"{start} {WORDS[n % 11]} {WORDS[n % 7]}", "rejected": f"{start} {WORDS[n % 5]} no"})
    return rows


def call(patch, script: str, *words: str) -> dict:
    """Run a script of recipes/bench in this process; its names."""
    patch.syspath_prepend(SCRIPTS)
    patch.setattr(sys, "argv", [script, *words])
    return runpy.run_path(str(SCRIPTS / script), run_name="__main__")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """data.jsonl, made/ as prepare.py makes it with a model that ends early, and a finished measurement `a`."""
    place = tmp_path_factory.mktemp("bench")
    rows = [json.dumps(row) + "\n" for row in transcripts(80)]
    (place / "data.jsonl").write_text("".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        sizes = ("--vocabulary", "300", "--ends-early", "--mean-length", "3")
        call(patch, "prepare.py", "--data", "data.jsonl", "--out", "made", *sizes)
        assert alignkit(patch, "bench", *SMALL, "bench.prompts=made/prompts.jsonl", "name=a") == 0
    return place


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def report(folder: Path, name: str) -> dict:
    return json.loads((folder / "runs" / name / "bench" / "bench.json").read_text())


def numbers(node) -> list[float]:
    if isinstance(node, dict):
        return [x for value in node.values() for x in numbers(value)]
    if isinstance(node, list):
        return [x for value in node for x in numbers(value)]
    return [node] if isinstance(node, int | float) and not isinstance(node, bool) else []


def test_prompts_and_models_are_made_alike_for_both_sides(here):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    prompts = [json.loads(line)["prompt"] for line in (here / "made" / "prompts.jsonl").read_text().splitlines()]
    assert prompts == [row["chosen"][: row["chosen"].rindex("Assistant:") + 10] for row in transcripts(80)]
    policy, reward = here / "made" / "policy", here / "made" / "reward"
    tokenizers = [AutoTokenizer.from_pretrained(place) for place in (policy, reward)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].pad_token_id != tokenizers[0].eos_token_id
    model = AutoModelForCausalLM.from_pretrained(policy)
    assert model.generation_config.eos_token_id == tokenizers[0].eos_token_id
    assert AutoModelForSequenceClassification.from_pretrained(reward).config.num_labels == 1


def test_a_planted_end_is_as_likely_as_asked(here):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(here / "made" / "policy")
    torch.manual_seed(1)
    with torch.no_grad():
        logits = model(input_ids=torch.randint(8, 300, (16, 60))).logits[:, 20:]
    ends = logits.softmax(dim=-1)[..., model.generation_config.eos_token_id]
    assert float(ends.mean()) == pytest.approx(1 / 3, rel=0.15)
    assert float(ends.std()) < 0.1, "alike at every position"


def test_a_report_is_whole_and_finite(here):
    found = report(here, "a")
    assert found.keys() >= FIGURES | {"seconds", "generation_seconds", "decoding", "padding_fraction"}
    assert all(math.isfinite(x) for x in numbers(found))
    assert found["seconds"].keys() == {"rollout", "scoring", "update", "rest"}
    assert len(found["all_seconds"]) == len(found["updates"]) == 2
    assert len(found["limits"]["flops_per_second"]) >= 2 * 3
    assert found["training"]["share_of_arithmetic_limit"] > 0 and found["decoding"]["share_of_bandwidth_limit"] > 0
    assert 0 < found["model_bytes"] == found["peak_bytes"] - found["working_bytes"]
    assert found["settings"]["ppo"]["batch"] == 8 and found["settings"]["bench"]["updates"] == 2
    prompts = found["non_pad_tokens_per_update"] - 8 * 6
    assert 0 < prompts < 8 * 64


def test_the_run_is_told_by_medians(here):
    summary = json.loads((here / "runs" / "a" / "summary.json").read_text())
    found = report(here, "a")
    assert summary["bench/seconds_per_update"] == found["seconds_per_update"]
    share = found["training"]["share_of_arithmetic_limit"]
    assert summary["bench/training_share_of_arithmetic_limit"] == share


def test_a_measurement_is_never_reused_and_stands_beside_another(here, monkeypatch, capsys):
    words = [*SMALL, "bench.updates=1", "bench.prompts=made/prompts.jsonl", "name=b"]
    assert alignkit(monkeypatch, "bench", *words, "bench.against=runs/a/bench/bench.json") == 0
    told = capsys.readouterr().out
    assert "reused" not in told and "against alignkit" in told and "ours / theirs" in told
    ours, theirs = report(here, "b"), report(here, "a")
    assert ours["against"]["ratios"]["seconds_per_update"] == pytest.approx(
        ours["seconds_per_update"] / theirs["seconds_per_update"]
    )
    assert theirs == report(here, "a"), "the other run keeps its own"
    assert alignkit(monkeypatch, "bench", *words) == 0
    assert "reused" not in capsys.readouterr().out
    assert "against" not in report(here, "b")


@pytest.mark.parametrize(
    "words",
    [
        ["bench.stage=sft", "model.path=made/policy", "sft.max_length=64", "sft.batch=8", "sft.microbatch=4"],
        ["bench.stage=reward_model", "policy=made/policy", "reward_model.batch=8", "reward_model.microbatch=8"],
    ],
    ids=["sft", "reward_model"],
)
def test_the_trainers_are_measured_too(here, monkeypatch, words):
    name = words[0].partition("=")[2]
    data = ["data=jsonl", "data.path=data.jsonl", "launch=inline", "bench.updates=2", f"name={name}"]
    assert alignkit(monkeypatch, "bench", *words, *data) == 0
    found = report(here, name)
    assert found.keys() >= FIGURES and "decoding" not in found
    assert all(math.isfinite(x) for x in numbers(found))
    assert len(found["all_seconds"]) == 2 and found["updates"][0]["sequences"] == 8
    assert 0 <= found["padding_fraction"] < 1 and found["training"]["share_of_arithmetic_limit"] > 0


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "bench.prompts: missing"),
        (["bench.prompts=no.jsonl"], "bench.prompts=no.jsonl: expected a file"),
        (["bench.prompts=made/prompts.jsonl", "ppo.batch=512", "ppo.minibatch=512"], "80 prompts are too few"),
        (["bench.prompts=made/prompts.jsonl", "bench.against=data.jsonl"], "bench.against=data.jsonl: expected a JSON"),
        (["bench.prompts=made/prompts.jsonl", "bench.stage=sft"], "not used by bench.stage=sft, which reads data"),
        (["bench.stage=sft"], "policy=made/policy: not used by bench.stage=sft"),
        (["bench.stage=all"], "bench.stage: "),
    ],
)
def test_a_mistake_is_told_before_anything_is_made(here, monkeypatch, capsys, words, said):
    assert alignkit(monkeypatch, "bench", *SMALL, *words, "name=wrong") == 2
    told = capsys.readouterr().err
    assert said in told and "Traceback" not in told
    assert not (here / "runs" / "wrong").exists()


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Calls a script with measurements that are made up: linear in the batch and flat in all else, the peer's twice as
    long."""

    def bench(work, models, name, *words):
        batch = next(int(word.partition("=")[2]) for word in words if word.startswith("ppo.batch="))
        figures = {
            "seconds_per_update": batch / 2,
            "cpu_seconds_per_update": batch / 2,
            "generation_seconds": 1.0,
            "peak_bytes": 2**30,
            "working_bytes": 2**29,
        }
        speeds = {"sequences_per_second": 2.0, "tokens_per_second": 192.0, "non_pad_tokens_per_update": 96 * batch}
        parts = {"seconds": {"rollout": batch / 8, "update": batch / 4}, "training": {"share_of_arithmetic_limit": 0.5}}
        return {**figures, **speeds, **parts, "padding_fraction": None}

    def run(command, log):
        log.parent.mkdir(parents=True, exist_ok=True)
        if "--out" in command and str(SCRIPTS / "trl_ppo.py") in command:
            named = dict(zip(command[2:], command[3:]))
            found = bench(None, None, "", f"ppo.batch={2 * int(named['--batch'])}")
            Path(named["--out"]).write_text(json.dumps({**found, "non_pad_tokens_per_update": 3000}))

    def call_it(script: str, *words: str) -> dict:
        monkeypatch.syspath_prepend(SCRIPTS)
        import runs

        monkeypatch.setattr(runs, "bench", bench)
        monkeypatch.setattr(runs, "run", run)
        return call(monkeypatch, script, *words, "--out", str(tmp_path / "out"))

    yield call_it
    sys.modules.pop("runs", None)


def test_growth_is_fitted_tabled_and_drawn(tmp_path, scripts):
    growth = scripts("growth.py", "--data", "none")
    assert growth["exponent"]([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1.0)
    assert growth["exponent"]([1], [5.0]) is None
    ElementTree.parse(tmp_path / "out" / "growth.svg")
    found = json.loads((tmp_path / "out" / "growth.json").read_text())["exponents"]
    assert found["batch"]["seconds_per_update"] == found["tokens"]["update"] == pytest.approx(1.0)
    assert found["vocabulary"]["peak_bytes"] == pytest.approx(0.0)
    rows = (tmp_path / "out" / "growth.md").read_text().splitlines()
    assert len([row for row in rows if row.startswith("| batch |")]) == 4 + 1
    assert "| vocabulary | 0.00 | 0.00 | 0.00 | 0.00 | 0.00 | 0.00 |" in rows


def test_two_systems_are_compared_by_ratios_of_medians(tmp_path, scripts, capsys):
    scripts("compare.py", "--models", "made", "--peer", "python", "--times", "2", "--batch", "8", "launch.threads=2")
    found = json.loads((tmp_path / "out" / "compared.json").read_text())
    assert found["ratios"]["seconds_per_update"] == 0.5 and found["ratios"]["peak_bytes"] == 1.0
    assert [len(runs) for runs in found["runs"].values()] == [2, 2]
    assert "tokens an update: 768 and 3000" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        scripts("compare.py", "--models", "made", "--peer", "python", "--updaets", "2")
