"""`alignkit plan`: what each setting does to it, and what it prints."""

import json
from pathlib import Path

import pytest
import torch
from plan_world import LOOP, config_of, planned, resting
from transformers import AutoConfig

from alignkit.algo.batching import token_cuts
from alignkit.runtime import plan_text
from alignkit.runtime.plan import plan
from alignkit.runtime.plan_models import find_sources
from alignkit.runtime.plan_ppo import Cast
from alignkit.runtime.plan_types import Layout, Phase

# ------------------------------------------------------------------------------------------------------- what must hold

GROWS = {  # what changes -> the phases that it makes smaller
    "sharding.activation_checkpointing=true": {"policy update", "value update", "sft", "reward_model"},
    "compute_dtype=bfloat16": {"rollout", "scoring", "policy update", "value update", "sft", "reward_model"},
    "ppo.microbatch_tokens=384": {"scoring", "policy update", "value update"},
    "sft.microbatch=4": {"sft"},
    "reward_model.microbatch=4": {"reward_model"},
    "rollout.batch=4": {"rollout"},
    "rollout.unshard=false": {"rollout"},
    "rollout.max_response=16": {"scoring", "policy update", "value update"},
    "ppo.max_prompt=16": {"rollout", "scoring", "policy update", "value update"},
    "launch.processes=4": {"rollout", "scoring", "policy update", "value update", "sft", "reward_model"},
    "sharding.offload_optimizer=true": {"rollout", "scoring", "policy update", "value update", "sft", "reward_model"},
    "sharding.offload_frozen=true": {"rollout", "scoring", "policy update", "value update"},
    "advantage=reinforce_pp": {"rollout", "scoring", "policy update"},
}
MIDDLE = (  # on the embedded default, a model whose weights and activations are of about one size
    "model.hidden_size=256", "model.vocab_size=4000", "sft.max_length=128", "ppo.batch=8",
    "ppo.minibatch=8", "ppo.microbatch_tokens=768", "sft.microbatch=8", "reward_model.microbatch=8", "ppo.episodes=80",
)  # fmt: skip


@pytest.fixture(scope="module")
def middle():
    """The same for all plans, so that what a setting does not change is not computed again."""
    return find_sources("rlhf", config_of("rlhf", *MIDDLE))


@pytest.fixture(scope="module")
def before(middle) -> dict[str, Phase]:
    return planned("rlhf", *MIDDLE, sources=middle)


@pytest.mark.parametrize("word", GROWS)
def test_each_setting_makes_smaller_what_it_is_there_for_and_nothing_larger(word, before, middle):
    after = planned("rlhf", *MIDDLE, word, sources=middle)
    for name, phase in after.items():
        if name in GROWS[word]:
            assert phase.total < before[name].total, name
        else:
            assert phase.total <= before[name].total, name


@pytest.mark.parametrize("of, made", [(64, (2, 450, 100)), (8, (1, 500, 100)), (1, (1, 500, 100))])
def test_a_micro_batch_is_as_full_as_the_budget_and_the_rows_allow(of, made, middle):
    """1,100 tokens are two rows of 550 rather than one of 600; on eight ranks, eight rows are one each."""
    config = config_of("rlhf", *MIDDLE, "launch.processes=8", "ppo.microbatch_tokens=1100")
    cast = Cast.of(config, *middle, Layout.of(config))
    assert cast.micro(of, 500, 100) == made


def test_replicas_split_nothing_and_groups_split_as_far_as_they_go(middle):
    def policy(*words: str):
        config = config_of("rlhf", *MIDDLE, *words)
        return Cast.of(config, *middle, Layout.of(config)).models()["policy"]

    whole, groups = (policy("launch.processes=4", f"sharding.shard_size={size}") for size in (1, 2))
    alone = policy()
    assert (whole.weights, whole.optimizer) == (alone.weights, alone.optimizer)
    assert groups.optimizer == alone.optimizer // 2


def test_the_step_takes_a_square_root_of_every_moment_and_an_average_another_copy(middle):
    """AdamW on a GPU works on all weights at once; with the moments in the CPU's memory on one."""

    def step(*words: str):
        config = config_of("rlhf", *MIDDLE, "ppo.ema=0.9", *words)
        return dict(Cast.of(config, *middle, Layout.of(config)).policy_update())["optimizer step"]

    count = 4000 * 256 + 2 * (4 * 256 * 256 + 3 * 256 * 680 + 2 * 256) + 256
    models, aside = step(), step("sharding.offload_optimizer=true")["policy"]
    assert models["policy"].gradients == models["policy average"].weights == 4 * count
    assert models["policy"].optimizer == 12 * count
    assert aside.optimizer == 12 * 4000 * 256


