"""The experiments at real scale: what their headers promise of memory is what the planner says now."""

import re

import pytest
from omegaconf import OmegaConf
from test_config import CONF, composed

from alignkit.runtime.config import load

HARDWARE = re.compile(r"Hardware: (\d+) GPUs? of (\d+) GB; planned peak ([\d.]+) GiB, by\s+(alignkit plan .*)$", re.M)
HEADERS = {
    file.stem: re.sub(r"^# *", "", file.read_text("utf-8"), flags=re.M) for file in (CONF / "experiment").iterdir()
}
PROMISES = {name: found.groups() for name, text in HEADERS.items() if (found := HARDWARE.search(text))}
QUICK = ("gpt2_sentiment",)  # the others take the planner up to half a minute


def test_the_experiments_at_real_scale_are_known():
    assert PROMISES.keys() == {
        *("tldr_pythia_1b", "tldr_pythia_2_8b", "tldr_pythia_6_9b", "hh_qwen3", "ultrafeedback_llama"),
        *("ultrafeedback_qwen3_lora", "gpt2_sentiment", "from_scratch"),
    }


@pytest.mark.parametrize("name", PROMISES)
def test_the_header_gives_the_command_expectations_and_what_was_run(name):
    assert f"experiment={name}" in HEADERS[name].partition("Hardware")[0]
    assert "Expected" in HEADERS[name] and "Run so far: " in HEADERS[name]


@pytest.mark.parametrize(
    "name", [item if item in QUICK else pytest.param(item, marks=pytest.mark.slow) for item in PROMISES]
)
def test_the_planned_memory_in_the_header_is_what_the_planner_says(name):
    from alignkit.runtime.plan import plan

    gpus, memory, peak, command = PROMISES[name]
    _, _, recipe, *words = command.split()
    assert words.pop() == f"--gpu-memory={memory}"
    config = load(composed(recipe, *words))
    assert config.launch.ranks == int(gpus)
    planned = max(phase.total for phase in plan(recipe, config)) / 2**30
    assert planned == pytest.approx(float(peak), rel=0.03)
    assert planned <= 0.9 * int(memory), "it fits, as `alignkit plan` counts"


@pytest.mark.parametrize("name", PROMISES)
def test_a_setting_of_the_experiment_changes_something(name):
    """Every value in the file differs from what the settings are without that file."""
    given = OmegaConf.to_container(OmegaConf.load(CONF / "experiment" / f"{name}.yaml"))
    bases = [item for item in given.get("defaults", []) if isinstance(item, str) and item != "_self_"]
    options = [item for item in given.pop("defaults", []) if isinstance(item, dict)]
    words = [f"{key.removeprefix('override /')}={option}" for item in options for key, option in item.items()]
    before = composed("rlhf", *(f"experiment={base}" for base in bases), *words)
    idle = [
        f"{group}.{key}"
        for group, values in given.items()
        for key, value in (values.items() if isinstance(values, dict) else [])
        if before[group][key] == value
    ]
    assert not idle
