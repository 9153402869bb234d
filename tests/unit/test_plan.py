"""`alignkit plan`: what it counts, against published figures, real models and the allocators."""

import copy
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from plan_world import GIB, LOOP, SMALL, config_of, planned, save_models, small_config, spec_of
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import alignkit.cli
from alignkit.algo.sampling import SamplingRule
from alignkit.errors import UserError
from alignkit.models.loading import build_model, load_causal, load_encoder, model_config
from alignkit.models.memory import ATTENTION, peak_of
from alignkit.models.policy import response_logprobs
from alignkit.models.scalar import ScalarModel
from alignkit.models.settings import ModelSettings
from alignkit.rollout.cache import room_for
from alignkit.runtime.config import RunConfig, conf_dir
from alignkit.runtime.plan import plan
from alignkit.runtime.plan_models import find_sources, options
from alignkit.runtime.plan_ppo import Cast
from alignkit.runtime.plan_types import Layout
from alignkit.runtime.sharding import Cluster
from alignkit.stages import ppo, ppo_update
from alignkit.stages.actors import adam, load_actors
from alignkit.stages.job import Job
from alignkit.stages.ptx import PtxBatches

PUBLISHED = {  # parameters, and who says so
    "gpt2": (124_439_808, "KerasHub preset gpt2_base_en: 124,439,808; openai/gpt-2: 124M"),
    "pythia_1b": (1_011_781_632, "model card: 805,736,448 without embeddings, and two of 50,304 x 2,048"),
    "pythia_2_8b": (2_775_208_960, "model card: 2,517,652,480 without embeddings, and two of 50,304 x 2,560"),
    "pythia_6_9b": (6_857_302_016, "model card: 6,444,163,072 without embeddings, and two of 50,432 x 4,096"),
    "qwen2_5_0_5b": (494_032_768, "safetensors total on the Hub; model card: 0.49B"),
    "qwen2_5_1_5b": (1_543_714_304, "safetensors total on the Hub; model card: 1.54B"),
    "qwen3_0_6b": (596_049_920, "KerasHub preset qwen3_0.6b_en; model card: 0.6B"),
    "qwen3_1_7b": (1_720_574_976, "KerasHub preset qwen3_1.7b_en; model card: 1.7B"),
    "qwen3_4b": (4_022_468_096, "KerasHub preset qwen3_4b_en; model card: 4.0B"),
    "qwen3_8b": (8_190_735_360, "KerasHub preset qwen3_8b_en; model card: 8.2B"),
    "llama3_2_1b": (1_235_814_400, "safetensors total on the Hub; model card: 1.23B"),
    "llama3_1_8b": (8_030_261_248, "safetensors total on the Hub; model card: 8B"),
    "mistral_7b": (7_248_023_552, "safetensors total on the Hub; KerasHub preset mistral_0.3_7b_en"),
    "smollm2_135m": (134_515_008, "safetensors total on the Hub; model card: 135M"),
}

# -------------------------------------------------------------------------------------------------- named architectures


