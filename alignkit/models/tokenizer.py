"""Tokenizers: a small one learnt from the texts, PAD kept apart from EOS, the set of tokens that end a response."""

from collections.abc import Iterable
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignkit.errors import UserError

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PLAIN_TEMPLATE = (  # for pretrained models that come without one: plain words, EOS after each of the assistant's turns
    "{% set names = {'system': 'System', 'user': 'Human', 'assistant': 'Assistant'} %}{% for message in messages %}"
    "{{ ('' if loop.first else '\\n\\n') + names[message['role']] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
NO_TOKENIZER = "'{}' holds no tokenizer: expected tokenizer.json or tokenizer.model beside the weights"


def learn_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of at most `vocab_size` tokens with PAD, END (end of a response) and one token a chat role."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(
    path: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or Hub id. Raises UserError with the reason if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # of many classes, for whatever stands in a stranger's files
        if "instantiate the backend tokenizer" in str(error):
            raise UserError(NO_TOKENIZER.format(path)) from error
        raise UserError(f"no tokenizer could be loaded from '{path}': {first_line(error)}") from error
    if not tokenizer("a b", add_special_tokens=False)["input_ids"]:  # where there are no files, an empty one is made up
        raise UserError(NO_TOKENIZER.format(path))
    return tokenizer


def ensure_pad(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give the tokenizer a PAD of its own if it has none or shares it with EOS; True if a token was added.

    With PAD = EOS a sequence classifier reads the token before EOS, and losses skip the decision to stop.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token: set `eos_token` in its tokenizer_config.json")
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return False
    known = tokenizer.get_vocab()
    candidates = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|padding|>")
    name = next((name for name in candidates if name in known and known[name] != tokenizer.eos_token_id), PAD)
    return bool(tokenizer.add_special_tokens({"pad_token": name}))


def start_tokenizer(path: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a pretrained model as SFT goes on with it: a PAD of its own, a plain template where it has none.
    Raises UserError."""
    tokenizer = load_tokenizer(path, revision, trust_remote_code)
    ensure_pad(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    return tokenizer


def find_stop_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None
) -> tuple[int, ...]:
    """All tokens that end a response: EOS, those of generation_config, the chat template's end of a turn."""
    stops = {tokenizer.eos_token_id}
    listed = getattr(generation_config, "eos_token_id", None)
    stops.update([listed] if isinstance(listed, int) else (listed or []))
    stops.add(end_of_turn(tokenizer))
    return tuple(sorted(stop for stop in stops if stop is not None))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts right after an assistant's text, None if there is none."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "qzqz"}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except TemplateError:
        return None  # a template of its own rules; EOS ends the response then
    if "qzqz" not in text:
        return None
    tail = tokenizer(text[text.rindex("qzqz") + 4 :], add_special_tokens=False)["input_ids"]
    return next(
        (token for token in tail[:2] if token in tokenizer.all_special_ids or _is_added(tokenizer, token)), None
    )


def same_tokens(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give every token the same id (so that ids may pass from one model to another)."""
    return a.get_vocab() == b.get_vocab()


def _is_added(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    return token in tokenizer.added_tokens_decoder


def first_line(error: Exception) -> str:
    """What an error says, in one line; one that ends with a colon goes on in the next."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
