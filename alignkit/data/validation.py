"""A share of the training pairs kept apart, by which training is steered."""

from alignkit.data.corpus import Pair, Prompt, split_fraction


def validation_split(pairs: list[Pair], share: float, labelled: bool) -> tuple[list[Pair], list[Pair]]:
    """Training pairs and validation pairs, `share` of the prompts by hash. The held-out split stays untouched: a figure
    that training was steered by says nothing about what it has not seen.

    The hash is one of its own, as that of the held-out split has chosen these prompts already. labelled: the pairs are
    made of labelled texts, any good one with any bad one; then texts are kept apart, and paired anew on either side.
    """
    if not labelled:
        aside = [_position(pair.prompt or pair.ranking or pair.chosen) < share for pair in pairs]
        return _chosen(pairs, aside, False), _chosen(pairs, aside, True)
    texts = {text for pair in pairs for text in (pair.chosen, pair.rejected)}
    kept = {text for text in texts if _position(text) < share}
    training = [pair for pair in pairs if kept.isdisjoint((pair.chosen, pair.rejected))]
    mixed = [pair for pair in pairs if len(kept & {pair.chosen, pair.rejected}) == 1]
    good, bad = ([getattr(pair, side) for pair in mixed] for side in ("chosen", "rejected"))
    training += [Pair("", *two) for two in zip(_outside(good, kept), _outside(bad, kept))]
    preferred, refused = (dict.fromkeys(getattr(pair, side) for pair in pairs) for side in ("chosen", "rejected"))
    validation = zip((text for text in preferred if text in kept), (text for text in refused if text in kept))
    return training, [Pair("", *two) for two in validation]


def _position(prompt: Prompt) -> float:
    return split_fraction(f"validation: {split_fraction(prompt)}")


def _chosen(pairs: list[Pair], aside: list[bool], wanted: bool) -> list[Pair]:
    return [pair for pair, here in zip(pairs, aside) if here == wanted]


def _outside(texts: list[str], kept: set[str]) -> list[str]:
    return [text for text in texts if text not in kept]
