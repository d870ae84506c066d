"""What a row says: its prompt and its responses, checked, as text or as messages."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastrlhf.data.controls import texts_in
from fastrlhf.data.rendering import REASONING, Message
from fastrlhf.data.report import Reason, Rejected

Conversation = str | Sequence[Message]
Answer = str | Message  # a message where there is more to it than a text
# which roles may come after each
FOLLOWERS = {"system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
PLAIN = {"role", "content", "weight", "name", "tool_call_id", "thinking", "reasoning_content"}
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def conversation(value: Any) -> list[Message]:
    """The messages of [system,] user, assistant, user, ..., without fields that are null; after an assistant's message
    there may be those of tools, and after these the assistant's next."""
    if not isinstance(value, list):
        raise Rejected(Reason.NOT_A_MESSAGE, f"expected a list of messages, got {type(value).__name__}")
    if not value:
        raise Rejected(Reason.EMPTY_PROMPT)
    messages = [_message(item) for item in value]
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    for n, role in enumerate(turns):
        before = turns[n - 1] if n else "system"
        if role not in ("system", "user", "assistant", "tool"):
            raise Rejected(Reason.UNKNOWN_ROLE, repr(role))
        if role == "tool" and before not in ("assistant", "tool"):
            raise Rejected(Reason.UNKNOWN_ROLE, "'tool' where no message of the assistant is before it")
        if role not in FOLLOWERS[before]:
            raise Rejected(Reason.NOT_ALTERNATING, ", ".join(map(str, roles[: n + 2])))
    if not turns:
        raise Rejected(Reason.EMPTY_PROMPT, "only a system message")
    for message in messages:
        if message["role"] in ("user", "assistant") and not _says_something(message):
            raise Rejected(Reason.EMPTY_PROMPT if message["role"] == "user" else Reason.EMPTY_RESPONSE)
    return messages


def _says_something(message: Message) -> bool:
    return bool(message.get("content", "").strip() or message.get("tool_calls"))


def _message(item: Any) -> Message:
    if not isinstance(item, Mapping) or not isinstance(item.get("role"), str):
        raise Rejected(Reason.NOT_A_MESSAGE)
    message = {key: value for key, value in item.items() if value is not None}
    if message.get("weight", 1) not in (0, 1):
        raise Rejected(Reason.BAD_WEIGHT, repr(message["weight"]))
    if message.pop("function_call", None):
        raise Rejected(Reason.TOOL_CALL, "function_call; tool_calls has taken its place")
    calls = message.pop("tool_calls", None)
    if calls:
        _check_calls(message["role"], calls)
        message["tool_calls"] = calls
    thought = next((message[name] for name in REASONING if name in message), None)
    if thought is not None:
        if not isinstance(thought, str):
            raise Rejected(Reason.NOT_A_MESSAGE, f"its reasoning is of type {type(thought).__name__}")
        # templates read one name or the other
        message |= {"reasoning_content": _unicode(thought), "thinking": thought}
        message.pop("reasoning", None)
    if calls and "content" not in message:
        return message
    return {**message, "content": _content(message.get("content"))}


def _check_calls(role: str, calls: Any) -> None:
    """Raises Rejected unless these are the assistant's calls of tools by name."""
    if role != "assistant" or not isinstance(calls, list):
        raise Rejected(Reason.TOOL_CALL, f"tool_calls of {role}, of type {type(calls).__name__}")
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise Rejected(Reason.TOOL_CALL, "a call has no name of a function")
        _check_arguments(function.get("arguments"))
    for text in texts_in(calls):
        _unicode(text)


def _check_arguments(given: Any) -> None:
    """Raises Rejected unless these are an object or one as JSON, as OpenAI writes them."""
    if isinstance(given, str):
        with contextlib.suppress(ValueError, RecursionError):
            given = json.loads(given)
    if given is not None and not isinstance(given, Mapping):
        raise Rejected(Reason.TOOL_CALL, f"arguments must be an object, or one as JSON text, got {given!r:.60}")


def tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """The tools of a row, from its column `tools`: a list of objects, or such a list as JSON; None: it has none. What
    is something else is a column like any other."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.lstrip().startswith("["):
        try:
            tools = json.loads(tools)
        except ValueError:
            return None
    is_list = isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)
    return list(tools) if tools and is_list else None


def _content(content: Any) -> str:
    """The text of a message; a list of text parts is joined."""
    if isinstance(content, list):
        if not all(map(_is_text, content)):
            raise Rejected(Reason.NOT_A_MESSAGE, "its content has a part that is not text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Rejected(Reason.NOT_A_MESSAGE, f"its content is of type {type(content).__name__}")
    return _unicode(content)


def _is_text(part: Any) -> bool:
    typed = isinstance(part, Mapping) and (part.get("type") or "text") in ("text", "input_text", "output_text")
    return typed and isinstance(part.get("text"), str)


def _unicode(text: str) -> str:
    """The text, unless it has half a surrogate pair, which JSON can write and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejected(Reason.NOT_UNICODE, f"{text[error.start]!a} at character {error.start}") from None
    return text


def text_of(value: Any, empty: Reason) -> str:
    """A text that is not empty."""
    if not isinstance(value, str):
        raise Rejected(Reason.NOT_TEXT, f"got {type(value).__name__}")
    if not value.strip():
        raise Rejected(empty)
    return _unicode(value)


def prompt_of(value: Any) -> Conversation:
    """A prompt: a text, or messages of which the last is the user's."""
    if not isinstance(value, list):
        return text_of(value, Reason.EMPTY_PROMPT)
    messages = conversation(value)
    if messages[-1]["role"] not in ("user", "tool"):
        raise Rejected(Reason.USER_NOT_LAST)
    return messages


