"""How sure each training label is: the margins of reward models that have not seen it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alignkit.algo.statistics import ranking_auc
from alignkit.data.corpus import Pair
from alignkit.data.strength import half_of, key_of, proposal
from alignkit.data.tokens import Encoder, show
from alignkit.errors import UserError
from alignkit.models.loading import load_encoder, model_folder, read_manifest
from alignkit.models.scalar import load_scalar
from alignkit.observe.tracking import write_rows
from alignkit.stages.actors import score_all
from alignkit.stages.common import prepare

if TYPE_CHECKING:
    from alignkit.observe.tracking import Tracker
    from alignkit.runtime.checkpoint import Checkpoints
    from alignkit.runtime.sharding import Cluster
    from alignkit.stages.job import Job

SHOWN = 20  # strongest disagreements that are written out for a person


def run(job: Job, cluster: Cluster, tracker: Tracker, checkpoints: Checkpoints) -> dict[str, float]:
    """Write `strength.jsonl`, a row for each training pair, the most doubtful first: mean and std over the models that
    have not seen it of its margin (chosen score less rejected), and the mean of sigmoid(margin / temperature), the
    probability that its label is right; and `disagreements.txt`, the first twenty for a person."""
    corpus, config = prepare(job, cluster.is_main), job.config
    checkpoints.newest()
    pairs, members = corpus.train.pairs, len([name for name in job.inputs if name.startswith("member")])
    margins = torch.full((members, len(pairs)), math.nan, dtype=torch.float64)
    rights = margins.clone()
    for number in range(1, members + 1):
        folder = job.inputs[f"member_{number}"]
        unseen = sorted(set(range(len(pairs))) - set(half_of(pairs, number, config.seed)))
        found = margins_of([pairs[i] for i in unseen], folder, job, cluster)
        margins[number - 1, unseen] = found
        rights[number - 1, unseen] = torch.sigmoid(found / read_manifest(folder)["metrics"]["temperature"])
        if cluster.is_main:
            print(f"strength: reward model {number} of {members} has scored {len(unseen)} pairs that it has not seen")
    rows = rows_of(pairs, margins, rights)
    if not rows:
        longest = config.reward_model.max_length
        raise UserError(f"none of {len(pairs)} training pairs is within reward_model.max_length={longest} tokens")
    counts = Counter(row["proposal"] for row in rows)
    if cluster.is_main:
        write_rows(job.out / "strength.jsonl", rows)
        text = "\n\n".join(readable(number, row) for number, row in enumerate(rows[:SHOWN], start=1))
        (job.out / "disagreements.txt").write_text(text + "\n", encoding="utf-8")
        proposed = ", ".join(f"{name} {counts[name]}" for name in ("keep", "smooth", "flip"))
        print(f"strength: of {len(rows)} labels {proposed}")
        print(f"strength: the {min(SHOWN, len(rows))} strongest disagreements are in its disagreements.txt")
        print("strength: another run makes use of it with data.denoise=FOLDER, that of this stage")
    tracker.samples(rows[:SHOWN], step=len(rows))
    result = {f"{name}_share": counts[name] / len(rows) for name in ("keep", "smooth", "flip")}
    result |= {"pairs": len(rows), "members": members, "margin_mean": sum(row["mean"] for row in rows) / len(rows)}
    if corpus.gold is not None:  # the label is known to be right or wrong, so doubt can be measured
        wrong = [corpus.gold(r["prompt"], r["chosen"]) < corpus.gold(r["prompt"], r["rejected"]) for r in rows]
        result["wrong_labels"] = sum(wrong) / len(wrong)
        if 0 < sum(wrong) < len(wrong):
            result["auc"] = ranking_auc([-row["right"] for row in rows], wrong)
    return result


def margins_of(pairs: list[Pair], folder: Path, job: Job, cluster: Cluster) -> Tensor:
    """Chosen score less rejected by one reward model, [n] float64; NaN for a pair that is too long for it."""
    encoder: Encoder = load_encoder(model_folder(folder))
    settings, pad = job.config.reward_model, encoder.tokenizer.pad_token_id
    scorer = cluster.place(lambda: load_scalar(model_folder(folder), encoder), trainable=False)
    sides = [encoder.pair(pair) for pair in pairs]
    fits = [i for i, two in enumerate(sides) if max(map(len, two)) <= settings.max_length]
    result = torch.full((len(pairs),), math.nan, dtype=torch.float64)
    if not fits:
        return result
    chosen, rejected = (
        score_all(scorer, [sides[i][side] for i in fits], pad, 4 * settings.microbatch, cluster) for side in (0, 1)
    )
    result[fits] = (chosen - rejected).double()
    return result


def rows_of(pairs: list[Pair], margins: Tensor, rights: Tensor) -> list[dict[str, Any]]:
    """One row a pair that any model has scored, the least believable label first. margins, rights [models, pairs], NaN
    where a model has not scored a pair."""
    rows = []
    for pair, margin, right in zip(pairs, margins.T, rights.T):
        known = margin[~margin.isnan()]
        if len(known):
            believed = float(right[~right.isnan()].mean())
            row: dict[str, Any] = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            row |= {"mean": float(known.mean()), "std": float(known.std(correction=0)), "right": believed}
            rows.append({"key": key_of(pair), **row, "proposal": proposal(believed)})
    return sorted(rows, key=lambda row: row["right"])


def readable(number: int, row: dict[str, Any]) -> str:
    """A disagreement as a person reads it."""
    return (
        f"{number}. the label is right with probability {row['right']:.2f} (margin {row['mean']:.2f}, "
        f"standard deviation {row['std']:.2f})\n  prompt:   {show(row['prompt'])}\n  chosen:   {row['chosen']}\n"
        f"  rejected: {row['rejected']}"
    )