def test_there_is_a_figure_for_every_named_model():
    assert set(PUBLISHED) == set(options()) - {"tiny"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_dimensions_give_the_published_number_of_parameters(name):
    spec, (count, _) = options()[name], PUBLISHED[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(spec, vocab_size=spec.vocab_size))
    assert sum(p.numel() for p in model.parameters()) == count
    assert spec.path.count("/") == 1


@pytest.mark.parametrize(
    "name, count", [("pythia_1b", 805_736_448), ("pythia_2_8b", 2_517_652_480), ("pythia_6_9b", 6_444_163_072)]
)
def test_without_embeddings_it_is_the_number_of_the_pythia_paper(name, count):
    """Biderman et al. 2023, arXiv:2304.01373, table 1."""
    spec = options()[name]
    assert PUBLISHED[name][0] - 2 * spec.vocab_size * spec.hidden_size == count


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gpt2", "gpt_neox"])
def test_every_architecture_is_built_from_scratch_and_computes(architecture, tiny_tokenizer):
    model = build_model(spec_of(architecture=architecture), tiny_tokenizer)
    assert model.config.model_type == architecture
    assert model.get_input_embeddings().weight.shape == (len(tiny_tokenizer), 64)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    logits = model(torch.tensor([[5, 6, 7]])).logits
    assert logits.shape == (1, 3, len(tiny_tokenizer)) and bool(torch.isfinite(logits).all())


def test_the_tiny_default_is_the_model_that_it_was(tiny_tokenizer):
    config = build_model(spec_of(), tiny_tokenizer).config
    assert (config.intermediate_size, config.num_key_value_heads, config.head_dim) == (168, 4, 16)
    assert config.tie_word_embeddings and config.max_position_embeddings == 128


def test_a_named_model_is_built_from_scratch_in_its_own_shape(tiny_tokenizer):
    given = OmegaConf.to_container(OmegaConf.load(conf_dir() / "model" / "smollm2_135m.yaml"))
    model = build_model(ModelSettings(**{**given, "path": None, "num_layers": 2}), tiny_tokenizer)
    attention = model.model.layers[0].self_attn
    assert attention.k_proj.weight.shape == (3 * 64, 576) and attention.q_proj.weight.shape == (9 * 64, 576)
    assert model.model.layers[0].mlp.up_proj.weight.shape == (1536, 576)


@pytest.mark.parametrize(
    "words, said",
    [
        (("model.num_kv_heads=3",), "model: num_heads=4 must be a multiple of num_kv_heads=3"),
        (("model.hidden_size=66",), "model: hidden_size=66 must be a multiple of num_heads=4"),
        (("model.architecture=gpt2", "model.head_dim=8"), "model: head_dim=8: gpt2 has as many key-value heads as"),
    ],
)
def test_dimensions_that_do_not_go_together_are_refused(words, said):
    with pytest.raises(UserError, match=said):
        config_of("rlhf", *words)


# ----------------------------------------------------------------------------------------------------------- by formula


def test_llama_3_1_8b_on_eight_gpus_by_hand():
    """Weights and moments of N parameters in float32 are 4 N and 8 N over 8 GPUs, a frozen policy in bfloat16 2 N; the
    value model has a row of 4,096 instead of the head of 128,256 rows, and a bias. The cache holds keys and values of
    32 layers, 8 heads, 128 numbers of 2 bytes, with room for 512 + 512 tokens of 32 rows from the start."""
    config = config_of(
        "rlhf", "model=llama3_1_8b", "model.path=null", "compute_dtype=bfloat16", "launch.processes=8",
        "ppo.batch=256", "ppo.minibatch=256", "ppo.episodes=2560", "ppo.max_prompt=512", "rollout.max_response=512",
    )  # fmt: skip
    cast = Cast.of(config, *find_sources("rlhf", config), Layout.of(config))
    models, count = cast.models(), 8_030_261_248
    assert models["policy"].weights == pytest.approx(4 * count / 8, rel=1e-6)
    assert models["policy"].optimizer == 8 * count / 8
    assert models["reference"].weights == pytest.approx(2 * count / 8, rel=1e-6)
    value = count - 4096 * 128_256
    assert models["value model"].optimizer == 8 * value / 8 + 8 * 4096 + 8  # the one row is on one rank, not split
    assert models["reward model"].weights == pytest.approx(2 * value / 8, rel=1e-5)
    assert cast.policy.gradients == 4 * count / 8 and cast.policy.whole == 2 * count
    (_, rollout), (_, last) = cast.rollout()
    assert rollout["policy"].gathered == last["policy"].gathered == 2 * count
    assert rollout["policy"].kv_cache == last["policy"].kv_cache == 2 * 32 * 8 * 128 * 2 * 32 * 1024


def test_what_a_llama_layer_keeps_for_its_backward_by_hand():
    """Numbers a token: 10 d (into and out of both norms, into the projections of queries, of the output and of the
    MLP, and query, key and value with heads repeated), 4 f (gate, its SiLU, up, their product), 2 (both norms' scales),
    a number for each head, and a row of the mask."""

    def kept(layers: int) -> int:
        with torch.device("meta"):
            config = small_config("llama", num_hidden_layers=layers)
            model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).train()
            tokens, mask = torch.zeros(3, 20, dtype=torch.long), torch.ones(3, 20, dtype=torch.long)
        return saved_bytes(model, lambda: model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False))

    d, f, heads, rows, width = 64, 168, 4, 3, 20
    assert kept(2) - kept(1) == 4 * rows * width * (10 * d + 4 * f + heads + 2 + width)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_a_real_forward_keeps_the_same_bytes(architecture):
    config = small_config(architecture)
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[:, :2] = 0

    def kept(device: str, attention: str) -> int:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention).train()
        tokens, here = torch.zeros(3, 20, dtype=torch.long, device=device), mask.to(device)
        return saved_bytes(model, lambda: model(input_ids=tokens, attention_mask=here, use_cache=False))

    assert kept("meta", ATTENTION) == kept("cpu", "sdpa")


