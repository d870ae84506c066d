"""Prompt and response tokens join to what the chat template makes of the whole; ends and starts occur once."""

from pathlib import Path

import pytest
from compare import filled
from tiny import tiny_model, tiny_tokenizer
from tokenizers import processors

from fastrlhf.data import Reason, load_demonstrations, load_pairs, load_prompts, read_rows
from fastrlhf.data.template import Renderer, check_same_vocabulary, end_of_turn, eos_token_ids, load_tokenizer
from fastrlhf.packing import pack

HH = Path(__file__).parents[2] / ".." / "shared" / "data" / "hh_harmless.jsonl.gz"
SMOLLM2 = Path.home() / ".cache" / "fastrlhf" / "SmolLM2-135M-Instruct"
EOS, USER, FILLER = 1, 2, 299
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 6 x 7?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "Sure?\n\nReally?"},
]
ANSWER = "Yes, it is.\nÄ 😀"

needs_hh = pytest.mark.skipif(not HH.exists(), reason=f"{HH.name} is not there")
needs_smollm2 = pytest.mark.skipif(not (SMOLLM2 / "tokenizer.json").exists(), reason="SmolLM2 is not in the cache")


@pytest.fixture(params=["tiny", pytest.param("SmolLM2", marks=needs_smollm2)])
def tokenizer(request):
    return tiny_tokenizer() if request.param == "tiny" else load_tokenizer(SMOLLM2)


def with_bos(tokenizer, *, eos=False):
    """Makes it and its chat template put a BOS before a text, and it an EOS behind if asked."""
    tokenizer.add_special_tokens({"bos_token": tokenizer.convert_ids_to_tokens(FILLER)})
    bos = tokenizer.bos_token
    single = f"{bos} $A" + (" <eos>" if eos else "")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(bos, FILLER), ("<eos>", EOS)]
    )
    if tokenizer.chat_template:
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    return tokenizer


def test_prompt_and_response_join_to_the_template_of_the_whole(tokenizer):
    renderer = Renderer(tokenizer)
    ours = renderer.prompt(TALK) + renderer.response(ANSWER)
    whole = tokenizer.apply_chat_template(
        [*TALK, {"role": "assistant", "content": ANSWER}], tokenize=True, return_dict=False
    )
    assert ours == whole[: len(ours)]
    assert tokenizer.decode(whole[len(ours) :]).strip() == ""  # SmolLM2 ends a turn with a newline


def test_a_response_ends_with_the_end_of_turn_exactly_once(tokenizer):
    renderer = Renderer(tokenizer)
    assert renderer.end == end_of_turn(tokenizer) == tokenizer.eos_token_id
    for text in (ANSWER, ANSWER + tokenizer.eos_token):
        assert renderer.response(text)[-1] == renderer.end and renderer.response(text).count(renderer.end) == 1
        assert renderer.text(text)[-1] == renderer.end and renderer.text(text).count(renderer.end) == 1


def test_the_end_of_turn_is_found_behind_text_and_differs_from_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<filler9>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", " \n<filler9>\n")
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<filler9>") != EOS
    assert Renderer(tokenizer).response("a")[-1] == end_of_turn(tokenizer)
    assert Renderer(tokenizer, "none").response("a")[-1] == EOS
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    assert end_of_turn(tokenizer) == EOS


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_bos_stands_once_and_first_and_no_eos_inside(chat, eos):
    tokenizer = with_bos(tiny_tokenizer(chat=chat), eos=eos)
    renderer = Renderer(tokenizer)
    prompts = ["q"] if chat else ["q", f"{tokenizer.bos_token}q"]
    for prompt in filled(prompts):
        whole = renderer.prompt(prompt) + renderer.response("a")
        assert whole[0] == FILLER and whole.count(FILLER) == 1
        assert renderer.text(prompt).count(FILLER) == 1 and renderer.text(prompt).count(EOS) == 1
        if not chat:
            assert whole.count(EOS) == 1 and whole[-1] == EOS


def test_white_space_around_an_answer_is_no_part_of_a_chat_but_of_a_text():
    chat, text = Renderer(tiny_tokenizer()), Renderer(tiny_tokenizer(), "none")
    assert chat.response(" a\n") == chat.response("a")
    spaced = [TALK[1], {"role": "assistant", "content": " 42 "}, TALK[3]]
    assert chat.prompt(spaced) == chat.prompt(TALK[1:])
    assert text.response(" a") != text.response("a")


