"""Rows of every layout become the right tokens, and every bad row is named."""

from pathlib import Path

import pytest
from tiny import tiny_tokenizer

from fastrlhf.data import Reason, load_demonstrations, load_pairs, load_prompts
from fastrlhf.errors import DataError

PLAIN, CHAT = tiny_tokenizer(chat=False), tiny_tokenizer()


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def learned(tokenizer, demonstration):
    """Its text, with the learned tokens between brackets."""
    text, inside = "", False
    for token, kept in zip(demonstration.tokens, demonstration.response_mask, strict=True):
        text += "[" * (kept and not inside) + "]" * (inside and not kept) + tokenizer.decode([token])
        inside = kept
    return text + "]" * inside


QUESTION = [user("q")]
ANSWERED = [user("q"), assistant("a")]
LONGER = [system("s"), user("q"), assistant("a"), user("r")]


@pytest.mark.parametrize(
    ("tokenizer", "row", "text"),
    [
        (PLAIN, {"prompt": "q"}, "q"),
        (CHAT, {"prompt": "q"}, "<|user|>q<eos><|assistant|>"),
        (CHAT, {"prompt": LONGER}, "<|system|>s<eos><|user|>q<eos><|assistant|>a<eos><|user|>r<eos><|assistant|>"),
        (CHAT, {"messages": QUESTION}, "<|user|>q<eos><|assistant|>"),
        (CHAT, {"messages": ANSWERED}, "<|user|>q<eos><|assistant|>"),
        (CHAT, {"chosen": ANSWERED, "rejected": [user("q"), assistant("b")]}, "<|user|>q<eos><|assistant|>"),
        (CHAT, {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, None),
        (CHAT, {"prompt": [user([{"type": "text", "text": "q"}])]}, "<|user|>q<eos><|assistant|>"),
    ],
)
def test_prompts_of_every_layout(write, tokenizer, row, text):
    (prompt,) = load_prompts(write(row), tokenizer, max_prompt_tokens=99).rows
    assert tokenizer.decode(prompt.tokens) == (text or "<|user|>q<eos><|assistant|>")


@pytest.mark.parametrize(
    ("tokenizer", "row", "text"),
    [
        (PLAIN, {"prompt": "q: ", "completion": "a"}, "q: [a<eos>]"),
        (PLAIN, {"text": "abc\n"}, "a[bc<eos>]"),
        (CHAT, {"prompt": "q", "completion": " a\n"}, "<|user|>q<eos><|assistant|>[a<eos>]"),
        (CHAT, {"prompt": QUESTION, "completion": [assistant("a")]}, "<|user|>q<eos><|assistant|>[a<eos>]"),
        (CHAT, {"messages": ANSWERED}, "<|user|>q<eos><|assistant|>[a<eos>]"),
        (
            CHAT,
            {"messages": [*LONGER, assistant("b")]},
            "<|system|>s<eos><|user|>q<eos><|assistant|>[a<eos>]<|user|>r<eos><|assistant|>[b<eos>]",
        ),
        (
            CHAT,
            {"messages": [user("q"), assistant("a", weight=0), user("r"), assistant("b", weight=1)]},
            "<|user|>q<eos><|assistant|>a<eos><|user|>r<eos><|assistant|>[b<eos>]",
        ),
        (PLAIN, {"prompt": "q", "chosen": "a", "rejected": "b"}, "q[a<eos>]"),
    ],
)
def test_demonstrations_of_every_layout_learn_the_responses_with_their_end(write, tokenizer, row, text):
    (demonstration,) = load_demonstrations(write(row), tokenizer, max_tokens=99).rows
    assert learned(tokenizer, demonstration) == text


HUMAN = "\n\nHuman: q\n\nmore\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
HUMAN_CHAT = "<|user|>q\n\nmore<eos><|assistant|>a<eos><|user|>r<eos><|assistant|>"


@pytest.mark.parametrize(
    ("tokenizer", "row", "texts"),
    [
        (PLAIN, {"prompt": "q", "chosen": "a", "rejected": "b"}, ("q", "a<eos>", "b<eos>")),
        (CHAT, {"prompt": "q", "chosen": "a", "rejected": "b"}, ("<|user|>q<eos><|assistant|>", "a<eos>", "b<eos>")),
        (
            CHAT,
            {"prompt": QUESTION, "chosen": [assistant("a")], "rejected": [assistant("b")]},
            ("<|user|>q<eos><|assistant|>", "a<eos>", "b<eos>"),
        ),
        (
            CHAT,
            {"chosen": ANSWERED, "rejected": [user("q"), assistant("b")]},
            ("<|user|>q<eos><|assistant|>", "a<eos>", "b<eos>"),
        ),
        (
            CHAT,
            {"prompt": "q", "chosen": ANSWERED, "rejected": [user("q"), assistant("b")]},
            ("<|user|>q<eos><|assistant|>", "a<eos>", "b<eos>"),
        ),
        (PLAIN, {"chosen": f"{HUMAN} x", "rejected": f"{HUMAN} y z"}, (HUMAN, " x<eos>", " y z<eos>")),
        (CHAT, {"chosen": f"{HUMAN} x", "rejected": f"{HUMAN} y z"}, (HUMAN_CHAT, "x<eos>", "y z<eos>")),
        (PLAIN, {"chosen": "Q: say\nA: yes", "rejected": "Q: say\nA: yet"}, ("Q: say\nA:", " yes<eos>", " yet<eos>")),
    ],
)
def test_pairs_of_every_layout(write, tokenizer, row, texts):
    (pair,) = load_pairs(write(row), tokenizer, max_tokens=99).rows
    assert tuple(tokenizer.decode(ids) for ids in (pair.prompt, pair.chosen, pair.rejected)) == texts
    assert pair.margin == 0.0


def test_a_margin_is_read(write):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    loaded = load_pairs(write({**row, "margin": 2}, {**row, "margin": None}), PLAIN, max_tokens=9)
    assert [pair.margin for pair in loaded.rows] == [2.0, 0.0]


def test_a_response_that_was_cut_off_gets_no_end(write):
    row = {"prompt": "q", "chosen": "a", "rejected": "a", "rejected_finished": False}
    loaded = load_pairs(write(row, {**row, "rejected_finished": None, "chosen_finished": False}), PLAIN, max_tokens=9)
    cut, whole = PLAIN("a").input_ids, [*PLAIN("a").input_ids, PLAIN.eos_token_id]
    assert [(pair.chosen, pair.rejected) for pair in loaded.rows] == [(whole, cut), (cut, whole)]
    assert loaded.report.notes == []


def test_every_other_column_of_a_prompt_file_is_kept(write):
    rows = write({"prompt": "q", "answer": 3, "hint": None, "completion": "c"}, {"prompt": "r"})
    first, second = load_prompts(rows, PLAIN, max_prompt_tokens=9).rows
    assert first.columns == {"answer": 3, "hint": None, "completion": "c"} and second.columns == {}
    assert (first.text, second.text) == ("q", "r")


def test_the_text_of_a_conversation_names_the_roles(write):
    (prompt,) = load_prompts(write({"prompt": LONGER}), CHAT, max_prompt_tokens=99).rows
    assert prompt.text == "system: s\n\nuser: q\n\nassistant: a\n\nuser: r"


def test_template_none_leaves_strings_as_they_are(write):
    loaded = load_prompts(write({"prompt": "q"}), CHAT, max_prompt_tokens=9, template="none")
    assert CHAT.decode(loaded.rows[0].tokens) == "q"


CALL = {"function": {"name": "f", "arguments": {}}}
WORD = {"prompt": "q", "chosen": "a", "rejected": "b"}
GOOD = {
    load_prompts: {"prompt": "q"},
    load_demonstrations: {"prompt": "q", "completion": "a", "text": "ab", "messages": ANSWERED},
    load_pairs: WORD,
}
BAD_ROWS = [
    (load_prompts, {"prompt": None}, Reason.MISSING_COLUMN),
    (load_prompts, {"prompt": 3}, Reason.NOT_TEXT),
    (load_prompts, {"prompt": "\ud83d"}, Reason.NOT_UNICODE),
    (load_prompts, {"prompt": [user("\ud83d")]}, Reason.NOT_UNICODE),
    (load_prompts, {"prompt": " \n"}, Reason.EMPTY_PROMPT),
    (load_prompts, {"prompt": []}, Reason.EMPTY_PROMPT),
    (load_prompts, {"prompt": [system("s")]}, Reason.EMPTY_PROMPT),
    (load_prompts, {"prompt": [user(" ")]}, Reason.EMPTY_PROMPT),
    (load_prompts, {"prompt": "q" * 100}, Reason.PROMPT_TOO_LONG),
    (load_prompts, {"prompt": ["q"]}, Reason.NOT_A_MESSAGE),
    (load_prompts, {"prompt": [{"role": "user"}]}, Reason.NOT_A_MESSAGE),
    (load_prompts, {"prompt": [user([{"type": "image_url", "image_url": "u"}])]}, Reason.NOT_A_MESSAGE),
    (load_prompts, {"prompt": [{"role": "tool", "content": "x"}]}, Reason.UNKNOWN_ROLE),
    (load_prompts, {"prompt": [user("q"), user("q")]}, Reason.NOT_ALTERNATING),
    (load_prompts, {"prompt": [assistant("a")]}, Reason.NOT_ALTERNATING),
    (load_prompts, {"prompt": [user("q"), system("s")]}, Reason.NOT_ALTERNATING),
    (load_prompts, {"prompt": ANSWERED}, Reason.USER_NOT_LAST),
    (load_demonstrations, {"text": ""}, Reason.EMPTY_TEXT),
    (load_demonstrations, {"text": "<eos>"}, Reason.NO_RESPONSE_TOKEN),
    (load_demonstrations, {"text": "a" * 100}, Reason.TOO_LONG),
    (load_demonstrations, {"prompt": "q", "completion": ""}, Reason.EMPTY_RESPONSE),
    (load_demonstrations, {"prompt": "q", "completion": "a" * 99}, Reason.TOO_LONG),
    (load_demonstrations, {"prompt": "q", "completion": ["a"]}, Reason.NOT_A_MESSAGE),
    (load_demonstrations, {"prompt": "q", "completion": ANSWERED}, Reason.NOT_ONE_ANSWER),
    (load_demonstrations, {"prompt": ANSWERED, "completion": "a"}, Reason.USER_NOT_LAST),
    (load_demonstrations, {"messages": "q"}, Reason.NOT_A_MESSAGE),
    (load_demonstrations, {"messages": QUESTION}, Reason.ASSISTANT_NOT_LAST),
    (load_demonstrations, {"messages": [user("q"), assistant("")]}, Reason.EMPTY_RESPONSE),
    (load_demonstrations, {"messages": [user("q"), assistant("a", weight=0)]}, Reason.NO_RESPONSE_TOKEN),
    (load_demonstrations, {"messages": [user("q"), assistant("a", weight=0.5)]}, Reason.BAD_WEIGHT),
    (load_demonstrations, {"messages": [user("q"), assistant("a", tool_calls=[{}])]}, Reason.TOOL_CALL),
    (load_demonstrations, {"messages": [user("q"), assistant("a", function_call={"name": "f"})]}, Reason.TOOL_CALL),
    (load_demonstrations, {"messages": [user("q"), assistant("a", tool_calls=[CALL])]}, Reason.NOT_RENDERED),
    (load_demonstrations, {"messages": [user("q"), assistant("a", reasoning=3)]}, Reason.NOT_A_MESSAGE),
    (load_demonstrations, {"messages": [user("q"), assistant("a", thinking="t")]}, Reason.NOT_RENDERED),
    (load_pairs, {**WORD, "rejected": None}, Reason.MISSING_COLUMN),
    (load_pairs, {**WORD, "rejected": "a"}, Reason.SAME),
    (load_pairs, {**WORD, "rejected": " "}, Reason.EMPTY_RESPONSE),
    (load_pairs, {**WORD, "chosen": ""}, Reason.EMPTY_RESPONSE),
    (load_pairs, {**WORD, "chosen": []}, Reason.EMPTY_RESPONSE),
    (load_pairs, {**WORD, "rejected": "b" * 99}, Reason.TOO_LONG),
    (load_pairs, {**WORD, "margin": "big"}, Reason.BAD_MARGIN),
    (load_pairs, {**WORD, "margin": float("nan")}, Reason.BAD_MARGIN),
    (load_pairs, {**WORD, "chosen_finished": "no"}, Reason.BAD_FINISHED),
    (load_pairs, {**WORD, "chosen": ANSWERED, "rejected": ANSWERED, "prompt": "other"}, Reason.PROMPTS_DIFFER),
    (load_pairs, {"chosen": ANSWERED, "rejected": [user("r"), assistant("b")]}, Reason.PROMPTS_DIFFER),
    (load_pairs, {"chosen": ANSWERED, "rejected": QUESTION}, Reason.ASSISTANT_NOT_LAST),
    (load_pairs, {"chosen": "a", "rejected": "b"}, Reason.NO_PROMPT),
    (load_pairs, {"chosen": f"{HUMAN} x", "rejected": "y"}, Reason.NO_PROMPT),
    (load_pairs, {"chosen": f"{HUMAN} x", "rejected": f"\n\nHuman: q{HUMAN} y"}, Reason.PROMPTS_DIFFER),
    (load_pairs, {"chosen": f"{HUMAN} x", "rejected": f"{HUMAN}"}, Reason.EMPTY_RESPONSE),
    (load_pairs, {"chosen": f"{HUMAN} x", "rejected": f"{HUMAN} y\n\nHuman: z"}, Reason.ASSISTANT_NOT_LAST),
    (load_pairs, {"chosen": f"{HUMAN}{HUMAN} x", "rejected": f"{HUMAN}{HUMAN} y"}, Reason.EMPTY_RESPONSE),
    (load_pairs, {"chosen": f"Hi{HUMAN} x", "rejected": f"Hi{HUMAN} y"}, Reason.TEXT_BEFORE_TURNS),
    (
        load_pairs,
        {"chosen": f"{HUMAN} a\n\nAssistant: x", "rejected": f"{HUMAN} a\n\nAssistant: y"},
        Reason.NOT_ALTERNATING,
    ),
]


def load(loader, path, tokenizer, size=99, **options):
    limit = "max_prompt_tokens" if loader is load_prompts else "max_tokens"
    return loader(path, tokenizer, **{limit: size}, **options)


@pytest.mark.parametrize(("loader", "row", "reason"), BAD_ROWS)
def test_a_bad_row_is_rejected_with_its_reason(write, loader, row, reason):
    good = {name: GOOD[loader][name] for name in row if name in GOOD[loader]}
    if good.keys() == {"chosen", "rejected"}:
        good = {"chosen": f"{HUMAN} x", "rejected": f"{HUMAN} y"}
    report = load(loader, write(good, row), CHAT, max_rejected=0.5).report
    assert report.rejected == {reason: [2]} and report.num_used == 1
    assert f"1 rejected: {reason} (row 2" in str(report)


@pytest.mark.parametrize(
    ("completion", "reason"), [("<eos>", Reason.NO_RESPONSE_TOKEN), ("a<eos>b", Reason.END_INSIDE)]
)
def test_an_end_inside_a_plain_response_rejects_it_and_in_a_chat_it_is_text(write, completion, reason):
    path = write(WORD | {"completion": "a"}, WORD | {"completion": completion})
    assert load(load_demonstrations, path, PLAIN, max_rejected=0.5).report.rejected == {reason: [2]}
    row = load(load_demonstrations, path, CHAT).rows[1]
    assert row.tokens.count(CHAT.eos_token_id) == 2 and learned(CHAT, row).endswith(f"[{completion}<eos>]")


def test_every_reason_is_tested():
    """Here, or in a file of tests that names it."""
    here = Path(__file__)
    others = "".join(path.read_text() for path in here.parents[1].rglob("test_*.py") if path != here)
    named = {reason for reason in Reason if f"Reason.{reason.name}" in others}
    below = {Reason.TEMPLATE_REFUSES, Reason.TEMPLATE_REWRITES, Reason.END_INSIDE}
    tested = {reason for *_, reason in BAD_ROWS} | named | below
    assert tested == set(Reason)


def test_texts_without_a_common_start_have_no_prompt(write):
    with pytest.raises(DataError, match="no common start"):
        load_pairs(write({"chosen": "a", "rejected": "b"}), PLAIN, max_tokens=9)


def test_a_template_that_refuses_a_row_rejects_it(write):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + (tokenizer.chat_template)
    )
    report = load_prompts(write({"prompt": LONGER}, {"prompt": "q"}), tokenizer, max_prompt_tokens=99, max_rejected=0.5)
    assert report.report.rejected == {Reason.TEMPLATE_REFUSES: [1]}
    assert "no system role" in str(report.report)


