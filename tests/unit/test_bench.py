"""What a measurement counts, by hand: FLOPs and bytes, the shapes of a model's products, medians, ratios, mistakes."""

import json
import math
import subprocess
import sys
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from alignkit.algo.arithmetic import Network
from alignkit.errors import UserError
from alignkit.models.loading import scorer_from_policy
from alignkit.models.scalar import ScalarModel
from alignkit.models.settings import PeftSettings
from alignkit.stages.bench import decoding_work, ppo_products
from alignkit.stages.bench_limits import Limits, hardware, network_of, products_of, versions
from alignkit.stages.bench_report import COMPARED, Update, figures_of, middle, ratios, read_against, read_prompts, table
from alignkit.stages.bench_trainer import CountingCollator

SMALL = Network(matrices=100, frozen=0, head=30, layers=2, attention=8, key_values=12)


def test_flops_of_a_forward_by_hand():
    through = 2 * 100 * (3 + 1) + 2 * 30 * (2 + 1)
    attention = 2 * (2 * 2 * 8) * (3 * 4 / 2 + 1)  # layers; q k and weights v, two operations each; pairs seen
    assert SMALL.forward([3, 1], [2, 1]) == through + attention


def test_flops_of_training_by_hand():
    assert SMALL.training([3, 1], [2, 1]) == 3 * SMALL.forward([3, 1], [2, 1])
    frozen = Network(matrices=100, frozen=90, head=30, layers=2, attention=8, key_values=12)
    assert frozen.training([3, 1], [2, 1]) == 3 * SMALL.forward([3, 1], [2, 1]) - 2 * 90 * 4


def test_work_of_decoding_by_hand():
    # A prompt of 5 and a response of 3: forwards over 5, 1 and 1 tokens, of which each last one has an output.
    forwards = 2 * 100 * 7 + 2 * 30 * 3 + 2 * 4 * 8 * (1 + 2 + 3 + 4 + 5 + 6 + 7)
    assert SMALL.decoding([5], [3]) == forwards
    # Of two rows the longer one decides how often the weights are read; the caches of 6 and 7 tokens, and of none.
    assert SMALL.decoding_bytes([5, 2], [3, 1], width=2) == 2 * (3 * (100 + 30) + 2 * 12 * (6 + 7))
    assert SMALL.decoding_bytes([], [], width=2) == 0


def test_of_a_tiny_llama_every_matrix_is_counted(tiny_policy, tmp_path):
    policy = tiny_policy("llama")
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48  # query and output, key and value of one head of 16, the MLP
    vocabulary = policy.config.vocab_size
    found = network_of(policy)
    assert found == Network(2 * layer, 0, 32 * vocabulary, layers=2, attention=32, key_values=2 * 16)
    policy.save_pretrained(tmp_path)
    value = ScalarModel(scorer_from_policy(tmp_path, seed=0))
    assert network_of(value) == Network(2 * layer, 0, 32, layers=2, attention=32, key_values=2 * 16)
    products = products_of(policy, 10, 4)
    assert sum(m * n * k * count for (m, n, k), count in products.items()) == 10 * 2 * layer + 4 * 32 * vocabulary
    assert products[10, 32, 32] == 4 and products[4, 32, vocabulary] == 1


def test_gpt2_whose_layers_are_not_linear_is_counted_too(tiny_policy):
    assert network_of(tiny_policy("gpt2")).matrices == 2 * 12 * 32 * 32


def test_what_an_adapter_stands_on_is_frozen(tiny_policy):
    from alignkit.models.adapters import add_adapter

    policy = tiny_policy("llama")
    matrices = network_of(policy).matrices
    add_adapter(policy, lora(), "CAUSAL_LM")
    found = network_of(policy)
    assert found.frozen == matrices and found.matrices > matrices


