"""The report of a reward model: what is planted is found, what is sound is left in peace, and the files are whole."""

import json
import math
import random
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from alignkit.algo.calibration import rightness, share_interval
from alignkit.data.corpus import Corpus, Demonstration, Pair, Split
from alignkit.errors import TrainingError, UserError
from alignkit.stages import reward_samples
from alignkit.stages.heldout import Heldout, groups_of, score_heldout
from alignkit.stages.job import Job
from alignkit.stages.reward_report import full_report, measure

WORDS = [
    *("harbour", "quiet", "before", "storm", "west", "wrote", "three", "letters", "sent", "none", "small", "burned"),
    *("window", "street", "stones", "beach"),
]


class ByLength(nn.Module):
    """A reward with a planted length bias: the score is the number of tokens."""

    def forward(self, tokens, mask):
        return mask.cumsum(dim=1).float()


class ByWord(nn.Module):
    """A sound one: a word that the better response has more often than not, and a little noise from the tokens."""

    def __init__(self, good: int) -> None:
        super().__init__()
        self.good = good

    def forward(self, tokens, mask):
        noise = torch.sin(tokens.double() * 12.9898).cumsum(dim=1) * 0.05
        return (2.0 * (tokens == self.good).cumsum(dim=1) + noise).float()


def rows(count: int, seed: int = 0) -> list[Pair]:
    """Pairs whose better response has the word "lamp" in seven of eight cases; length is drawn apart from that."""
    drawn, pairs = random.Random(seed), []
    for i in range(count):
        texts = [" ".join(drawn.choices(WORDS, k=drawn.randint(2, 12))).replace("lamp", "stone") for _ in range(2)]
        better, worse = (f"{text} lamp" if lucky else text for text, lucky in zip(texts, (i % 8 > 0, i % 8 == 0)))
        pairs.append(Pair(f"why {i}?", better, worse, subset=("short", "long")[i % 2]))
    return pairs


def corpus(count: int = 240) -> Corpus:
    pairs = rows(count + 40)
    demonstrations = [Demonstration(pair.prompt, pair.chosen) for pair in pairs]
    sides = [
        Split(demonstrations[cut], pairs[cut], [pair.prompt for pair in pairs[cut]])
        for cut in (slice(count, None), slice(count))
    ]
    return Corpus(*sides)


