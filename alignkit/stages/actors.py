"""The four models of PPO with what goes with them, each sharded: the state of the training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.algo.batching import pad_left, pad_right
from alignkit.algo.sampling import SamplingRule, uniform_noise
from alignkit.algo.schedule import learning_rate_share
from alignkit.algo.sequence import spread
from alignkit.algo.types import PromptBatch, Rollout
from alignkit.data.tokens import Encoder
from alignkit.models.adapters import adapters_off, add_adapter
from alignkit.models.loading import (
    disable_dropout,
    load_causal,
    load_encoder,
    model_folder,
    require_context,
    scorer_from_policy,
)
from alignkit.models.policy import logprobs_at, pack_rows, response_logprobs
from alignkit.models.scalar import ScalarModel, Scalars, score_sequences
from alignkit.models.settings import refuse_in_ppo, refuse_stacking
from alignkit.reward.model import RewardModel
from alignkit.reward.source import CombinedSource, RewardSource, opened
from alignkit.stages.optimizer import OffloadedAdamW, adamw
from alignkit.stages.settings import PPOSettings
from alignkit.stages.state import AveragedWeights, KeptWeights, PPOState

if TYPE_CHECKING:
    from alignkit.runtime.config import RunConfig
    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.job import Job


@dataclass
class Actors:
    """policy and value_model are trained, reference and reward are frozen; value_model and its optimizer are None where
    the advantage needs no values. state: all else that changes; ema: the averaged policy, best: the one that the judge
    liked most, if there is to be one; reward_failures: the share of the last rollout's responses that the reward source
    could not score, None for one that may not fail."""

    cluster: Cluster
    encoder: Encoder
    rule: SamplingRule
    policy: PreTrainedModel
    reference: PreTrainedModel | WithoutAdapter
    value_model: nn.Module | None
    reward: RewardSource | CombinedSource
    policy_optimizer: torch.optim.Optimizer
    value_optimizer: torch.optim.Optimizer | None
    state: PPOState
    ema: AveragedWeights | None = None
    best: KeptWeights | None = None
    reward_failures: float | None = None

    def set_learning_rates(self, settings: PPOSettings) -> None:
        """Both learning rates where their schedule stands."""
        share = learning_rate_share(settings.schedule, self.state.iteration, settings.iterations, settings.warmup)
        for optimizer, peak in (
            (self.policy_optimizer, settings.learning_rate),
            (self.value_optimizer, settings.value_learning_rate),
        ):
            for group in optimizer.param_groups if optimizer else ():
                group["lr"] = peak * share

    def tensors(self) -> dict[str, dict[str, Any]]:
        """All trained weights, Adam's moments and the average, sharded as they are, by name. Moments that an optimizer
        makes in its first step are there (as zeros) if the state says that it has stepped."""
        saved: dict[str, dict[str, Any]] = {}
        trained = (
            ("policy", self.policy, self.policy_optimizer, self.state.policy_steps),
            ("value", self.value_model, self.value_optimizer, self.state.value_steps),
        )
        for name, model, optimizer, steps in trained:
            if model is None:
                continue
            self.cluster.rest(model)
            saved[name] = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
            if steps and optimizer:
                parameters = optimizer.param_groups[0]["params"]
                saved[f"{name}_adam"] = {key: moments(optimizer, p) for key, p in zip(saved[name], parameters)}
        if self.ema is not None:
            saved["policy_average"] = self.ema.average
        if self.best is not None:
            saved["policy_best"] = self.best.kept
        return saved


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Adam's state of one weight, made as its first step would if it is not there."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.tensor(0.0)
        home = torch.device("cpu") if isinstance(optimizer, OffloadedAdamW) else parameter.device
        state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter).to(home) for _ in range(2))
    return state


def load_actors(job: Job, cluster: Cluster) -> Actors:
    """Load and shard the models: reference = policy; the value model starts as the reward model, in its units. With an
    adapter there is one copy of each base: the reference is the policy without its adapter, the reward model the value
    model without its own."""
    config = job.config
    folder, settings, peft = model_folder(job.inputs["policy"]), config.ppo, config.peft
    offload = config.sharding.offload_optimizer
    refuse_in_ppo(peft)
    refuse_stacking(peft, folder)
    encoder, adapted = load_encoder(folder), peft.method != "none"
    policy = cluster.place(lambda: start_of(folder, config), trainable=True)
    reference = WithoutAdapter(policy) if adapted else cluster.place(lambda: load_policy(folder), trainable=False)
    shares = adapted and config.advantage.uses_values and isinstance(config.reward, RewardModel)
    reward = opened(config.reward, job.inputs.get("reward"), encoder, cluster, *([peft] if shares else []))
    value_model = first_value(reward, folder, config, cluster) if config.advantage.uses_values else None
    if settings.packing:
        sources = getattr(reward, "members", {"reward": reward}).values()
        for model in (policy, reference, value_model, *(getattr(source, "model", None) for source in sources)):
            pack(model)
    return Actors(
        cluster=cluster,
        encoder=encoder,
        rule=sampling_rule(config, encoder),
        policy=policy,
        reference=reference,
        value_model=value_model,
        reward=reward,
        policy_optimizer=adam(policy, settings.learning_rate, settings, offload),
        value_optimizer=adam(value_model, settings.value_learning_rate, settings, offload) if value_model else None,
        state=PPOState(kl_coef=config.kl.coef),
        ema=None if settings.ema is None else AveragedWeights(policy, settings.ema),
        best=KeptWeights(policy) if settings.keep == "best" else None,
    )


def pack(model: object) -> None:
    """Lay the rows that this model reads end to end, if it is one of ours. Raises UserError where that cannot be."""
    if isinstance(model, ScalarModel):
        pack_rows(model, model.classifier.base_model, model)
    elif isinstance(model, PreTrainedModel):
        rule = SamplingRule(temperature=1.0, stop_ids=())

        def logprobs(tokens: Tensor, mask: Tensor) -> Tensor:
            wanted = mask.clone()
            wanted[:, 0] = False
            return spread(logprobs_at(model, tokens, mask, wanted, rule)[0], wanted)

        pack_rows(model, model.base_model, logprobs)


def first_value(reward: RewardSource | CombinedSource, folder: Path, config: RunConfig, cluster: Cluster) -> nn.Module:
    """The value model before training, sharded: the reward model if there is one, else the policy with a fresh head."""
    if hasattr(reward, "initial_value"):
        return reward.initial_value()

    def fresh() -> ScalarModel:
        value_model = ScalarModel(scorer_from_policy(folder, config.seed))
        if config.peft.method != "none":
            add_adapter(value_model.classifier, config.peft, "SEQ_CLS")
            value_model.head.requires_grad_(True)
        disable_dropout(value_model.classifier)
        return value_model

    return cluster.place(fresh, trainable=True)


@dataclass(frozen=True)
class WithoutAdapter:
    """A model called with its adapter switched off: the reference of a policy that trains only an adapter."""

    model: PreTrainedModel

    def __call__(self, **inputs: Any) -> Any:
        with adapters_off(self.model):
            return self.model(**inputs)

    def logprobs_at(self, tokens: Tensor, mask: Tensor, wanted: Tensor, rule: SamplingRule, entropy: bool) -> Any:
        """See `models.policy.logprobs_at`."""
        with adapters_off(self.model):
            return logprobs_at(self.model, tokens, mask, wanted, rule, entropy=entropy)


def start_of(folder: Path, config: RunConfig) -> PreTrainedModel:
    """The policy before training, with its adapter if there is to be one. Raises UserError if a sequence is longer than
    it can be."""
    policy, longest = load_policy(folder), config.ppo.max_prompt + config.rollout.max_response
    lengths = f"ppo.max_prompt={config.ppo.max_prompt} and rollout.max_response={config.rollout.max_response}"
    require_context(policy, longest, lengths)
    if config.ptx.coef:
        require_context(policy, config.ptx.max_length, f"ptx.max_length={config.ptx.max_length}")
    if config.peft.method != "none":
        add_adapter(policy, config.peft, "CAUSAL_LM")
        disable_dropout(policy)
    return policy


def load_policy(folder: Path) -> PreTrainedModel:
    """A causal model with dropout off."""
    model = load_causal(folder)
    disable_dropout(model)
    return model


def sampling_rule(config: RunConfig, encoder: Encoder) -> SamplingRule:
    """One rule for sampler, old, new and reference log-probabilities."""
    return SamplingRule(config.rollout.temperature, encoder.stop_ids, config.rollout.min_response)


def sample(
    model: PreTrainedModel, prompts: list[list[int]], first_episode: int, config: RunConfig, rule: SamplingRule,
    cluster: Cluster, pad_id: int, iteration: int = 0,
) -> Rollout:  # fmt: skip
    """One response to each prompt (ids), sampled on the rank that the prompt was dealt to, then joined on every rank.

    The noise of a row is a function of seed, iteration and episode number, not of the rank.
    """
    tokens, mask = pad_left(prompts, pad_id)  # padded over all ranks, so that shares can be joined
    hand = cluster.deal(mask.sum(dim=1))
    rows = hand.rows
    batch = PromptBatch(
        tokens=tokens[rows].to(cluster.device),
        mask=mask[rows].to(cluster.device),
        index=(rows + first_episode).to(cluster.device),
    )
    noise = uniform_noise(config.seed, iteration, batch.index, config.rollout.max_response)
    unshard = config.rollout.unshard
    with cluster.sampling(model, unshard=unshard):
        part = config.rollout.generate(model, batch, rule, noise, go_on=bool if unshard else cluster.any)
    return Rollout(*(cluster.collect(getattr(part, field.name), hand) for field in fields(Rollout)))


def logprobs_of(
    model: PreTrainedModel | WithoutAdapter, rollout: Rollout, rule: SamplingRule, micros: list[Tensor], *,
    entropy: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Log-probabilities [B, R] of a rollout's responses, and their entropies if asked for, 0 on padding. micros: the
    rows of each micro-batch, as `Cluster.microbatches` gives them."""

    def forward(part: Rollout) -> list[Tensor]:
        found = response_logprobs(model, part.tokens, part.mask, part.response_mask, rule, entropy=entropy)
        return [values for values in found if values is not None]

    return _by_response_token(rollout, micros, forward)