def test_a_template_that_rewrites_earlier_turns_rejects_their_demonstrations(write):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content }}", "{{ m.content if loop.last else '' }}")
    rows = write({"messages": [*LONGER, assistant("b")]}, {"messages": ANSWERED})
    report = load_demonstrations(rows, tokenizer, max_tokens=99, max_rejected=0.5).report
    assert report.rejected == {Reason.TEMPLATE_REWRITES: [1]}


def test_more_rejected_rows_than_allowed_stop_with_the_counts(write):
    path = write(*[WORD] * 98, {**WORD, "rejected": "a"}, {**WORD, "chosen": ""})
    with pytest.raises(DataError) as error:
        load_pairs(path, PLAIN, max_tokens=9)
    for text in ("2 of 100 rows", "max_rejected = 0.01", "the same (row 99)", "empty response (row 100)"):
        assert text in str(error.value)
    assert load_pairs(path, PLAIN, max_tokens=9, max_rejected=0.02).report.num_used == 98
    assert load_pairs(path, PLAIN, max_tokens=9, limit=99, max_rejected=0.0102).report.num_used == 98


def test_a_file_without_a_usable_row_is_an_error_even_if_all_may_be_rejected(write):
    with pytest.raises(DataError, match=r"no row can be used(.|\n)*1 rejected: empty prompt \(row 1\)"):
        load_prompts(write({"prompt": ""}), PLAIN, max_prompt_tokens=9, max_rejected=1)
