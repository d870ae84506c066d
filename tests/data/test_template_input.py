"""What rows and settings give a chat template: calls, keywords and keys of messages."""

import json

import chat_templates
import pytest
from talks import CALL, PLAIN, WITH_TOOLS, assistant, learned, rendered, user
from tiny import tiny_tokenizer

from fastrlhf.data import load_demonstrations, load_prompts
from fastrlhf.data.conversations import conversation
from fastrlhf.data.report import Reason, Rejected
from fastrlhf.data.template import Renderer
from fastrlhf.errors import DataError

TEXT_CALL = {**CALL, "function": {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}}
TAKES_CALLS = ("glm4moe", "gptoss", "llama3_1", "muse_glimmer", "nemotron_3_nano", "qwen2_5", "qwen3", "qwen3_5_think")


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.mark.parametrize("name", TAKES_CALLS)
def test_arguments_as_json_are_rendered_as_the_object_that_they_are(name):
    tokenizer = chat_templates.tokenizer_of(name)
    as_text = [{**m, "tool_calls": [TEXT_CALL]} if "tool_calls" in m else m for m in WITH_TOOLS]
    as_text, as_objects = ([{"content": "", **m} for m in talk] for talk in (as_text, WITH_TOOLS))
    tokens = Renderer(tokenizer).conversation(conversation(as_text)).ids
    assert tokens == Renderer(tokenizer).conversation(conversation(as_objects)).ids
    plain = rendered(tokenizer, as_objects)
    assert tokens[: len(plain)] == plain


@pytest.mark.parametrize("call", [CALL, TEXT_CALL])
def test_a_template_that_takes_arguments_as_text_only_gets_them_so(call):
    tokenizer = tiny_tokenizer()  # as DeepSeek's templates do
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}"
        "{{ call['function']['name'] + ':' + call['function']['arguments'] }}{% endfor %}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokens = Renderer(tokenizer).conversation(conversation([user("q"), assistant("", tool_calls=[call])]))
    assert learned(tokenizer, tokens) == ['add:{"a": 2, "b": 2}<eos>']


@pytest.mark.parametrize("arguments", ["", "{", "[1]", "3", [1], 3, "[" * 100_000])
def test_arguments_that_are_no_object_reject_the_row(arguments):
    call = {"function": {"name": "add", "arguments": arguments}}
    with pytest.raises(Rejected, match="arguments must be an object"):
        conversation([user("q"), assistant("", tool_calls=[call])])


def test_keywords_that_the_template_does_not_read_are_refused_with_those_that_it_reads(write):
    tokenizer = chat_templates.tokenizer_of("qwen3")
    wanted = r"does not read enable_thinkin \(did you mean enable_thinking\?\); it reads enable_thinking$"
    for _ in range(2):
        with pytest.raises(ValueError, match=wanted):
            load_prompts(
                write({"prompt": "q"}), tokenizer, max_prompt_tokens=99, template_kwargs={"enable_thinkin": False}
            )
    with pytest.raises(ValueError, match="it reads none"):
        Renderer(tiny_tokenizer(), keywords={"enable_thinking": False})
    with pytest.raises(ValueError, match="does not read content"):  # which it makes itself
        Renderer(tokenizer, keywords={"content": "a"})


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "tokenize", "chat_template", "padding"])
def test_keywords_of_transformers_itself_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"template_kwargs: {name} is not the template's"):
        Renderer(chat_templates.tokenizer_of("qwen3"), keywords={name: "a"})


@pytest.mark.parametrize(
    ("family", "keywords"),
    [
        ("llama3_1", {"date_string": "1 May 2025", "tools_in_user_message": False}),  # which it makes if not given
        ("nemotron_3_nano", {"enable_thinking": False, "truncate_history_thinking": False}),
        ("muse_glimmer", {"reasoning_strength": "low", "current_date": "2025-01-01"}),  # read in a macro
    ],
)
def test_keywords_that_a_template_makes_where_they_are_not_given_reach_it(family, keywords):
    tokenizer = chat_templates.tokenizer_of(family)
    renderer = Renderer(tokenizer, keywords=keywords)
    rendered_ = tokenizer.apply_chat_template([user("q")], add_generation_prompt=True, return_dict=False, **keywords)
    assert tokenizer.decode(renderer.prompt("q")) == tokenizer.decode(rendered_)


@pytest.mark.parametrize(
    "extra", [{"train": False}, {"loss_mask": 0}, {"prefix": True}, {"refusal": "no"}, {"audio": "x"}]
)
def test_a_key_of_a_message_that_nothing_reads_rejects_the_row_by_its_name(extra, write):
    tokenizer, (key,) = tiny_tokenizer(), extra
    rows = (
        {"messages": [user("q"), assistant("a", **extra)]},
        {"messages": [{**user("q"), **extra}, assistant("a")]},
        {"prompt": "q", "completion": [assistant("a", **extra)]},
    )
    for row in rows:
        with pytest.raises(DataError, match=f"{Reason.UNKNOWN_KEY} .*'{key}' of role"):
            load_demonstrations(write(row), tokenizer, max_tokens=99)
    for harmless in (dict.fromkeys(extra), {"id": 7, "timestamp": "now"}):
        row = {"messages": [user("q"), assistant("a", **harmless)]}
        assert len(load_demonstrations(write(row), tokenizer, max_tokens=99).rows) == 1


def test_a_key_of_a_message_that_the_template_reads_reaches_it():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content }}", "{{ m['mood'] }}{{ m.content }}", 1)
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['mood'] + m['content']", 1)
    assert "mood" in tokenizer.chat_template
    talk = [{**user("q"), "mood": "sad"}, PLAIN[1]]
    assert "sadq" in tokenizer.decode(Renderer(tokenizer).conversation(conversation(talk)).ids)


@pytest.mark.parametrize("part", [{"type": "image", "text": "a"}, {"type": "image"}, {"text": 1}, "a"])
def test_parts_that_are_no_text_reject_the_row(part):
    with pytest.raises(Rejected, match="a part that is not text"):
        conversation([{"role": "user", "content": [part]}, assistant("a")])
    assert (
        conversation([{"role": "user", "content": [{"text": "a"}, {"type": "text", "text": "b"}]}])[0]["content"]
        == "ab"
    )


@pytest.mark.parametrize("num", [2, 3, 4, 5])
def test_calls_of_glm_end_with_the_token_that_begins_what_the_tool_says(num):
    tokenizer, more = chat_templates.tokenizer_of("glm4moe"), {"role": "tool", "name": "add", "content": "5"}
    talks = {2: WITH_TOOLS[:2], 3: [*WITH_TOOLS[:3], WITH_TOOLS[1]], 4: WITH_TOOLS}
    talk = [{"content": "", **m} for m in talks.get(num, [*WITH_TOOLS[:3], more, WITH_TOOLS[3]])]
    marked = chat_templates.template("glm4moe_training")
    theirs = tokenizer.apply_chat_template(talk, chat_template=marked, return_assistant_tokens_mask=True)
    tokens = Renderer(tokenizer).conversation(talk)
    ours = [any(start <= n < stop for _, start, stop in tokens.turns) for n in range(len(tokens.ids))]
    assert (tokens.ids, ours) == (theirs["input_ids"], [mask == 1 for mask in theirs["assistant_masks"]])
