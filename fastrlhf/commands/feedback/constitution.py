"""Principles to criticise and revise a response by, and how a model is asked to.

Source: Bai et al., arXiv 2212.08073, section 3: a principle is drawn for each revision, the model criticises its own
response by it and then revises it; further rounds start from the revision, without the earlier critiques.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import yaml

from fastrlhf.commands.feedback.rows import read_text
from fastrlhf.data.controls import Quoted
from fastrlhf.data.conversations import Conversation, messages_of
from fastrlhf.errors import UserError

ONLY = "Reply with the rewritten response alone, as if it were your first."
# what ends a piece of a transcript without a chat template
STOPS = ("\n\nCritique request:", "\n\nRevision request:", "\n\nCritique:", "\n\nRevision:", "\n\nHuman:")


@dataclass(frozen=True)
class Principle:
    """What the model is asked for: to criticise its response, then to revise it."""

    name: str
    critique: str
    revision: str


def load_principles(path: str | None) -> list[Principle]:
    """Returns the principles of a YAML file, a list of {name, critique, revision}; None: those shipped.

    Raises: ValueError for a file that is something else, and for a name given twice."""
    if path is None:
        text = (files("fastrlhf.commands.feedback") / "principles.yaml").read_text(encoding="utf-8")
    else:
        text = read_text(path, "principles")
    try:
        entries = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"principles: {path} is not YAML: {error}") from None
    keys = {"name", "critique", "revision"}
    if not isinstance(entries, list) or not entries:
        raise UserError(f"principles: {path} must be a list of entries with {', '.join(sorted(keys))}")
    for number, entry in enumerate(entries, 1):
        texts = isinstance(entry, dict) and all(isinstance(v, str) and v.strip() for v in entry.values())
        if not texts or entry.keys() != keys:
            raise UserError(f"principles: {path}, entry {number} must have texts {', '.join(sorted(keys))}: {entry}")
    principles = [Principle(**{key: value.strip() for key, value in entry.items()}) for entry in entries]
    names = [principle.name for principle in principles]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"principles: {path} has {twice[0]!r} twice")
    return principles


def draw(principles: list[Principle], *, seed: int, round_number: int, row: int) -> Principle:
    """Returns the principle of a row in a round: a function of the three numbers."""
    return principles[np.random.default_rng((seed, round_number, row)).integers(len(principles))]


def ask_critique(prompt: Conversation, response: str, principle: Principle, *, chat: bool) -> Conversation:
    """Returns what the model reads before it writes a critique of its response."""
    if not chat:
        request = f"\n\nCritique request: {principle.critique}\n\nCritique:"
        return Quoted.of((str(prompt), False), (response, True), (request, False))
    return [
        *messages_of(prompt),
        {"role": "assistant", "content": response},
        {"role": "user", "content": principle.critique},
    ]


def ask_revision(
    prompt: Conversation, response: str, principle: Principle, critique: str, *, chat: bool
) -> Conversation:
    """Returns what the model reads before it writes the revision."""
    asked = ask_critique(prompt, response, principle, chat=chat)
    if isinstance(asked, str):
        request = f"\n\nRevision request: {principle.revision}\n\nRevision:"
        return Quoted.of((asked, False), (critique, True), (request, False))
    return [
        *asked,
        {"role": "assistant", "content": critique},
        {"role": "user", "content": f"{principle.revision} {ONLY}"},
    ]
