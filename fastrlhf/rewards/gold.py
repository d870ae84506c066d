"""The gold reward of the demo: a fixed rule that stands in for what people want.

The reward model sees only which of two responses the rule prefers, and PPO sees only the reward model, so the rule
shows at the end whether the policy got better at what was meant, or only at pleasing its reward model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

ENOUGH_WORDS = 5  # a shorter answer is hardly a sentence
UNFINISHED, OFF_TOPIC = 0.25, 0.7

WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)?")
SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
VOWELS = re.compile(r"[aeiouy]+")
# a last vowel group that is not spoken: make, rule, makes, played; not table, faces, wanted
SILENT = re.compile(
    r"([^aeiouyl]|[aeiouy]l)e$|[^aeiouycgsxz]es$|[^aeiouytd]ed$"
)  # make, rule, makes, played; not table


def plain_answer(
    prompts: Sequence[str], responses: Sequence[str], *, finished: Sequence[bool], **columns: Any
) -> list[float]:
    """Returns how plain and whole each answer is, from 0 to 1: a finished sentence on the topic, in easy words.

    score = (1 + ease) / 2 * variety * fullness * end * topic

    ease: Flesch's reading ease / 100, cut to [0, 1]: short words and short sentences
    variety: share of the words that are not repeats
    fullness: min(1, words / 5)
    end: 1 if the response ended by itself and with . ! or ?, else 0.25
    topic: 1 if it takes up a word of the user's turn of four letters or more (its first four), else 0.7

    It is a product, so no one trick earns it: repeating a word of the prompt fails in variety, one stock sentence for
    every prompt in topic, a breathless list in end, a bare "Yes." in fullness, and learned words in ease.

    prompts, responses: N texts
    finished: N flags, False where a response was cut off at its longest length
    columns: not used

    Source: R. Flesch, A new readability yardstick, Journal of Applied Psychology 32 (1948), for the ease."""
    return [_score(*each) for each in zip(prompts, responses, finished, strict=True)]


def reading_ease(text: str) -> float:
    """Returns Flesch's reading ease: 206.835 - 1.015 words / sentences - 84.6 syllables / words; 0 without a word."""
    words = WORD.findall(text)
    if not words:
        return 0.0
    num_sentences = max(1, len(SENTENCE_END.findall(text.strip())))
    num_syllables = sum(syllables(word) for word in words)
    return 206.835 - 1.015 * len(words) / num_sentences - 84.6 * num_syllables / len(words)


def syllables(word: str) -> int:
    """Returns the syllables of an English word, at least 1: its vowel groups, without a silent final e, es or ed."""
    word = word.lower().removesuffix("'s")
    if word.endswith("ing"):
        return 1 + len(VOWELS.findall(word[:-3]))  # be-ing: the group would swallow it
    return max(1, len(VOWELS.findall(word)) - bool(SILENT.search(word)))


def _score(prompt: str, response: str, finished: bool) -> float:
    words = [word.lower() for word in WORD.findall(response)]
    if not words:
        return 0.0
    ease = min(max(reading_ease(response) / 100, 0.0), 1.0)
    variety = len(set(words)) / len(words)
    fullness = min(1.0, len(words) / ENOUGH_WORDS)
    end = 1.0 if finished and response.rstrip().endswith((".", "!", "?")) else UNFINISHED
    topic = 1.0 if _stems(prompt.rpartition("user: ")[2]) & _stems(response) else OFF_TOPIC
    return (1 + ease) / 2 * variety * fullness * end * topic


def _stems(text: str) -> set[str]:
    """The first four letters of the words that carry meaning, roughly: those of four letters or more."""
    return {word.lower()[:4] for word in WORD.findall(text) if len(word) >= 4}
