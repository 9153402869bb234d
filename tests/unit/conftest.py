"""Actors of PPO built by hand: small models with recording optimizers, sharded on a mesh of one."""

import copy

import pytest
import torch
from plan_world import save_models, small_config
from ppo_world import EXACT, Recorder

from alignkit.algo.sampling import SamplingRule
from alignkit.models.loading import make_encoder, scorer_from_policy
from alignkit.models.scalar import ScalarModel
from alignkit.reward.model import ModelSource
from alignkit.stages.actors import Actors
from alignkit.stages.state import PPOState


@pytest.fixture(scope="session")
def encoder(tiny_tokenizer):
    """Prompts and responses as ids of `tiny_tokenizer`."""
    return make_encoder(tiny_tokenizer, None)


@pytest.fixture(scope="module")
def make_actors(cluster, tiny_policy, tiny_tokenizer, tmp_path_factory):
    """Factory of Actors with recording optimizers; `plain` holds unsharded copies of policy and value model."""

    def build(architecture: str = EXACT, dtype=torch.float64, *, stops=(1, 5, 9), optimizer=Recorder) -> Actors:
        folder = tmp_path_factory.mktemp("policy")
        policy = tiny_policy(architecture).to(dtype)
        policy.save_pretrained(folder)
        reward, value = (ScalarModel(scorer_from_policy(folder, seed=1)).to(dtype) for _ in range(2))
        value.absorb_affine(0.1, 2.0)
        reference, plain = copy.deepcopy(policy), (copy.deepcopy(policy), copy.deepcopy(value))
        policy, value = cluster.shard(policy, trainable=True), cluster.shard(value, trainable=True)
        actors = Actors(
            cluster=cluster,
            encoder=make_encoder(tiny_tokenizer, None),
            rule=SamplingRule(temperature=0.9, stop_ids=stops),
            policy=policy,
            reference=cluster.shard(reference, trainable=False),
            value_model=value,
            reward=ModelSource(cluster.shard(reward, trainable=False), 0.1, 2.0, cluster),
            policy_optimizer=optimizer(policy),
            value_optimizer=optimizer(value),
            state=PPOState(kl_coef=0.1),
        )
        actors.plain = plain
        return actors

    return build


@pytest.fixture(scope="module")
def exact(make_actors):
    return make_actors()


@pytest.fixture(scope="module")
def single(make_actors):
    return make_actors("llama", torch.float32)


@pytest.fixture(scope="session")
def folders(tiny_tokenizer, tmp_path_factory):
    """`policy` and `reward` in it: models with random weights, as finished stages leave them."""
    return save_models(tmp_path_factory.mktemp("models"), tiny_tokenizer, small_config("llama"))
