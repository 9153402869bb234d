"""The default task: short chats about everyday things, made from a seed, with a known gold score.

A prompt asks about a topic; a response is put together from an opening, facts, filler and a closing. Each response
has a mood, and moods set how often it is polite, rude, off the topic, rambling, repetitive or broken off. All kinds
occur among the demonstrations, so that supervised fine-tuning ends up mediocre and PPO has somewhere to go.

Why a reward model can be over-optimised here, and the gold score shows it:
- Polite openings come with on-topic content (the same mood brings both), so politeness is credited beyond its worth.
- No response holds more than two polite markers, so nothing in the data says that a third one earns nothing.
- No response holds a broken word or three times the same phrase in a row, so what they cost must be extrapolated.
- Training labels are wrong with probability `label_noise`, and there are few of them.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from alignkit.data.corpus import Corpus, Demonstration, Pair, Prompt, Split, split_fraction
from alignkit.data.strength import Treatment
from alignkit.data.synthetic_words import (
    CLOSINGS,
    FACTS,
    FILLERS,
    FRAMES,
    OPENINGS,
    POLITE_MARKERS,
    PRONOUN,
    RUDE_MARKERS,
    STOP_WORDS,
)
from alignkit.errors import UserError
from alignkit.schema import Count, Proportion, settings

MAX_PROMPTS = len(FRAMES) * len(FACTS)
MIN_GAP = 0.4  # a pair whose gold scores are closer than this (in standard deviations) is drawn again


@settings
class Synthetic:
    """The task's settings (`conf/data/synthetic.yaml`). Counts are of both sides of the split together."""

    num_prompts: Count
    num_pairs: Count
    num_demonstrations: Count
    label_noise: Annotated[float, Field(ge=0, lt=0.5)]
    heldout: Proportion
    denoise: str | None
    denoise_by: Treatment

    def __post_init__(self) -> None:
        if self.num_prompts > MAX_PROMPTS:
            raise ValueError(f"num_prompts is {self.num_prompts}, but the task has only {MAX_PROMPTS} prompts")

    def fingerprint(self) -> str:
        """Names the generator's version: raised by hand whenever the same settings and seed give other texts."""
        return "synthetic-v1"

    def load(self, seed: int) -> Corpus:
        """The whole corpus. Each kind of row has its own stream of random numbers, so that for instance a sweep over
        `label_noise` changes labels and nothing else."""
        prompts = draw_prompts(self.num_prompts, random.Random(f"{seed}-prompts"))
        demonstrations = draw_demonstrations(prompts, self.num_demonstrations, random.Random(f"{seed}-demonstrations"))
        pairs = draw_pairs(prompts, self.num_pairs, random.Random(f"{seed}-pairs"))

        train, heldout = (
            Split(
                demonstrations=[row for row in demonstrations if self._held_out(row.prompt) == side],
                pairs=[row for row in pairs if self._held_out(row.prompt) == side],
                prompts=[prompt for prompt in prompts if self._held_out(prompt) == side],
            )
            for side in (False, True)
        )
        if not train.prompts or not heldout.prompts:
            raise UserError(
                f"data: {len(train.prompts)} prompts to train on and {len(heldout.prompts)} held out, expected some of "
                f"both; raise data.num_prompts ({self.num_prompts}) or change data.heldout ({self.heldout})"
            )
        num_flipped = flip_labels(train.pairs, self.label_noise, random.Random(f"{seed}-labels"))
        return Corpus(train, heldout, gold=gold, notes=_notes(train, heldout, num_flipped))

    def _held_out(self, prompt: Prompt) -> bool:
        return split_fraction(prompt) < self.heldout


def draw_prompts(num: int, rng: random.Random) -> list[Prompt]:
    """Distinct chats of one user turn, in random order."""
    texts = [frame.format(topic) for topic in FACTS for frame in FRAMES]
    return [[{"role": "user", "content": text}] for text in rng.sample(texts, num)]


def draw_demonstrations(prompts: Sequence[Prompt], num: int, rng: random.Random) -> list[Demonstration]:
    """Responses of every mood, spread evenly over the prompts."""
    rows = (prompts[i % len(prompts)] for i in range(num))
    return [Demonstration(prompt, compose(topic_of(prompt), rng)) for prompt in rows]


