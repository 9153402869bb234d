"""Generalised advantage estimation over responses of different lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from alignkit.schema import Fraction, settings

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.algo.types import Advantages


@settings
class GAE:
    """gamma: discount per token; lam: how far credit reaches (0: one step, 1: the whole response);
    whiten: scale the advantages to mean 0 and variance 1 over all response tokens of the iteration, all ranks."""

    gamma: Fraction
    lam: Fraction
    whiten: bool

    def __call__(
        self, rewards: Tensor, values: Tensor, mask: Tensor, *, gather: Callable[[Tensor], Tensor] | None = None
    ) -> Advantages:
        """Advantages and returns. Shapes: all [B, R]; gather as in `masked.whiten` (None: one process)."""
        from alignkit.algo.masked import whiten
        from alignkit.algo.types import Advantages

        advantages, returns = gae(rewards, values, mask, gamma=self.gamma, lam=self.lam)
        if self.whiten:
            advantages = whiten(advantages, mask, **({} if gather is None else {"gather": gather}))
        return Advantages(advantages=advantages, returns=returns)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns by generalised advantage estimation.

        delta_t = r_t + gamma * V_{t+1} - V_t,    V after the last response token = 0
        A_t = delta_t + gamma * lam * A_{t+1};    returns_t = A_t + V_t  (before any whitening)

    Shapes:  rewards, values, mask [B, R] -> two [B, R], 0 on padding. mask is bool, True on a prefix of each row.
    Units:   reward-model units.
    A response cut off at R tokens is treated as ended there: no value is bootstrapped, as its score is already known.
    Source:  Schulman et al. 2016, arXiv:1506.02438, eq. 16.
    """
    import torch

    from alignkit.algo.types import require_bool, same_shape

    same_shape(rewards=rewards, values=values, mask=mask)
    require_bool(mask=mask)
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    carried = torch.zeros_like(values[:, 0])
    following = torch.zeros_like(carried)  # V_{t+1}; values are 0 on padding, so it is 0 after the last token
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        carried = torch.where(mask[:, t], delta + gamma * lam * carried, 0.0)
        following = values[:, t]
        advantages[:, t] = carried
    return advantages, advantages + values