def saved_bytes(model: nn.Module, forward: Callable) -> int:
    """Bytes of all storages, but for the weights, that autograd keeps of a forward."""
    weights, kept = {p.untyped_storage()._cdata for p in model.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        forward()
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for key, size in storages.items() if key not in weights)


def test_the_key_value_cache_is_that_of_a_real_run(folders):
    words = ("ppo.batch=6", "ppo.minibatch=6", "ppo.episodes=60", "ppo.max_prompt=9", "rollout.max_response=5")
    found = planned("ppo", *words, f"policy={folders / 'policy'}")["rollout"]
    model, cache = load_causal(folders / "policy"), room_for(AutoConfig.from_pretrained(folders / "policy"), 9 + 5)
    model(input_ids=torch.zeros(6, 9, dtype=torch.long), past_key_values=cache)
    real = sum(buffer.nbytes for layer in cache.layers for buffer in layer.buffers)
    assert found.models["policy"].kv_cache == real  # from the prompts on, with room for the response


# ----------------------------------------------------------------------------------- against real models and allocators


@pytest.fixture
def eight_ranks():
    """This process as the first of eight ranks whose collectives do nothing: shapes are right, numbers are not."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield 8
    dist.destroy_process_group()


@pytest.fixture
def one_rank():
    yield 1
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(params=["one_rank", "eight_ranks"])
def ranks(request):
    return request.getfixturevalue(request.param)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_moments_of_a_rank_after_a_step(ranks, dtype, folders):
    """Measured 1.0000 of what was planned; the issue asks for 10%."""
    folder = folders / "policy"
    sizes = ("ppo.batch=8", "ppo.minibatch=8", "ppo.episodes=80")
    words = (f"policy={folder}", f"compute_dtype={dtype}", f"launch.processes={ranks}", *LOOP, *sizes)
    config = config_of("ppo", *words)
    cast = Cast.of(config, *find_sources("ppo", config), Layout.of(config))
    found, cluster = cast.models(), Cluster.open(compute_dtype=dtype)
    policy = cluster.shard(load_causal(folder), trainable=True)
    optimizer = adam(policy, 1e-3, config.ppo, False)
    policy(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.float().sum().backward()
    optimizer.step()
    held = sum(local(p).nbytes for p in policy.parameters()) + sum(b.nbytes for b in policy.buffers())
    moments = [local(value).nbytes for state in optimizer.state.values() for value in state.values() if value.dim()]
    gradients = sum(local(p.grad).nbytes for p in policy.parameters())
    assert held == pytest.approx(found["policy"].weights, rel=1e-3)
    assert sum(moments) == pytest.approx(found["policy"].optimizer, rel=1e-3)
    assert gradients == pytest.approx(cast.policy.gradients, rel=1e-3)
    frozen = cluster.shard(load_causal(folder), trainable=False)
    held = sum(local(p).nbytes for p in frozen.parameters()) + sum(b.nbytes for b in frozen.buffers())
    assert held == pytest.approx(found["reference"].weights, rel=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("task", ["causal", "causal in pieces", "scalar"])
@pytest.mark.parametrize("backward", [True, False], ids=["trained", "frozen"])
def test_the_peak_of_a_sharded_model_is_the_allocators(ranks, backward, task, checkpointing, monkeypatch):
    """FSDP2's own memory included. Measured within 0.6% on one rank and on eight."""
    if checkpointing and not backward:
        return
    rows, width, response = 4, 48, 24
    if task == "causal in pieces":  # of 40, 40 and 16 tokens
        monkeypatch.setattr("alignkit.models.policy.LOGITS_BYTES", 40 * 4 * SMALL["vocab_size"])
    config = small_config("llama")

    def model_on(device: str, attention: str) -> nn.Module:
        factory = AutoModelForSequenceClassification if task == "scalar" else AutoModelForCausalLM
        with torch.device(device):
            model = factory.from_config(copy.deepcopy(config), attn_implementation=attention)
            return ScalarModel(model) if task == "scalar" else model

    def work(model: nn.Module) -> Callable:
        tokens, mask = torch.ones(rows, width, dtype=torch.long), torch.ones(rows, width, dtype=torch.bool)
        mask[:, :2] = False

        def call() -> None:
            with torch.set_grad_enabled(backward):
                if task == "scalar":
                    values = model(tokens, mask)
                else:
                    values, _ = response_logprobs(model, tokens, mask, mask[:, -response:], SamplingRule(1.0, (0,)))
            if backward:
                torch.autograd.backward([values.sum()])

        return call

    cluster = Cluster.open(activation_checkpointing=checkpointing)
    meta = model_on("meta", ATTENTION).train(backward).requires_grad_(backward)
    if checkpointing:
        getattr(meta, "classifier", meta).gradient_checkpointing_enable({"use_reentrant": False})
    counted = sum(peak_of(meta, work(meta), ranks, SMALL["vocab_size"]).values())
    real = cluster.shard(model_on("cpu", "sdpa"), trainable=backward)
    call = work(real)
    call()
    cluster.rest(real)
    assert counted == pytest.approx(allocated(call)[1], rel=0.01)


