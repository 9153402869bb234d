"""A backbone with one number at every position: the reward model and the value model."""

from pathlib import Path

import torch
from torch import Tensor, nn

from alignkit.algo.sequence import last_token_index, position_ids
from alignkit.data.tokens import Encoder
from alignkit.errors import UserError
from alignkit.models.loading import disable_dropout, load_encoder, load_scorer, scalar_head
from alignkit.models.tokenizer import same_tokens


class ScalarModel(nn.Module):
    """scalar[b, t] = score(backbone(tokens)[b, t]) + bias, for every position.

    Wraps a Hugging Face sequence classifier, whose own forward reads the last position alone. `bias` is learnt by a
    value model; a reward model leaves it at 0. The wrapper is the unit that sharding takes as root, so that its
    forward runs all of the network's hooks.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        self.bias = nn.Parameter(torch.zeros(()).unsqueeze(0))
        self._no_split_modules = classifier._no_split_modules
        self.config = classifier.config

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens [B, T] int64, mask [B, T] bool -> [B, T]; positions under a False mask hold no meaning."""
        hidden = self.classifier.base_model(
            input_ids=tokens, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False
        ).last_hidden_state
        return scalar_head(self.classifier)(hidden).squeeze(-1) + self.bias

    def absorb_affine(self, mean: float, std: float) -> None:
        """Make the output (scalar - mean) / std, so that a value model copied from a reward model starts in the units
        of the normalised reward that PPO pays."""
        head = scalar_head(self.classifier)
        with torch.no_grad():
            head.weight.div_(std)
            if head.bias is not None:
                head.bias.div_(std)
            self.bias.sub_(mean).div_(std)


def load_scalar(folder: Path, encoder: Encoder) -> ScalarModel:
    """The reward model in `folder`, dropout off. Raises UserError unless it has the tokens of `encoder`."""
    other = load_encoder(folder)
    if not same_tokens(other.tokenizer, encoder.tokenizer):
        raise UserError(
            f"the tokenizers of policy ({len(encoder.tokenizer)} tokens) and reward model ({len(other.tokenizer)} "
            "tokens) differ: ids cannot pass from one to the other; train the reward model from the same SFT model"
        )
    classifier = load_scorer(folder)
    disable_dropout(classifier)
    return ScalarModel(classifier)


def score_sequences(model: ScalarModel, tokens: Tensor, mask: Tensor, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """One score a sequence: the scalar at its last real token, as (scalar - mean) / std.

    Shapes: tokens [B, T], mask [B, T] bool, padding on either side -> [B]. The one read-out of reward models, in their
    evaluation as in PPO (the last real token of a finished response is its stop token, as PAD differs from EOS).
    """
    scalars = model(tokens, mask)
    last = scalars.gather(1, last_token_index(mask)[:, None]).squeeze(1)
    return (last - mean) / std
