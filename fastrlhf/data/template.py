"""From conversations to token ids: the same tokens in training, sampling and scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

from fastrlhf.data.controls import Controls, Span, added_tokens, unmarked
from fastrlhf.data.conversations import Answer, Conversation, answer_message, messages_of
from fastrlhf.data.encoding import Encoded, Encoder, common_start
from fastrlhf.data.pretrained import read_pretrained
from fastrlhf.data.reads import check_keywords, prepared
from fastrlhf.data.rendering import ChatTemplate, Message
from fastrlhf.data.report import Reason, Rejected
from fastrlhf.data.turns import Turns
from fastrlhf.errors import UserError
from fastrlhf.settings.objects import GivenObject, ModelSource


def load_tokenizer(path: ModelSource) -> Any:
    """Returns the tokenizer in a folder or of a hub id; of one that is an object (`GivenObject`) a copy.

    Raises: as `read_pretrained`; ValueError for one without an end-of-sequence token."""
    tokenizer = read_pretrained(AutoTokenizer, path)
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer: that of {str(path)!r} has no eos_token; responses could not end")
    return tokenizer


def eos_token_ids(tokenizer: Any, model: Any = None) -> set[int]:
    """Returns every token that ends a response: the tokenizer's eos, the template's end of turn, the model's own."""
    ids = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        eos = getattr(config, "eos_token_id", None)
        ids.update(eos if isinstance(eos, list | tuple) else [eos])
    return {i for i in ids if i is not None and 0 <= i < len(tokenizer)}


def end_of_turn(tokenizer: Any) -> int:
    """Returns the first added token that the chat template puts after an answer; eos where there is none, no template,
    or one that cannot be followed (a `Renderer` that uses it refuses it)."""
    if tokenizer.chat_template is None:
        return tokenizer.eos_token_id
    try:
        _, turns, controls = analyse_template(tokenizer)
    except ValueError:
        return tokenizer.eos_token_id
    return tokenizer.eos_token_id if turns.end is None else controls.ids[turns.end]


@dataclass(frozen=True)
class Tokens:
    """Token ids of a conversation. turns: (message, first token, behind the last one) of each of the assistant's"""

    ids: list[int]
    turns: list[tuple[int, int, int]]


