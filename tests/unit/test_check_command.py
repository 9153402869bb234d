"""`alignkit check`, and the same checks at the start of a run, in a sweep and on several machines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stub_stage import composed

from alignkit.errors import StageFailed, UserError
from alignkit.runtime.artifact import file_facts, open_artifact, write_json
from alignkit.runtime.config import load, with_changes
from alignkit.runtime.machines import differences, facts_of
from alignkit.runtime.run import Run
from alignkit.runtime.sources import PART, files_of


def write_rows(count: int) -> list[str]:
    """Pairs on so many prompts in pairs.jsonl; the words that read them."""
    rows = [{"prompt": f"say {number}", "chosen": "yes", "rejected": "no"} for number in range(count)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["data=jsonl", "data.path=pairs.jsonl", "data.heldout=0.2"]


CHECK = """
import sys
sys.argv = ["alignkit", "check", *sys.argv[1:]]
from alignkit.cli import main
try:
    main()
finally:
    print({"torch", "transformers", "wandb"} & sys.modules.keys(), file=sys.stderr)
"""


def test_the_embedded_default_is_checked_without_torch_and_nothing_is_written(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", CHECK, "rlhf"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stderr) == (0, "set()\n")
    *facts, last = ended.stdout.splitlines()
    assert [fact.partition(" ")[0] for fact in facts] == ["data", "disk", "memory", "W&B", "versions"]
    counts = "2,512 demonstrations and 488 held out, 5,023 pairs and 977 held out, 643 prompts and 125 held out"
    assert facts[0] == f"data         {counts}, no prompt on both sides"
    assert last == "alignkit rlhf can start"
    assert list(tmp_path.iterdir()) == []


def test_warnings_are_counted_and_the_jobs_of_a_sweep_are_checked_one_by_one(cli):
    words = write_rows(300)
    code, out, err = cli("check", "rlhf", "-m", *words, "seed=1,2")
    held_out = len([line for line in out.splitlines() if line.startswith("warning: data.heldout: ")])
    assert (code, err, held_out) == (0, "", 4)
    assert out.splitlines().count("alignkit rlhf can start, with 2 warnings") == 2
    assert sorted(os.listdir()) == ["pairs.jsonl"]


def test_every_error_is_told_and_the_code_is_2(cli):
    words = write_rows(60)
    Path("file").touch()
    code, out, err = cli("check", "rlhf", *words, "runs_dir=file/runs", "tracking.mode=online")
    there = next(line for line in err.splitlines() if "training prompts" in line)
    assert code == 2 and "can start" not in out
    assert err.splitlines() == [
        f"error: data: {there.split()[2]} training prompts: an iteration takes 64 (ppo.batch / "
        "ppo.samples_per_prompt); lower ppo.batch or give more data",
        "error: runs_dir=file/runs: nothing can be written in file: the run keeps all it makes there; choose another",
    ]
    assert "warning: tracking.mode=online: no API key was found: " in out


def test_what_a_recipe_asks_for_is_told_beside_what_is_wrong_with_the_machine(cli):
    Path("file").touch()
    words = write_rows(60)
    code, out, err = cli("check", "ppo", *words, "runs_dir=file/runs")
    assert code == 2
    assert [line.partition(":")[2].partition(":")[0] for line in err.splitlines()] == [" policy", " runs_dir=file/runs"]
    code, _, err = cli("check", "rlhf", *words, "policy=x")
    assert (code, err) == (2, "error: policy=x is not used by alignkit rlhf, which trains its own; use alignkit ppo\n")
    code, _, err = cli("check", "evaluate")
    assert (code, err.partition(" that")[0]) == (2, "error: check: 'evaluate' is no recipe")
    code, _, err = cli("check", "rlhf", "ppo.eopchs=1")
    assert (code, err) == (2, "error: ppo.eopchs: unknown key; did you mean ppo.epochs?\n")


# ------------------------------------------------------------------------------------------------ at the start of a run


@pytest.fixture
def untrained(monkeypatch):
    """The first stage of a run fails at once, instead of training."""

    def fail(self, job, inputs, spec):
        self.made.append(job["label"])
        raise StageFailed("nothing is trained here")

    monkeypatch.setattr(Run, "_make", fail)


def test_a_run_tells_its_warnings_once_keeps_them_and_counts_them_in_its_report(cli, untrained):
    words = write_rows(300)
    code, out, err = cli("rlhf", *words, "name=a", "tracking=none")
    assert (code, err) == (1, "error: nothing is trained here\n")
    heldout = len([line for line in out.splitlines() if line.startswith("warning: ")])
    assert heldout == 2 and out.index("warning: ") < out.index("run a (rlhf) in runs/a")
    kept = json.loads(Path("runs/a/preflight.json").read_text())["findings"]
    assert [finding["level"] for finding in kept].count("warning") == 2
    assert {"where", "what", "why", "mend", "line"} <= kept[0].keys()
    page = Path("runs/a/report.html").read_text()
    assert "2 in all, 2 of them before the start." in page
    assert "Before the start: data.heldout: " in page
    assert cli("report", "runs/a")[0] == 0


def test_an_error_stops_a_run_before_a_folder_is_made_and_a_sweep_before_its_first_job(cli, untrained):
    words = write_rows(60)
    code, out, err = cli("rlhf", *words)
    assert code == 2 and out == ""
    assert err.startswith("error: data: ") and "training prompts: an iteration takes 64" in err
    code, out, err = cli("rlhf", "-m", *words, "ppo.batch=32,64", "name=s")
    assert code == 2
    assert err.startswith("error: job 1 (ppo.batch=64): data: ") and "none of the 2 jobs was started" in err
    code, _, err = cli("rlhf", "-m", *words, "policy=x", "seed=1,2")
    assert (code, err.count("policy=x is not used by alignkit rlhf")) == (2, 2)
    assert not Path("runs").exists()


def test_a_check_reads_no_weights_but_sees_what_is_cut_off(tmp_path):
    folder = tmp_path / "sft"
    (folder / "model").mkdir(parents=True)
    file = folder / "model" / "model.safetensors"
    file.write_bytes(b"weights")
    facts = {"stage": "sft", "digest": "d", "metrics": {}, "files": {"model/model.safetensors": file_facts(file)}}
    write_json(folder / "manifest.json", facts)
    file.write_bytes(b"WEIGHTS")
    assert open_artifact(str(folder), ("sft",), whole=False).digest == "d"
    with pytest.raises(UserError, match="is damaged: model/model.safetensors is missing, cut off or changed"):
        open_artifact(str(folder), ("sft",))
    file.write_bytes(b"cut")
    with pytest.raises(UserError, match="is damaged"):
        open_artifact(str(folder), ("sft",), whole=False)


# --------------------------------------------------------------------------------------------------- several machines


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A machine's working folder with data and a model: its facts. The other machine has its own, elsewhere."""

    def build(machine: int, text: str = "yes", weights: bytes = b"0" * (20 * PART)) -> dict:
        folder = tmp_path / str(machine)
        (folder / "m").mkdir(parents=True)
        monkeypatch.chdir(folder)
        Path("a.jsonl").write_text("".join(json.dumps({"prompt": f"{n}", "response": text}) + "\n" for n in range(50)))
        Path("m/config.json").write_text("{}")
        Path("m/model.safetensors").write_bytes(weights)
        raw = composed("rlhf")
        data = {**composed_data(), "path": "a.jsonl"}
        raw = with_changes(raw, {"data": data, "model.path": "m", "launch.machines": 2, "launch.rendezvous": "a:1"})
        return facts_of(load(raw), raw)

    return build


