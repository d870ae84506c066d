"""From conversations to token ids: the same tokens in training, sampling and scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

Message = Mapping[str, Any]


def load_tokenizer(path: str | Path) -> Any:
    """Returns the tokenizer in a folder or of a hub id.

    Raises: FileNotFoundError where there is none; ValueError for one without an end-of-sequence token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"tokenizer: none could be loaded from {str(path)!r} ({error})") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer: that of {str(path)!r} has no eos_token; responses could not end")
    return tokenizer


def eos_token_ids(tokenizer: Any, model: Any = None) -> set[int]:
    """Returns every token that ends a response: the tokenizer's eos, the template's end of turn, the model's own."""
    ids = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        eos = getattr(config, "eos_token_id", None)
        ids.update(eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos])
    return {i for i in ids if i < len(tokenizer)}


def end_of_turn(tokenizer: Any) -> int:
    """Returns the token that the chat template puts after an assistant's answer; eos where that is no special token."""
    if tokenizer.chat_template is None:
        return tokenizer.eos_token_id
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "answer"}]
    tail = tokenizer.apply_chat_template(messages, tokenize=False).rpartition("answer")[2]
    ids = tokenizer(tail, add_special_tokens=False).input_ids
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return ids[0] if ids and ids[0] in special else tokenizer.eos_token_id


class Renderer:
    """Turns prompts and responses into tokens, with the chat template or as plain text.

    template: "chat" uses the tokenizer's chat template, "none" plain text, "auto" the template if there is one. With
    the template a prompt that is a plain string becomes one user message.

    Prompt and response are tokenised apart, and the response ends with one end-of-turn token: what the engine samples
    after a prompt's tokens is then what training sees. Nothing is ever decoded and encoded again."""

    def __init__(self, tokenizer: Any, template: str = "auto") -> None:
        if template == "chat" and tokenizer.chat_template is None:
            raise ValueError(
                "template: the tokenizer has no chat template; set tokenizer.chat_template, or use template none "
                "with plain texts"
            )
        self.tokenizer = tokenizer
        self.chat = tokenizer.chat_template is not None if template == "auto" else template == "chat"
        self.end = end_of_turn(tokenizer) if self.chat else tokenizer.eos_token_id

    def prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """The tokens of a prompt, up to where the response starts."""
        if isinstance(prompt, str) and not self.chat:
            return list(self.tokenizer(prompt).input_ids)
        if not self.chat:
            raise ValueError(
                "template: the data holds messages, but the tokenizer has no chat template (or template is none); set "
                "tokenizer.chat_template"
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return list(
            self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        )

    def response(self, text: str) -> list[int]:
        """The tokens of a response, with its end."""
        ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        return ids if ids and ids[-1] == self.end else [*ids, self.end]

    def text(self, text: str) -> list[int]:
        """The tokens of a whole text, with its end."""
        ids = list(self.tokenizer(text).input_ids)
        return ids if ids and ids[-1] == self.end else [*ids, self.end]


def check_same_vocabulary(policy: Any, other: Any, name: str) -> None:
    """Raises ValueError unless both tokenizers give every token the same id: `name` then reads the policy's ids."""
    ours, theirs = policy.get_vocab(), other.get_vocab()
    if ours != theirs:
        differ = sum(theirs.get(token) != i for token, i in ours.items())
        raise ValueError(
            f"{name}: its vocabulary ({len(theirs)} tokens) is not that of the policy ({len(ours)} tokens; {differ} of "
            "them differ); train it from a model with the policy's tokenizer"
        )
