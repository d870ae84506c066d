"""Templates of published models: our tokens are those of transformers, our masks those of trl's training variants."""

import copy
import inspect
import re
from datetime import date

import chat_templates
import pytest
from talks import (
    PLAIN,
    TALKS,
    TOOL,
    WITH_TOOLS,
    ZEPHYR,
    assistant,
    learned,
    mistral,
    rendered,
    sentencepiece_like,
    user,
)
from tiny import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastrlhf.commands.feedback.constitution import Principle, ask_critique
from fastrlhf.data import Reason, Rejected, load_demonstrations, load_labelled, load_pairs, load_prompts
from fastrlhf.data.controls import Quoted
from fastrlhf.data.conversations import conversation
from fastrlhf.data.rendering import DATE, NO_CLOCK
from fastrlhf.data.template import Renderer, end_of_turn

MULTIMODAL = ("idefics3", "llava_next")  # want contents in parts
FAMILIES = [name for name in chat_templates.names() if name not in MULTIMODAL]
REASONING = ("glm4moe", "gptoss", "lfm2_2_5", "muse_glimmer", "nemotron_3_nano", "qwen3", "qwen3_5_think", "gemma4_v5")
TOOLS = (*REASONING, "llama3_1", "qwen2_5")


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_are_those_of_the_template_and_masks_hold_the_answers_with_their_ends(name, talk):
    tokenizer, messages = chat_templates.tokenizer_of(name), TALKS[talk]
    renderer = Renderer(tokenizer)
    if (name, talk) == ("gemma", "system"):
        with pytest.raises(Rejected, match="System role not supported"):
            renderer.conversation(messages)
        return
    tokens = renderer.conversation(messages)
    whole = rendered(tokenizer, messages)
    end = [tokenizer.convert_tokens_to_ids("<|user|>")] if name == "glm4moe" else []  # which only begins the next turn
    assert tokens.ids == whole + end
    assert tokens.ids[tokens.turns[-1][2] - 1] == renderer.end
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    for text, answer in zip(learned(tokenizer, tokens), answers, strict=True):
        assert text.count(answer) == 1 and "two plus two?" not in text
    prompt = rendered(tokenizer, messages[:-1], add_generation_prompt=True)
    assert renderer.prompt(messages[:-1]) == prompt
    if not renderer.notes:  # training goes on just where sampling starts
        assert tokens.ids[: tokens.turns[-1][1]] == prompt


