"""What all tests share: one thread, no network, no tracking service, and models small enough to be exact about.

Nothing here imports torch before a fixture needs it: some tests check that validation leaves it out.
"""

import logging
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; two threads on shared cores are slower than one
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_ERROR_REPORTING"] = "false"
os.environ["OTEL_SDK_DISABLED"] = "true"  # W&B's own telemetry, whose threads would look for a network
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

SENTENCES = [
    "the harbour was quiet before the storm came in from the west",
    "she wrote three letters and sent none of them",
    "a small lamp burned in every window of the street",
    "why would anyone count the stones on a beach?",
]
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 96,
    "bos_token_id": None,
    "initializer_range": 0.2,  # large enough that a wrong position or a leaking PAD shows
}
GATED = {**TINY, "intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16}
CONFIGS = {
    "llama": {**GATED, "tie_word_embeddings": True},
    "qwen3": {**GATED, "tie_word_embeddings": True},
    "mistral": {**GATED, "sliding_window": 5},
    "gemma3_text": {**GATED, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": GATED,
    "gpt_neox": {**TINY, "intermediate_size": 48},
    "opt": {**TINY, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {**TINY, "new_decoder_architecture": False},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 96,
        "bos_token_id": None,
        "initializer_range": 0.2,
    },
}


@pytest.fixture(autouse=True)
def loggers_as_they_were():
    """`--info` makes Hydra log to a stream that the test's end closes; later tests would see complaints about it."""
    loggers = [logging.getLogger(), logging.getLogger("hydra")]
    before = [(logger, list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, handlers, level in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Call `alignkit WORDS` in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)

    def call(*words: str) -> tuple[int, str, str]:
        from hydra.core.global_hydra import GlobalHydra

        import alignkit.cli

        monkeypatch.setattr(sys, "argv", ["alignkit", *words])
        GlobalHydra.instance().clear()
        code = 0
        try:
            alignkit.cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE learnt from a few sentences, with PAD, END and the chat roles."""
    from alignkit.models.tokenizer import learn_tokenizer

    tokenizer = learn_tokenizer(SENTENCES, 280)
    tokenizer.padding_side = "left"
    return tokenizer


@pytest.fixture(scope="session")
def tiny_policy(tiny_tokenizer):
    """Factory of random causal models: hidden size 32, two layers, evaluation mode, PAD and END of `tiny_tokenizer`."""

    def build(architecture: str = "llama", seed: int = 0, **changes):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        known = {
            "vocab_size": len(tiny_tokenizer),
            "pad_token_id": tiny_tokenizer.pad_token_id,
            "eos_token_id": tiny_tokenizer.eos_token_id,
        }
        config = AutoConfig.for_model(architecture, **{**CONFIGS[architecture], **known, **changes})
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    return build


@pytest.fixture(scope="module")
def cluster():
    """This process alone, ready to shard."""
    from alignkit.runtime.sharding import Cluster

    cluster = Cluster.open()
    yield cluster
    cluster.close()
