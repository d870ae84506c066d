"""Stop strings and repetition, against looking at the whole response again after every token."""

import json
import random

import pytest
from engines import EOS, engine_of, model_of, prompts_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastrlhf.generation.engine import Sampling
from fastrlhf.generation.stopping import StopStrings, repeats

TEXT = "Human: why is the sky blue?\n\nAssistant: because señor Grün 猫 says so 🙂🙂.\n\nHuman: and the sea?  It's sky."
STOPS = ["\n\nHuman:", "猫", "🙂🙂", "e", "sky", "ñ", "the s", "?  It"]


def trained(kind):
    """A tokenizer with tokens of several characters; half of `TEXT`'s are split into bytes."""
    if kind == "spaces":  # as of Llama 2: a leading space belongs to a token and is not printed at the start
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(parts)
        special = ["<unk>", "<eos>", *(f"<0x{n:02X}>" for n in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, limit_alphabet=20, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
        )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] == "<eos>"]
    tokenizer = Tokenizer.from_str(json.dumps(described))  # bytes are not special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


TOKENIZERS = {"bytes": tiny_tokenizer(), "merges": trained("merges"), "spaces": trained("spaces")}


def first_stop(tokenizer, response, strings):
    """The number of tokens after which the text first holds a string, or None."""
    for n in range(1, len(response) + 1):
        if any(string in tokenizer.decode(response[:n], skip_special_tokens=True) for string in strings):
            return n
    return None


def number_found(tokenizer, response, strings):
    stop = StopStrings(tokenizer, strings)
    return next((n for n in range(1, len(response) + 1) if stop.found(response[:n])), None)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("string", STOPS)
def test_a_string_is_found_with_the_token_that_completes_it(kind, string):
    tokenizer = TOKENIZERS[kind]
    response = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    n = number_found(tokenizer, response, [string])
    assert n is not None and n == first_stop(tokenizer, response, [string])


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_tokens_stop_where_the_whole_text_says_so(kind, source):
    tokenizer = TOKENIZERS[kind]
    words = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    # shuffled pieces of text, and tokens that cut characters in two or have no text
    response = [source.choice(words) if source.random() < 0.8 else source.randrange(260) for _ in range(30)]
    text = tokenizer.decode(response, skip_special_tokens=True).replace("\N{REPLACEMENT CHARACTER}", "")
    begin = source.randrange(max(1, len(text)))
    strings = [string for string in (text[begin : begin + source.randint(1, 6)], "e t") if string]
    assert number_found(tokenizer, response, strings) == first_stop(tokenizer, response, strings)


def test_the_engine_keeps_the_tokens_up_to_the_one_that_completes_the_string():
    model, tokenizer = model_of(), tiny_tokenizer()
    engine = engine_of(model, max_slots=4, tokenizer=tokenizer)
    plain = engine.generate(prompts_of(), Sampling(40), seeds=range(9))
    texts = [tokenizer.decode(s.response) for s in plain]
    strings = ("a", *(text[n : n + 3] for n, text in enumerate(texts[:4], 5)))
    samples = engine.generate(prompts_of(), Sampling(40, stop=strings), seeds=range(9))
    lengths = [first_stop(tokenizer, s.response, strings) for s in plain]
    assert any(lengths) and not all(n == 1 for n in lengths)
    for sample, whole, n in zip(samples, plain, lengths, strict=True):
        assert sample.response == whole.response[:n]
        assert sample.finished == (n is not None or whole.finished)


def test_a_string_before_min_new_tokens_ends_nothing():
    model, tokenizer = model_of(), tiny_tokenizer()
    engine = engine_of(model, tokenizer=tokenizer, eos=())
    plain = engine.generate(prompts_of(), Sampling(20), seeds=range(9))
    strings = tuple({tokenizer.decode(s.response[2:4]) for s in plain})
    samples = engine.generate(prompts_of(), Sampling(20, stop=strings, min_new_tokens=10), seeds=range(9))
    assert all(len(s.response) >= 10 for s in samples)
    assert [s.response for s in samples] == [p.response[: len(s.response)] for s, p in zip(samples, plain, strict=True)]


def circles(tokens, longest, times):
    """The number of tokens after which they first end in a repeated n-gram, or None."""
    for end in range(1, len(tokens) + 1):
        for n in range(1, longest + 1):
            last = tokens[max(0, end - n) : end]
            if len(last) == n and tokens[:end][-n * times :] == last * times:
                return end
    return None


def test_repeats_are_those_of_the_definition():
    source = random.Random(0)
    seen = set()
    for _ in range(3000):
        tokens = [source.randrange(source.choice((2, 3))) for _ in range(source.randrange(25))]
        longest, times = source.randint(1, 4), source.randint(2, 5)
        first = next((n for n in range(1, len(tokens) + 1) if repeats(tokens[:n], longest, times)), None)
        assert first == circles(tokens, longest, times)
        seen.add(first)
    assert None in seen and len(seen) > 10


def test_a_row_that_goes_round_in_circles_ends_unfinished():
    model = model_of()
    engine = engine_of(model, max_slots=4)
    plain = engine.generate(prompts_of(), Sampling(100, greedy=True), seeds=range(9))
    samples = engine.generate(prompts_of(), Sampling(100, greedy=True, repeat_ngram=6, repeat_times=4), seeds=range(9))
    ends = [circles(s.response, 6, 4) for s in plain]
    assert any(ends)
    for sample, whole, end in zip(samples, plain, ends, strict=True):
        assert sample.response == whole.response[:end]
        assert sample.finished == (sample.response[-1] == EOS)


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match=r"stop=\('x',\) is text, which needs Engine\(..., tokenizer=\)"):
        engine_of(model_of()).generate([[2]], Sampling(3, stop=("x",)), seeds=[0])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"stop": "abc"}, "stop must be a tuple of strings, none empty, got 'abc'"),
        ({"stop": ("a", "")}, "got ('a', '')"),
        ({"repeat_ngram": 3}, "repeat_ngram must be at least 1 and repeat_times at least 2, or both 0, got 3 and 0"),
        ({"repeat_ngram": 3, "repeat_times": 1}, "got 3 and 1"),
    ],
)
def test_bad_stops_are_named(options, text):
    with pytest.raises(ValueError) as caught:
        Sampling(5, **options)
    assert "Sampling: " in str(caught.value) and text in str(caught.value)
