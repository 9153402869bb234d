"""What a PPO run must remember between iterations besides weights and optimizers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class PPOState:
    """All that changes from one iteration to the next and is not a weight.

    iteration:      finished iterations: the cursor in the prompts, the counter of the sampling noise, and where the
                    learning-rate schedules and the warm-ups stand, all of which are functions of it and of the seed.
    kl_coef:        reward units per nat, of the next iteration.
    score_moments:  count, mean, sum of squared deviations of all scores so far.
    ptx_rows:       rows of ptx text used so far.
    policy_steps, value_steps: optimizer steps taken.
    best_look, best_iteration: the judge's highest mean score (or win rate, where it gives none) and when it was; None
                    before the first look, iteration 0 while no policy was liked more than the start.
    looks_since:    looks since then.
    """

    kl_coef: float
    iteration: int = 0
    score_moments: tuple[float, float, float] = (0.0, 0.0, 0.0)
    ptx_rows: int = 0
    policy_steps: int = 0
    value_steps: int = 0
    best_look: float | None = None
    best_iteration: int = 0
    looks_since: int = 0

    def take_look(self, found: float, start: float) -> bool:
        """Take what a look found, `start`: what the policy before training got. Whether it is the best so far."""
        if self.best_look is None:
            self.best_look = start
        if found > self.best_look:
            self.best_look, self.best_iteration, self.looks_since = found, self.iteration, 0
            return True
        self.looks_since += 1
        return False

    def add_scores(self, scores: Tensor) -> Tensor:
        """Take the scores [B] of an iteration into the running moments; returns them, [3] float64."""
        from alignkit.algo.masked import merge_moments, moments

        seen = torch.tensor(self.score_moments, dtype=torch.float64, device=scores.device)
        merged = merge_moments(torch.stack([seen, moments(scores, torch.ones_like(scores, dtype=torch.bool))]))
        self.score_moments = tuple(merged.tolist())
        return merged

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, which JSON keeps to the last bit."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, saved: dict[str, Any]) -> PPOState:
        """The inverse of `state_dict`."""
        return cls(**{**saved, "score_moments": tuple(saved["score_moments"])})


class KeptWeights:
    """A copy of a model's trained weights at one moment, sharded like them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.kept = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def take(self, model: torch.nn.Module) -> None:
        """Keep the weights as they are now."""
        for name, parameter in model.named_parameters():
            if name in self.kept:
                self.kept[name].copy_(parameter)

    @torch.no_grad()
    def put(self, model: torch.nn.Module) -> None:
        """Give the model the kept weights."""
        for name, parameter in model.named_parameters():
            if name in self.kept:
                parameter.copy_(self.kept[name])


class AveragedWeights:
    """The exponential moving average of a model's trained weights, sharded like them.

        average <- decay * average + (1 - decay) * weights,    after every optimizer step

    Source: Polyak and Juditsky 1992 (uniform); Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155, appendix C.4 (as
            here, decay 0.992).
    Tests:  test_ppo_variants.py::test_averaged_weights_follow_every_policy_step_and_are_swapped_in_and_out
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """Move the average towards the weights as they are now."""
        for name, parameter in model.named_parameters():
            if name in self.average:
                self.average[name].lerp_(parameter, 1.0 - self.decay)

    @torch.no_grad()
    def swap(self, model: torch.nn.Module) -> None:
        """Put the average into the model and the model's weights here; a second call undoes it."""
        for name, parameter in model.named_parameters():
            if name in self.average:
                held = parameter.detach().clone()
                parameter.copy_(self.average[name])
                self.average[name] = held