def lora() -> PeftSettings:
    from alignkit.runtime.compose import read_option

    return PeftSettings(**read_option("peft", "lora"))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_limits_are_finite_rates(cluster, dtype):
    from dataclasses import replace

    limits = Limits({(10, 32, 48): 3, (4, 32, 2**23): 1}, 1000, replace(cluster, compute_dtype=dtype))
    assert limits.around(cluster) == []
    for _ in range(3):
        limits.measure()
    assert len(limits.flops) == len(limits.bytes) == 9
    pairs = limits.around(cluster)
    assert len(pairs) == 2 and pairs[1] == (median(limits.flops[3:]), median(limits.bytes[3:]))
    assert all(math.isfinite(x) and x > 0 for x in (*limits.flops, *limits.bytes))


def test_decoding_is_counted_in_batches_of_the_engine(cluster):
    config = SimpleNamespace(rollout=SimpleNamespace(batch=1))
    prompts, responses = [5, 2], [3, 1]
    actors = SimpleNamespace(cluster=cluster, policy=torch.nn.Linear(1, 1))
    flops, read = decoding_work(SMALL, prompts, responses, actors, config)
    assert flops == SMALL.decoding(prompts, responses)
    assert read == sum(SMALL.decoding_bytes([p], [r], width=4) for p, r in zip(prompts, responses))


def test_products_are_those_of_a_micro_batch(cluster, tiny_policy):
    config, policy = SimpleNamespace(ppo=SimpleNamespace(minibatch=4, microbatch_tokens=16)), tiny_policy("llama")
    products = ppo_products([policy, policy], [6] * 8, [4] * 8, config, cluster)  # 40 tokens in 3 parts, 16 outputs
    assert products[13, 32, 32] == 2 * 4 and products[5, 32, policy.config.vocab_size] == 2


def test_the_collator_notes_what_is_trained_on():
    collator = CountingCollator(lambda rows: {"input_ids": torch.zeros(2, 4)})
    collator([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]}])
    collator([{"responses": [[1, 2], [3]]}, {"responses": [[4], [5, 6]]}])
    first, second = collator.seen
    assert (first.tokens, first.outputs, first.computed) == ([3, 4], [2, 3], 8)
    assert (second.tokens, second.outputs) == ([2, 1, 1, 2], [1, 1, 1, 1])


def an_update(seconds: float, **changes) -> Update:
    facts = {
        "phases": {"rollout": 1.0, "update": seconds - 1.0}, "sequences": 4, "tokens": 100, "training": 6e9,
        "decoding": (1e9, 4e9), "padding": 0.25, "peak": 2**30,
    }  # fmt: skip
    return Update(seconds, 2 * seconds, **{**facts, **changes})


def a_report(*updates: Update, stage: str = "ppo", limits=None) -> dict:
    machine = {"cpu": "a CPU", "cores": 2, "threads": 1, "gpu": None, "ranks": 1}
    settings = {"compute_dtype": "float32"}
    found = figures_of(updates, limits or [(2e9, 5e9)] * len(updates))
    return {"system": "alignkit", "stage": stage, **found, "hardware": machine, "settings": settings}


def test_figures_are_medians_and_shares():
    report = a_report(an_update(3.0), an_update(5.0, peak=2**31), an_update(9.0))
    assert report["seconds_per_update"] == 5.0 and report["all_seconds"] == [3.0, 5.0, 9.0]
    assert report["cpu_seconds_per_update"] == 10.0
    assert report["sequences_per_second"] == 4 / 5 and report["tokens_per_second"] == 100 / 5
    assert report["seconds"] == {"rollout": 1.0, "update": 4.0} and report["generation_seconds"] == 1.0
    assert report["peak_bytes"] == 2**31 and report["padding_fraction"] == 0.25
    assert report["training"]["share_of_arithmetic_limit"] == 6e9 / 4 / 2e9
    decoding = report["decoding"]
    assert decoding["share_of_bandwidth_limit"] == 0.8 and decoding["share_of_arithmetic_limit"] == 0.5
    assert decoding["nearer_limit"] == "bandwidth"


