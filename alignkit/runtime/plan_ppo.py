"""The memory of PPO: four models at rest, and the work of rollout, scoring and the two updates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from alignkit.models.memory import units_of
from alignkit.reward.model import RewardModel
from alignkit.rollout.compiled import BLOCK, Compiled
from alignkit.rollout.native import Native
from alignkit.runtime import plan_work as work
from alignkit.runtime.config import RunConfig
from alignkit.runtime.plan_models import Kind, Source, Task, shard_bytes, skeleton, trained
from alignkit.runtime.plan_types import WEIGHT, Footprint, Layout, Phase, most

Moment = tuple[str, dict[str, Footprint]]


@dataclass(frozen=True)
class Member:
    """A model of a phase."""

    source: Source
    kind: Kind
    layout: Layout

    @property
    def model(self) -> nn.Module:
        """Its skeleton."""
        return skeleton(self.source, self.kind)

    @property
    def rest(self) -> Footprint:
        """What it takes whatever is computed: float32 weights and moments if it is trained, else weights in the dtype
        of the forward; nothing of what stays in the CPU's memory."""
        buffers = sum(buffer.nbytes for buffer in self.model.buffers())
        if self.kind.trained:
            weights = shard_bytes(self.model.parameters(), self.layout.shards, WEIGHT)
            moments = 0 if self.layout.offload_optimizer else 2 * self.gradients
            return Footprint(weights=weights + buffers, optimizer=moments)
        weights = shard_bytes(self.model.parameters(), self.layout.shards, self.layout.dtype.itemsize)
        return Footprint(weights=buffers + (0 if self.layout.offload_frozen else weights))

    @property
    def gradients(self) -> int:
        """Bytes of the shards of its gradient."""
        return shard_bytes(trained(self.model), self.layout.shards, WEIGHT)

    @property
    def step(self) -> int:
        """Bytes that AdamW makes on a GPU while it steps: a square root for each weight at once, or, where the moments
        come from the CPU, moments and square root of one weight."""
        if not self.layout.offload_optimizer:
            return self.gradients
        return 3 * max(shard_bytes([p], self.layout.shards, WEIGHT) for p in trained(self.model))

    @property
    def whole(self) -> int:
        """Bytes of all its weights, gathered."""
        return shard_bytes(self.model.parameters(), 1, self.layout.dtype.itemsize)

    @property
    def root(self) -> int:
        """Bytes of its gathered root (embeddings, last norm, head), which a trained model keeps until its backward."""
        return shard_bytes(units_of(self.model)[-1][1], 1, self.layout.dtype.itemsize)


