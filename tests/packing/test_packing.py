"""The packed layout: what each index means, and that cutting and selecting lose nothing."""

import pytest
import torch
from compare import filled
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrlhf.packing import pack


def test_predictor_of_a_response_token_is_the_row_before_it():
    batch = pack([[5, 6, 7], [8, 9]], prompt_lengths=[1, 1])
    assert batch.targets.tolist() == [6, 7, 9]
    assert batch.tokens[batch.predictors].tolist() == [5, 6, 8]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.last_rows.tolist() == [2, 4]
    assert batch.cu_responses.tolist() == [0, 2, 3]


def test_a_mask_may_have_gaps():
    batch = pack([[1, 2, 3, 4]], [[False, True, False, True]])
    assert batch.targets.tolist() == [2, 4] and batch.response_lengths == (2,)


sequences = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=8)


@given(sequences, st.data())
@settings(max_examples=100, deadline=None)
def test_select_equals_packing_the_selected(tokens, data):
    prompts = [data.draw(st.integers(1, len(s))) for s in tokens]
    order = data.draw(st.lists(st.integers(0, len(tokens) - 1), min_size=1, max_size=6))
    batch = pack(tokens, prompt_lengths=prompts)
    batch = batch.with_fields(twice=batch.targets * 2)
    chosen, expected = batch.select(order), pack([tokens[i] for i in order], prompt_lengths=[prompts[i] for i in order])
    for name in ("tokens", "position_ids", "cu_seqlens", "response_rows", "cu_responses"):
        assert torch.equal(getattr(chosen, name), getattr(expected, name)), name
    assert torch.equal(chosen["twice"], expected.targets * 2)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_microbatches_hold_each_sequence_once_in_order_within_the_budget(lengths, max_tokens):
    batch = pack([[n] * length for n, length in enumerate(lengths)])
    parts = batch.microbatches(max_tokens)
    assert torch.equal(torch.cat([part.tokens for part in parts]), batch.tokens)
    for part in parts:
        assert part.num_sequences == 1 or part.num_tokens <= max_tokens


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([[1], []],), "sequence 1 is empty"),
        (([[1, 2]], [[True, False]]), "nothing predicts it"),
        (([[1, 2]], [[False]]), "one flag a token"),
    ],
)
def test_bad_input_is_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        pack(*arguments)


def test_a_prompt_longer_than_its_sequence_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        pack([[1, 2]], prompt_lengths=[3])


def test_positions_go_on_after_a_prefix_and_micro_batches_keep_it():
    batch = pack([[5, 6, 7], [8], [5, 9], [4, 4]], prefix_lengths=[0, 2, 0, 1])
    assert batch.position_ids.tolist() == [0, 1, 2, 2, 0, 1, 1, 2]
    parts = batch.microbatches(4, together=2)
    assert [part.prefix_lengths for part in parts] == [(0, 2), (0, 1)]
    assert [part.position_ids.tolist() for part in parts] == [[0, 1, 2, 2], [0, 1, 1, 2]]


@pytest.mark.parametrize("prefixes", [[1, 0, 0], [0, 3, 0], [0, 1, 3], [0, -1, 0], [0, 1]])
def test_a_prefix_that_is_not_there_is_refused(prefixes):
    with pytest.raises(ValueError, match="do not fit lengths"):
        pack([[1, 2], [3], [4, 5]], prefix_lengths=prefixes)


def test_prefixes_that_grow_are_refused():
    with pytest.raises(ValueError, match="do not fit lengths"):
        pack([[1, 2], [3], [4, 5]], prefix_lengths=[0, 1, 2])


token_lists = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@st.composite
def shared_and_apart(draw):
    """The same sequences with their prefixes once and repeated, with a field, and some of them in some order."""
    once, prefixes, apart, prompts = [], [], [], []
    for start in draw(st.lists(token_lists, min_size=1, max_size=4)):
        seen = len(start)
        for n in range(draw(st.integers(1, 4))):
            own = draw(token_lists)
            seen = draw(st.integers(1, seen)) if n else 0
            once.append(own if n else start + own)
            prefixes.append(seen)
            apart.append((start[:seen] if n else start) + own)
            prompts.append(seen if n else len(start))
            seen = seen or len(start)
    values = torch.rand(sum(len(row) - prompt for row, prompt in zip(apart, prompts, strict=True)))
    order = draw(st.permutations(range(len(once))))[: draw(st.integers(1, len(once)))]
    sizes = [(len(row), prompt - prefix) for row, prompt, prefix in zip(once, prompts, prefixes, strict=True)]
    masks = [[n >= start for n in range(size)] for size, start in sizes]
    return (
        pack(once, masks, prefix_lengths=prefixes).with_fields(values=values),
        pack(apart, prompt_lengths=prompts).with_fields(values=values),
        order,
    )


