"""alignkit and TRL's last PPOTrainer in turn on the same models, prompts and settings: the ratio of medians.

    python recipes/bench/compare.py --models work --peer peer/bin/python --out compared --times 3

--models: what recipes/bench/prepare.py wrote; --peer: the Python of an environment with trl==1.12.0. They take turns,
so that a machine that grows slower does so for both. Each run's JSON is kept in OUT, and all ratios in compared.json.
Words that have a = in them are settings of `alignkit bench` alone, such as rollout=vllm or launch.threads=2.
"""

import argparse
import json
from pathlib import Path
from statistics import median

from runs import bench, run, save

KEYS = (
    "seconds_per_update", "cpu_seconds_per_update", "generation_seconds", "sequences_per_second", "tokens_per_second",
    "peak_bytes",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", required=True, type=Path, help="folder that prepare.py wrote")
    parser.add_argument("--peer", required=True, help="Python of an environment with trl==1.12.0")
    parser.add_argument("--out", required=True, type=Path, help="folder for all that is measured")
    parser.add_argument("--times", type=int, default=3, help="runs of each")
    parser.add_argument("--updates", type=int, default=3, help="updates that count, of each run")
    parser.add_argument("--batch", type=int, default=32, help="sequences an update")
    parser.add_argument("--micro-batch", type=int, default=32, help="the peer's; ours is a setting of its own")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--max-prompt", type=int, default=128, help="tokens")
    parser.add_argument("--max-response", type=int, default=64, help="tokens")
    parser.add_argument(
        "--learning-rate", type=float, default=1e-5, help="of both; 1e-9 keeps planted lengths as they are"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--gradient-checkpointing", action="store_true", help="of the peer's policy")
    options, words = parser.parse_known_args()
    if wrong := [word for word in words if "=" not in word or word.startswith("-")]:
        parser.error(f"unknown: {' '.join(wrong)}")
    found: dict[str, list[dict]] = {"trl": [], "alignkit": []}
    for number in range(1, options.times + 1):
        found["trl"].append(peer(options, number))
        found["alignkit"].append(ours(options, number, words))
        for name, runs in found.items():
            last = runs[-1]
            cpu = f"{last['cpu_seconds_per_update']:.2f} s of the CPU"
            print(f"{number}/{options.times} {name}: {last['seconds_per_update']:.2f} s an update, {cpu}", flush=True)
    medians = {
        name: {key: median(row[key] for row in runs) for key in KEYS if all(key in row for row in runs)}
        for name, runs in found.items()
    }
    tokens = {name: median(row["non_pad_tokens_per_update"] for row in runs) for name, runs in found.items()}
    ratios = {key: medians["alignkit"][key] / medians["trl"][key] for key in KEYS}
    save(options.out / "compared.json", {"medians": medians, "ratios": ratios, "tokens": tokens, "runs": found})
    print(f"{'median of ' + str(options.times):<22}{'alignkit':>12}{'trl':>12}{'ratio':>8}")
    for key in KEYS:
        print(f"{key:<22}{medians['alignkit'][key]:>12.4g}{medians['trl'][key]:>12.4g}{ratios[key]:>8.3f}")
    print(f"tokens an update: {tokens['alignkit']:.0f} and {tokens['trl']:.0f}")


def peer(options: argparse.Namespace, number: int) -> dict:
    """One run of the peer."""
    file = options.out / f"trl-{number}.json"
    script = str(Path(__file__).with_name("trl_ppo.py"))
    words = {
        "policy": options.models / "policy",
        "reward": options.models / "reward",
        "prompts": options.models / "prompts.jsonl",
        "updates": options.updates + 1,  # there the one that warms up counts
        "batch": options.batch,
        "micro-batch": options.micro_batch,
        "epochs": options.epochs,
        "max-prompt": options.max_prompt,
        "max-response": options.max_response,
        "learning-rate": options.learning_rate,
        "dtype": options.dtype,
        "out": file,
    }
    switches = ["--gradient-checkpointing"] * options.gradient_checkpointing
    named = [part for key, value in words.items() for part in (f"--{key}", str(value))]
    run([options.peer, script, *named, *switches], options.out / f"trl-{number}.log")
    return json.loads(file.read_text("utf-8"))


def ours(options: argparse.Namespace, number: int, words: list[str]) -> dict:
    """One run of alignkit: one optimizer step of the whole batch in each epoch, at the peer's learning rate."""
    settings = {
        "bench.updates": options.updates,
        "ppo.batch": options.batch,
        "ppo.minibatch": options.batch,
        "ppo.epochs": options.epochs,
        "ppo.max_prompt": options.max_prompt,
        "ppo.learning_rate": options.learning_rate,
        "ppo.value_learning_rate": options.learning_rate,
        "rollout.max_response": options.max_response,
        "compute_dtype": options.dtype,
    }
    given = [f"{key}={value}" for key, value in settings.items()]
    found = bench(options.out, options.models, f"alignkit-{number}", *given, *words)
    save(options.out / f"alignkit-{number}.json", found)
    return found


if __name__ == "__main__":
    main()
