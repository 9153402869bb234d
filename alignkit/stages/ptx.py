"""PPO-ptx: the language-model loss on the user's own text, mixed into every policy step.

    L = L_PPO + coef * (- sum_t log p(text_t)) / (number of ptx tokens of the step, over all ranks)

It keeps the policy fluent while it chases reward.
Source: Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155, eq. 2 (there a mean over texts of sums over their tokens).
Tests:  test_ppo_update.py::test_ptx_adds_its_coefficient_times_the_mean_negative_log_likelihood
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from alignkit.algo.batching import pad_right, prompt_indices
from alignkit.algo.losses import negative_log_likelihood
from alignkit.algo.sampling import SamplingRule
from alignkit.data.corpus import Demonstration
from alignkit.data.files import read_demonstrations
from alignkit.data.tokens import Encoder
from alignkit.errors import UserError
from alignkit.models.policy import logprobs_at
from alignkit.observe.metrics import Mean, Metrics
from alignkit.stages.actors import Actors
from alignkit.stages.settings import PtxSettings


@dataclass
class PtxBatches:
    """Endless shuffled passes over the rows."""

    rows: list[tuple[list[int], int]]
    batch: int
    seed: int

    @classmethod
    def open(cls, rows: list[Demonstration], encoder: Encoder, settings: PtxSettings, seed: int) -> PtxBatches:
        """Rows of settings.path, or else the given ones, as ids with the length of their prompt, cut at max_length;
        none if the loss is off."""
        if settings.coef == 0:
            return cls([], settings.batch, seed)
        rows = read_demonstrations(settings.path, "ptx.path") if settings.path else rows
        encoded = []
        for row in rows:
            prompt = encoder.prompt(row.prompt)
            ids = (prompt + encoder.response(row.prompt, row.response))[: settings.max_length]
            if len(ids) > max(len(prompt), 1):
                encoded.append((ids, max(len(prompt), 1)))
        if not encoded:
            raise UserError("ptx.coef is above 0 but there are no demonstrations to mix in; set ptx.coef=0")
        return cls(encoded, settings.batch, seed)

    def take(self, position: int) -> list[tuple[list[int], int]]:
        """The `batch` rows after the first `position`, the same on every rank."""
        chosen = prompt_indices(position, self.batch, len(self.rows), self.seed + 1)
        return [self.rows[i] for i in chosen.tolist()]


def ptx_backward(actors: Actors, batches: PtxBatches, settings: PtxSettings, budget: int, metrics: Metrics) -> None:
    """Add the gradient of coef * mean negative log-likelihood of the next rows, divided by their number of tokens over
    all ranks. budget: tokens at once."""
    if settings.coef == 0:
        return
    rows, cluster = batches.take(actors.state.ptx_rows), actors.cluster
    actors.state.ptx_rows += len(rows)
    tokens = sum(len(ids) - start for ids, start in rows)
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    hand, plain = cluster.deal(lengths), SamplingRule(temperature=1.0, stop_ids=())
    for micro in cluster.microbatches(lengths[hand.rows], budget):
        picked, here = [rows[i] for i in hand.rows[micro].tolist()], hand.real[micro]
        ids, mask = (x.to(cluster.device) for x in pad_right([ids for ids, _ in picked], 0))
        starts = torch.tensor([start for _, start in picked])
        learnt = mask & ((torch.arange(ids.shape[1]) >= starts[:, None]) & here[:, None]).to(cluster.device)
        (logprobs,) = logprobs_at(actors.policy, ids, mask, learnt, plain)
        loss = negative_log_likelihood(logprobs, torch.ones_like(logprobs, dtype=torch.bool))
        (settings.coef * loss.total / tokens).backward()
        metrics.add("ptx_loss", Mean(loss.total.detach(), loss.count))