@dataclass(frozen=True)
class Cast:
    """The models of PPO. reference: None where it is the policy without its adapter; value: None where the advantage
    needs no values; scorer: None where the score is not a model's, or comes from the value model's base."""

    config: RunConfig
    layout: Layout
    policy: Member
    reference: Member | None
    value: Member | None
    scorer: Member | None

    @classmethod
    def of(cls, config: RunConfig, policy: Source, reward: Source, layout: Layout) -> Cast:
        """Who plays, by the settings; see `stages.actors.load_actors`."""
        adapted, uses_values = config.peft.method != "none", config.advantage.uses_values
        scored = isinstance(config.reward, RewardModel)
        shared = adapted and uses_values and scored
        scores = reward if scored else policy

        def member(source: Source, task: Task, *, trained: bool) -> Member:
            kind = Kind(task, trained, layout.dtype, checkpointing=trained and layout.checkpointing)
            return Member(source, kind, layout)

        return cls(
            config=config,
            layout=layout,
            policy=member(policy, "causal", trained=True),
            reference=None if adapted else member(policy, "causal", trained=False),
            value=member(scores, "shared" if shared else "scalar", trained=True) if uses_values else None,
            scorer=member(scores, "scalar", trained=False) if scored and not shared else None,
        )

    def models(self, **more: dict[str, int]) -> dict[str, Footprint]:
        """What each model takes, by its name: at rest, and with these bytes more."""
        found = {
            name: member.rest.plus(**more.get(name, {}))
            for name in ("policy", "reference", "value", "scorer")
            if (member := getattr(self, name)) is not None
        }
        named = {NAMES.get(name, name): footprint for name, footprint in found.items()}
        if not isinstance(self.config.rollout, Native):  # vLLM's cache is what it is given, and not counted
            named["engine's copy"] = Footprint(weights=self.policy.whole, kv_cache=self.kept_cache)
        if self.config.ppo.ema is not None:
            named["policy average"] = Footprint(weights=self.policy.gradients)
        if self.config.ppo.keep == "best":
            named["best policy"] = Footprint(weights=self.policy.gradients)
        return named

    def micro(self, of: int, prompt: int | None = None, response: int | None = None) -> tuple[int, int, int]:
        """Rows of the largest micro-batch out of `of` rows, and the lengths of their prompts and responses; these are
        the longest where none are given. The tokens are as many as may be; of shorter prompts there could be more
        responses, but their logits come LOGITS_BYTES at a time."""
        prompt = prompt or self.config.ppo.max_prompt
        response = response or self.config.rollout.max_response
        budget, longest = self.config.ppo.microbatch_tokens, prompt + response
        rows = self.layout.share(of, -(-budget // longest))
        width = longest if rows == 1 else min(budget // rows, longest)
        return rows, max(width - response, 1), min(response, width - 1)

    @property
    def several(self) -> bool:
        """Whether a minibatch of the longest rows takes more than one micro-batch."""
        rows, longest = self.config.ppo.minibatch, self.config.ppo.max_prompt + self.config.rollout.max_response
        return self.layout.share(rows, rows) * longest > self.config.ppo.microbatch_tokens

    @property
    def kept_cache(self) -> int:
        """Bytes of the key-value cache that the compiled engine keeps from one rollout to the next, in whole blocks."""
        if not isinstance(self.config.rollout, Compiled):
            return 0
        prompt, response = self.config.ppo.max_prompt, self.config.rollout.max_response
        *_, (_, _, cache) = work.decoding(self.policy.source, self.policy.kind, *self._decoded, None)
        return cache // (prompt + response) * (-(-(prompt + response) // BLOCK) * BLOCK)

    @property
    def _decoded(self) -> tuple[int, int, int, int]:
        """Rows that a rank decodes at once, tokens of their prompts and responses, and the fewest of a response."""
        rollout, rows = self.config.rollout, self.config.ppo.batch
        share = self.layout.share(rows, getattr(rollout, "batch", rows))
        return share, self.config.ppo.max_prompt, rollout.max_response, rollout.min_response

    def rollout(self) -> Iterator[Moment]:
        """Sampling: the whole policy, or layer after layer, with the key-value cache."""
        policy, unshard = self.policy, getattr(self.config.rollout, "unshard", True)
        shards = None if unshard else self.layout.shards
        for moment, peak, cache in work.decoding(policy.source, policy.kind, *self._decoded, shards):
            gathered = peak["gathered"] + (policy.whole if unshard else 0)
            activations = max(peak["activations"] - cache, 0)
            mine = {**peak, "gathered": gathered, "activations": activations, "kv_cache": cache}
            if self.kept_cache:  # it is the engine's, then
                del mine["kv_cache"]
            yield moment, self.models(policy=mine)

    def scoring(self) -> Iterator[Moment]:
        """One model after the other, without gradients; the roots of the trained ones stay gathered."""
        rows, *lengths = self.micro(self.config.ppo.batch)
        minimum, shards = self.config.rollout.min_response, self.layout.shards
        kept: dict[str, dict[str, int]] = {}
        for name in ("policy", "reference", "value", "scorer"):
            member = getattr(self, name)
            if member is None:
                continue
            place = (member.source, member.kind, rows)
            if name in ("policy", "reference"):
                peak = work.logprobs(*place, *lengths, minimum, shards, backward=False, entropy=name == "policy")
            else:
                peak = work.scalars(*place, sum(lengths), shards, backward=False)
            yield f"forward of the {NAMES.get(name, name)}", self.models(**{**kept, name: peak})
            if member.kind.trained:
                kept[name] = {"gathered": member.root}

    def policy_update(self) -> Iterator[Moment]:
        """Gradients of a micro-batch, and the optimizer's step."""
        policy, config, shards = self.policy, self.config, self.layout.shards
        place = (policy.source, policy.kind)
        gradients = {"gradients": policy.gradients}
        micro, minimum = self.micro(config.ppo.minibatch), config.rollout.min_response
        options = {"backward": True, "several": self.several}
        entropy = config.ppo.entropy_coef > 0
        peak = work.logprobs(*place, *micro, minimum, shards, **options, entropy=entropy)
        yield "backward", self.models(policy={**peak, **gradients})
        if config.ptx.coef:
            micro = self.micro(config.ptx.batch, 1, config.ptx.max_length - 1)
            peak = work.logprobs(*place, *micro, 0, shards, backward=True, entropy=False)
            yield "backward of ptx", self.models(policy={**peak, **gradients})
        yield "optimizer step", self.models(policy={"optimizer": policy.step, **gradients})

    def value_update(self) -> Iterator[Moment]:
        """The same of the value model; with ppo.joint the policy's gradient waits for the common norm."""
        value, settings = self.value, self.config.ppo
        assert value is not None
        waiting = {"gradients": self.policy.gradients} if settings.joint else {}
        gradients = {"gradients": value.gradients}
        rows, *lengths = self.micro(settings.minibatch)
        options = {"backward": True, "several": self.several}
        peak = work.scalars(value.source, value.kind, rows, sum(lengths), self.layout.shards, **options)
        yield "backward", self.models(policy=waiting, value={**peak, **gradients})
        yield "optimizer step", self.models(policy=waiting, value={"optimizer": value.step, **gradients})


NAMES = {"value": "value model", "scorer": "reward model"}


def ppo_phases(config: RunConfig, policy: Source, reward: Source, layout: Layout) -> list[Phase]:
    """Rollout, scoring, and the updates of policy and value model."""
    cast = Cast.of(config, policy, reward, layout)
    phases = {"rollout": cast.rollout, "scoring": cast.scoring, "policy update": cast.policy_update}
    if cast.value is not None:
        phases["value update"] = cast.value_update
    return [most(name, dict(moments())) for name, moments in phases.items()]
