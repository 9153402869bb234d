"""Runs as `alignkit export` finds them, made by hand in a moment, and the command itself."""

import functools
import sys

import pytest
import yaml
from stub_stage import composed

from alignkit.models.loading import scorer_from_policy
from alignkit.runtime.artifact import Store, link, write_json
from alignkit.runtime.compose import as_yaml

CHAIN = ("sft", "reward_model", "ppo", "evaluate")
METRICS = {
    "sft": {"eval_loss": 0.758, "eval_perplexity": 2.134, "train_rows": 1200},
    "reward_model": {"eval_accuracy": 0.902, "eval_accuracy_low": 0.881, "eval_accuracy_high": 0.919, "eval_pairs": 812,
                     "eval_accuracy_bag_of_words": 0.875, "train_pairs": 4000, "score_mean": 0.25, "score_std": 2.0},
    "ppo": {"score_first": -0.04, "score_mean": 1.55, "kl": 5.77, "kl_target": 6.0, "episodes": 640},
    "evaluate": {"win_rate": 0.88, "win_rate_low": 0.811, "win_rate_high": 0.926, "prompts": 100, "judge": "gold",
                 "judge_is_the_reward": False},
}  # fmt: skip
INPUTS = {"sft": {}, "reward_model": {"init": "sft"}, "ppo": {"policy": "sft", "reward": "reward_model"},
          "evaluate": {"policy": "ppo", "baseline": "sft"}}  # fmt: skip


def call(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    """The command in this process: its exit code and what it printed."""
    from alignkit.cli import main

    monkeypatch.setattr(sys, "argv", ["alignkit", "export", *map(str, words)])
    capsys.readouterr()  # of what was before
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err


def card_of(folder) -> tuple[dict, str]:
    _, head, body = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(head), body


@functools.cache
def defaults() -> dict:
    """The settings of alignkit rlhf."""
    return composed("rlhf")


def make_run(place, tiny_policy, tokenizer, *stages: str, save=None, **settings):
    """A run `a` of these stages with models that nobody trained, in runs/ of `place`; returns its folder. settings:
    sections that differ from the defaults; save: (place, stage), saves a stage's model instead."""

    def plain(place, stage):
        if stage == "evaluate":
            return
        model = tiny_policy(seed=len(stage))
        model.generation_config.eos_token_id, model.config.use_cache = [7], False
        model.save_pretrained(place / "model")
        tokenizer.save_pretrained(place / "model")
        if stage == "reward_model":
            scorer_from_policy(place / "model", seed=1).save_pretrained(place / "model")
            (place / "model" / "generation_config.json").unlink()

    store, folder = Store(place / "runs"), place / "runs" / "a"
    mine, digests, summary, lineage = {**defaults(), **settings}, {}, {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(f"# alignkit rlhf\n{as_yaml(mine)}")
    for number, stage in enumerate(stages):
        digest = digests[stage] = f"{number}" * 12
        (save or plain)(store.start(stage, digest), stage)
        made_from = {
            key: {"digest": digests[of], "path": str(store.folder / f"{of}-{digests[of]}")}
            for key, of in INPUTS[stage].items()
        }
        facts = {"metrics": {**METRICS[stage], "seconds": 1.0}, "inputs": made_from, "data": "0123abcd"}
        link(folder / stage, store.publish(stage, digest, {**facts, "settings": mine, "alignkit": "0.1.0"}).path)
        summary |= {f"{stage}/{key}": value for key, value in METRICS[stage].items()}
        places = ["/home/me/secret place/pairs.jsonl.gz", "hf://datasets/Anthropic/hh-rlhf@None"]
        lineage[stage] = {"data": {"places": places}}
    write_json(folder / "summary.json", summary)
    if "reward_model" in stages:
        report = {"gate": {"passes": True}, "warnings": ["it likes length"]}
        write_json(folder / "reward_model" / "report.json", report)
    command = "/opt/bin/alignkit rlhf data.path=/home/me/pairs.jsonl.gz reward.token=abc123"
    write_json(folder / "lineage.json", {"command": command, "commit": "c0ffee", "changed": True, "stages": lineage})
    return folder
