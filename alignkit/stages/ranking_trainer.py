"""TRL's RewardTrainer on rankings: what it lacks of a batch and of its loss, and nothing else.

A row of its data set, an element of a batch, is a ranking: token ids of K >= 2 responses to a prompt, each of which
goes through the model once, and the pairs among them. A plain pair is a ranking of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl import RewardTrainer

from alignkit.algo.batching import pad_right
from alignkit.algo.losses import Centring, centring, mean_by_ranking, preference_loss
from alignkit.data.corpus import Pair
from alignkit.data.rankings import by_ranking
from alignkit.data.tokens import Encoder


def encode_rankings(
    pairs: list[Pair], encoder: Encoder, max_length: int, smoothing: float
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The trainer's rows, and how many pairs were left out for which reason. smoothing: of pairs without their own.

    responses: token ids; chosen_ids, rejected_ids: the two responses of each pair, by number (where a data set has
    columns of these names, TRL takes it as prepared); margin, smoothing: one a pair.
    """
    rows, dropped = [], {"too long": 0, "the same tokens": 0}
    for group in by_ranking(pairs):
        prompt = encoder.prompt(group[0].prompt)
        texts = dict.fromkeys(text for pair in group for text in (pair.chosen, pair.rejected))
        ids = {text: prompt + encoder.response(group[0].prompt, text) for text in texts}
        used: dict[str, int] = {}
        kept: dict[str, list[Any]] = {"chosen_ids": [], "rejected_ids": [], "margin": [], "smoothing": []}
        for pair in group:
            chosen, rejected = ids[pair.chosen], ids[pair.rejected]
            if max(len(chosen), len(rejected)) > max_length:
                dropped["too long"] += 1
            elif chosen == rejected:
                dropped["the same tokens"] += 1
            else:
                kept["chosen_ids"].append(used.setdefault(pair.chosen, len(used)))
                kept["rejected_ids"].append(used.setdefault(pair.rejected, len(used)))
                kept["margin"].append(pair.margin)
                kept["smoothing"].append(pair.smoothing or smoothing)
        if used:
            rows.append({"responses": [ids[text] for text in used], **kept})
    return rows, dropped


def lay_out_rankings(rows: list[dict[str, Any]]) -> tuple[list[list[int]], dict[str, Tensor]]:
    """The responses [N] of all rows: first ones of all rankings, then second ones, and so on (pairs as TRL has them).
    And owner [N]: the ranking of each response; chosen, rejected [B]: the responses of each pair."""
    most = max(len(row["responses"]) for row in rows)
    places = [(n, k) for k in range(most) for n, row in enumerate(rows) if k < len(row["responses"])]
    number = {place: index for index, place in enumerate(places)}
    index = {"owner": torch.tensor([n for n, _ in places])}
    for side in ("chosen", "rejected"):
        index[side] = torch.tensor([number[n, k] for n, row in enumerate(rows) for k in row[f"{side}_ids"]])
    return [rows[n]["responses"][k] for n, k in places], index


@dataclass(frozen=True)
class RankingCollator:
    """Rows of `encode_rankings` as one batch."""

    pad_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """input_ids, attention_mask [N, T]; owner, chosen, rejected; margin [B], and smoothing [B] if any is not 0."""
        responses, index = lay_out_rankings(rows)
        tokens, mask = pad_right(responses, self.pad_id)
        margin, smoothing = (torch.tensor([x for row in rows for x in row[key]]) for key in ("margin", "smoothing"))
        batch = {"input_ids": tokens, "attention_mask": mask.long(), **index, "margin": margin}
        return batch | {"smoothing": smoothing} if bool(smoothing.any()) else batch


class RankingTrainer(RewardTrainer):
    """The loss of a ranking is the mean over its pairs, that of a batch the mean over its rankings, so that neither the
    micro-batch nor the number of ranks decides what a pair weighs."""

    def __init__(self, *, pad_id: int, center_form: Centring, **named: Any) -> None:
        super().__init__(data_collator=RankingCollator(pad_id), **named)
        self.center_form = center_form

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Bradley-Terry with margins and smoothing, and centring; without them, on pairs, TRL's own loss."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        scores, owner = outputs.logits.squeeze(-1), inputs["owner"]
        chosen, rejected, ranking = scores[inputs["chosen"]], scores[inputs["rejected"]], owner[inputs["chosen"]]
        summed = mean_by_ranking(preference_loss(chosen, rejected, inputs["margin"], inputs.get("smoothing")), ranking)
        args: Any = self.args  # RewardConfig, which Trainer does not know
        loss, coef = summed.total / summed.count, args.center_rewards_coefficient
        if coef is not None:
            centre = mean_by_ranking(centring(chosen, rejected, self.center_form), ranking)
            loss = loss + coef * (centre.total / centre.count)
        self._note(inputs["attention_mask"], scores.detach(), owner, (chosen - rejected).detach(), ranking)
        return (loss, outputs) if return_outputs else loss

    def _note(self, mask: Tensor, scores: Tensor, owner: Tensor, difference: Tensor, ranking: Tensor) -> None:
        """TRL's metrics, of all ranks; means over rankings, as the loss."""
        right = (difference > 0).to(difference)
        means = [mean_by_ranking(*x) for x in ((scores, owner), (right, ranking), (difference, ranking))]
        here = [scores.min(), scores.max(), mask.sum(), *(mean.total / mean.count for mean in means)]
        ranks = self.accelerator.gather(torch.stack([value.double() for value in here])).reshape(-1, len(here))
        mode = "train" if self.model and self.model.training else "eval"
        if mode == "train":
            self._total_train_tokens += int(ranks[:, 2].sum())
        noted = self._metrics[mode]
        noted["num_tokens"] = [self._total_train_tokens]
        noted["min_reward"].append(ranks[:, 0].min().item())
        noted["max_reward"].append(ranks[:, 1].max().item())
        for name, column in (("mean_reward", 3), ("accuracy", 4), ("margin", 5)):
            noted[name].append(ranks[:, column].mean().item())