class Renderer:
    """Turns prompts and responses into tokens, with the chat template or as plain text.

    template: "chat" uses the tokenizer's chat template, "none" plain text, "auto" the template if there is one. With
    the template a prompt that is a plain string becomes one user message, and white space around an answer is no part
    of it. keywords: what the template gets besides, such as enable_thinking

    A conversation is rendered whole and tokenised whole: its tokens are those of `apply_chat_template`. A token across
    the border of prompt and response belongs to the response. Only what looks like a control token in what people or
    models wrote is tokenised apart, as the text that it is. `prompt` ends where the model is to write.

    A response ends with the token that ends the turn. What the template writes behind the last one, such as a line
    feed, is part of a demonstration, where it is not learned, and no part of a response that is judged: a reward model
    reads its score at the end of the turn, where a sampled response ends too. If the template writes no end token after
    the last turn, we add that of earlier turns, or EOS. Nothing is decoded and encoded again.

    Plain texts keep their control tokens, since their author rendered them; those within a `Quoted` span become text.

    Raises: ValueError for "chat", or for messages, without a chat template, and for a template that cannot be followed.
    """

    def __init__(self, tokenizer: Any, template: str = "auto", keywords: Mapping[str, Any] | None = None) -> None:
        if template not in ("auto", "chat", "none"):
            raise UserError(f"template: expected auto, chat or none, got {template!r}")
        self.tokenizer = tokenizer
        self.chat = template == "chat" or (template == "auto" and tokenizer.chat_template is not None)
        if self.chat and tokenizer.chat_template is None:
            raise self._no_template("template is chat")
        self.end = tokenizer.eos_token_id
        if self.chat:
            self.template, self.turns, self.controls = analyse_template(tokenizer, keywords)
            if self.turns.end is not None:
                self.end = self.controls.ids[self.turns.end]
        elif keywords:
            raise UserError("template_kwargs: they are the chat template's, and there is none: leave them out")
        else:
            self.controls = Controls(tokenizer)
        self.encode = Encoder(tokenizer, self.controls)
        self.forms = self.encode.forms(self.turns.asked, self.turns.answered) if self.chat else None
        self.start = _start_tokens(tokenizer)

    @property
    def notes(self) -> list[str]:
        """What is to be said of prompts to which responses are sampled: where they end as no rendered answer begins."""
        if not self.chat:
            return []
        prompt, whole = (self.encode.ids(text) for text in (self.turns.asked, self.turns.answered))
        header = self.turns.header
        if whole[: len(prompt)] == prompt and header.count("<think>") == header.count("</think>"):
            return []
        shown = f"the generation prompt ends with {header!r}, and a plain answer is not rendered so"
        return [f"{shown}: responses are sampled from there (template_kwargs may change it: docs/data.md)"]

    @property
    def notes_on_ends(self) -> list[str]:
        """What is to be said of responses: where the template writes no token behind them."""
        if not self.chat or self.turns.end is not None:
            return []
        eos = self.tokenizer.eos_token
        return [
            f"the chat template ends an answer with no token of the tokenizer, so {eos} is put behind what it writes"
        ]

    def prompt(self, prompt: Conversation, tools: Any = None) -> list[int]:
        """The tokens of a prompt, up to where the response starts. Raises: Rejected where the template refuses it."""
        if not self.chat:
            return self._started(self._plain_text(prompt))
        (messages, tools), marks = self.controls.mark((prepared(self.template, messages_of(prompt)), tools))
        self.template.check_all(messages, tools, generation=True)
        rendered = self.template.render(messages, tools, generation=True)
        text, spans, place = unmarked(rendered, marks)
        found = self.template.places(rendered, messages, tools, generation=True) or []
        others = [(place(each.start), place(each.stop)) for each in found]
        return self.encode.guarded(text, spans, others=others, forms=self.forms).ids

    def answers(
        self, prompt: Conversation, answers: Sequence[Answer], finished: Sequence[bool], tools: Any = None
    ) -> tuple[list[int], list[list[int]]]:
        """(the tokens of a prompt, those of each response to it): each response with the prompt before it is what the
        template renders, up to the end of the turn; one that is not finished has no end. A token across the border, in
        any of them, belongs to the responses.

        Raises: Rejected where the template refuses or rewrites them."""
        found = [self._answer(prompt, answer, ended, tools) for answer, ended in zip(answers, finished, strict=True)]
        first, shared = found[0]
        for ids, border in found[1:]:
            shared = min(shared, border, common_start(first, ids))
        return first[:shared], [ids[shared:] for ids, _ in found]

    def response(self, text: str) -> list[int]:
        """The tokens of a response, with its end, as they follow a plain prompt."""
        if self.chat:
            return self.answers("?", [text], [True])[1][0]
        return self._ended(self.encode.behind(text))

    def text(self, text: str) -> list[int]:
        """The tokens of a whole text without its trailing white space, with its end."""
        return self._ended(self._started(text.rstrip()))

    def conversation(self, messages: Sequence[Message], tools: Any = None, *, finished: bool = True) -> Tokens:
        """The tokens of a conversation that the assistant ends, and its turns.

        finished: whether the last turn has its end and what the template writes behind it

        Raises: Rejected where the template refuses or rewrites it."""
        if not self.chat:
            raise self._no_template("the data holds messages")
        (marked, tools), marks = self.controls.mark((prepared(self.template, messages), tools))
        rendering = self.template.locate(marked, tools)
        turns = self.turns.of(marked, rendering, tools, "".join(marks or ()))
        if not turns or turns[-1].number != len(messages) - 1:
            raise Rejected(Reason.TEMPLATE_REWRITES, "its last turn is not the assistant's")
        text, spans, place = unmarked(rendering.text, marks)
        borders = [(turn.number, place(turn.start), place(turn.stop)) for turn in turns]
        if not finished or not turns[-1].ended:
            cut = place(turns[-1].stop if finished else turns[-1].said)
            text, spans = text[:cut], [(a, min(b, cut)) for a, b in spans if a < cut]
            borders[-1] = (*borders[-1][:2], cut)
        others = [(place(each.start), place(each.stop)) for each in rendering.places]
        places = [border for turn in borders for border in turn[1:]]
        encoded = self.encode.guarded(text, spans, places, others=others, forms=self.forms)
        ids, found = encoded.ids, [(n, encoded.from_(start), encoded.until(stop)) for n, start, stop in borders]
        if finished and not turns[-1].ended:  # the template writes no end
            end = turns[-1].end
            ids = [*ids, self.end if end is None else self.controls.ids[end]]
            found[-1] = (*found[-1][:2], len(ids))
        return Tokens(ids, found)

    def _answer(self, prompt: Conversation, answer: Answer, finished: bool, tools: Any) -> tuple[list[int], int]:
        """(the tokens of a prompt and a response, how many of them are the prompt's)."""
        if self.chat:
            tokens = self.conversation([*messages_of(prompt), answer_message(answer)], tools, finished=finished)
            _, start, stop = tokens.turns[-1]
            return tokens.ids[:stop], start
        start_text, text = self._plain_text(prompt), self._plain_text(answer)
        encoded = self._encoded(
            start_text + text, [*_spans(start_text), *_spans(text, len(start_text))], len(start_text)
        )
        num = encoded.from_(len(start_text))
        ids = self._with_start(encoded.ids)
        border = num + len(ids) - len(encoded.ids)
        return self._ended(ids) if finished else ids[: -1 if ids[-1] == self.end else None], border

    def _plain_text(self, text: Any) -> str:
        if not isinstance(text, str):
            raise self._no_template("the data holds messages")
        return text

    def _encoded(self, text: str, quoted: Sequence[Span], border: int = 0) -> Encoded:
        """The tokens of a plain text; what spells a control token in a quoted span is text."""
        spans = [(a + m.start(), a + m.end()) for a, b in quoted for m in self.controls.pattern.finditer(text[a:b])]
        return self.encode.guarded(text, spans, [border], others=quoted)

    def _started(self, text: str) -> list[int]:
        return self._with_start(self._encoded(text, _spans(text)).ids)

    def _with_start(self, ids: list[int]) -> list[int]:
        """The tokens of a text, after those that the tokenizer starts a sequence with unless the text has them."""
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


