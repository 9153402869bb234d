"""What the tests of the plan share: small models and their folders, settings, and what is planned for them."""

from pathlib import Path

import hydra
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from alignkit.models.loading import scorer_from_policy
from alignkit.models.settings import ModelSettings
from alignkit.runtime.config import RunConfig, conf_dir, load
from alignkit.runtime.plan import plan
from alignkit.runtime.plan_models import find_sources
from alignkit.runtime.plan_ppo import Cast
from alignkit.runtime.plan_types import Footprint, Layout, Phase

GIB = 2**30
SMALL = {  # a model whose activations are larger than its weights, so that both are seen
    "hidden_size": 64, "intermediate_size": 168, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 2000, "tie_word_embeddings": False, "num_labels": 1,
    "pad_token_id": 0,
}  # fmt: skip
LOOP = (  # one PPO iteration of it
    "ppo.batch=4", "ppo.minibatch=4", "ppo.microbatch_tokens=128", "ppo.episodes=40", "ppo.epochs=1",
    "ppo.max_prompt=56", "rollout.max_response=8", "rollout.min_response=7", "rollout.batch=4", "reward.normalise=none",
)  # fmt: skip


def composed(recipe: str, *words: str) -> dict:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose(recipe, overrides=list(words)), resolve=True)


def config_of(recipe: str, *words: str) -> RunConfig:
    return load(composed(recipe, *words))


def planned(recipe: str, *words: str, sources=None) -> dict[str, Phase]:
    return {phase.name: phase for phase in plan(recipe, config_of(recipe, *words), sources)}


def small_config(architecture: str, **changes):
    return AutoConfig.for_model(architecture, **{**SMALL, **changes})


def resting(recipe: str, *words: str) -> dict[str, Footprint]:
    """What PPO's models take at rest."""
    config = config_of(recipe, *words)
    return Cast.of(config, *find_sources(recipe, config), Layout.of(config)).models()


def spec_of(**changes) -> ModelSettings:
    return ModelSettings(**{**OmegaConf.load(conf_dir() / "model" / "tiny.yaml"), **changes})


def save_models(place: Path, tokenizer, config) -> Path:
    config.update({"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(place / "policy")
    scorer_from_policy(place / "policy", seed=1).save_pretrained(place / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(place / name)
    return place