@pytest.fixture(scope="module")
def base(tiny_policy, tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    tiny_policy("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def measured(scorer, base, encoder, cluster, out, count: int = 240, samples: int = 6) -> tuple[dict, dict]:
    settings = SimpleNamespace(max_length=90, microbatch=16, reference_responses=32, sft_samples=samples)
    config = SimpleNamespace(seed=0, reward_model=settings)
    metrics = measure(scorer, corpus(count), encoder, Job("reward_model", config, {"init": base}, out, True), cluster)
    return metrics, json.loads((out / "report.json").read_text("utf-8"), parse_constant=pytest.fail)


def test_a_planted_length_bias_is_caught(base, encoder, cluster, tmp_path, capsys):
    metrics, report = measured(ByLength(), base, encoder, cluster, tmp_path)
    (warning,) = [text for text in report["warnings"] if "prefers the longer response" in text]
    assert "in 100% of pairs" in warning and "shaping.length_penalty" in warning
    assert metrics["accuracy_longer_better"] == 1.0 and metrics["accuracy_shorter_better"] == 0.0
    assert metrics["length_correlation"] > 0.95
    assert metrics["warnings"] == len(report["warnings"])
    assert f"reward_model: warning: {warning}" in capsys.readouterr().out
    html = (tmp_path / "report.html").read_text("utf-8")
    ElementTree.fromstring(html.partition("\n")[2])
    assert "prefers the longer response in 100% of pairs" in html and html.count("<svg") == 4


def test_a_sound_scorer_is_not_warned_of(base, encoder, cluster, tmp_path):
    good = encoder.response("", " x lamp")[-2]
    metrics, report = measured(ByWord(good), base, encoder, cluster, tmp_path)
    assert report["warnings"] == [] and metrics["warnings"] == 0
    assert metrics["eval_accuracy_low"] > 0.8 and report["gate"]["passes"]
    assert {"temperature", "ece", "ece_after_temperature", "score_mean", "score_std", "eval_loss"} <= metrics.keys()
    assert metrics["accuracy_subset/long"] == pytest.approx(1.0, abs=0.05) != metrics["accuracy_subset/short"]
    assert "Nothing to warn of" in (tmp_path / "report.html").read_text("utf-8")


def test_responses_of_the_sft_model_are_sampled_and_scored(base, encoder, cluster, tmp_path):
    metrics, report = measured(ByLength(), base, encoder, cluster, tmp_path)
    facts = report["scores"]["SFT samples"]
    assert facts["count"] == 6 and metrics["sft_samples_mean"] == facts["mean"]
    assert len(report["points"]["SFT samples"]) == 6
    again, _ = measured(ByLength(), base, encoder, cluster, tmp_path)
    assert again == metrics
    without, report = measured(ByLength(), base, encoder, cluster, tmp_path, samples=0)
    assert "sft_samples_mean" not in without and "SFT samples" not in report["scores"]


def test_only_a_language_model_is_sampled_from(base, tmp_path):
    assert reward_samples.is_causal(base) and not reward_samples.is_causal(tmp_path)
    for name, causal in (("GPT2LMHeadModel", True), ("BertModel", False), ("LlamaForSequenceClassification", False)):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
        assert reward_samples.is_causal(tmp_path) == causal
    (tmp_path / "adapter_config.json").write_text('{"task_type": "CAUSAL_LM", "base_model_name_or_path": "x"}')
    assert reward_samples.is_causal(tmp_path)


# -------------------------------------------------------------------------------------------------- by chance, or not


def made(delta: list[float], longer_by: list[int], subsets: list[str] | None = None) -> dict:
    """A report on margins that are given, with 0 for the rejected response."""
    scores, clusters = torch.tensor(delta, dtype=torch.float64), (torch.arange(len(delta)),)
    heldout = Heldout(
        chosen=scores, rejected=torch.zeros_like(scores), longer_by=torch.tensor(longer_by), clusters=clusters,
        subsets=subsets or [""] * len(delta), responses=scores, lengths=torch.tensor(longer_by) + 50,
        accuracy=share_interval(rightness(scores), clusters), dropped={},
    )  # fmt: skip
    share = heldout.accuracy
    metrics = {
        "eval_accuracy": share.value, "eval_accuracy_low": share.low, "eval_accuracy_high": share.high,
        "eval_pairs": share.count, "eval_accuracy_bag_of_words": 0.5, "score_mean": 0.0, "score_std": 1.0,
    }  # fmt: skip
    return full_report(heldout, None, metrics, 0)


def noisy(seed: int, count: int, longer: float, per_token: float = 0.0) -> dict:
    """Calibrated margins, of which people prefer the longer response in a share `longer`, and the score goes up by
    `per_token` for each token besides."""
    drawn = random.Random(seed)
    delta, longer_by = [], []
    for _ in range(count):
        size = drawn.uniform(0, 3)
        right = drawn.random() < 1 / (1 + math.exp(-size))
        length = drawn.randint(1, 20) * (1 if drawn.random() < longer else -1)
        delta.append((size if right else -size) + per_token * length)
        longer_by.append(length)
    return made(delta, longer_by, [("a", "b", "c")[i % 3] for i in range(count)])


@pytest.mark.parametrize("longer", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("count", [150, 900])
def test_noise_alone_gives_no_warning_whatever_people_prefer(count, longer):
    assert [text for seed in range(40) for text in noisy(seed, count, longer)["warnings"]] == []


@pytest.mark.parametrize(("per_token", "word"), [(0.25, "longer"), (-0.25, "shorter")])
def test_a_bias_beside_a_sound_judgement_is_found(per_token, word):
    found = [noisy(seed, 900, 0.5, per_token)["warnings"] for seed in range(10)]
    assert all(sum(f"prefers the {word} response" in text for text in texts) == 1 for texts in found)


def test_claims_beyond_knowledge_are_told_with_what_mends_them():
    drawn = random.Random(0)
    delta = [4.0 if drawn.random() < 0.7 else -4.0 for _ in range(400)]
    report = made(delta, [1, -1] * 200)
    (warning,) = report["warnings"]
    right = sum(d > 0 for d in delta) / 400
    temperature = 4 / math.log(right / (1 - right))
    assert report["temperature"]["value"] == pytest.approx(temperature)
    assert f"divides them by {temperature:.3g}" in warning and "reward.normalise=temperature" in warning
    assert report["ece"] == pytest.approx(1 / (1 + math.exp(-4)) - right, abs=1e-9) and report["ece"] > 0.25
    assert report["ece_after_temperature"] < 0.08


def test_a_subset_at_chance_is_named_and_a_small_one_is_not():
    right = [1.0, 0.8, -0.5, 0.9] * 100
    coin = [0.5, -0.5] * 50
    found = made(right + coin, [1, -1] * 250, ["good"] * 400 + ["coin"] * 100)
    (warning,) = [text for text in found["warnings"] if "subset" in text]
    assert warning.startswith("subset 'coin': its accuracy of 0.500")
    few = made(right + coin[:8], [1, -1] * 204, ["good"] * 400 + ["coin"] * 8)
    assert not [text for text in few["warnings"] if "subset" in text]


def test_a_coin_flip_and_too_few_pairs_are_told():
    coin = made([0.5, -0.5] * 100, [1, -1, -1, 1] * 50)
    assert coin["gate"]["passes"] is False
    told = " ".join(coin["warnings"])
    assert "not above chance" in told and "bag of words does as well" in told and "no temperature mends it" in told
    few = made([0.5, 0.5, -0.5] * 20, [1, -1] * 30)
    assert few["gate"]["passes"] is True and "only 60 held-out pairs" in few["warnings"][0]
    perfect = made([0.5, 1.0] * 100, [1, -1, -1, 1] * 50)
    assert ["every held-out pair is in order" in text for text in perfect["warnings"]] == [True]


# ----------------------------------------------------------------------------------------------------- held-out pairs


def lengths_of(rows):
    return torch.tensor([float(len(row)) for row in rows])


def test_each_response_is_scored_once(encoder):
    seen = []

    def scores(rows):
        seen.extend(map(tuple, rows))
        return lengths_of(rows)

    pairs = [Pair("p", a, b, ranking="r") for a, b in (("x lamp", "y"), ("x lamp", "z stone"), ("y", "z stone"))]
    heldout = score_heldout(Split([], pairs, []), encoder, 60, scores, seed=0)
    assert len(seen) == len(set(seen)) == 3 == len(heldout.responses)
    texts = [len(encoder.response("p", text)) for text in ("x lamp", "y", "z stone")]
    assert heldout.lengths.tolist() == texts
    assert heldout.longer_by.tolist() == [texts[0] - texts[1], texts[0] - texts[2], texts[1] - texts[2]]
    assert heldout.interval.startswith("by prompts") and heldout.accuracy.low == 0.0  # one prompt says little


def test_pairs_of_a_prompt_or_ranking_hang_together():
    pairs = [
        Pair("a", "1", "2"), Pair("b", "1", "2"), Pair("a", "3", "4", ranking="r"), Pair("", "1", "2"),
        Pair("", "3", "4"), Pair("", "1", "2", ranking="r"), Pair("", "2", "3", ranking="r"),
    ]  # fmt: skip
    assert groups_of(pairs).tolist() == [0, 1, 0, 2, 3, 4, 4]


def test_labelled_texts_are_drawn_up_to_a_cap_with_intervals_by_text(encoder, monkeypatch):
    drawn = random.Random(1)
    sides = tuple([" ".join(drawn.choices(WORDS, k=drawn.randint(1, 9))) for _ in range(n)] for n in (30, 20))
    split = Split([], [], [], contrast=sides)
    whole = score_heldout(split, encoder, 60, lengths_of, seed=0)
    assert len(whole.delta) == whole.accuracy.count == 600 and whole.interval.startswith("by texts")
    assert rightness(whole.delta).mean() == pytest.approx(whole.accuracy.value)
    monkeypatch.setattr("alignkit.stages.heldout.MOST_PAIRS", 200)
    part, again, other = (score_heldout(split, encoder, 60, lengths_of, seed) for seed in (0, 0, 1))
    assert len(part.delta) == 200 and part.accuracy == whole.accuracy
    assert part.delta.equal(again.delta) and not part.delta.equal(other.delta)
    assert len({*zip(*(groups.tolist() for groups in part.clusters))}) == 200
    lengths = [[len(encoder.response("", text)) for text in side] for side in sides]
    i, j = part.clusters
    assert part.delta.tolist() == [lengths[0][a] - lengths[1][b] for a, b in zip(i.tolist(), j.tolist())]
    assert part.longer_by.tolist() == part.delta.tolist()


def test_scores_that_are_not_finite_stop_the_stage(encoder):
    def scores(rows):
        return torch.full((len(rows),), math.nan)

    with pytest.raises(TrainingError, match="not finite"):
        score_heldout(Split([], rows(3), []), encoder, 90, scores, seed=0)
    with pytest.raises(UserError, match="no held-out preference pairs"):
        score_heldout(Split([], [], [], contrast=(["lamp"], ["stone " * 99])), encoder, 20, lengths_of, seed=0)
