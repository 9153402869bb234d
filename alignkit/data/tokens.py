"""Prompts and responses as token ids. Every stage goes through these functions, so that SFT, reward model and PPO
see the same tokens for the same row."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from alignkit.data.corpus import Pair, Prompt
from alignkit.errors import UserError


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with the set of tokens that end a response; the first of `stop_ids` need not be the one appended:
    `end_id` is (the chat template's end of turn where there is one, else EOS). pooled: of an encoder model, where the
    token that ends a text also parts prompt and response."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    end_id: int
    pooled: bool = False

    def prompt(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt: raw text with the tokenizer's own BOS, or chat turns up to the assistant's turn."""
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
            ends = ids and ids[-1] == (self.end_id if self.pooled else self.tokenizer.eos_token_id)
            return ids[:-1] if ends and not (self.pooled and prompt) else ids
        return self._ids(self._render(prompt, add_generation_prompt=True))

    def response(self, prompt: Prompt, response: str) -> list[int]:
        """Ids of a response to `prompt`, with the token that ends it as the last one."""
        text = response
        if not isinstance(prompt, str):
            before = self._render(prompt, add_generation_prompt=True)
            whole = self._render([*prompt, {"role": "assistant", "content": response}])
            text = whole[len(before) :] if whole.startswith(before) else response
        ids = self._ids(text)
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), None)
        return [*ids, self.end_id] if end is None else ids[: end + 1]

    def pair(self, pair: Pair) -> tuple[list[int], list[int]]:
        """Ids of prompt + chosen and of prompt + rejected."""
        prompt = self.prompt(pair.prompt)
        return prompt + self.response(pair.prompt, pair.chosen), prompt + self.response(pair.prompt, pair.rejected)

    def text(self, ids: Sequence[int]) -> str:
        """Readable text of ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(self, turns: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                "the data holds chat messages but the tokenizer has no chat template: "
                "use a chat model, or set `chat_template` in its tokenizer_config.json"
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
            )
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise UserError(f"the model's chat template refuses turns of {roles}: {error}") from error


def training_texts(prompts: Iterable[Prompt], responses: Iterable[str]) -> Iterable[str]:
    """All texts from which a vocabulary is learnt."""
    for prompt in prompts:
        yield from [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    yield from responses


def show(prompt: Prompt) -> str:
    """A prompt as a person reads it: raw text, or `role: text` a turn."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