def composed_data() -> dict:
    from alignkit.runtime.compose import read_option

    return read_option("data", "jsonl")


def test_machines_with_the_same_files_agree_and_another_file_is_named(place):
    here = place(0)
    names = {name for name in here if name.startswith("file ")}
    assert names == {
        f"file {name}" for name in ("data.path=a.jsonl", "model.path=m/config.json", "model.path=m/model.safetensors")
    }
    assert differences(1, place(1), here) is None
    mend = "its ranks would read other data or another model; copy it there, or keep it where all machines see it"
    said = differences(2, place(2, text="no!"), here)
    assert said.startswith("on machine 2 another file than on machine 0: data.path=a.jsonl (1,790 bytes, SHA-256 ")
    assert said.endswith(f" here): {mend}") and " there, 1,790 bytes, SHA-256 " in said
    changed = b"0" * (20 * PART - 1) + b"1"  # neither the size differs nor the first part
    said = differences(3, place(3, weights=b"1" + changed[1:]), here)
    assert said.startswith(
        "on machine 3 another file than on machine 0: model.path=m/model.safetensors (20,971,520 bytes"
    )
    Path("m/config.json").unlink()
    left = {"file model.path=m/config.json": None}
    lacking = {name: value for name, value in here.items() if name not in left}
    assert "model.path=m/config.json (missing there, 2 bytes, SHA-256 " in differences(4, lacking, here)


def test_data_that_lacks_on_one_machine_is_its_fault(place):
    here = place(0)
    assert here["file data.path=a.jsonl"].endswith(dict(files_of(load(with_changes(composed("rlhf"), {
        "data": {**composed_data(), "path": "a.jsonl"}}))))["data.path=a.jsonl"][-8:])  # fmt: skip
    raw = with_changes(composed("rlhf"), {"data": {**composed_data(), "path": "b.jsonl"}})
    fault = differences(1, facts_of(load(raw), raw), here)
    assert fault == f"on machine 1: data.path=b.jsonl: expected a file, got no such file in {os.getcwd()}"
