"""Advantages: what each response token gained over what was expected. With a value model (GAE), or against the other
responses to the same prompt (RLOO, GRPO), or neither (REINFORCE++).

Each is an `AdvantageEstimator`; `normalise` whitens and clips what it returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal

from alignkit.schema import Fraction, Positive, settings

if TYPE_CHECKING:
    from torch import Tensor

    from alignkit.algo.types import Advantages, ShapedReward

Whiten = Literal["none", "batch", "minibatch"]


class AdvantageEstimator(ABC):
    """What each response token gained: a frozen dataclass of settings that `_target_` names, with a call. A subclass
    has the values below unless it sets others, as class attributes or as settings of its own.

    uses_values: there is a value model, which learns `returns`; min_samples: responses that a prompt must have
    (ppo.samples_per_prompt); whiten, clip: what becomes of the advantages afterwards, see `normalise`.
    """

    uses_values: bool = False
    min_samples: int = 1
    whiten: Whiten = "batch"
    clip: float | None = None

    @abstractmethod
    def __call__(self, reward: ShapedReward, values: Tensor, mask: Tensor, samples: int) -> Advantages:
        """Advantages of an iteration's B responses, before whitening.

        reward.per_token [B, R]: reward units, KL penalty included, on the slots reward.mask [B, R]; values [B, R]: of
        the value model, 0 without one; mask [B, R] bool: response tokens; samples: rows in a row that answer one
        prompt. `Advantages.of_responses` makes the result of one number a response.
        """
        ...


@settings
class Normalised:
    """What all here have. whiten: to mean 0 and variance 1 over the response tokens of the iteration (batch) or of each
    optimizer step (minibatch), all ranks; clip: then cut to +-clip (null: not). See `normalise`."""

    whiten: Whiten
    clip: Positive | None


@settings
class GAE(Normalised):
    """gamma: discount per token; lam: how far credit reaches (0: one step, 1: the whole response)."""

    gamma: Fraction
    lam: Fraction

    uses_values = True
    min_samples = 1

    def __call__(self, reward: ShapedReward, values: Tensor, mask: Tensor, samples: int) -> Advantages:
        """See `gae`. values [B, R] on the slots of reward.mask; mask [B, R]: response tokens."""
        import torch

        from alignkit.algo.types import Advantages, same_shape

        same_shape(rewards=reward.per_token, values=values, mask=mask)
        advantages, returns = gae(reward.per_token, values, reward.mask, gamma=self.gamma, lam=self.lam)
        return Advantages(torch.where(mask, advantages, 0.0), returns)


@settings
class RLOO(Normalised):
    """Each response against the mean of the other responses to its prompt; no value model."""

    uses_values = False
    min_samples = 2

    def __call__(self, reward: ShapedReward, values: Tensor, mask: Tensor, samples: int) -> Advantages:
        """A_i = S_i - mean_{j != i} S_j on every token of response i; S: summed reward, KL penalty included.

        Rows i are `samples` responses to a prompt in a row.
        Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024 (RLOO),
                arXiv:2402.14740.
        Tests:  test_advantage.py::test_rloo_compares_with_the_mean_of_the_others,
                test_advantage.py::test_the_expected_policy_gradient_is_that_of_reward_less_kl
        """
        from alignkit.algo.types import Advantages

        groups = _groups(reward, mask, samples)
        return Advantages.of_responses((groups - groups.mean(dim=1, keepdim=True)) * (samples / (samples - 1)), mask)


@settings
class GRPO(Normalised):
    """Each response against the mean of all responses to its prompt; no value model. divide_by_std: also divide by
    their standard deviation, which changes what is optimised (easy and hard prompts weigh more)."""

    divide_by_std: bool

    uses_values = False
    min_samples = 2

    def __call__(self, reward: ShapedReward, values: Tensor, mask: Tensor, samples: int) -> Advantages:
        """A_i = (S_i - mean_j S_j) [/ (std_j S_j + 1e-4)] on every token of response i; the std divides by samples - 1.

        Source: Shao et al. 2024 (DeepSeekMath), arXiv:2402.03300, section 4.1.2; without the division: Liu et al. 2025
                (Dr. GRPO), arXiv:2503.20783.
        Tests:  test_advantage.py::test_grpo_compares_with_the_mean_of_all_and_may_divide_by_their_deviation,
                test_advantage.py::test_grpo_without_the_deviation_follows_the_same_gradient_scaled
        """
        from alignkit.algo.types import Advantages

        groups = _groups(reward, mask, samples)
        gained = groups - groups.mean(dim=1, keepdim=True)
        spread = groups.std(dim=1, keepdim=True) + 1e-4
        return Advantages.of_responses(gained / spread if self.divide_by_std else gained, mask)


@settings
class ReinforcePlusPlus(Normalised):
    """The reward still to come from each token, whitened over the batch; no value model. gamma:
    discount per token."""

    gamma: Fraction

    uses_values = False
    min_samples = 1

    def __call__(self, reward: ShapedReward, values: Tensor, mask: Tensor, samples: int) -> Advantages:
        """A_t = sum_{k >= t} gamma^(k - t) r_k, the KL penalty being part of each r_k.

        Source: Hu 2025 (REINFORCE++), arXiv:2501.03262 (there gamma = 1).
        Tests:  test_advantage.py::test_reinforce_plus_plus_sums_the_rewards_to_come,
                test_against_numpy.py::test_reinforce_plus_plus
        """
        import torch

        from alignkit.algo.types import Advantages, same_shape

        nothing = torch.zeros_like(reward.per_token)
        same_shape(per_token=reward.per_token, mask=mask)
        advantages, _ = gae(reward.per_token, nothing, reward.mask, gamma=self.gamma, lam=1.0)
        return Advantages(torch.where(mask, advantages, 0.0), nothing)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns by generalised advantage estimation.

        delta_t = r_t + gamma * V_{t+1} - V_t,    V after the last slot = 0
        A_t = delta_t + gamma * lam * A_{t+1};    returns_t = A_t + V_t  (before any whitening)

    Shapes:  rewards, values, mask [B, R] -> two [B, R], 0 on padding. mask is bool, True on a prefix of each row.
    Units:   reward-model units.
    A response cut off at R tokens is treated as ended there: no value is bootstrapped, as its score is already known.
    Source:  Schulman et al. 2016, arXiv:1506.02438, eq. 16.
    Tests:   test_advantage.py::test_gae_gives_the_published_numbers,
             test_advantage.py::test_ragged_responses_equal_the_definition_row_by_row
    """
    import torch

    from alignkit.algo.types import require_bool, same_shape

    same_shape(rewards=rewards, values=values, mask=mask)
    require_bool(mask=mask)
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    carried = torch.zeros_like(values[:, 0])
    following = torch.zeros_like(carried)  # V_{t+1}; values are 0 on padding, so it is 0 after the last slot
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        carried = torch.where(mask[:, t], delta + gamma * lam * carried, 0.0)
        following = values[:, t]
        advantages[:, t] = carried
    return advantages, advantages + values