@pytest.mark.parametrize("talk", ["plain", "turns", "system"])
@pytest.mark.parametrize("name", chat_templates.names(training=True))
def test_masks_are_those_of_generation_marks(name, talk):
    tokenizer, messages = chat_templates.tokenizer_of(name), TALKS[talk]
    marked = chat_templates.template(f"{name}_training").replace("strftime_now", "now")
    options = {"chat_template": NO_CLOCK.replace("strftime_now", "now") + marked, "date_string": DATE}
    if (name, talk) == ("gemma", "system"):
        return
    theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
    tokens = Renderer(tokenizer).conversation(messages)
    if theirs["input_ids"] != tokens.ids[: len(theirs["input_ids"])]:
        assert (name, talk) == ("qwen3_5_think", "turns")  # its variant keeps the reasoning of earlier turns
        return
    ours = [any(start <= n < stop for _, start, stop in tokens.turns) for n in range(len(theirs["input_ids"]))]
    rest = ""
    for token, mine, other in zip(theirs["input_ids"], ours, theirs["assistant_masks"], strict=True):
        if mine and not other:  # what the template writes between its generation prompt and the answer
            assert name in ("glm4moe", "muse_glimmer", "gptoss"), (name, tokenizer.decode([token]))
        if other and not mine:
            rest += tokenizer.decode([token])
    # they also take the line feed behind a turn, EOS behind the last, or what the generation prompt gives away
    special = "|".join(map(re.escape, [*tokenizer.all_special_tokens, "<think>"]))
    assert re.sub(special, "", rest).replace("assistant", "").strip() == ""


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_that_spell_control_tokens_are_text(name):
    tokenizer = chat_templates.tokenizer_of(name)
    renderer = Renderer(tokenizer)
    # Gemma 4's template takes its marks of reasoning out of answers
    spelled = "".join(sorted(text for text in renderer.controls.texts if "channel" not in text))
    control = {renderer.controls.ids[text] for text in renderer.controls.texts}
    plain, hostile = ([user(f"a {text} b"), assistant(f"c {text} d")] for text in ("x", spelled))
    tokens, wanted = renderer.conversation(hostile), renderer.conversation(plain)
    assert [i for i in tokens.ids if i in control] == [i for i in wanted.ids if i in control]
    whole = tokenizer.decode(rendered(tokenizer, hostile))
    assert tokenizer.decode(tokens.ids).startswith(whole)
    assert spelled in learned(tokenizer, tokens)[0]
    prompt = renderer.prompt(hostile[:1])
    assert [i for i in prompt if i in control] == [i for i in renderer.prompt(plain[:1]) if i in control]
    if "sanitize_control_tokens" in inspect.signature(tokenizer.apply_chat_template).parameters:
        assert prompt == rendered(tokenizer, hostile[:1], add_generation_prompt=True, sanitize_control_tokens=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_reasoning_is_rendered_where_the_template_knows_it_and_else_rejected_by_name(name):
    tokenizer, renderer = chat_templates.tokenizer_of(name), Renderer(chat_templates.tokenizer_of(name))
    for key in ("reasoning_content", "thinking"):
        messages = conversation([user("2 + 2?"), assistant("4", **{key: "adding two numbers"})])
        if name in REASONING:
            tokens = renderer.conversation(messages)
            assert tokenizer.decode(tokens.ids).startswith(tokenizer.decode(rendered(tokenizer, messages)))
            (text,) = learned(tokenizer, tokens)
            assert text.index("adding two numbers") < text.index("4")
        else:
            with pytest.raises(Rejected, match=r"reasoning of the last answer \(reasoning_content") as error:
                renderer.conversation(messages)
            assert error.value.reason == Reason.NOT_RENDERED


@pytest.mark.parametrize("name", FAMILIES)
def test_tools_are_rendered_where_the_template_knows_them_and_else_rejected(name):
    tokenizer, renderer = chat_templates.tokenizer_of(name), Renderer(chat_templates.tokenizer_of(name))
    tools, messages = [{"type": "function", "function": TOOL}], conversation(WITH_TOOLS)
    if name not in TOOLS:
        with pytest.raises(Rejected):
            renderer.conversation(messages, tools)
        return
    tokens = renderer.conversation(messages, tools)
    whole = rendered(tokenizer, messages, tools=tools)
    assert tokens.ids[: len(whole)] == whole
    call, answer = learned(tokenizer, tokens)
    assert "add" in call and "It is 4." in answer and "It is 4." not in call
    assert "4" not in call
    prompt = renderer.prompt(messages[:3], tools)
    assert prompt == rendered(tokenizer, messages[:3], tools=tools, add_generation_prompt=True)


def test_reasoning_within_an_answer_is_kept_or_the_row_rejected():
    messages = [user("2 + 2?"), assistant("<think>\nadding\n</think>\n\n4")]
    for name in ("qwen3", "qwen2_5"):
        tokenizer = chat_templates.tokenizer_of(name)
        tokens = Renderer(tokenizer).conversation(messages)
        assert tokens.ids == rendered(tokenizer, messages)
        assert tokenizer.convert_tokens_to_ids("<think>") in tokens.ids[tokens.turns[0][1] :]
    with pytest.raises(Rejected, match="reasoning of the last answer"):  # which the template cuts off
        Renderer(chat_templates.tokenizer_of("deepseek_r1_distill")).conversation(messages)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_template_that_cannot_be_followed_is_refused_in_one_line(name):
    tokenizer = chat_templates.tokenizer_of(name)
    with pytest.raises(
        ValueError, match=r"^template: the chat template of .* (fails|writes the assistant's answer 0)[^\n]*$"
    ):
        Renderer(tokenizer)
    Renderer(tokenizer, "none")


def test_a_template_that_changes_or_repeats_answers_is_refused():
    tokenizer = tiny_tokenizer()
    for change, why in (("{{ m.content | upper }}", "0 times"), ("{{ m.content * 2 }}", "2 times")):
        tokenizer.chat_template = tiny_tokenizer().chat_template.replace("{{ m.content }}", change)
        with pytest.raises(ValueError, match=f"writes the assistant's answer {why}"):
            Renderer(tokenizer)
    tokenizer.chat_template = tiny_tokenizer().chat_template.replace("{{ m.content }}", "{{ m.content[:20] }}")
    with pytest.raises(Rejected) as error:
        Renderer(tokenizer).conversation([user("q"), assistant("a" * 30)])
    assert error.value.reason == Reason.TEMPLATE_REWRITES


def test_an_error_inside_a_template_rejects_the_row_with_its_kind(write):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages[0].content == 'bad' %}{{ 1 + 'a' }}{% endif %}" + tokenizer.chat_template
    loaded = load_prompts(write({"prompt": "bad"}, {"prompt": "q"}), tokenizer, max_prompt_tokens=9, max_rejected=1)
    assert loaded.report.rejected == {Reason.TEMPLATE_REFUSES: [1]} and "TypeError: " in str(loaded.report)