def response_of(value: Any) -> Answer:
    """A response: a text, or messages of which there is one, the assistant's; that message where there is more to it
    than a text."""
    if isinstance(value, list):
        if not value:
            raise Rejected(Reason.EMPTY_RESPONSE)
        message = _message(value[0])
        if len(value) > 1 or message["role"] != "assistant":
            raise Rejected(Reason.NOT_ONE_ANSWER)
        return _answer(message)
    return text_of(value, Reason.EMPTY_RESPONSE)


def _answer(message: Message) -> Answer:
    if any(message.get(name) for name in ("tool_calls", *REASONING)) or message.keys() - PLAIN:
        return message
    return text_of(message["content"], Reason.EMPTY_RESPONSE)


def messages_of(prompt: Conversation) -> list[Message]:
    """A prompt as messages: a text is one message of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def answer_message(answer: Answer) -> Message:
    """A response as the assistant's message."""
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer


def only_text(answer: Answer) -> str:
    """A response as text. Raises: Rejected for one that has more to it."""
    if not isinstance(answer, str):
        raise Rejected(Reason.NOT_TEXT, "a response that is more than a text: reasoning, tool calls or other keys")
    return answer


def message_text(message: Message) -> str:
    """What a message says to who reads it as text: its content, and the tools that it calls."""
    calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join([*([message["content"]] if message.get("content") else []), *calls])


def preference_of(row: Mapping[str, Any], *, chat: bool) -> tuple[Conversation, Answer, Answer]:
    """(prompt, chosen, rejected) of a preference row.

    chat: HH-RLHF text becomes messages; otherwise it stays text"""
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = prompt_of(row["prompt"]) if "prompt" in row else None
    if isinstance(chosen, list) and isinstance(rejected, list) and (prompt is None or len(chosen) > 1):
        return _whole_conversations(chosen, rejected, prompt)
    if prompt is not None:
        return prompt, response_of(chosen), response_of(rejected)
    texts = text_of(chosen, Reason.EMPTY_RESPONSE), text_of(rejected, Reason.EMPTY_RESPONSE)
    if all(ASSISTANT in text for text in texts):
        return _human_assistant(*texts, chat=chat)
    if chat or any(ASSISTANT in text for text in texts):
        raise Rejected(Reason.NO_PROMPT)
    return _common_start(*texts)


def _whole_conversations(
    chosen: list[Any], rejected: list[Any], prompt: Conversation | None
) -> tuple[Conversation, Answer, Answer]:
    """Both sides hold the prompt; where there is a prompt column too, it must say the same."""
    good, bad = conversation(chosen), conversation(rejected)
    if good[-1]["role"] != "assistant" or bad[-1]["role"] != "assistant":
        raise Rejected(Reason.ASSISTANT_NOT_LAST)
    if good[:-1] != bad[:-1]:
        raise Rejected(Reason.PROMPTS_DIFFER)
    if prompt is not None and prompt not in (good[:-1], good[-2].get("content")):
        raise Rejected(Reason.PROMPTS_DIFFER, "the prompt column is not what stands before the responses")
    return good[:-1], _answer(good[-1]), _answer(bad[-1])


def _human_assistant(chosen: str, rejected: str, *, chat: bool) -> tuple[Conversation, str, str]:
    """HH-RLHF text, each side cut at its own last Assistant: turn: cutting both at that of the chosen side is wrong
    where the prompts differ."""
    (prompt, good), (other, bad) = _cut_at_last_answer(chosen), _cut_at_last_answer(rejected)
    if prompt != other:
        raise Rejected(Reason.PROMPTS_DIFFER)
    messages = _turns(prompt)
    good, bad = text_of(good, Reason.EMPTY_RESPONSE), text_of(bad, Reason.EMPTY_RESPONSE)
    return (messages if chat else prompt), good, bad


def _cut_at_last_answer(text: str) -> tuple[str, str]:
    start = text.rindex(ASSISTANT) + len(ASSISTANT)
    if HUMAN in text[start:]:
        raise Rejected(Reason.ASSISTANT_NOT_LAST)
    return text[:start], text[start:]


def _turns(prompt: str) -> list[Message]:
    """The messages of an HH-RLHF prompt, which ends with an open Assistant: turn."""
    turns: list[Message] = []
    for piece in prompt.removesuffix(ASSISTANT).split("\n\n"):
        if piece.startswith(("Human:", "Assistant:")):
            role, _, content = piece.partition(":")
            turns.append({"role": "user" if role == "Human" else "assistant", "content": content.strip()})
        elif turns:
            turns[-1] = {**turns[-1], "content": f"{turns[-1]['content']}\n\n{piece}".strip()}
        elif piece.strip():
            raise Rejected(Reason.TEXT_BEFORE_TURNS)
    messages = conversation(turns)
    if messages[-1]["role"] != "user":
        raise Rejected(Reason.NOT_ALTERNATING, "two Assistant: turns in a row")
    return messages


def _common_start(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Plain texts: the prompt is their common start, cut where its last white space begins a word."""
    same = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    start = min(chosen, rejected, key=len)[:same]
    cut = max((n for n, letter in enumerate(start) if letter.isspace()), default=0)
    if not start[:cut].strip():
        raise Rejected(Reason.EMPTY_PROMPT, "chosen and rejected have no common start")
    return start[:cut], text_of(chosen[cut:], Reason.EMPTY_RESPONSE), text_of(rejected[cut:], Reason.EMPTY_RESPONSE)
