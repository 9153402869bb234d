"""A data source, a reward and an advantage of your own. From the folder that this file is in, whose conf/ has their
options:

alignkit rlhf --config-dir conf data=sums reward=nearness advantage=above_median 'trusted=[own_parts]'
"""

from dataclasses import dataclass

import torch

from alignkit import AdvantageEstimator, Advantages, Corpus, DataSource, Demonstration, RewardSource


@dataclass(frozen=True)
class Sums(DataSource):
    """Small sums with their answers: `largest` is the largest number in them."""

    largest: int

    def load(self, seed):
        numbers = range(1, self.largest + 1)
        return Corpus.from_rows([Demonstration(f"{a} and {b} make", f" {a + b}") for a in numbers for b in numbers])


@dataclass(frozen=True)
class Nearness(RewardSource):
    """A point less than nothing for each character beyond `length`, or short of it."""

    length: int

    def score(self, answers, microbatch):
        return torch.tensor([-abs(len(text) - self.length) for text in answers.responses], dtype=torch.float32)


@dataclass(frozen=True)
class AboveMedian(AdvantageEstimator):
    """Each response's reward less the median of the batch; no value model."""

    def __call__(self, reward, values, mask, samples):
        total = torch.where(reward.mask, reward.per_token, 0.0).sum(dim=1)
        return Advantages.of_responses(total - total.median(), mask)
