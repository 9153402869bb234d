"""Kills a small chain at random moments, lets it go on, and compares what it ends with.

    python tests/recipes/kills.py FOLDER --kills 20 --ranks 2 --first 0

A kill is SIGKILL of the launcher, of torch.distributed.run or of a rank: at a random second, after a random row of a
random stage, while a checkpoint is being written, or while a product is being saved and the next stage starts. A run
that goes on may be killed again. Whatever happened, it must end with the weights and the rows of a run that nobody
killed, to the last bit, and leave no process behind. FOLDER is new or empty; the log of each run stays in it.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

SIZES = [
    "tracking=none", "data.num_prompts=100", "data.num_pairs=140", "data.num_demonstrations=140",
    "model.hidden_size=32", "sft.epochs=1", "sft.batch=8", "reward_model.epochs=1", "reward_model.batch=8",
    "ppo.batch=16", "ppo.minibatch=8", "ppo.episodes=160", "ppo.value_warmup=3", "ppo.ema=0.9", "rollout.batch=8",
    "ppo.samples_every=2", "rollout.max_response=16", "shaping.running=scale", "reward.normalise=none",
    "ptx=demonstrations", "ptx.batch=4", "kl.target=3.0", "evaluate.prompts=8",
    "checkpoint.every_iterations=1", "checkpoint.every_steps=1",
]  # fmt: skip
STAGES = ["sft", "reward_model", "ppo", "evaluate"]
TRAINED = STAGES[:3]
MEASURED = ("time", "seconds", "tokens_per_second", "runtime", "per_second")  # not computed
MARK = "ALIGNKIT_KILLS"  # names the run in the environment of each of its processes
LIMIT = 900.0  # seconds for a run, whatever else the machine does
GONE = 30.0  # seconds from the launcher's end until nothing of it runs


@dataclass(frozen=True)
class Moment:
    """When to kill whom. kind: "second" of the run; "row", once a stage's metrics have that many; "checkpoint", while
    the one after that step or later is written; "product", while it is saved. delay: seconds after that."""

    kind: str
    stage: str
    number: int
    delay: float
    victim: str

    def __str__(self) -> str:
        when = f"second {self.delay:.1f}" if self.kind == "second" else f"{self.stage}, {self.kind} {self.number}"
        return f"{self.victim} at {when}" + f" + {self.delay:.2f} s" * (self.kind != "second")


def draw(dice: random.Random, seconds: float, stages: list[str], ranks: int) -> Moment:
    """A random moment, in one of these stages or of a run that takes so many seconds."""
    kind = dice.choice(["second", "row", "row", "checkpoint", "checkpoint", "product"])
    delays = {"second": seconds, "row": 0.3, "checkpoint": 0.03, "product": 2.0}
    return Moment(
        kind=kind,
        stage=dice.choice(stages),
        number=1 if kind == "product" else dice.randint(1, 9),
        delay=delays[kind] * dice.random(),
        victim=dice.choice(["launcher", "group", *(f"rank {rank}" for rank in range(ranks))]),
    )


class Chain:
    """One run of the chain in a folder of its own, and its processes."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder, self.ranks, self.run = folder, ranks, folder / "runs" / "a"
        folder.mkdir(parents=True, exist_ok=True)
        self.log, self.token = folder / "log.txt", hashlib.sha256(str(folder.absolute()).encode()).hexdigest()
        self.launcher: subprocess.Popen | None = None
        self.was_killed = False  # since it was started

    def begin(self, *words: str) -> None:
        """Start the chain."""
        self._start("rlhf", *SIZES, "name=a", f"launch.processes={self.ranks}", *words)

    def resume(self) -> None:
        """Let it go on; a run that was killed before its settings were written is begun again."""
        if (self.run / "config.yaml").is_file():
            self._start("resume", "runs/a")
        else:
            self.begin()

    def _start(self, *words: str) -> None:
        environment = {**os.environ, MARK: self.token, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
        self.note(f"$ alignkit {' '.join(words)}")
        self.was_killed = False
        with self.log.open("a") as log:
            self.launcher = subprocess.Popen(
                [sys.executable, "-c", "from alignkit.cli import main; main()", *words],
                cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait(self) -> int:
        """The launcher's exit code, once nothing of the run is left. Raises AssertionError if something stays."""
        code = self.launcher.wait(timeout=LIMIT)
        end = time.monotonic() + GONE
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        assert not left, f"still running after the launcher's end (exit {code}): {left}"
        return code

    def processes(self) -> dict[int, str]:
        """Number and command line of every process of this run, whoever started it."""
        found = {}
        for place in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if place.name.isdecimal() and f"{MARK}={self.token}".encode() in (place / "environ").read_bytes():
                    found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return {number: words for number, words in found.items() if words}  # without those that have ended

    def victim(self, name: str) -> int:
        """The number of a process: the launcher's where the one that is asked for does not run now."""
        for number, words in self.processes().items():
            is_group = "alignkit.runtime.group" in words
            if name == "group" and is_group:
                return number
            if name.startswith("rank") and "alignkit.runtime.worker" in words and not is_group:
                with contextlib.suppress(OSError):
                    if f"\0RANK={name.split()[1]}\0" in Path(f"/proc/{number}/environ").read_text():
                        return number
        return self.launcher.pid

    def kill(self, moment: Moment) -> bool:
        """Kill at that moment; False if the run was over before."""
        began = time.monotonic()
        while not self._reached(moment):
            if self.launcher.poll() is not None:
                return False
            assert time.monotonic() - began < LIMIT, f"never came: {moment}"
            time.sleep(0.002)
        time.sleep(moment.delay)
        number = self.victim(moment.victim)
        if self.launcher.poll() is not None:
            return False
        who = "launcher" if number == self.launcher.pid else moment.victim
        state = self.run / moment.stage / "state"
        there = sorted(place.name for place in state.glob("*")) if state.is_dir() else []
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            return False
        self.note(f"# killed {who} ({moment}; {moment.stage} had {', '.join(there) or 'no checkpoint'})")
        self.was_killed = True
        return True

    def _reached(self, moment: Moment) -> bool:
        stage = self.run / moment.stage
        if not stage.exists():
            return moment.kind == "second"
        if moment.kind == "row":
            metrics = stage / "metrics.jsonl"
            return metrics.is_file() and metrics.read_bytes().count(b"\n") >= moment.number
        if moment.kind == "checkpoint":
            steps = [int(place.name.split("-")[1]) for place in stage.glob("state/.checkpoint-*")]
            return any(step >= moment.number for step in steps)
        return moment.kind == "second" or (stage / "model").is_dir()

    def note(self, text: str) -> None:
        """A line of our own in the log."""
        with self.log.open("a") as log:
            log.write(f"{text}\n")

    def tail(self) -> str:
        """The end of the log."""
        return self.log.read_text()[-3000:]

    def result(self) -> dict:
        """All that the chain has made: digests of weights, rows, figures."""
        summary = json.loads((self.run / "summary.json").read_text("utf-8"))
        made: dict = {"summary": computed(summary)}
        made["comparison"] = json.loads((self.run / "evaluate" / "comparison.json").read_text("utf-8"))
        for stage in TRAINED:
            files = sorted((self.run / stage / "model").rglob("*"))
            made[f"{stage} model"] = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}
            for name in ("metrics", "samples"):
                file = self.run / stage / f"{name}.jsonl"
                lines = file.read_text("utf-8").splitlines() if file.is_file() else []
                made[f"{stage} {name}"] = [computed(json.loads(line)) for line in lines]
        return made

    def tidy(self) -> bool:
        """Whether the store holds finished products alone, and no checkpoint any more."""
        store = self.folder / "runs" / ".store"
        whole = all((self.run / stage / "manifest.json").is_file() for stage in STAGES)
        return whole and not [*store.glob("*.partial"), *store.glob("[!.]*[!0-9]/state/*checkpoint-*")]


def computed(row: dict) -> dict:
    """A row without what is measured."""
    return {name: value for name, value in row.items() if not any(word in name for word in MEASURED)}


@dataclass(frozen=True)
class Whole:
    """A run that nobody killed."""

    chain: Chain
    result: dict
    seconds: float

    @classmethod
    def make(cls, folder: Path, ranks: int, *words: str) -> "Whole":
        chain, began = Chain(folder, ranks), time.monotonic()
        chain.begin(*words)
        assert chain.wait() == 0, chain.tail()
        assert chain.tidy()
        return cls(chain, chain.result(), time.monotonic() - began)


def killed(folder: Path, whole: Whole, seed: int, only: str | None = None, again: float = 0.3) -> list[str]:
    """Run the chain, kill it, let it go on until it is done. Returns the names of what differs from `whole` in the end.

    only: the stage in which it is killed, those before it are taken from the whole run; None: all are run, and any may
    be. again: how probably a run that goes on is killed too.
    """
    dice, chain, kills = random.Random(seed), Chain(folder, whole.chain.ranks), 0
    while kills == 0:  # a run that was over before its moment is made again
        shutil.rmtree(folder / "runs", ignore_errors=True)
        _reuse(whole, chain, STAGES[: STAGES.index(only)] if only else [])
        chain.begin()
        while True:
            if kills == 0 or (kills < 3 and dice.random() < again):
                kills += chain.kill(draw(dice, whole.seconds, [only] if only else TRAINED, chain.ranks))
            code = chain.wait()
            if code == 0:
                break
            assert chain.was_killed, chain.tail()
            chain.resume()
    assert "is damaged" not in chain.log.read_text(), "a kill damaged what was sealed before"
    assert chain.tidy(), sorted(str(place) for place in (folder / "runs" / ".store").rglob("*"))
    result = chain.result()
    return [name for name in whole.result if result.get(name) != whole.result[name]]


def _reuse(whole: Whole, chain: Chain, stages: list[str]) -> None:
    """Give the run these stages' products."""
    for stage in stages:
        product = (whole.chain.run / stage).resolve()
        shutil.copytree(product, chain.folder / "runs" / ".store" / product.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--first", type=int, default=0, help="seed of the first run")
    words = parser.parse_args()
    whole, good = Whole.make(words.folder / "whole", words.ranks), 0
    print(f"without a kill: {whole.seconds:.0f} s on {words.ranks} ranks", flush=True)
    for seed in range(words.first, words.first + words.kills):
        began, folder = time.monotonic(), words.folder / f"seed{seed}"
        try:
            said = killed(folder, whole, seed)
        except (AssertionError, subprocess.TimeoutExpired) as fault:
            said = [str(fault)]
        good += not said
        kills = [line[2:] for line in (folder / "log.txt").read_text().splitlines() if line.startswith("# killed")]
        outcome = f"DIFFERENT: {said}" if said else "the same"
        print(
            f"seed {seed}: {'; '.join(kills) or 'not killed'}: {outcome}, {time.monotonic() - began:.0f} s", flush=True
        )
    print(f"{good} of {words.kills} ended as if nobody had killed them", flush=True)
    sys.exit(good < words.kills)


if __name__ == "__main__":
    main()
