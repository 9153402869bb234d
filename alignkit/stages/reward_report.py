"""What is known of a reward model: its order of pairs that it has not seen, what its margins are worth, what else it
likes, and the scale of its score. Figures go into the manifest, all else into report.json and report.html."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignkit.algo import calibration
from alignkit.algo.calibration import Estimate, rightness, share_interval
from alignkit.algo.statistics import contrast_accuracy
from alignkit.data.corpus import Corpus
from alignkit.data.tokens import Encoder
from alignkit.errors import NotFinite, UserError
from alignkit.models.scalar import Scalars
from alignkit.observe.plot import histogram_series
from alignkit.observe.reward_page import reward_page
from alignkit.observe.tracking import without_nonfinite, write_report
from alignkit.reward.bag_of_words import fit_bag_of_words
from alignkit.reward.gate import verdict
from alignkit.stages.actors import score_all
from alignkit.stages.common import sample_of
from alignkit.stages.heldout import Heldout, score_heldout
from alignkit.stages.reward_samples import Samples, score_samples
from alignkit.stages.reward_warnings import warnings_of

if TYPE_CHECKING:
    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.job import Job

POINTS = 400  # of each kind, in the picture of score against length


def measure(scorer: Scalars, corpus: Corpus, encoder: Encoder, job: Job, cluster: Cluster) -> dict[str, float]:
    """The figures of the manifest; report.json and report.html are written beside `model/`. Collective."""
    settings, seed = job.config.reward_model, job.config.seed

    def scores(rows: list[list[int]]) -> Tensor:
        return score_all(scorer, rows, encoder.tokenizer.pad_token_id, 4 * settings.microbatch, cluster)

    heldout = score_heldout(corpus.heldout, encoder, settings.max_length, scores, seed)
    reference = reference_scores(corpus, encoder, job, scores)
    longest = int(heldout.lengths.max())
    samples = score_samples(corpus.heldout.prompts, longest, scores, encoder, job, cluster)
    metrics = {
        **accuracy_metrics(heldout),
        "eval_accuracy_bag_of_words": bag_of_words_accuracy(corpus, seed),
        "score_mean": float(reference.mean()),
        "score_std": max(float(reference.std(correction=0)), 1e-6),
    }
    report = full_report(heldout, samples, metrics, seed)
    if cluster.is_main:
        write_report(job.out / "report.json", report)
        (job.out / "report.html").write_text(reward_page(report), encoding="utf-8")
        for warning in report["warnings"]:
            print(f"reward_model: warning: {warning}")
    return {**metrics, **flat(report)}


def reference_scores(corpus: Corpus, encoder: Encoder, job: Job, scores: Callable[[list[list[int]]], Tensor]) -> Tensor:
    """Scores of training demonstrations, by whose mean and deviation PPO normalises."""
    settings = job.config.reward_model
    references = sample_of(corpus.train.demonstrations, settings.reference_responses, job.config.seed)
    rows = [encoder.prompt(row.prompt) + encoder.response(row.prompt, row.response) for row in references]
    rows = [row for row in rows if len(row) <= settings.max_length]  # a cut one has lost the token that is read
    if len(rows) < 2:
        raise UserError(
            f"reward_model.max_length={settings.max_length}: fewer than two of {len(references)} reference responses "
            "are that short, so the score cannot be normalised; raise it"
        )
    reference = scores(rows)
    if not bool(torch.isfinite(reference).all()):
        raise NotFinite("the reward model gives scores that are not finite: lower reward_model.learning_rate")
    return reference


def accuracy_metrics(heldout: Heldout) -> dict[str, float]:
    """Share of held-out pairs in the right order (of labelled texts: over all pairs of a positive and a negative) with
    its interval, and the loss and margin of the pairs."""
    return {
        "eval_accuracy": heldout.accuracy.value,
        "eval_accuracy_low": heldout.accuracy.low,
        "eval_accuracy_high": heldout.accuracy.high,
        "eval_pairs": heldout.accuracy.count,
        "eval_dropped_pairs": sum(heldout.dropped.values()),
        "eval_loss": float(torch.nn.functional.softplus(-heldout.delta).mean()),
        "eval_margin": float(heldout.delta.mean()),
    }


def full_report(heldout: Heldout, samples: Samples | None, metrics: dict[str, float], seed: int) -> dict[str, Any]:
    """Everything that report.json holds, as plain values; what cannot be told is None."""
    delta, clusters = heldout.delta, heldout.clusters
    temperature = calibration.fit_temperature(delta)
    curve, after = calibration.reliability(delta, clusters), None
    halved = calibration.cross_fitted(delta, calibration.halves(clusters))
    if halved is not None:
        scaled, rows = halved
        after = calibration.reliability(scaled, tuple(groups[rows] for groups in clusters))
    passes, why = verdict(metrics)
    report = {
        "accuracy": heldout.accuracy,
        "interval": heldout.interval,
        "accuracy_bag_of_words": metrics["eval_accuracy_bag_of_words"],
        "gate": {"passes": passes, "why": why},
        "temperature": temperature,
        "ece": calibration.calibration_error(curve),
        "ece_after_temperature": calibration.calibration_error(after) if after else None,
        "overconfidence": calibration.mean_interval(delta.abs().sigmoid() - rightness(delta), clusters),
        "reliability": curve,
        "reliability_after_temperature": after,
        "length": {
            **calibration.length_bias(delta, heldout.longer_by, clusters),
            "pearson": calibration.pearson(heldout.responses, heldout.lengths),
            "spearman": calibration.spearman(heldout.responses, heldout.lengths),
        },
        "subsets": subset_accuracies(heldout),
        "scores": score_facts(heldout, samples, metrics),
        "histogram": histogram_series(groups_of_scores(heldout, samples)),
        "points": points(heldout, samples, seed),
    }
    report = plain(report)
    return {**report, "warnings": warnings_of(report)}


def subset_accuracies(heldout: Heldout) -> dict[str, Estimate]:
    """Accuracy in each subset that the data names."""
    right, names = rightness(heldout.delta), sorted({name for name in heldout.subsets if name})
    rows = {name: torch.tensor([subset == name for subset in heldout.subsets]) for name in names}
    return {
        name: share_interval(right[rows[name]], tuple(groups[rows[name]] for groups in heldout.clusters))
        for name in names
    }


def groups_of_scores(heldout: Heldout, samples: Samples | None) -> dict[str, list[float]]:
    """The scores that the histogram compares."""
    groups = {"chosen": heldout.chosen.tolist(), "rejected": heldout.rejected.tolist()}
    return groups | ({"SFT samples": samples.scores.tolist()} if samples else {})


def score_facts(heldout: Heldout, samples: Samples | None, metrics: dict[str, float]) -> dict[str, dict[str, float]]:
    """Mean and deviation of each group of scores."""
    facts = {
        name: {"count": len(group), "mean": statistics.fmean(group), "std": statistics.pstdev(group)}
        for name, group in groups_of_scores(heldout, samples).items()
    }
    facts["reference responses"] = {"mean": metrics["score_mean"], "std": metrics["score_std"]}
    if samples:
        facts["SFT samples"] |= {"finished": samples.finished, "length": float(samples.lengths.double().mean())}
    return facts


def points(heldout: Heldout, samples: Samples | None, seed: int) -> dict[str, list[list[float]]]:
    """[tokens, score] of some responses."""
    held = sample_of(list(zip(heldout.lengths.tolist(), heldout.responses.tolist())), POINTS, seed)
    drawn = {"held-out responses": held}
    if samples:
        drawn["SFT samples"] = sample_of(list(zip(samples.lengths.tolist(), samples.scores.tolist())), POINTS, seed)
    return drawn


def flat(report: dict[str, Any]) -> dict[str, float]:
    """The figures that runs are compared by; one that cannot be told is left out."""
    length, samples = report["length"], report["scores"].get("SFT samples", {})
    figures = {
        "temperature": report["temperature"]["value"],
        "ece": report["ece"],
        "ece_after_temperature": report["ece_after_temperature"],
        "accuracy_shorter_better": length["shorter_better"]["value"],
        "accuracy_longer_better": length["longer_better"]["value"],
        "length_correlation": length["spearman"],
        "sft_samples_mean": samples.get("mean"),
        "sft_samples_std": samples.get("std"),
        **{f"accuracy_subset/{name}": subset["value"] for name, subset in report["subsets"].items()},
        "warnings": len(report["warnings"]),
    }
    return {name: value for name, value in figures.items() if value is not None}


def plain(value: Any) -> Any:
    """Dataclasses as dicts, tuples as lists, and None for what is not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return without_nonfinite(value)


def bag_of_words_accuracy(corpus: Corpus, seed: int) -> float:
    """What a bag of words, which knows no order and no prompt, reaches on the same held-out pairs: the yardstick."""
    pairs = sample_of(corpus.train.pairs, 5000, seed)
    texts = [(text, label) for pair in pairs for text, label in ((pair.chosen, 1), (pair.rejected, 0))]
    bag = fit_bag_of_words(texts, None)
    heldout = corpus.heldout
    if heldout.contrast:
        return contrast_accuracy(*(bag.scores(side) for side in heldout.contrast))[0]
    chosen, rejected = (bag.scores([getattr(pair, side) for pair in heldout.pairs]) for side in ("chosen", "rejected"))
    return float((chosen > rejected).double().mean() + 0.5 * (chosen == rejected).double().mean())
