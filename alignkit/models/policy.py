"""Log-probabilities of sampled tokens under a causal language model."""

from torch import Tensor, nn

from alignkit.algo.sampling import SamplingRule
from alignkit.algo.sequence import position_ids, token_entropy, token_logprobs


def response_logprobs(
    model: nn.Module, tokens: Tensor, mask: Tensor, num_response: int, rule: SamplingRule, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the last `num_response` tokens, and the entropy at their positions if asked for.

    Shapes: tokens, mask [B, T] -> [B, num_response] each; nats, under the distribution that was sampled from.
    Logits are computed at response positions only.
    """
    logits = model(
        input_ids=tokens,
        attention_mask=mask.long(),
        position_ids=position_ids(mask),
        use_cache=False,
        logits_to_keep=num_response + 1,
    ).logits[:, :-1]
    logits = rule.apply(logits, start=0)
    logprobs = token_logprobs(logits, tokens[:, -num_response:])
    return logprobs, token_entropy(logits) if entropy else None