def test_an_adapter_shares_the_bases_and_trains_little(folders):
    words = (f"policy={folders / 'policy'}", f"reward.path={folders / 'reward'}", *LOOP)
    whole, thin = resting("ppo", *words), resting("ppo", *words, "peft=lora")
    assert set(whole) == {"policy", "reference", "value model", "reward model"}
    assert set(thin) == {"policy", "value model"}
    assert thin["policy"].optimizer < 0.2 * whole["policy"].optimizer
    assert whole["policy"].weights < thin["policy"].weights < 1.2 * whole["policy"].weights


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def cli(cli, tmp_path):
    """As the `cli` of all tests; a plan leaves nothing in the folder."""

    def call(*words: str) -> tuple[int, str, str]:
        ended = cli(*words)
        assert not any(tmp_path.iterdir())
        return ended

    return call


def phases_in(text: str) -> list[str]:
    """The first words of the table's rows that are not indented."""
    rows = text.split("on each GPU", 1)[1].split("\n\n")[0].splitlines()[1:]
    return [row.split(":")[0] for row in rows if not row.startswith(" ")]


def test_it_prints_every_phase_and_names_the_peak(cli):
    code, out, err = cli("plan", "rlhf")
    assert (code, err) == (0, "")
    assert out.startswith("rlhf: model llama, 2 layers of 64, 0.14 M parameters, float32, 1 GPU\n")
    assert out.count("<- peak") == 1
    assert "peak: sft (training step), " in out and "--gpu-memory=GIB says whether it fits" in out


PHASES = [("sft", 1), ("reward_model", 1), ("ppo", 4), ("denoise", 2), ("frontier", 6)]


@pytest.mark.parametrize("recipe, phases", PHASES)
def test_every_recipe_has_its_phases(cli, recipe, phases):
    code, out, _ = cli("plan", recipe, "data=jsonl", "data.path=absent.jsonl")
    assert code == 0
    assert len(phases_in(out)) == phases


@pytest.mark.parametrize("flag", [("--gpu-memory", "80"), ("--gpu-memory=80",)], ids=" ".join)
def test_it_says_that_it_fits_with_a_tenth_left(cli, flag):
    code, out, err = cli("plan", "sft", *flag)
    assert (code, err) == (0, "")
    assert "\nfits: 72.00 GiB of 80 GiB can be planned; a tenth is left for the CUDA context, " in out


def test_it_says_what_would_help_and_by_how_much(cli):
    words = ("model.hidden_size=128", "model.vocab_size=4000", "ppo.microbatch_tokens=3072")
    code, out, err = cli("plan", "ppo", *words, "--gpu-memory", "0.2")
    assert (code, err) == (1, "")
    assert "does not fit: 184.32 MiB of 0.2 GiB can be planned" in out
    helped = [line.strip() for line in out.split("what would help, each alone:\n")[1].splitlines()]
    sizes = [float(line.split(": ")[1].split()[0]) for line in helped if not line.startswith("launch.processes")]
    assert sizes == sorted(sizes) and len(sizes) >= 2
    change, _, said = helped[0].partition(": ")
    phases = planned("ppo", *words, *change.split())
    assert said == f"{plan_text.amount(max(phase.total for phase in phases.values()))}, fits"


def test_where_no_setting_is_enough_it_says_what_several_make(cli):
    words = ("model.hidden_size=256", "ppo.max_prompt=8", "rollout.max_response=8", "--gpu-memory=0.012")
    code, out, _ = cli("plan", "ppo", *words)
    assert code == 1
    together = out.split("together:\n")[1].splitlines()
    assert len(together) == 1 and together[0].count("=") >= 2


def test_sixty_four_gpus_are_planned_without_one(cli):
    sizes = ("sft.batch=64", "reward_model.batch=64", "ppo.minibatch=64")
    code, out, _ = cli("plan", "rlhf", "launch.processes=8", "launch.machines=8", "launch.rendezvous=h:1", *sizes)
    assert code == 0
    assert "64 GPUs, models split over 64" in out


def test_a_sweep_is_planned_job_by_job(cli):
    code, out, _ = cli("plan", "sft", "-m", "sft.microbatch=8,16")
    assert code == 0
    assert out.count("sft: training step") == 2


