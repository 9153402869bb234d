"""Preflight of the data: of the right kind for the recipe, enough of it, and nothing on both sides of the split."""

from collections.abc import Iterator

from alignkit.data.corpus import Corpus, Prompt, Split
from alignkit.runtime.config import RunConfig
from alignkit.runtime.findings import Finding, error, fact, warning
from alignkit.runtime.rules import TRAINS

FEW = 100  # held-out rows from which a share is known to within a tenth either way (95%)
LACKING = {
    "demonstrations": "no demonstrations: SFT needs prompt+response rows, texts or chosen responses",
    "pairs": "no preference pairs; a reward model needs prompt+chosen+rejected rows or labelled texts",
    "prompts": "no prompts: PPO needs rows with a prompt, or text+label rows, whose first words are one",
}
FIGURES = {"demonstrations": "the held-out loss", "pairs": "the reward model's accuracy", "prompts": "the win rate"}


def check_data(recipe: str, config: RunConfig, corpus: Corpus, reward_model: bool) -> list[Finding]:
    """What is wrong with the data for this recipe, and how much of it there is. reward_model: whether one is made."""
    ppo = "ppo" in TRAINS[recipe]
    needs = {"demonstrations": "sft" in TRAINS[recipe], "pairs": reward_model, "prompts": ppo or recipe == "evaluate"}
    leaks, counts = [*_leaks(corpus)], []
    found = [*leaks]
    for name in [name for name, needed in needs.items() if needed]:
        train, heldout = (getattr(split, name) for split in (corpus.train, corpus.heldout))
        least = min(map(len, corpus.heldout.contrast or [heldout])) if name == "pairs" else len(heldout)
        counts.append(f"{len(train):,} {name} and {len(heldout):,} held out")
        if not train:
            found.append(error("data", LACKING[name]))
        elif least < FEW and name != "demonstrations":  # a loss is known well from few of these
            width = f"only to +-{0.98 / least**0.5:.2f} (95%)" if least else "not at all"
            why = f"{FIGURES[name]} will be known {width}"
            found.append(warning("data.heldout", f"{least} held-out {name}", why, "raise it or give more data"))
    asked, there = config.ppo.batch // config.ppo.samples_per_prompt, len(corpus.train.prompts)
    if ppo and 0 < there < asked:
        why = f"an iteration takes {asked} (ppo.batch / ppo.samples_per_prompt)"
        found.append(error("data", f"{there} training prompts", why, "lower ppo.batch or give more data"))
    if any(finding.level == "error" for finding in found):
        return found
    sound = [] if leaks else ["no prompt on both sides"]
    return [*found, fact("data", ", ".join([*counts, *sound]))]


def _leaks(corpus: Corpus) -> Iterator[Finding]:
    """What is on both sides of the split, as it stands and but for capitals and white space."""
    train, heldout = _texts(corpus.train), _texts(corpus.heldout)
    loosely = {(kind, _plain(text)) for kind, text in train}
    same = [item for item in heldout if item in train]
    near = [(kind, text) for kind, text in heldout if (kind, text) not in train and (kind, _plain(text)) in loosely]
    why = "held-out figures would be those of what was learnt by heart"
    if same:
        yield error("data", f"{_shown(same)} on both sides of the split", why, "mend the source that splits them")
    if near:
        what = f"{_shown(near)} on both sides of the split but for capitals and white space"
        yield warning("data", what, why, "write each in one way, or leave the doubles out")


def _texts(split: Split) -> dict[tuple[str, str], None]:
    """What must not be on both sides: the prompts; of rows without one the texts."""
    rows = [(row.prompt, row.response) for row in split.demonstrations]
    rows += [(pair.prompt, text) for pair in split.pairs for text in (pair.chosen, pair.rejected)]
    prompts = [*split.prompts, *(prompt for prompt, _ in rows if prompt)]
    texts = [("text", text) for prompt, text in rows if not prompt]
    return dict.fromkeys([*(("prompt", _as_text(prompt)) for prompt in prompts), *texts])


def _as_text(prompt: Prompt) -> str:
    """As the split sees it: a single user turn counts as its text."""
    if isinstance(prompt, str) or (len(prompt) == 1 and prompt[0]["role"] == "user"):
        return prompt if isinstance(prompt, str) else prompt[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _shown(items: list[tuple[str, str]]) -> str:
    kind, text = items[0]
    first = f"{text[:47]}..." if len(text) > 50 else text
    return f"{len(items):,} {kind}{'s' * (len(items) > 1)} ({' '.join(first.split())!r})"
