"""The engine with fixed shapes samples what `native` samples; compiled or not, sharded or not, adapted or not."""

import pytest
import torch

from alignkit.algo.batching import pad_left
from alignkit.algo.sampling import SamplingRule, uniform_noise
from alignkit.algo.types import PromptBatch
from alignkit.models.adapters import adapters_off, add_adapter
from alignkit.models.settings import PeftSettings
from alignkit.rollout.compiled import Compiled, copy_of, dtype_of
from alignkit.rollout.native import Native

STEPS = 12
RULE = SamplingRule(temperature=1.0, stop_ids=tuple(range(100, 160)), min_response=2)
ROWS = [[5, 6, 7], [8], list(range(20, 31)), [40, 41], [50] * 7]


def engine(kind=Compiled, **changes):
    own = {"dtype": None, "compile": False} if kind is Compiled else {}
    common = {"temperature": 1.0, "min_response": 2, "max_response": STEPS, "batch": 100, "unshard": True}
    return kind(**{**common, **own, **changes})


def both(model, **changes):
    tokens, mask = pad_left(ROWS, 0)
    prompts = PromptBatch(tokens, mask, torch.arange(len(ROWS)))
    noise = uniform_noise(0, 0, prompts.index, STEPS)
    return [each.generate(model, prompts, RULE, noise, bool) for each in (engine(Native), engine(**changes))]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("batch", [100, 2])
def test_the_same_tokens_as_native(architecture, batch, tiny_policy):
    model = tiny_policy(architecture)
    native, compiled = both(model, batch=batch)
    assert compiled.tokens.equal(native.tokens) and compiled.mask.equal(native.mask)
    assert compiled.finished.equal(native.finished) and bool(native.finished.any())
    torch.testing.assert_close(compiled.engine_logprobs, native.engine_logprobs, rtol=0, atol=1e-4)


def test_weights_that_have_moved_are_handed_over(tiny_policy):
    model = tiny_policy("llama")
    first, held = both(model)[1], copy_of(model, engine())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    native, compiled = both(model)
    assert copy_of(model, engine()) is held, "one copy for the whole run"
    assert compiled.tokens.equal(native.tokens) and not compiled.tokens.equal(first.tokens)


def test_an_adapter_is_merged_into_the_copy_alone(tiny_policy):
    model = tiny_policy("llama")
    add_adapter(model, PeftSettings(method="lora", settings={"r": 4, "target_modules": "all-linear"},
                                    quantization={}, merge=False), "CAUSAL_LM")  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    native, compiled = both(model)
    assert compiled.tokens.equal(native.tokens)
    with adapters_off(model):
        base = both(model)
    assert base[1].tokens.equal(base[0].tokens) and not base[0].tokens.equal(native.tokens)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_sharded_model_hands_its_weights_over(cluster, tiny_policy):
    model = tiny_policy("llama")
    expected = both(model)[0]
    sharded = cluster.shard(model, trainable=True)
    with cluster.sampling(sharded, unshard=True):
        assert both(sharded)[1].tokens.equal(expected.tokens)


def test_a_compiled_step_computes_the_same(tiny_policy):
    native, compiled = both(tiny_policy("llama"), compile=True)
    assert compiled.tokens.equal(native.tokens)


def test_bfloat16_samples_from_nearly_the_same_policy(tiny_policy):
    model = tiny_policy("llama")
    compiled = both(model, dtype="bfloat16")[1]
    assert next(copy_of(model, engine(dtype="bfloat16")).model.parameters()).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert compiled.response_mask[:, 0].all()
    weight = next(model.parameters())
    assert dtype_of("auto", weight) in (torch.bfloat16, torch.float32) and dtype_of(None, weight) == torch.float32


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="unshard=False: the copy that samples is whole on every rank"):
        engine(unshard=False)
    with pytest.raises(ValueError, match="min_response=12 must be below max_response=12 tokens"):
        engine(min_response=12)