@pytest.mark.parametrize(
    "words, said",
    [
        ((), "plan: which recipe?; as in `alignkit plan rlhf ppo.batch=32`, of rlhf, sft, reward_model, ppo, denoise"),
        (
            ("evaluate",),
            "plan: 'evaluate' is no recipe that trains; as in `alignkit plan rlhf ppo.batch=32`, of rlhf, sft",
        ),
        (("rlhf", "--gpu-memory=much"), "--gpu-memory=much: expected the GiB of one GPU, as in --gpu-memory=80"),
        (("rlhf", "--gpu-memory"), "--gpu-memory=: expected the GiB of one GPU, as in --gpu-memory=80"),
        (("rlhf", "ppo.eopchs=2"), "ppo.eopchs: unknown key; did you mean ppo.epochs?"),
        (("sft", "model.path=/no/such/place"), "model.path=/no/such/place: no such folder, and no Hub id (OWNER/NAME)"),
        (("ppo", "policy=."), "policy=.: no model's config could be read there: "),
        (("sft", "model.path=no/such"), "model.path=no/such: no model's config could be read there: "),
        (("sft", "peft=prefix", "model.path=gpt2"), "peft.method=prefix: learnt tokens and quantised weights are not"),
    ],
)
def test_a_mistake_is_one_line(cli, words, said):
    code, out, err = cli("plan", *words)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {said}") and err.count("\n") == 1


def test_a_model_whose_attention_cannot_be_counted_is_named(cli, tmp_path_factory):
    place = tmp_path_factory.mktemp("falcon")
    AutoConfig.for_model("falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=2).save_pretrained(place)
    code, _, err = cli("plan", "sft", f"model.path={place}", "sft.max_length=16")
    assert code == 2
    assert err.endswith(": falcon computes attention in code of its own, which cannot be counted\n")


# -------------------------------------------------------------------------------------------- what a model is read from


def test_a_hub_id_of_a_shipped_option_needs_no_network():
    source, _ = find_sources("sft", config_of("sft", "model.path=Qwen/Qwen3-0.6B"))
    assert source.name == "model.path=Qwen/Qwen3-0.6B"
    assert (source.config.model_type, source.config.num_hidden_layers, source.vocab) == ("qwen3", 28, 151_936)


def test_beside_an_unknown_hub_id_the_sections_dimensions_count(cli):
    words = ("sft.max_length=16", "sft.microbatch=1", "model.path=me/my-fine-tune", "model.num_layers=2")
    code, out, _ = cli("plan", "sft", "model=smollm2_135m", *words)
    assert code == 0
    assert out.startswith("sft: model.path=me/my-fine-tune, 35.39 M parameters, float32, 1 GPU\n")


def test_a_local_folder_counts_as_it_is_and_an_adapter_as_its_base(folders, tmp_path):
    def weights(policy: Path) -> int:
        return resting("ppo", f"policy={policy}", *LOOP)["policy"].weights

    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(folders / "policy")}), encoding="utf-8"
    )
    assert weights(folders / "policy") == weights(tmp_path) == pytest.approx(4 * 345_408, rel=1e-4)


def test_an_engine_with_weights_of_its_own_takes_a_copy_more():
    words = ("model.hidden_size=128", "model.vocab_size=4000")
    native, compiled = (plan("ppo", config_of("ppo", *words, f"rollout={name}")) for name in ("native", "compiled"))
    for before, after in zip(native, compiled, strict=True):
        copy = after.models["engine's copy"]
        sampling = before.models["policy"].kv_cache  # which is in the copy's cache then
        assert copy.weights > 0 and copy.kv_cache > 0
        assert after.total == pytest.approx(before.total + copy.weights + copy.kv_cache - sampling)


@pytest.mark.parametrize("budget, several", [(48, False), (47, True), (40, True)])
def test_where_the_last_row_does_not_fit_there_are_several_micro_batches(budget, several, middle):
    """Four rows of 12 tokens; of 40 tokens the plan's micro-batch has four rows of 10, the real ones three and one."""
    words = ("ppo.batch=4", "ppo.minibatch=4", "ppo.max_prompt=6", "rollout.max_response=6")
    config = config_of("rlhf", *MIDDLE, *words, f"ppo.microbatch_tokens={budget}")
    cast = Cast.of(config, *middle, Layout.of(config))
    assert cast.several == several == (len(token_cuts(torch.full((4,), 12), budget)) > 1)
