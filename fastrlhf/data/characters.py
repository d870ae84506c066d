"""A tokenizer whose tokens are characters: what a file holds can be told and counted without a model's."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

# two code points that stand for no character, so that no text has them: the ends of messages, and of a system message
END, SYSTEM_END = "\uffff", "\ufffe"


class CharacterTokenizer:
    """What `Renderer` and the loaders need of a tokenizer; tokens are code points, with an end after each message."""

    name_or_path = "characters"
    chat_template = "a message after the other"
    eos_token_id = ord(END)
    all_special_tokens = (END, SYSTEM_END)
    all_special_ids = (ord(END), ord(SYSTEM_END))
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012 (a transformers' tokenizer has it as a property)
    is_fast = True

    def __call__(self, text: str, **options: Any) -> SimpleNamespace:
        places = [(n, n + 1) for n in range(len(text))]
        return SimpleNamespace(input_ids=[ord(letter) for letter in text], offset_mapping=places)

    def apply_chat_template(self, messages: Sequence[Any], *, tokenize: bool = True, **options: Any) -> Any:
        ends = {"system": SYSTEM_END}
        text = "".join(message["content"] + ends.get(message["role"], END) for message in messages)
        return self(text).input_ids if tokenize else text

    def count(self, tokens: Sequence[int]) -> int:
        """How many of the tokens are characters."""
        return sum(token not in self.all_special_ids for token in tokens)