def draw_pairs(prompts: Sequence[Prompt], num: int, rng: random.Random) -> list[Pair]:
    """Two independent responses a prompt, the one with the higher gold score chosen, without label noise.

    Near ties (less than `MIN_GAP` standard deviations apart) are drawn again: nobody could learn from them, and they
    would cap the accuracy that a perfect reward model can reach.
    """
    pairs = []
    for i in range(num):
        prompt = prompts[i % len(prompts)]
        scored: list[tuple[float, str]] = []
        while not scored or scored[1][0] - scored[0][0] < MIN_GAP:
            responses = [compose(topic_of(prompt), rng) for _ in range(2)]
            scored = sorted((gold(prompt, response), response) for response in responses)
        pairs.append(Pair(prompt, chosen=scored[1][1], rejected=scored[0][1]))
    return pairs


def flip_labels(pairs: list[Pair], probability: float, rng: random.Random) -> int:
    """Turns each pair round, in place, with the given probability. Returns how many. A higher probability flips the
    same pairs and more."""
    flipped = [i for i in range(len(pairs)) if rng.random() < probability]
    for i in flipped:
        pairs[i] = Pair(pairs[i].prompt, chosen=pairs[i].rejected, rejected=pairs[i].chosen)
    return len(flipped)


def _notes(train: Split, heldout: Split, num_flipped: int) -> list[str]:
    def sizes(split: Split) -> str:
        return f"{len(split.prompts)} prompts, {len(split.demonstrations)} demonstrations, {len(split.pairs)} pairs"

    return [
        "synthetic task: short chats about everyday things; preferences follow a known gold score",
        f"train: {sizes(train)}, of which {num_flipped} labels are flipped",
        f"held out: {sizes(heldout)}, no label flipped",
    ]


@dataclass(frozen=True)
class Mood:
    """How a response is written: a weight among the moods, and the probability of each trait."""

    weight: float
    polite: float  # of the opening, and again of the closing
    rude: float  # likewise
    on_topic: float  # the facts are about what was asked
    ramble: float  # one or two sentences of filler follow
    repeat: float  # a sentence comes once more (where none of that filler follows)
    cut: float  # the last words are missing


MOODS = (
    Mood(weight=0.3, polite=0.7, rude=0.0, on_topic=0.95, ramble=0.1, repeat=0.15, cut=0.05),
    Mood(weight=0.4, polite=0.3, rude=0.1, on_topic=0.7, ramble=0.2, repeat=0.25, cut=0.1),
    Mood(weight=0.3, polite=0.1, rude=0.5, on_topic=0.5, ramble=0.4, repeat=0.4, cut=0.15),
)


def compose(topic: str | None, rng: random.Random) -> str:
    """One response to a question about the topic, in a random mood."""
    mood = rng.choices(MOODS, [mood.weight for mood in MOODS])[0]
    opening = rng.choice(OPENINGS[_tone(mood, rng)])
    closing = rng.choice(CLOSINGS[_tone(mood, rng)])

    sentences = _content(topic, mood, rng)
    if rng.random() < mood.ramble:
        sentences += [filler + "." for filler in rng.sample(FILLERS, rng.randint(1, 2))]
    elif rng.random() < mood.repeat:
        at = rng.randrange(len(sentences))
        sentences.insert(rng.randint(at, len(sentences)), sentences[at])
    sentences[0] = opening + sentences[0]
    if closing:
        sentences.append(closing)

    text = " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
    if rng.random() < mood.cut:
        text = text.rsplit(" ", rng.randint(1, 2))[0].rstrip(".,!?")
    return text


def _tone(mood: Mood, rng: random.Random) -> str:
    return rng.choices(("polite", "rude", "neutral"), (mood.polite, mood.rude, 1 - mood.polite - mood.rude))[0]