def test_a_template_that_writes_the_date_gives_the_same_tokens_every_day():
    tokenizer = tiny_tokenizer()
    date = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    tokenizer.chat_template = date + "{{ date_string }}" + tokenizer.chat_template  # as that of Llama 3.2
    assert tokenizer.decode(Renderer(tokenizer).prompt("q")) == "26 Jul 2024<|user|>q<eos><|assistant|>"


def test_messages_need_a_chat_template_and_the_tokenizer_is_named(tmp_path):
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.save_pretrained(tmp_path / "plain")
    tokenizer = load_tokenizer(tmp_path / "plain")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": [{"role": "user", "content": "q"}]}\n')
    with pytest.raises(ValueError, match=r"holds messages, but the tokenizer '.*plain' has no chat template; put"):
        load_prompts(path, tokenizer, max_prompt_tokens=9)
    with pytest.raises(ValueError, match=r"template is chat, but the tokenizer '.*plain' has no chat template; put"):
        load_prompts(path, tokenizer, max_prompt_tokens=9, template="chat")
    with pytest.raises(ValueError, match="holds messages, but template is none; use auto or chat"):
        load_prompts(path, tiny_tokenizer(), max_prompt_tokens=9, template="none")
    with pytest.raises(ValueError, match="expected auto, chat or none, got 'yes'"):
        Renderer(tokenizer, "yes")


def test_a_tokenizer_whose_pad_is_its_eos_gives_the_same_tokens_and_masks(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n')
    shared, apart = tiny_tokenizer(pad_is_eos=True), tiny_tokenizer()
    assert shared.pad_token_id == shared.eos_token_id != apart.pad_token_id
    (row,) = load_demonstrations(path, shared, max_tokens=99).rows
    assert [row] == load_demonstrations(path, apart, max_tokens=99).rows
    batch = pack([row.tokens], [row.response_mask])
    assert batch.targets.tolist() == [*apart("a").input_ids, EOS]  # the end is learned
    assert batch.tokens[batch.last_rows].tolist() == [EOS]  # and a score is read there


def test_every_token_that_may_end_a_response_is_found():
    tokenizer, model = tiny_tokenizer(), tiny_model()
    assert eos_token_ids(tokenizer) == {EOS}
    tokenizer.add_special_tokens({"additional_special_tokens": ["<filler9>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<filler9>")
    model.config.eos_token_id, model.generation_config.eos_token_id = 7, [EOS, 8, 10**6]
    assert eos_token_ids(tokenizer, model) == {EOS, 7, 8, tokenizer.convert_tokens_to_ids("<filler9>")}


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^model '.*missing' not found: there is no such folder, and"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=rf"^tokenizer: cannot load '{tmp_path}': the folder has no tokenizer$"):
        load_tokenizer(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="endless' has no eos_token"):
        load_tokenizer(tmp_path / "endless")


def test_another_vocabulary_is_refused_with_both_sizes():
    check_same_vocabulary(tiny_tokenizer(), tiny_tokenizer(chat=False), "reward model")
    with pytest.raises(ValueError, match=r"reward model: .*310 tokens.*300 tokens"):
        check_same_vocabulary(tiny_tokenizer(), tiny_tokenizer(310), "reward model")


@needs_hh
@pytest.mark.parametrize("template", ["chat", "none"])
def test_the_report_on_real_hh_rows_states_what_is_known_of_them(template):
    loaded = load_pairs(HH, tiny_tokenizer(), max_tokens=10**6, template=template)
    counts = {reason: len(rows) for reason, rows in loaded.report.rejected.items()}
    # of 7 rows whose roles do not alternate 3 are those whose prompts differ
    assert counts == {Reason.PROMPTS_DIFFER: 3, Reason.NOT_ALTERNATING: 4, Reason.EMPTY_RESPONSE: 3}
    assert loaded.report.num_rows == 2000 and len(loaded.rows) == 1990
    assert loaded.report.rejected[Reason.EMPTY_RESPONSE] == [1160, 1204, 1954]
    assert 0.40 < sum(len(pair.chosen) > len(pair.rejected) for pair in loaded.rows) / 1990 < 0.48


@needs_hh
def test_real_hh_text_without_a_template_is_kept_letter_for_letter():
    tokenizer = tiny_tokenizer(chat=False)
    _, row = next(read_rows(HH))
    (pair,) = load_pairs(HH, tokenizer, max_tokens=10**6, limit=1).rows
    for side in ("chosen", "rejected"):
        assert tokenizer.decode(pair.prompt + getattr(pair, side)[:-1]) == row[side]
