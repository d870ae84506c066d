"""From conversations to token ids: the same tokens in training, sampling and scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from fastrlhf.data.pretrained import read_pretrained

Message = Mapping[str, Any]
# templates such as Llama 3's write today's date into the system message, and a run would change overnight
DATE = "26 Jul 2024"


def load_tokenizer(path: str | Path) -> Any:
    """Returns the tokenizer in a folder or of a hub id.

    Raises: as `read_pretrained`; ValueError for one without an end-of-sequence token."""
    tokenizer = read_pretrained(AutoTokenizer, path)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer: that of {str(path)!r} has no eos_token; responses could not end")
    return tokenizer


def eos_token_ids(tokenizer: Any, model: Any = None) -> set[int]:
    """Returns every token that ends a response: the tokenizer's eos, the template's end of turn, the model's own."""
    ids = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        eos = getattr(config, "eos_token_id", None)
        ids.update(eos if isinstance(eos, list | tuple) else [eos])
    return {i for i in ids if i is not None and 0 <= i < len(tokenizer)}


def end_of_turn(tokenizer: Any) -> int:
    """Returns the first special token that the chat template puts after an answer; eos where there is none."""
    if tokenizer.chat_template is None:
        return tokenizer.eos_token_id
    answer = "the answer is 42"
    messages = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": answer}]
    tail = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(answer)[2]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = tokenizer(tail, add_special_tokens=False).input_ids
    return next((i for i in ids if i in special), tokenizer.eos_token_id)


class Renderer:
    """Turns prompts and responses into tokens, with the chat template or as plain text.

    template: "chat" uses the tokenizer's chat template, "none" plain text, "auto" the template if there is one. With
    the template a prompt that is a plain string becomes one user message, and white space around an answer is no part
    of it.

    Prompt and response are tokenised apart, and the response ends with one end-of-turn token: what the engine samples
    after a prompt's tokens is then what training sees. Nothing is ever decoded and encoded again.

    Raises: ValueError for "chat", or for messages, without a chat template."""

    def __init__(self, tokenizer: Any, template: str = "auto") -> None:
        if template not in ("auto", "chat", "none"):
            raise ValueError(f"template: expected auto, chat or none, got {template!r}")
        self.tokenizer = tokenizer
        self.chat = template == "chat" or (template == "auto" and tokenizer.chat_template is not None)
        if self.chat and tokenizer.chat_template is None:
            raise self._no_template("template is chat")
        self.end = end_of_turn(tokenizer) if self.chat else tokenizer.eos_token_id
        self.start = _start_tokens(tokenizer)

    def prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """The tokens of a prompt, up to where the response starts."""
        if not self.chat:
            if not isinstance(prompt, str):
                raise self._no_template("the data holds messages")
            return self._started(prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        messages = [
            {**message, "content": message["content"].strip()} if message["role"] == "assistant" else message
            for message in messages
        ]
        return list(
            self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False, date_string=DATE
            )
        )

    def response(self, text: str) -> list[int]:
        """The tokens of a response, with its end."""
        return self._ended(self._encode(text.strip() if self.chat else text))

    def text(self, text: str) -> list[int]:
        """The tokens of a whole text without its trailing white space, with its end."""
        return self._ended(self._started(text.rstrip()))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _started(self, text: str) -> list[int]:
        """The tokens of a text, after those that the tokenizer starts a sequence with unless the text has them."""
        ids = self._encode(text)
        return ids if ids[: len(self.start)] == self.start else [*self.start, *ids]

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if ids and ids[-1] == self.end else [*ids, self.end]

    def _no_template(self, why: str) -> ValueError:
        has_one = self.tokenizer.chat_template is not None
        problem = (
            "template is none" if has_one else f"the tokenizer {self.tokenizer.name_or_path!r} has no chat template"
        )
        remedy = "use auto or chat" if has_one else "put chat_template.jinja into its folder, or use plain texts"
        return ValueError(f"template: {why}, but {problem}; {remedy}")


def _start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text: BOS, or nothing."""
    bare, full = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    return list(full[: next((n for n in range(len(full)) if full[n : n + len(bare)] == bare), 0)])


def check_same_vocabulary(policy: Any, other: Any, name: str) -> None:
    """Raises ValueError unless both tokenizers give every token the same id: `name` then reads the policy's ids."""
    ours, theirs = policy.get_vocab(), other.get_vocab()
    if ours != theirs:
        differ = sum(theirs.get(token) != i for token, i in ours.items())
        raise ValueError(
            f"{name}: its vocabulary ({len(theirs)} tokens) is not that of the policy ({len(ours)} tokens; {differ} of "
            "them differ); train it from a model with the policy's tokenizer"
        )
