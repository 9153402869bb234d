"""PPO with adapters: one copy of each base, the reference and the reward model are those of the bases, what is trained
is what is saved."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from ppo_world import PROMPTS, TEXTS, config_of, cut
from safetensors.torch import load_file

from alignkit.models.loading import load_causal, load_scorer, scorer_from_policy
from alignkit.models.scalar import ScalarModel, score_sequences
from alignkit.models.settings import PeftSettings
from alignkit.stages import ppo
from alignkit.stages.actors import load_actors, logprobs_of
from alignkit.stages.job import Job
from alignkit.stages.ppo_report import weight_bytes
from alignkit.stages.ptx import PtxBatches

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1}
METHODS = {"lora": LORA, "dora": {**LORA, "use_dora": True}, "ia3": {}, "bitfit": {}}


def peft_of(name: str, merge: bool = False) -> PeftSettings:
    method = "lora" if name == "dora" else name
    return PeftSettings(method=method, settings=METHODS[name], quantization={}, merge=merge or name == "bitfit")


@pytest.fixture(scope="module")
def folders(tiny_policy, tiny_tokenizer, tmp_path_factory):
    """Saved policy and reward model of one architecture with biases."""
    place = tmp_path_factory.mktemp("bases")
    tiny_policy("gpt2").save_pretrained(place / "policy")
    scorer_from_policy(place / "policy", seed=1).save_pretrained(place / "reward")
    for name in ("policy", "reward"):
        tiny_tokenizer.save_pretrained(place / name)
    return {"policy": place / "policy", "reward": place / "reward"}


def job_of(folders, out, peft: PeftSettings, **changes) -> Job:
    config = config_of(learning_rate=1e-2, value_learning_rate=1e-2, **changes)
    config.peft, config.reward = peft, replace(config.reward, normalise="none")
    return Job("ppo", config, folders, out, first=True)


def iterate(actors, job, times: int = 1):
    prompts = [(text, actors.encoder.prompt(text)) for text in PROMPTS]
    for _ in range(times):
        values, rows = ppo.ppo_iteration(actors, prompts, PtxBatches(TEXTS, 3, 0), job, None)
    return values, rows


def total_bytes(actors) -> int:
    seen: set[int] = set()
    models = (actors.policy, actors.reference, actors.value_model, actors.reward.model)
    return sum(weight_bytes(model, seen) for model in models if isinstance(model, torch.nn.Module))


@pytest.mark.parametrize("name", METHODS)
def test_each_base_is_in_memory_once(name, folders, cluster, tmp_path):
    none = PeftSettings(method="none", settings={}, quantization={}, merge=False)
    four = total_bytes(load_actors(job_of(folders, tmp_path, none), cluster))
    actors = load_actors(job_of(folders, tmp_path, peft_of(name)), cluster)
    trained = sum(
        p.nbytes for model in (actors.policy, actors.value_model) for p in model.parameters() if p.requires_grad
    )
    two = total_bytes(actors)
    assert two - trained == pytest.approx(four / 2, rel=0.01)


class Watched:
    """A reward source that keeps what it was asked and what it said."""

    def __init__(self, source) -> None:
        self.source = source

    def score(self, answers, microbatch):
        self.rollout, self.scores = answers.rollout, self.source.score(answers, microbatch)
        return self.scores


@pytest.mark.parametrize("name", METHODS)
def test_reference_and_reward_stay_those_of_the_bases_while_the_adapters_learn(name, folders, cluster, tmp_path):
    job = job_of(folders, tmp_path, peft_of(name))
    actors = load_actors(job, cluster)
    actors.reward = Watched(actors.reward)
    alone, base = ScalarModel(load_scorer(folders["reward"])).eval(), load_causal(folders["policy"]).eval()
    first, _ = iterate(actors, job)
    assert first["kl"] == 0.0 and first["ratio_error"] <= 1e-4
    second, _ = iterate(actors, job, times=2)
    assert second["kl"] != 0.0 and second["explained_variance"] != first["explained_variance"]
    seen = actors.reward.rollout
    with torch.no_grad():
        expected = score_sequences(alone, seen.tokens, seen.mask)
    torch.testing.assert_close(actors.reward.scores, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        logprobs_of(actors.reference, seen, actors.rule, cut(seen, 8))[0],
        logprobs_of(base, seen, actors.rule, cut(seen, 8))[0],
        rtol=0,
        atol=1e-5,
    )
    held = {name.replace(".base_layer", ""): value for name, value in cluster.full_state(actors.policy).items()}
    assert all(held[name].equal(value) for name, value in base.state_dict().items())


@pytest.mark.parametrize(
    "name, merge", [("lora", False), ("lora", True), ("dora", False), ("ia3", False), ("bitfit", True)]
)
def test_what_is_saved_computes_what_was_trained(name, merge, folders, cluster, tmp_path):
    job = job_of(folders, tmp_path, peft_of(name, merge))
    actors = load_actors(job, cluster)
    iterate(actors, job, times=2)
    ppo.save_policy(actors, cluster.full_state(actors.policy), job)
    tokens = torch.randint(2, 270, (3, 9), generator=torch.Generator().manual_seed(2))
    rollout = ppo.Rollout(
        tokens,
        torch.ones(3, 9, dtype=torch.bool),
        torch.ones(3, 5, dtype=torch.bool),
        torch.ones(3) > 0,
        torch.zeros(3, 5),
    )
    expected = logprobs_of(actors.policy, rollout, actors.rule, cut(rollout, 3))[0]
    saved = {"ours": load_causal(tmp_path / "model")}
    if name != "bitfit":
        place = tmp_path / ("adapter" if merge else "model")
        saved["peft"] = PeftModel.from_pretrained(load_causal(folders["policy"]), str(place)).get_base_model()
    base = logprobs_of(actors.reference, rollout, actors.rule, cut(rollout, 3))[0]
    assert float((base - expected).abs().max()) > 1e-3, "an adapter that did not move proves nothing"
    for model in saved.values():
        torch.testing.assert_close(
            logprobs_of(model.eval(), rollout, actors.rule, cut(rollout, 3))[0], expected, rtol=0, atol=1e-5
        )


def test_averaged_weights_of_an_adapter_are_those_of_its_tensors_alone(folders, cluster, tmp_path):
    job = job_of(folders, tmp_path, peft_of("lora"), ema=0.5)
    actors = load_actors(job, cluster)
    assert all("lora" in name for name in actors.ema.average)
    iterate(actors, job)
    average = {name.replace(".default", ""): whole(value) for name, value in actors.ema.average.items()}
    actors.ema.swap(actors.policy)
    last = {name.replace(".default", ""): whole(value) for name, value in actors.ema.average.items()}
    ppo.save_policy(actors, cluster.full_state(actors.policy), job)
    file = load_file(tmp_path / "model" / "adapter_model.safetensors")
    saved = {name.removeprefix("base_model.model."): value for name, value in file.items()}
    assert saved.keys() == average.keys()
    assert all(saved[name].equal(value) for name, value in average.items())
    assert not any(saved[name].equal(value) for name, value in last.items()), "they would be the same without averaging"


def whole(value: torch.Tensor) -> torch.Tensor:
    """A copy of all of a tensor that may be sharded."""
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
