"""A reward model with other tokens or another chat template than the policy's: it reads the texts, rendered its own
way, never foreign token ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignkit.algo.batching import pad_right
from alignkit.data.corpus import Prompt
from alignkit.data.tokens import Encoder
from alignkit.errors import UserError
from alignkit.models.loading import make_encoder
from alignkit.models.pooled import is_pooled, pooled_encoder
from alignkit.models.scalar import PooledScalar, ScalarModel, score_sequences
from alignkit.models.tokenizer import load_tokenizer, same_tokens
from alignkit.reward.source import Answers, RewardSource

if TYPE_CHECKING:
    from alignkit.runtime.sharding import Cluster


@dataclass(frozen=True)
class RenderedSource(RewardSource):
    """A (sharded) scalar model with its own encoder. It gives no value model: that has to read the policy's ids."""

    model: ScalarModel | PooledScalar
    mean: float
    std: float
    encoder: Encoder
    cluster: Cluster
    collective = True

    def score(self, answers: Answers, microbatch: int) -> Tensor:
        """See `RewardSource.score`. Raises UserError, on every rank alike, for a text that it cannot render or that is
        longer than it has positions."""
        rows, fault = [], ""
        try:
            finished = answers.rollout.finished.tolist()
            rows = [render(self.encoder, *row) for row in zip(answers.prompts, answers.responses, finished)]
            require_positions(self.model, max(map(len, rows)))
        except UserError as error:
            fault = str(error)
        if self.cluster.any(bool(fault)):
            raise UserError(next(filter(None, self.cluster.gather_objects(fault))))
        micros = self.cluster.microbatches(torch.tensor([len(row) for row in rows]), microbatch)
        return (score_ids(self.model, rows, self.encoder, micros, self.cluster.device) - self.mean) / self.std


def render(encoder: Encoder, prompt: Prompt, response: str, finished: bool) -> list[int]:
    """Ids of prompt and response; one that did not come to its end has no end token, which in an encoder model says
    nothing but where the text ends."""
    ids = encoder.response(prompt, response)
    return encoder.prompt(prompt) + (ids if finished or encoder.pooled else ids[:-1]) or [encoder.end_id]


def require_positions(model: ScalarModel | PooledScalar, tokens: int) -> None:
    """Raise UserError if a rendered sequence is longer than the reward model can be."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise UserError(
            f"a prompt with its response takes {tokens} tokens of the reward model, which has {positions} positions: "
            "lower ppo.max_prompt or rollout.max_response"
        )


def score_ids(
    model: ScalarModel | PooledScalar, rows: list[list[int]], encoder: Encoder, micros: list[Tensor],
    device: torch.device,
) -> Tensor:  # fmt: skip
    """One score for each row of ids, [n] in float32 or better. micros: the rows of each micro-batch."""
    pad, scores = encoder.tokenizer.pad_token_id, []
    for micro in micros:
        tokens, mask = pad_right([rows[i] for i in micro.tolist()], encoder.end_id if pad is None else pad)
        scores.append(score_sequences(model, tokens.to(device), mask.to(device)))
    joined = torch.cat(scores)[torch.cat(micros).argsort().to(device)]
    return joined.to(torch.promote_types(joined.dtype, torch.float32))


def own_encoder(folder: Path) -> Encoder:
    """The encoder of a reward model's folder; it needs no PAD, as rows are read by their mask. Raises UserError."""
    tokenizer = load_tokenizer(folder)
    encoder = pooled_encoder(tokenizer, folder) if is_pooled(folder) else make_encoder(tokenizer, None)
    if encoder.end_id is None:
        raise UserError(f"the tokenizer of '{folder}' has no EOS token: set `eos_token` in its tokenizer_config.json")
    return encoder


def same_rendering(a: Encoder, b: Encoder) -> bool:
    """Whether two encoders turn every prompt and response into the same ids."""
    return (
        same_tokens(a.tokenizer, b.tokenizer)
        and a.tokenizer.chat_template == b.tokenizer.chat_template
        and a.end_id == b.end_id
        and a.prompt("a b") == b.prompt("a b")
    )
