"""The weights of a policy as an engine with weights of its own takes them."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def merged_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values as the base model has them. An adapter that is switched on is in them, computed on a copy of its
    layer: merging in place and back would leave rounding in the weights that train."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, layer in adapted.items():
        if not layer.disable_adapters:
            layer = copy.deepcopy(layer)
            layer.merge()
        for part, value in layer.get_base_layer().named_parameters():
            yield f"{name}.{part}", value
    inside = tuple(f"{name}." for name in adapted)
    for name, value in model.named_parameters(remove_duplicate=False):
        owner, _, part = name.rpartition(".")
        if name.startswith(inside) or part == "bias_offset":
            continue
        here: Any = model.get_submodule(owner)
        bitfit = part == "bias" and hasattr(here, "bias_offset") and not here._disable_adapters
        yield name, value + here.bias_offset if bitfit else value
