"""Encoder models (BERT, DeBERTa, ModernBERT and their like) as reward models: they read a text as a whole and give it
one number by a pooling of their own."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from alignkit.data.tokens import Encoder
from alignkit.errors import UserError
from alignkit.models.settings import adapter_facts

TEMPLATE = (  # for encoders, which come without one: plain words between the tokens that begin and part texts
    "{{ cls_token }}{% set names = {'system': 'System', 'user': 'Human', 'assistant': 'Assistant'} %}"
    "{% for message in messages %}{{ ('' if loop.first else '\\n\\n') + names[message['role']] + ': ' }}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ sep_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)


def pools(config: PreTrainedConfig) -> bool:
    """Whether a classifier with this config pools in its own way: its architecture knows the masked-language task, so
    its tokens see what follows, and the last one is none to read alone."""
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def is_pooled(path: str | Path) -> bool:
    """The same of a model folder or Hub id; False where none can be read."""
    if adapter_facts(path) is not None:
        return False
    try:
        return pools(AutoConfig.from_pretrained(str(path), trust_remote_code=False))
    except (OSError, ValueError, KeyError):
        return False


def pooled_encoder(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> Encoder:
    """[CLS] prompt [SEP] response [SEP], or what these are called here; chats by the tokenizer's template, else in
    plain words. Raises UserError if the tokenizer lacks one of these tokens or PAD."""
    lacking = [name for name in ("cls_token", "sep_token", "pad_token") if getattr(tokenizer, name) is None]
    if lacking:
        raise UserError(f"'{path}': its tokenizer has no {' and no '.join(lacking)}: set it in tokenizer_config.json")
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    return Encoder(tokenizer, (tokenizer.sep_token_id,), tokenizer.sep_token_id, pooled=True)