def allocated(call: Callable) -> tuple[object, int]:
    """What a call returns, and the most that torch's CPU allocator held beyond what it held before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = call()
    events = [(e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        most = max(most, live)
    return result, most


def peaks_of_an_iteration(config: RunConfig, place: Path, measure: Callable, monkeypatch) -> dict[str, list[int]]:
    """Peaks of the second PPO iteration, when the moments are there, by phase: of each call that makes up the phase."""
    cluster = Cluster.open(
        compute_dtype=config.compute_dtype, activation_checkpointing=config.sharding.activation_checkpointing
    )
    folders = {"policy": place / "policy", "reward": place / "reward"}
    job = Job("ppo", config, folders, place, first=True)
    actors = load_actors(job, cluster)
    prompt = list(range(2, 2 + config.ppo.max_prompt))
    different = [[*prompt[:-1], 5 + i] for i in range(config.ppo.batch)]  # as one that is there twice is read once
    prompts = [(f"prompt {i}", ids[: len(ids) - (i == 0)]) for i, ids in enumerate(different)]
    ptx = PtxBatches([(list(range(2, 2 + config.ptx.max_length)), 1)], config.ptx.batch, config.seed)
    ppo.ppo_iteration(actors, prompts, ptx, job, None)
    found: dict[str, list[int]] = {}

    def watch(module, name: str, phase: str) -> None:
        original = getattr(module, name)

        def measured(*args, **options):
            result, peak = measure(lambda: original(*args, **options))
            found.setdefault(phase, []).append(peak)
            return result

        monkeypatch.setattr(module, name, measured)

    watch(ppo, "sample", "rollout")
    watch(ppo, "score", "scoring")
    watch(ppo_update, "policy_backward", "policy update")
    watch(ppo_update, "ptx_backward", "ptx")
    watch(ppo_update, "value_backward", "value update")
    watch(ppo_update, "step", "step")
    ppo.ppo_iteration(actors, prompts, ptx, job, None)
    return found


RECOMPUTED = "sharding.activation_checkpointing=true"
PTX = ("ptx.coef=1", "ptx.batch=4", "ptx.max_length=64")


@pytest.mark.parametrize("words", [(), PTX, (RECOMPUTED, "peft=lora")], ids=["whole", "ptx", "adapter, recomputed"])
def test_the_phases_of_a_real_iteration_peak_where_the_cpus_allocator_says(words, one_rank, folders, monkeypatch):
    """Beyond the weights and moments that are there before. Measured 1.00 to 1.01 of what is planned; what is left from
    before and freed inside counts against it."""
    words = (f"policy={folders / 'policy'}", f"reward.path={folders / 'reward'}", *LOOP, *words)
    phases = planned("ppo", *words)
    found = peaks_of_an_iteration(config_of("ppo", *words), folders, allocated, monkeypatch)
    gradients = phases["policy update"].models["policy"].gradients  # there before the first text of ptx
    found["policy update"].append(found["ptx"][0] + gradients)
    for name, phase in phases.items():
        expected = sum(f.total - f.weights - f.optimizer for f in phase.models.values())
        assert max(found[name]) == pytest.approx(expected, rel=0.06), name


# ------------------------------------------------------------------------------------------------------------------ GPU


def on_gpu(call: Callable) -> tuple[object, int]:
    """What a call returns, and the most that the CUDA allocator had given out meanwhile, before it included."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated()


