"""What compare.py and growth.py share: one `alignkit bench` in a process of its own, and its figures."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def bench(work: Path, models: Path, name: str, *words: str) -> dict[str, Any]:
    """Run `alignkit bench` on the policy, reward model and prompts in `models`; its bench.json. The run goes to
    work/runs/name, what it says to work/name.log. words: further settings, which win over those here."""
    given = {
        "policy": models / "policy",
        "reward.path": models / "reward",
        "bench.prompts": models / "prompts.jsonl",
        "reward.normalise": "none",  # a classifier with random weights has no mean of its own on file
        "runs_dir": work / "runs",
        "name": name,
    }
    given = {key: str(value) for key, value in given.items()} | dict(word.split("=", 1) for word in words)
    command = [sys.executable, "-c", "from alignkit.cli import main; main()", "bench"]
    run([*command, *(f"{key}={value}" for key, value in given.items())], work / f"{name}.log")
    return json.loads((Path(given["runs_dir"]) / name / "bench" / "bench.json").read_text("utf-8"))


def run(command: list[str], log: Path) -> None:
    """Run a command, its output in a file; end with its last lines if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        last = "\n".join(log.read_text("utf-8").splitlines()[-8:])
        raise SystemExit(f"error: {' '.join(command[:4])} ... ended with code {code}; {log} ends:\n{last}")


def save(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
