"""Who decides which of two responses is better. Any reward source can (the higher score wins); here are the judges that
the data brings along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from alignkit.errors import UserError
from alignkit.schema import settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from alignkit.data.corpus import Corpus, Prompt


@settings
class FromData:
    """by: gold: the score by which synthetic data was made; bag_of_words: a logistic regression on labelled texts that
    were kept apart (data.judge); reward_model: the very reward that PPO climbs; auto: the first of these that there
    is."""

    by: Literal["auto", "gold", "bag_of_words", "reward_model"]

    def kind(self, corpus: Corpus) -> str:
        """`by`, with auto decided. Raises UserError if the data has no such judge."""
        if self.by == "gold" and corpus.gold is None:
            raise UserError("judge=gold: this data has no gold score; choose bag_of_words, reward_model, model or http")
        if self.by == "bag_of_words" and not corpus.judge:
            raise UserError("judge=bag_of_words: needs labelled texts (text+label) and data.judge above 0")
        best = "gold" if corpus.gold else "bag_of_words" if corpus.judge else "reward_model"
        return best if self.by == "auto" else self.by

    def open(self, corpus: Corpus) -> TextJudge | None:
        """Ready to score texts; None where the reward itself is to judge. Raises as `kind` does."""
        kind = self.kind(corpus)
        if kind == "gold":
            return TextJudge(kind, _by_gold(corpus))
        return TextJudge(kind, _by_bag_of_words(corpus)) if kind == "bag_of_words" else None


@dataclass(frozen=True)
class TextJudge:
    """name; score: (prompts, responses) -> [n] float64, higher is better."""

    name: str
    score: Callable[[list[Prompt], list[str]], Tensor]


def _by_gold(corpus: Corpus) -> Callable[[list[Prompt], list[str]], Tensor]:
    import torch

    gold = corpus.gold
    assert gold is not None
    return lambda prompts, texts: torch.tensor([gold(p, t) for p, t in zip(prompts, texts)]).double()


def _by_bag_of_words(corpus: Corpus) -> Callable[[list[Prompt], list[str]], Tensor]:
    from alignkit.data.tokens import show
    from alignkit.reward.bag_of_words import fit_bag_of_words

    bag = fit_bag_of_words(corpus.judge, corpus.heldout.contrast)
    print(f"judge: a bag of words on {len(corpus.judge)} texts, accuracy {bag.accuracy:.3f} held out")
    return lambda prompts, texts: bag.scores([f"{show(p)} {t}" for p, t in zip(prompts, texts)])