def values_of(model: nn.Module, rollout: Rollout, micros: list[Tensor]) -> Tensor:
    """Values [B, R] of a rollout: the value at each response token is read one token earlier, before it is chosen."""

    def forward(part: Rollout) -> list[Tensor]:
        return [model(part.tokens, part.mask)[:, -part.response_mask.shape[1] - 1 : -1]]

    return _by_response_token(rollout, micros, forward)[0]


def _by_response_token(
    rollout: Rollout, micros: list[Tensor], forward: Callable[[Rollout], list[Tensor]]
) -> list[Tensor]:
    """`forward` of each micro-batch, put together: [B, R] tensors, 0 on padding, in float32 or better."""
    joined: list[Tensor] = []
    with torch.no_grad():
        for rows in micros:
            part = rollout.rows(rows)
            outputs = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in forward(part)]
            joined = joined or [
                torch.zeros(rollout.response_mask.shape, dtype=x.dtype, device=x.device) for x in outputs
            ]
            for target, value in zip(joined, outputs):
                target[rows, : value.shape[1]] = torch.where(part.response_mask, value, 0.0)
    return joined


def score_all(scorer: Scalars, rows: list[list[int]], pad_id: int, batch: int, cluster: Cluster) -> Tensor:
    """Scores of all rows of ids, [n] float32 on the CPU, the work dealt over the ranks."""
    hand = cluster.deal(torch.tensor([len(row) for row in rows]))
    parts = []
    with torch.no_grad():
        for part in hand.rows.split(batch):
            tokens, mask = pad_right([rows[i] for i in part.tolist()], pad_id)
            parts.append(score_sequences(scorer, tokens.to(cluster.device), mask.to(cluster.device)).float())
    return cluster.collect(torch.cat(parts), hand).cpu()


def adam(model: nn.Module, learning_rate: float, settings: PPOSettings, offload: bool = False) -> torch.optim.Optimizer:
    """AdamW over what is trained; offload: its moments stay in the CPU's memory."""
    trained = [p for p in model.parameters() if p.requires_grad]
    betas = (settings.adam_beta1, settings.adam_beta2)
    return adamw(
        trained, learning_rate, offload=offload, betas=betas, eps=settings.adam_eps, weight_decay=settings.weight_decay
    )
