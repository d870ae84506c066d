"""What ends a response besides EOS and its length: strings in its text, and going round in circles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what tokenizers decode the first bytes of a character to


class StopStrings:
    """Says after each token of one response whether its text now holds one of `strings`.

    A token's text depends on its neighbours (spaces, characters of several bytes), so it is decoded together with the
    tokens that settled the text before it, and a string is found across the borders of tokens. Special tokens have no
    text here, as in the text that rewards see."""

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, strings
        self.num_kept = max(map(len, strings)) - 1  # characters that a string may reach back
        self.first = self.num_settled = 0  # tokens decoded along with new ones: from first to num_settled
        self.text = self.tail = ""  # of these tokens, and the last characters of the response up to them

    def found(self, response: Sequence[int]) -> bool:
        """Whether the last token completes a stop string. Call it with the response after each token."""
        new = self._decode(response[self.first :])[len(self.text) :]
        tail = self.tail + new
        found = any(string in tail[max(0, len(self.tail) - len(string) + 1) :] for string in self.strings)
        if new and not new.endswith(UNFINISHED):
            self.first, self.num_settled = self.num_settled, len(response)
            self.text = self._decode(response[self.first :])
            self.tail = tail[max(0, len(tail) - self.num_kept) :]
        return found

    def _decode(self, tokens: Sequence[int]) -> str:
        # cleaning up would change text that was there before
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def repeats(response: Sequence[int], longest: int, times: int) -> bool:
    """Whether the response ends in some 1 to `longest` tokens, `times` times over."""
    for n in range(1, longest + 1):
        if len(response) < n * times:
            return False
        if response[-n * times : -n] == response[-n * (times - 1) :]:
            return True
    return False
