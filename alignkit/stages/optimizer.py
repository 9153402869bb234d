"""AdamW, with its moments on the GPU or, to save room there, in the CPU's memory."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW whose moments live in the CPU's memory and visit the weights' device one weight at a time. The arithmetic
    is AdamW's own, so the result is the same to the last bit.

    Tests:  test_optimizer.py::test_offloaded_moments_give_the_same_weights
    """

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure
        """One step; moments are brought, used and put back weight by weight."""
        whole = [group["params"] for group in self.param_groups]
        for group in self.param_groups:
            group["params"] = []
        try:
            for group, parameters in zip(self.param_groups, whole):
                for parameter in parameters:
                    group["params"] = [parameter]
                    self._move(parameter, parameter.device)
                    super().step()
                    self._move(parameter, torch.device("cpu"))
                group["params"] = []
        finally:
            for group, parameters in zip(self.param_groups, whole):
                group["params"] = parameters

    def _move(self, parameter: nn.Parameter, device: torch.device) -> None:
        state = self.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                state[name] = state[name].to(device)


def adamw(parameters: Iterable[Tensor], learning_rate: float, *, offload: bool, **settings: Any) -> torch.optim.AdamW:
    """AdamW over `parameters`; offload: its moments stay in the CPU's memory. settings: betas, eps, weight_decay."""
    return (OffloadedAdamW if offload else torch.optim.AdamW)(parameters, lr=learning_rate, **settings)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
