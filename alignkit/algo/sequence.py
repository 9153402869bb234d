"""Where a response ends, which logits belong to which token, and the log-probabilities of tokens."""

import torch
from torch import Tensor

from alignkit.algo.types import require_bool, same_shape


def response_mask(response: Tensor, stop_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mask of the sampled tokens up to and including the first stop token, and whether there was one.

    Shapes: response [B, R] int64, stop_ids [S] -> mask [B, R] bool, finished [B] bool.
    """
    is_stop = torch.isin(response, stop_ids)
    stops_before = is_stop.long().cumsum(dim=1) - is_stop.long()
    return stops_before == 0, is_stop.any(dim=1)


def last_token_index(mask: Tensor) -> Tensor:
    """Index of the last True of each row. mask [B, T] bool -> [B] int64. Raises ValueError on a row without one."""
    require_bool(mask=mask)
    if not bool(mask.any(dim=1).all()):
        raise ValueError("a row of the mask has no True: an empty sequence has no last token")
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, positions, -1).max(dim=1).values


def position_ids(mask: Tensor) -> Tensor:
    """Positions that count real tokens only, so that left padding moves nothing. mask [B, T] -> [B, T] int64."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values [n] of the n True places of a mask, row by row, where they belong; 0 elsewhere. mask [B, T] -> [B, T]."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token], in float32 or better. logits [B, R, V], tokens [B, R] -> [B, R] nats.

    Source: the definition, as logits[token] - logsumexp(logits).
    Tests:  test_sequence.py::test_log_probabilities_equal_numpy_and_survive_large_logits,
            test_against_numpy.py::test_entropies_and_log_probabilities
    """
    same_shape(tokens=tokens, positions=logits[..., 0])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of each position's distribution, - sum_v p_v log p_v. logits [B, R, V] -> [B, R] nats.

    A token that cannot be sampled (logit -inf) contributes nothing.
    Source: Shannon 1948.
    Tests:  test_sequence.py::test_entropy_of_known_distributions,
            test_sequence.py::test_the_gradient_of_entropy_is_the_slope_of_the_numpy_reference
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logp = logits.log_softmax(dim=-1)
    return -(logp.exp() * logp.masked_fill(logp.isneginf(), 0.0)).sum(dim=-1)  # masked first, or its gradient is NaN