def test_a_share_is_of_the_limit_at_its_time():
    # One program on a machine that is half as fast in the third update: its share stays.
    updates = [an_update(4.0), an_update(4.0), an_update(7.0)]
    report = a_report(*updates, limits=[(4e9, 1e9), (4e9, 1e9), (2e9, 1e9)])
    assert [u["training"] / u["phases"]["update"] for u in report["updates"]] == [2e9, 2e9, 1e9]
    assert report["training"] == {
        "flops_per_second": 2e9, "limit_flops_per_second": 4e9, "share_of_arithmetic_limit": 0.5,
    }  # fmt: skip


def test_a_trainers_steps_have_no_phases():
    report = a_report(an_update(4.0, phases={}, decoding=None, padding=None), stage="sft")
    assert report["training"]["flops_per_second"] == 6e9 / 4 and "decoding" not in report
    told = table(report)
    assert "seconds a step" in told and "training, share of arithmetic" in told and "padding" not in told


def test_ratios_are_ours_over_theirs_of_what_both_have():
    report = a_report(an_update(4.0))
    theirs = {"system": "other", "seconds_per_update": 8.0, "sequences_per_second": 2.0, "peak_bytes": 2**32}
    found = ratios(report, theirs)
    assert found == {"seconds_per_update": 0.5, "sequences_per_second": 0.5, "peak_bytes": 0.25}
    told = table({**report, "against": {"system": "other", "ratios": found, "figures": theirs}})
    lines = {line.split("  ")[1]: line for line in told.splitlines() if line.startswith("  ")}
    assert lines["seconds per update"].endswith("4 / 8, better")
    assert lines["sequences per second"].endswith("1 / 2, worse")
    assert set(found) <= set(COMPARED)


def test_medians_are_of_what_all_rows_have():
    assert middle([{"a": 1.0, "b": 2.0}, {"a": 3.0}]) == {"a": 2.0}
    assert middle([]) == {}


def test_prompts_are_read_and_mistakes_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n\n{"prompt": "two"}\n')
    (tmp_path / "q.jsonl").write_text('{"prompt": "one"}\n{"text": "two"}\n')
    assert read_prompts("p.jsonl") == ["one", "two"]
    for path, said in (
        (None, r"bench.prompts: missing; .* for example bench.prompts=prompts.jsonl"),
        ("no.jsonl", r"bench.prompts=no.jsonl: expected a file, got no such file in"),
        ("q.jsonl", r'q.jsonl:2: expected a row \{"prompt": TEXT\}, got a row without one'),
    ):
        with pytest.raises(UserError, match=said):
            read_prompts(path)


@pytest.mark.parametrize(
    "text, said",
    [
        ("seconds", "expected a JSON file, got a fault"),
        ("[1]", "writes, got one without system and seconds_per_update"),
        ('{"system": "x"}', "writes, got one without seconds_per_update"),
        (json.dumps({"system": "x", "seconds_per_update": "fast"}), "a number above 0 for seconds_per_update, got 'fa"),
        (json.dumps({"system": "x", "seconds_per_update": 1, "peak_bytes": 0}), "above 0 for peak_bytes, got 0"),
    ],
)
def test_anothers_figures_are_checked(tmp_path, text, said):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(UserError, match=f"bench.against={file}: .*{said}"):
        read_against(str(file))
    assert read_against(None) is None


def test_what_it_ran_on_and_with_is_told(cluster):
    assert hardware(cluster)["threads"] == torch.get_num_threads() and hardware(cluster)["gpu"] is None
    assert versions()["torch"] == torch.__version__


def test_measuring_ppo_does_not_bring_what_only_the_trainers_need():
    """They would be in the peak of memory."""
    code = "import sys, alignkit.stages.bench; assert not {'trl', 'datasets', 'wandb'} & sys.modules.keys()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
