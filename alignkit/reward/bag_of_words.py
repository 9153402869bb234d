"""A judge of another family than the models it judges: logistic regression on which words occur in a text."""

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.algo.statistics import contrast_accuracy

MIN_COUNT = 2  # a word seen in fewer texts tells nothing
PENALTY = 0.1  # L2 weight on all words together, per text; chosen once, for the sentence-polarity texts


@dataclass(frozen=True)
class BagOfWords:
    """weights of words and of pairs of neighbouring words; `offset` puts zero at the median of held-out texts;
    `accuracy`: share of held-out (positive, negative) pairs in order."""

    vocabulary: dict[str, int]
    weights: Tensor
    offset: float
    accuracy: float

    def scores(self, texts: list[str]) -> Tensor:
        """Log-odds of being positive, less the held-out median. [n] float64."""
        return features(texts, self.vocabulary).mv(self.weights) - self.offset


def fit_bag_of_words(texts: list[tuple[str, int]], heldout: tuple[list[str], list[str]] | None) -> BagOfWords:
    """Fit on labelled texts (1 positive, 0 negative) by L-BFGS with an L2 penalty; centre on held-out texts."""
    counts = Counter(word for text, _ in texts for word in set(words(text)))
    vocabulary = {word: i for i, word in enumerate(sorted(w for w, n in counts.items() if n >= MIN_COUNT))}
    table = features([text for text, _ in texts], vocabulary)
    labels = torch.tensor([float(label) for _, label in texts], dtype=torch.float64)
    weights = torch.zeros(len(vocabulary), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        fit = torch.nn.functional.binary_cross_entropy_with_logits(table.mv(weights), labels, reduction="sum")
        loss = (fit + PENALTY * weights.square().sum()) / len(labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    bag = BagOfWords(vocabulary, weights.detach(), 0.0, float("nan"))
    if heldout is None:
        return bag
    positive, negative = (bag.scores(side) for side in heldout)
    share, _, _ = contrast_accuracy(positive, negative)
    return BagOfWords(vocabulary, bag.weights, float(torch.cat([positive, negative]).median()), share)


def words(text: str) -> list[str]:
    """Lower-case words, and each pair of neighbours."""
    single = re.findall(r"[^\W_]+(?:'[a-z]+)?", text.lower())
    return single + [f"{a} {b}" for a, b in zip(single, single[1:])]


def features(texts: list[str], vocabulary: dict[str, int]) -> Tensor:
    """Which words occur, each text scaled to length 1: a sparse [texts, words] float64 table."""
    rows, columns, values = [], [], []
    for row, text in enumerate(texts):
        found = sorted({vocabulary[word] for word in words(text) if word in vocabulary})
        rows += [row] * len(found)
        columns += found
        values += [max(len(found), 1) ** -0.5] * len(found)
    indices = torch.tensor([rows, columns], dtype=torch.long)
    entries = torch.tensor(values, dtype=torch.float64)
    return torch.sparse_coo_tensor(indices, entries, (len(texts), len(vocabulary)), check_invariants=True)