def test_the_shared_prompt_of_a_pair_joins_to_what_the_template_renders(write):
    tokenizer = chat_templates.tokenizer_of("qwen3_5_think")
    (pair,) = load_pairs(write({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}), tokenizer, max_tokens=999).rows
    for answer, response in (("Hello", pair.chosen), ("No", pair.rejected)):
        whole = rendered(tokenizer, [user("Hi"), assistant(answer)])
        assert pair.prompt + response == whole[: len(pair.prompt + response)]
        assert response[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert tokenizer.decode(whole[len(pair.prompt + response) :]) == "\n"
    assert tokenizer.decode(pair.prompt).endswith("<|im_start|>assistant\n<think>\n")


def test_a_token_across_the_border_belongs_to_the_responses(write):
    names = {name: n for name, n in tiny_tokenizer().get_vocab().items() if n < 298} | {"xn": 298, "xy": 299}
    backend = Tokenizer(models.BPE(vocab=names, merges=[("x", "y")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|user|>", "<|assistant|>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", additional_special_tokens=special)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ 'x' if m.role == 'assistant' }}{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>x{% endif %}"
    )
    row = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    (pair,) = load_pairs(write(row), tokenizer, max_tokens=99).rows
    assert [tokenizer.decode(each) for each in (pair.prompt, pair.chosen, pair.rejected)] == [
        "<|user|>q<eos><|assistant|>",
        "xyes<eos>",
        "xno<eos>",
    ]
    row = {"prompt": "q", "completion": "yes", "label": True, "finished": False}
    (labelled,) = load_labelled(write(row), tokenizer, max_tokens=99).rows
    assert tokenizer.decode(labelled.response) == "xyes"
    (plain,) = load_pairs(
        write({**row, "prompt": "x", "chosen": "y", "rejected": "z"}), tokenizer, max_tokens=99, template="none"
    ).rows
    assert (plain.prompt, tokenizer.decode(plain.chosen)) == ([], "xy<eos>")


def test_open_reasoning_in_the_generation_prompt_is_said(write):
    row = write({"prompt": "q"})
    for name in ("deepseek_r1_distill", "qwen3_5_think", "nemotron_3_nano"):
        report = load_prompts(row, chat_templates.tokenizer_of(name), max_prompt_tokens=999).report
        assert sum("<think>" in note and "generation prompt" in note for note in report.notes) == 1
    options = {"max_prompt_tokens": 999, "template_kwargs": {"enable_thinking": False}}
    assert load_prompts(row, chat_templates.tokenizer_of("qwen3_5_think"), **options).report.notes == []
    assert load_prompts(row, chat_templates.tokenizer_of("llama3"), max_prompt_tokens=999).report.notes == []


def test_keywords_reach_the_template(write):
    tokenizer = chat_templates.tokenizer_of("qwen3")
    keywords = {"enable_thinking": False}
    (row,) = load_prompts(write({"prompt": "q"}), tokenizer, max_prompt_tokens=99, template_kwargs=keywords).rows
    assert row.tokens == rendered(tokenizer, [user("q")], add_generation_prompt=True, enable_thinking=False)
    assert tokenizer.decode(row.tokens).endswith("<think>\n\n</think>\n\n")
    with pytest.raises(ValueError, match="template_kwargs: they are the chat template's, and there is none"):
        load_prompts(write({"prompt": "q"}), tokenizer, max_prompt_tokens=99, template="none", template_kwargs=keywords)


@pytest.mark.parametrize("name", ["gptoss", "muse_glimmer"])
def test_a_template_that_asks_for_the_date_gets_the_same_one_every_day(name):
    text = chat_templates.tokenizer_of(name).decode(Renderer(chat_templates.tokenizer_of(name)).prompt("q"))
    assert "Current date: 2024-07-26" in text
    tokenizer = tiny_tokenizer()
    formats = ("%d %b %Y", "%A, %B %-d, %y", "%Y-%m-%d", "%H:%M")
    shown = "|".join("{{ strftime_now('" + form + "') }}" for form in formats)
    tokenizer.chat_template = "  \n" + shown + tokenizer.chat_template
    day = date(2024, 7, 26)
    expected = "|".join([*(day.strftime(form) for form in formats[:3]), "00:00"])
    assert tokenizer.decode(Renderer(tokenizer).prompt("q")) == f"  \n{expected}<|user|>q<eos><|assistant|>"


def test_a_template_without_an_end_token_gets_eos_behind_its_text(write):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}[end]\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokens = Renderer(tokenizer).conversation([user("q"), assistant("a"), user("r"), assistant("b")])
    assert tokenizer.decode(tokens.ids) == "user: q[end]\nassistant: a[end]\nuser: r[end]\nassistant: b[end]<eos>"
    assert learned(tokenizer, tokens) == ["a[end]", "b[end]<eos>"]
    (note,) = load_demonstrations(write({"prompt": "q", "completion": "a"}), tokenizer, max_tokens=99).report.notes
    assert "no token of the tokenizer, so <eos> is put behind" in note


def test_rows_say_what_they_hold_that_the_template_does_not_render(write):
    tokenizer = chat_templates.tokenizer_of("llama3")
    rows = [
        {"messages": PLAIN, "tools": [TOOL]},
        {"messages": WITH_TOOLS},
        {"messages": [user("q"), assistant("a", reasoning_content="r")]},
        {"messages": [user("q"), assistant("a", tool_calls=[], reasoning_content=None)], "tools": []},
    ]
    loaded = load_demonstrations(write(*rows), tokenizer, max_tokens=999, max_rejected=1)
    assert loaded.report.rejected == {Reason.NOT_RENDERED: [1, 2, 3]}
    assert "does not render what a message has (first row 1: tools)" in str(loaded.report)
    (row,) = loaded.rows
    assert row.tokens == rendered(tokenizer, [user("q"), assistant("a")])


def test_responses_with_reasoning_are_compared_with_it(write):
    tokenizer = chat_templates.tokenizer_of("qwen3")
    sides = [[assistant("4", reasoning_content=text)] for text in ("adding", "guessing")]
    (pair,) = load_pairs(
        write({"prompt": "2 + 2?", "chosen": sides[0], "rejected": sides[1]}), tokenizer, max_tokens=999
    ).rows
    assert tokenizer.decode(pair.chosen) == "<think>\nadding\n</think>\n\n4<|im_end|>"
    assert tokenizer.decode(pair.rejected) == "<think>\nguessing\n</think>\n\n4<|im_end|>"


def test_control_tokens_of_plain_prompts_stay_but_not_those_of_quotes():
    tokenizer = tiny_tokenizer()
    renderer = Renderer(tokenizer, "none")
    assert renderer.prompt("<|user|>q<eos>") == tokenizer("<|user|>q<eos>").input_ids
    quoted = renderer.prompt(Quoted.of(("<|user|>", False), ("q<eos>", True)))
    assert quoted[0] == tokenizer.convert_tokens_to_ids("<|user|>") and tokenizer.eos_token_id not in quoted
    assert tokenizer.decode(quoted) == "<|user|>q<eos>"


def test_a_control_token_that_cannot_be_written_as_text_rejects_the_row():
    backend = Tokenizer(models.WordLevel({"§": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="§", unk_token="[UNK]")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}§{% endfor %}"
    with pytest.raises(Rejected) as error:
        Renderer(tokenizer).prompt("a§a")
    assert error.value.reason == Reason.SPELLS_CONTROL


def test_role_tokens_that_are_not_special_cannot_be_forged():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<role>", "<think>"])
    tokenizer.chat_template = "{% for m in messages %}<role>{{ m.content }}<eos>{% endfor %}"
    tokens = Renderer(tokenizer).conversation([user("<role><think>"), assistant("<think><role>")])
    role, think = tokenizer.convert_tokens_to_ids(["<role>", "<think>"])
    assert tokens.ids.count(role) == 2 and tokens.ids.count(think) == 2


def forms(text):
    """The text, and those that NFKC makes it of."""
    return [
        text,
        text.translate({ord(c): ord(c) + 0xFEE0 for c in "<|>"}),
        text.translate({ord(c): ord(c) + 0xFEE0 for c in "|er"}),
    ]


@pytest.mark.parametrize("slow", [False, True])
def test_control_tokens_that_a_normaliser_makes_are_text(slow):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken("<|end|>", normalized=True, special=True)])
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    end, renderer = tokenizer.convert_tokens_to_ids("<|end|>"), Renderer(Slow(tokenizer) if slow else tokenizer)
    for form in forms("<|end|>"):
        assert tokenizer(form).input_ids == [end]  # so it is read where nobody looks
        if slow and form != "<|end|>":
            with pytest.raises(Rejected, match="SPELLS_CONTROL"):
                renderer.prompt(f"q{form}r")
            continue
        assert renderer.prompt(f"q{form}r").count(end) == 1
        tokens = renderer.conversation([user(f"q {form}"), assistant(f"{form}a{form}b")])
        assert tokens.ids.count(end) == 2 and len(tokens.turns) == 1
        assert tokenizer.decode(tokens.ids[slice(*tokens.turns[0][1:])]) == "<|end|>a<|end|>b<|end|>"
        quoted = Renderer(tokenizer, "none").prompt(Quoted.of((f"{form}q", False), (form, True)))
        assert quoted[0] == end and quoted.count(end) == 1  # a text that was rendered keeps its own
    both = [user("q"), assistant("a")]
    assert Renderer(tokenizer).conversation(both).ids == rendered(tokenizer, both)


@pytest.mark.parametrize("slow", [False, True])
def test_no_control_token_is_joined_of_two_texts(slow):
    tokenizer = tiny_tokenizer()
    given, eos = Slow(tokenizer) if slow else tokenizer, tokenizer.eos_token_id
    plain = Renderer(given, "none")
    for start, quote in (("q<eo", "s>r"), ("q<", "eos>"), ("<eos", ">")):
        for parts in ([(start, False), (quote, True)], [(start, True), (quote, False)], [(start, True), (quote, True)]):
            ids = plain.prompt(Quoted.of(*parts))
            assert eos not in ids and tokenizer.decode(ids) == start + quote
    principle = Principle("p", "Criticise.", "Revise.")
    assert eos not in plain.prompt(ask_critique("Say <eo", "s>", principle, chat=False))
    start, (answer,) = plain.answers(Quoted.of(("<eo", True), ("s>", True)), ["a"], [True])
    assert start + answer == [*plain.prompt(Quoted.of(("<eo", True), ("s>", True))), *tokenizer("a<eos>").input_ids]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}<eos>"  # nothing between messages
    chat = Renderer(given)
    assert chat.prompt([user("<eo"), assistant("s>"), user("r")]).count(eos) == 1
    tokens = chat.conversation([user("q<eo"), assistant("s>r")])
    assert tokens.ids.count(eos) == 1 and tokenizer.decode(tokens.ids) == "q<eos>r<eos>"
    assert tokenizer.decode(tokens.ids[tokens.turns[0][1] :]) == "s>r<eos>"


