"""Which model a run starts from."""

from typing import Literal

from alignkit.schema import Count, settings


@settings
class ModelSettings:
    """`path`: a local folder or a Hub id of a decoder-only model, at `revision`; or null: a small model of
    `architecture` with these dimensions is built from scratch, with a BPE vocabulary learnt from the training texts."""

    path: str | None
    revision: str | None
    trust_remote_code: bool
    architecture: Literal["llama", "qwen3"]
    hidden_size: Count
    num_layers: Count
    num_heads: Count
    vocab_size: Count
    context_length: Count

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}")
        if self.vocab_size < 262:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 262: 256 bytes and 6 special tokens")