LARGE = (  # half a billion random weights, sequences long enough that activations and logits are several GiB
    "ppo.batch=32", "ppo.minibatch=32", "ppo.microbatch_tokens=4096", "ppo.episodes=320", "ppo.epochs=1",
    "ppo.max_prompt=256", "rollout.max_response=256", "rollout.min_response=255", "rollout.batch=32",
    "reward.normalise=none", "ppo.self_checks=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def large(tiny_tokenizer, tmp_path_factory) -> Path:
    spec = options()["qwen2_5_0_5b"]
    return save_models(tmp_path_factory.mktemp("large"), tiny_tokenizer, model_config(spec, vocab_size=spec.vocab_size))


@pytest.mark.gpu
@pytest.mark.parametrize("words", [(), ("compute_dtype=bfloat16",), ("compute_dtype=bfloat16", RECOMPUTED)], ids=str)
def test_every_phase_of_ppo_peaks_where_the_gpus_allocator_says(words, one_rank, large, monkeypatch):
    words = (f"policy={large / 'policy'}", f"reward.path={large / 'reward'}", *LARGE, *words)
    phases = planned("ppo", *words)
    found = peaks_of_an_iteration(config_of("ppo", *words), large, on_gpu, monkeypatch)
    for name, phase in phases.items():
        print(f"{name}: measured {max(found[name]) / GIB:.2f} GiB, planned {phase.total / GIB:.2f} GiB")
    policy, value = found["step"]
    found["policy update"].append(policy)
    found["value update"].append(value)
    for name, phase in phases.items():
        assert max(found[name]) == pytest.approx(phase.total, rel=0.15), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_training_with_trl_peaks_where_the_gpus_allocator_says(stage, dtype, large, tmp_path, monkeypatch):
    """The whole stage in this process; rows of SFT are cut to max_length, and the longest pair is as long."""
    key = {"sft": "model.path", "reward_model": "policy"}[stage]
    words = (
        f"{key}={large / 'policy'}", f"compute_dtype={dtype}", "launch=inline", "tracking=none", f"runs_dir={tmp_path}",
        "data.num_demonstrations=400", "data.num_pairs=400", "model.context_length=1024",
    )  # fmt: skip
    encoder, pairs = load_encoder(large / "policy"), config_of(stage, *words).data.load(0).train.pairs
    longest = {"sft": 64, "reward_model": max(len(ids) for pair in pairs for ids in encoder.pair(pair))}[stage]
    words += tuple(f"{stage}.{name}" for name in ("batch=64", "microbatch=64", "epochs=1", f"max_length={longest}"))
    (phase,) = plan(stage, config_of(stage, *words))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["alignkit", stage, *words])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as stop:
        on_gpu(alignkit.cli.main)
    assert stop.value.code == 0
    peak = torch.cuda.max_memory_allocated()
    print(f"{stage}: measured {peak / GIB:.2f} GiB, planned {phase.total / GIB:.2f} GiB")
    assert peak == pytest.approx(phase.total, rel=0.15)