def test_words_that_a_vocabulary_lacks_are_no_control_tokens():
    backend = Tokenizer(models.WordLevel({"§": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="§", unk_token="[UNK]")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}§{% endfor %}"
    messages = [user("a new word"), assistant("another a")]
    assert Renderer(tokenizer).conversation(messages).ids == rendered(tokenizer, messages)


def test_a_template_is_tried_once_a_tokenizer_and_again_once_either_changes(monkeypatch):
    tokenizer, tried = tiny_tokenizer(), []
    render = type(tokenizer).apply_chat_template
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", lambda *a, **k: tried.append(0) or render(*a, **k))
    tokenizer.chat_template = "{{ a }}" + tokenizer.chat_template
    first = Renderer(tokenizer)
    once = len(tried)
    assert once > 0 and end_of_turn(tokenizer) == Renderer(tokenizer).end == first.end and len(tried) == once
    Renderer(tokenizer, keywords={"a": 1})
    Renderer(tiny_tokenizer())
    assert len(tried) == 3 * once
    tokenizer.chat_template = tokenizer.chat_template + " "
    Renderer(tokenizer)
    assert len(tried) == 4 * once
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    for _ in range(2):
        with pytest.raises(ValueError, match="answer 0 times"):
            Renderer(tokenizer)
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    before = len(tried)
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id and len(tried) == before
    assert copy.deepcopy(tokenizer)("q").input_ids == tokenizer("q").input_ids


class Slow:
    """A tokenizer that tells no places of its tokens."""

    is_fast, backend_tokenizer = False, None

    def __init__(self, tokenizer):
        self.inner = tokenizer

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, text, **options):
        return self.inner(text, **options)


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gptoss"])
def test_a_slow_tokenizer_gives_the_same_tokens_and_masks(name):
    tokenizer = chat_templates.tokenizer_of(name)
    for messages in (
        TALKS["turns"],
        [user("a <|im_end|><|eot_id|><|end|>"), assistant("b<|im_end|><|eot_id|><|end|>")],
    ):
        assert Renderer(Slow(tokenizer)).conversation(messages) == Renderer(tokenizer).conversation(messages)


LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [ZEPHYR, LLAMA2])
@pytest.mark.parametrize("vocabulary", ["like", "mistral"])
def test_sentencepiece_adds_no_space_of_its_own(tmp_path, write, vocabulary, template):
    tokenizer = mistral(tmp_path) if vocabulary == "mistral" else sentencepiece_like()
    tokenizer.chat_template = template
    for messages in ([user("hi"), assistant("Blue.")], [user("a"), assistant("b"), user("c"), assistant("Blue  a")]):
        (row,) = load_demonstrations(write({"messages": messages}), tokenizer, max_tokens=99).rows
        assert row.tokens == rendered(tokenizer, messages)
        texts = [m["content"] + "</s>" for m in messages if m["role"] == "assistant"]
        last = [i for i, learned in zip(row.tokens, row.response_mask, strict=True) if learned]
        assert tokenizer.decode(last).replace(" ", "") == "".join(texts).replace(" ", "")
    renderer = Renderer(tokenizer)
    assert (
        renderer.prompt("hi") + renderer.response("Blue.")
        == rendered(tokenizer, [user("hi"), assistant("Blue.")])[
            : len(renderer.prompt("hi") + renderer.response("Blue."))
        ]
    )
    hostile = renderer.conversation([user("hi</s>"), assistant("Blue</s>a")])
    assert hostile.ids.count(tokenizer.eos_token_id) == renderer.conversation(
        [user("hi"), assistant("Blue")]
    ).ids.count(tokenizer.eos_token_id)
    assert "Blue</s>a</s>" in tokenizer.decode(hostile.ids).replace(" ", "")
    plain = Renderer(tokenizer, "none")
    start, (answer,) = plain.answers("A: ", ["Blue."], [True])
    assert start + answer == [*tokenizer("A: Blue.").input_ids, tokenizer.eos_token_id]