def assert_same_sequences(shared, apart):
    """What tokens attend to, their positions, and what is read of them, is the same."""
    rows = shared.model_inputs().get("key_rows", torch.arange(shared.num_tokens))
    assert torch.equal(shared.tokens[rows], apart.tokens)
    assert torch.equal(shared.position_ids[rows], apart.position_ids)
    assert shared.full_lengths == apart.lengths and shared.num_tokens_unshared == apart.num_tokens
    for of in (lambda p: p.targets, lambda p: p.tokens[p.predictors], lambda p: p.position_ids[p.predictors]):
        assert torch.equal(of(shared), of(apart))
    assert torch.equal(shared.tokens[shared.last_rows], apart.tokens[apart.last_rows])
    assert torch.equal(shared["values"], apart["values"])
    assert shared.response_lengths == apart.response_lengths


@given(shared_and_apart())
def test_sequences_that_are_selected_take_their_prefix_along(case):
    shared, apart, order = case
    assert_same_sequences(shared, apart)
    assert_same_sequences(shared.select(order), apart.select(order))
    twice = sorted(range(len(order)), key=lambda n: order[n])
    assert_same_sequences(shared.select(order).select(twice), apart.select(sorted(order)))


@given(shared_and_apart(), st.integers(1, 20), st.integers(1, 3))
def test_micro_batches_that_cut_a_prefix_off_repeat_it(case, max_tokens, of):
    shared, apart, _ = case
    for number in filled(range(of)):
        parts = shared.microbatches(max_tokens, share=(number, of))
        own = shared.share_of(number, of)
        assert all(part.num_tokens <= max_tokens or part.num_sequences == 1 for part in filled(parts))
        assert (
            sum(part.num_tokens_unshared for part in parts if part.num_response_tokens) == apart.select(own).num_tokens
        )
        for part in filled(parts):
            part_apart = apart.select(own[: part.num_sequences])
            if part.num_response_tokens:
                assert_same_sequences(part, part_apart)
                own = own[part.num_sequences :]
        assert not own


@pytest.mark.parametrize("max_tokens", range(15, 40))
def test_prefixes_that_are_selected_never_grow_so_micro_batches_keep_to_the_budget(max_tokens):
    shared = pack([[1] * 20, [2], [3] * 9], prefix_lengths=[0, 20, 11]).select([0, 2, 1])
    assert shared.full_lengths == (20, 20, 21)
    assert all(part.num_tokens <= max_tokens or part.num_sequences == 1 for part in shared.microbatches(max_tokens))


def test_after_a_prefix_its_last_row_predicts_the_first_token():
    batch = pack(
        [[5, 6, 7, 8], [9, 4], [3, 2], [1]],
        [[False, False, True, True], [True, True], [False, True], [True]],
        prefix_lengths=[0, 2, 0, 1],
    )
    assert batch.targets.tolist() == [7, 8, 9, 4, 2, 1]
    assert batch.tokens[batch.predictors].tolist() == [6, 7, 6, 9, 3, 3]
    second = batch.select([2, 3])
    assert second.tokens[second.predictors].tolist() == [3, 3]


def test_several_sequences_go_on_from_the_last_whole_one():
    batch = pack(
        [[5, 6, 7], [8], [9, 4], [2, 3], [1]],
        [[False, False, True], [True], [True, True], [False, True], [True]],
        prefix_lengths=[0, 2, 2, 0, 1],
    )
    assert batch.position_ids.tolist() == [0, 1, 2, 2, 2, 3, 0, 1, 1]
    assert batch.tokens[batch.predictors].tolist() == [6, 6, 6, 9, 2, 2]
    first, second = batch.microbatches(6, together=[3, 2])
    assert (first.prefix_lengths, second.prefix_lengths) == ((0, 2, 2), (0, 1))
    assert second.tokens[second.predictors].tolist() == [2, 2]
    assert [batch.share_of(n, 2, together=[3, 2]) for n in (0, 1)] == [range(3), range(3, 5)]


def test_groups_that_are_not_the_sequences_are_refused():
    with pytest.raises(ValueError, match=r"groups of \[1\] are not the 2 sequences"):
        pack([[1], [2]]).microbatches(1, together=[1])


def test_a_field_of_another_length_is_refused():
    with pytest.raises(ValueError, match="field values must be"):
        pack([[1, 2]], prompt_lengths=[1]).with_fields(values=torch.zeros(2))


@settings(deadline=None)
@given(sequences, st.integers(1, 12), st.integers(1, 4), st.integers(1, 2))
def test_shares_have_every_sequence_once_and_as_many_packs_each(tokens, max_tokens, of, together):
    batch = pack(tokens, prompt_lengths=[1] * len(tokens))
    batch = batch.with_fields(number=torch.arange(batch.num_response_tokens))
    whole, longest = [], max(sum(batch.lengths[n : n + together]) for n in range(0, len(tokens), together))
    counts = set()
    for number in range(of):
        own = batch.share_of(number, of, together=together)
        parts = batch.microbatches(max_tokens, together=together, share=(number, of))
        counts.add(len(parts))
        real, left = [], len(own)
        for part in parts:
            if left:
                real.append(part)
                left -= part.num_sequences
            else:
                assert part.num_response_tokens == 0 and part["number"].numel() == 0 and part.num_tokens > 0
        assert left == 0
        whole += [token for part in real for token in part.tokens.tolist()]
        assert abs(sum(part.num_tokens for part in real) - batch.num_tokens / of) <= longest
    assert whole == batch.tokens.tolist() and len(counts) == 1
