"""What a chat template reads: the keywords and the keys of messages that its source names."""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes

from fastrlhf.data.rendering import REASONING, ChatTemplate, Message
from fastrlhf.data.report import Reason, Rejected
from fastrlhf.errors import UserError

# a template that has no use for one of these may leave it out; `check_all` sees to what must not be lost
KEYS = {"role", "content", "name", "weight", "tool_calls", "tool_call_id", *REASONING}
# what data sets say about a message, which is neither said in it nor changes what is learned: left out
METADATA = {
    "id",
    "message_id",
    "parent_id",
    "conversation_id",
    "index",
    "turn",
    "timestamp",
    "created_at",
    "create_time",
}
METADATA |= {"date", "model", "source", "author", "lang", "language", "score", "rank", "tokens", "metadata"}
GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")  # tags of transformers, unknown to jinja
ASKS = ("defined", "undefined", "default", "d")  # whether a template was given something
# what we or transformers give every template
GIVEN = {
    "messages",
    "tools",
    "add_generation_prompt",
    "chat_template",
    "tokenize",
    "return_dict",
    "raise_exception",
    "strftime_now",
}


def sources_of(tokenizer: Any) -> list[str]:
    """The source of a tokenizer's chat template; of several, each."""
    template = tokenizer.chat_template
    found = template.values() if isinstance(template, Mapping) else [template]
    return [source for source in found if isinstance(source, str)]


def keywords_read(source: str) -> set[str]:
    """The names that a template reads and does not make itself.

    Raises: jinja2.TemplateError for what is no template."""
    tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(GENERATION.sub("", source))
    made = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    questions = [each for each in tree.find_all((nodes.Test, nodes.Filter)) if each.name in ASKS]
    asked = {each.node.name for each in questions if isinstance(each.node, nodes.Name)}
    # jinja lists what a branch makes too; a template that makes what it was not given asks first whether it was
    return {name for name in jinja2.meta.find_undeclared_variables(tree) if name not in made or name in asked}


def check_keywords(tokenizer: Any, keywords: Mapping[str, Any]) -> None:
    """Raises ValueError for keywords that are transformers' own, or that the chat template does not read."""
    parameters = inspect.signature(tokenizer.apply_chat_template).parameters.values()
    own = {each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
    own = (own | GIVEN) - {"documents"}
    try:
        read: set[str] = set().union(*map(keywords_read, sources_of(tokenizer))) - own
    except jinja2.TemplateError:  # `Turns` says that it fails
        return
    for name in keywords:
        if name in own:
            raise UserError(f"template_kwargs: {name} is not the template's: transformers or we set it; leave it out")
        if name not in read and sources_of(tokenizer):
            near = difflib.get_close_matches(name, read, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            known = f"it reads {', '.join(sorted(read))}" if read else "it reads none"
            raise UserError(f"template_kwargs: the chat template does not read {name}{hint}; {known}")


def prepared(template: ChatTemplate, messages: Sequence[Message]) -> list[Message]:
    """The messages as the template takes them: without white space around answers and what is no template's, and with
    the arguments of calls as objects, or as JSON where it takes only that.

    Raises: Rejected for a key that nothing reads."""
    return [dict(_prepared(template, message)) for message in messages]


def _prepared(template: ChatTemplate, message: Message) -> Iterator[tuple[str, Any]]:
    for key, value in message.items():
        if key not in KEYS and not reads_key(template, key):
            if key in METADATA:
                continue
            raise Rejected(Reason.UNKNOWN_KEY, f"{key!r} of role {message['role']}; remove it if it means nothing")
        if key == "content" and message["role"] == "assistant":
            yield key, value.strip()
        elif key == "tool_calls":
            yield key, [_call(call, as_text=template.takes_text) for call in value]
        elif key != "weight":
            yield key, value


def reads_key(template: ChatTemplate, key: str) -> bool:
    """Whether the source of a template names a key: as .key or 'key'."""
    if key not in template.keys:
        pattern = re.compile(rf"\.{re.escape(key)}\b|(['\"]){re.escape(key)}\1")
        template.keys[key] = any(pattern.search(source) for source in sources_of(template.tokenizer))
    return template.keys[key]


def _call(call: Mapping[str, Any], *, as_text: bool) -> Mapping[str, Any]:
    """A call with its arguments as an object, or as JSON."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call(call["function"], as_text=as_text)}
    given = call.get("arguments")
    if as_text and isinstance(given, Mapping):
        return {**call, "arguments": json.dumps(given, ensure_ascii=False)}
    return call if as_text or not isinstance(given, str) else {**call, "arguments": json.loads(given)}