def analyse_template(tokenizer: Any, keywords: Mapping[str, Any] | None = None) -> tuple[ChatTemplate, Turns, Controls]:
    """A tokenizer's chat template, what it writes around turns, and the control tokens. The tokenizer keeps them, so
    that a template is tried once, as long as it, its keywords and the added tokens are the same.

    Raises: ValueError for a template that cannot be followed."""
    known = vars(tokenizer).setdefault("_followed", {})
    key = repr((tokenizer.chat_template, keywords or {}, tokenizer.eos_token_id, added_tokens(tokenizer)))
    if key not in known:
        template, controls = ChatTemplate(tokenizer, keywords), Controls(tokenizer)
        try:
            check_keywords(tokenizer, keywords or {})
            turns = Turns(template, controls, tokenizer.name_or_path)
            known[key] = template, turns, Controls(tokenizer, around_turns(tokenizer, turns.written))
        except ValueError as error:
            known[key] = str(error)
    if isinstance(known[key], str):
        raise UserError(known[key])
    found: tuple[ChatTemplate, Turns, Controls] = known[key]
    return found


def around_turns(tokenizer: Any, written: str) -> set[str]:
    """The added tokens that a template puts around turns, but for those that mark reasoning: an answer may hold its own
    reasoning, with <think> as the token that it is."""
    return {text for text in added_tokens(tokenizer) if text in written and "think" not in text.lower()}


def _spans(text: str, start: int = 0) -> list[Span]:
    return [(start + a, start + b) for a, b in getattr(text, "spans", ())]


def _start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text: BOS, or nothing."""
    bare, full = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    return list(full[: next((n for n in range(len(full)) if full[n : n + len(bare)] == bare), 0)])


def check_reads_ids_of(tokenizer: Any, source: ModelSource, what: str) -> None:
    """Raises ValueError unless a model has the tokenizer's vocabulary; an object has no tokenizer that would tell."""
    if not isinstance(source, GivenObject):
        check_same_vocabulary(tokenizer, load_tokenizer(source), f"{what} {source}")


def check_same_vocabulary(policy: Any, other: Any, name: str) -> None:
    """Raises ValueError unless both tokenizers give every token the same id: `name` then reads the policy's ids."""
    ours, theirs = policy.get_vocab(), other.get_vocab()
    if ours != theirs:
        differ = sum(theirs.get(token) != i for token, i in ours.items())
        raise UserError(
            f"{name}: its vocabulary ({len(theirs)} tokens) is not that of the policy ({len(ours)} tokens; {differ} of "
            "them differ); train it from a model with the policy's tokenizer"
        )