def normalise(advantages: Tensor, mask: Tensor, whiten: Whiten, clip: float | None, *, over: Whiten) -> Tensor:
    """Whiten and clip advantages [B, R] where their turn has come: `over` says whether these rows are the whole batch
    of an iteration or one minibatch. Clipping follows whitening.

    Source: over a minibatch: Ziegler et al. 2019 code; over the batch: Huang et al. 2024 (N+), arXiv:2403.17031;
            clipping: Zheng et al. 2023, arXiv:2307.04964 (advantage normalization and clipping).
    Tests:  test_advantage.py::test_whitening_and_clipping_come_once_and_in_that_order,
            test_against_numpy.py::test_whitening_and_then_clipping
    """
    from alignkit.algo.masked import whiten as whitened

    if whiten == over:
        advantages = whitened(advantages, mask)
    due = whiten == over or (whiten == "none" and over == "batch")
    return advantages.clamp(-clip, clip) if clip is not None and due else advantages


def _groups(reward: ShapedReward, mask: Tensor, samples: int) -> Tensor:
    """Summed reward of each response, [prompts, samples]."""
    import torch

    from alignkit.algo.types import same_shape

    same_shape(rewards=reward.per_token, mask=mask)
    rows = len(reward.per_token)
    if rows % samples:
        raise ValueError(f"{rows} responses are not a whole number of prompts with {samples} responses each")
    return torch.where(reward.mask, reward.per_token, 0.0).sum(dim=1).view(-1, samples)