def _content(topic: str | None, mood: Mood, rng: random.Random) -> list[str]:
    """One to three facts about the topic, or one or two about another topic, or filler."""
    if topic is not None and rng.random() < mood.on_topic:
        subject, num = topic, rng.choice((1, 1, 2, 2, 3))
    elif rng.random() < 0.5:
        subject, num = rng.choice([name for name in FACTS if name != topic]), rng.randint(1, 2)
    else:
        return [filler + "." for filler in rng.sample(FILLERS, rng.randint(1, 2))]
    first, *others = rng.sample(FACTS[subject], num)
    return [f"{subject} {first}.", *(f"{PRONOUN[subject]} {fact}." for fact in others)]


def _split_words(text: str) -> list[str]:
    """Lower-case words without the punctuation mark that may follow each. Anything unusual (two marks in a row, a
    lone mark, a missing space) stays in and counts as an unknown word."""
    return [word[:-1] if word[-1] in ".,!?" else word for word in text.lower().split()]


def _words_of(groups: Iterable[Iterable[str]]) -> set[str]:
    return {word for texts in groups for text in texts for word in _split_words(text)}


_AROUND = _words_of([*OPENINGS.values(), *CLOSINGS.values(), FILLERS])
VOCABULARY = _words_of([FACTS, PRONOUN.values(), *FACTS.values()]) | _AROUND
# What shows that a text is about the topic: "day" does not, for "have a nice day" goes with every topic.
FACT_WORDS = {topic: _words_of([facts]) - STOP_WORDS - _AROUND - {topic} for topic, facts in FACTS.items()}


def topic_of(prompt: Prompt) -> str | None:
    """The topic that the last turn asks about; None for a prompt that is not of this task."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"] if prompt else ""
    return next((word for word in _split_words(text) if word in FACTS), None)


def topic_part(topic: str | None, words: Sequence[str]) -> float:
    """0 to 1: 0.4 for the topic's name and 0.2 for each word of its facts, up to three of them."""
    if topic is None:
        return 0.0
    return 0.4 * (topic in words) + 0.2 * min(len(FACT_WORDS[topic].intersection(words)), 3)


def marker_part(markers: Sequence[str], words: Sequence[str]) -> float:
    """0 to 1: one marker gives 0.5, two different ones 1, and more of them no more."""
    text = f" {' '.join(words)} "
    return 0.5 * min(sum(f" {marker} " in text for marker in markers), 2)


def brief_part(words: Sequence[str]) -> float:
    """1 for 5 to 20 words, less for fewer, falling by 1 for each 10 words more; not below -2."""
    return min(len(words) / 5, 1.0, max(1 - (len(words) - 20) / 10, -2.0))


def repetition_part(words: Sequence[str]) -> float:
    """0 to 1: the share of pairs of neighbouring words that occurred before."""
    bigrams = list(zip(words, words[1:]))
    return 1 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def unknown_part(words: Sequence[str]) -> float:
    """0 to 1: the share of words that the task does not know, such as half words."""
    return sum(word not in VOCABULARY for word in words) / max(len(words), 1)


WEIGHTS = {"topic": 1.5, "polite": 1.5, "rude": -1.5, "brief": 1.0, "repetition": -3.0, "ends": 0.5, "unknown": -3.0}
GOLD_MEAN = 2.44  # of the weighted sum over demonstrations, measured on 100,000 of them
GOLD_STD = 1.33


def gold_parts(prompt: Prompt, response: str) -> dict[str, float]:
    """What the gold score is made of, before weights: for reports that show where a policy gains and loses."""
    words = _split_words(response)
    return {
        "topic": topic_part(topic_of(prompt), words),
        "polite": marker_part(POLITE_MARKERS, words),
        "rude": marker_part(RUDE_MARKERS, words),
        "brief": brief_part(words),
        "repetition": repetition_part(words),
        "ends": float(response.rstrip().endswith((".", "!", "?"))),
        "unknown": unknown_part(words),
    }


def gold(prompt: Prompt, response: str) -> float:
    """The true score of any text: the sum of `WEIGHTS` times `gold_parts`, moved and scaled so that demonstrations
    have mean 0 and standard deviation 1."""
    parts = gold_parts(prompt, response)
    return (sum(weight * parts[name] for name, weight in WEIGHTS.items()) - GOLD_MEAN) / GOLD_STD
