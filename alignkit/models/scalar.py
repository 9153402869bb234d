"""A backbone with one number at every position: the reward model and the value model."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.algo.sequence import last_token_index, spread
from alignkit.data.tokens import Encoder
from alignkit.errors import UserError
from alignkit.models.adapters import adapters_off, add_adapter
from alignkit.models.loading import disable_dropout, load_encoder, load_scorer, scalar_head
from alignkit.models.policy import hidden_at
from alignkit.models.pooled import pools
from alignkit.models.settings import PeftSettings
from alignkit.models.tokenizer import same_tokens

if TYPE_CHECKING:
    from peft import PeftModel

Scalars = Callable[[Tensor, Tensor], Tensor]
"""(tokens, mask), [B, T] each -> a number at every position: one of the models below, or a reading of one."""


class ScalarModel(nn.Module):
    """scalar[b, t] = score(backbone(tokens)[b, t]) + bias, for every position.

    Wraps a Hugging Face sequence classifier, whose own forward reads the last position alone. `bias` is learnt by a
    value model; a reward model leaves it at 0. The wrapper is the unit that sharding takes as root, so that its
    forward runs all of the network's hooks.
    """

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        self.classifier = classifier
        self.bias = nn.Parameter(torch.zeros(()).unsqueeze(0))
        self._no_split_modules = classifier._no_split_modules
        self.config = classifier.config

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens [B, T] int64, mask [B, T] bool -> [B, T], 0 under a False mask."""
        return spread(self.head(self.hidden(tokens, mask)).squeeze(-1) + self.bias, mask)

    @property
    def head(self) -> nn.Linear:
        """The layer that turns hidden states into the scalar."""
        return scalar_head(self.classifier)

    def hidden(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Last hidden states [n, d] of the n real tokens, row by row; to be called from `forward` alone."""
        return hidden_at(self.classifier.base_model, tokens, mask, mask)

    def absorb_affine(self, mean: float, std: float) -> None:
        """Make the output (scalar - mean) / std, so that a value model copied from a reward model starts in the units
        of the normalised reward that PPO pays.

        Source: value model from reward model: Stiennon et al. 2020, arXiv:2009.01325, section 3.4; the change of units
                is ours, as both are affine in the head.
        Tests:  test_models.py::test_absorbing_the_normalisation_makes_values_start_in_the_rewards_units
        """
        with torch.no_grad():
            self.head.weight.div_(std)
            if self.head.bias is not None:
                self.head.bias.div_(std)
            self.bias.sub_(mean).div_(std)


class SharedScalar(ScalarModel):
    """Value model and reward model on one set of base weights:

        forward(...)[b, t] = value_head(backbone with adapter)[b, t] + bias
        score(...)[b, t]   = score(backbone without adapter)[b, t], what `ScalarModel(classifier)` computed before

    The adapter starts as the identity and the value head as a copy of the reward model's; they and the bias are all
    that is trained. Both readings go through the root's forward, so that all of the network's hooks run.
    """

    def __init__(self, classifier: PreTrainedModel, settings: PeftSettings) -> None:
        super().__init__(classifier)
        self.value_head = copy.deepcopy(scalar_head(classifier)).requires_grad_(True)
        self.scores = False
        add_adapter(classifier, settings, "SEQ_CLS")

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """See `ScalarModel.forward`: the value; inside `score`, the reward model's scalar."""
        if self.scores:
            return spread(scalar_head(self.classifier)(self.hidden(tokens, mask)).squeeze(-1), mask)
        return super().forward(tokens, mask)

    @property
    def head(self) -> nn.Linear:
        """The value's own layer."""
        return self.value_head

    @torch.no_grad()
    def score(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The frozen reward model's scalar at every position, [B, T]; `score_sequences(shared.score, ...)` reads it."""
        self.scores = True
        try:
            with adapters_off(self):
                return self(tokens, mask)
        finally:
            self.scores = False


class PromptedScalar(nn.Module):
    """The same call as ScalarModel's for a classifier behind learnt tokens (peft's wrapper); padding on the right.

    From then on the wrapper's own forward, which trainers call, reads the last real token too: behind learnt tokens
    transformers' classifiers see no ids and read the last position, which in a padded row is PAD.
    """

    def __init__(self, wrapper: "PeftModel") -> None:
        super().__init__()
        self.classifier = wrapper
        inner: Any = wrapper.get_base_model()
        inner.score.register_forward_hook(self._keep)
        inner.register_forward_hook(self._read, with_kwargs=True)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens [B, T] int64, mask [B, T] bool -> [B, T]; positions under a False mask hold no meaning."""
        self.classifier(input_ids=tokens, attention_mask=mask.long(), use_cache=False)
        return self.scalars[:, -tokens.shape[1] :]

    def _keep(self, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        self.scalars = output.squeeze(-1)

    def _read(self, inner: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        mask = named.get("attention_mask")
        if mask is not None and named.get("inputs_embeds") is not None:
            output.logits = self.scalars.gather(1, last_token_index(mask.bool())[:, None])


class PooledScalar(nn.Module):
    """The same call as ScalarModel's for a classifier that gives a sequence one number by a pooling of its own: every
    position has that number, so that it is read as any other score. A decoder's classifier needs its PAD on the right.
    """

    def __init__(self, classifier: PreTrainedModel) -> None:
        super().__init__()
        self.classifier = classifier
        self._no_split_modules = classifier._no_split_modules
        self.config = classifier.config

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens [B, T] int64, mask [B, T] bool -> [B, T]. Rows are moved to the left, where an encoder begins."""
        order = (~mask).long().argsort(dim=1, stable=True)
        tokens, there = tokens.gather(1, order), mask.gather(1, order).long()
        return self.classifier(input_ids=tokens, attention_mask=there, use_cache=False).logits.expand(mask.shape)

    def absorb_affine(self, mean: float, std: float) -> None:
        """As `ScalarModel.absorb_affine`, which makes a value model. Raises UserError: here there can be none."""
        raise UserError(
            f"a {type(self.classifier).__name__} gives one number a sequence, so no value model can start from it, "
            "which needs one at every position; choose an advantage without values (advantage=rloo) or a decoder"
        )


def open_scalar(folder: Path) -> ScalarModel | PooledScalar:
    """The reward model in `folder`, dropout off, whatever its tokens (`models.pooled.is_pooled` tells beforehand which
    of the two it is). Raises UserError."""
    classifier = load_scorer(folder)
    disable_dropout(classifier)
    if pools(classifier.config):
        return PooledScalar(classifier)
    scalar_head(classifier)  # raises where there is none
    return ScalarModel(classifier)


def load_scalar(folder: Path, encoder: Encoder) -> ScalarModel | PooledScalar:
    """The reward model in `folder`, dropout off. Raises UserError unless it has the tokens of `encoder`."""
    other = load_encoder(folder)
    if not same_tokens(other.tokenizer, encoder.tokenizer):
        raise UserError(
            f"the tokenizers of policy ({len(encoder.tokenizer)} tokens) and reward model ({len(other.tokenizer)} "
            "tokens) differ: ids cannot pass from one to the other; train the reward model from the same SFT model"
        )
    return open_scalar(folder)


def score_sequences(model: Scalars, tokens: Tensor, mask: Tensor, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """One score a sequence: the scalar at its last real token, as (scalar - mean) / std.

    Shapes: tokens [B, T], mask [B, T] bool, padding on either side -> [B]. The one read-out of reward models, in their
    evaluation as in PPO (the last real token of a finished response is its stop token, as PAD differs from EOS).
    """
    scalars = model(tokens, mask)
    last = scalars.gather(1, last_token_index(mask)[:, None]).squeeze(1)
    return (last - mean) / std
