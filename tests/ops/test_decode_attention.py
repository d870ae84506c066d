"""Attention over a cache against torch's own attention on the cached tokens."""

import pytest
import torch
import torch.nn.functional as F
from compare import filled

from fastrlhf import decode_attention
from fastrlhf.ops.decode_attention import decode_attention_ref


def expected(query, keys, values, lengths, *, scale=None, window=None):
    """Row by row through scaled_dot_product_attention, on what the row sees and nothing else."""
    rows = []
    for n, length in enumerate(lengths.tolist()):
        seen = slice(max(0, length - window) if window else 0, length)
        q, k, v = query[n, :, None], keys[n, :, seen], values[n, :, seen]
        k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], 0) for t in (k, v))
        rows.append(F.scaled_dot_product_attention(q, k, v, scale=scale)[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "width"), [(4, 4, 16), (6, 2, 40), (3, 1, 5)])
def test_it_is_attention_over_the_cached_tokens(num_heads, num_kv_heads, width, window):
    query = torch.randn(5, num_heads, width, dtype=torch.float64)
    keys, values = torch.randn(2, 7, num_kv_heads, 150, width, dtype=torch.float64)
    lengths = torch.tensor([1, 150, 64, 65, 129], dtype=torch.int32)
    out = decode_attention(query, keys, values, lengths, window=window)
    torch.testing.assert_close(out, expected(query, keys, values, lengths, window=window))


def test_a_length_of_zero_gives_zero():
    out = decode_attention(torch.randn(2, 2, 8), *torch.randn(2, 2, 2, 4, 8), torch.tensor([0, 3], dtype=torch.int32))
    assert not out[0].any() and out[1].any()


@pytest.mark.parametrize("function", [decode_attention, decode_attention_ref])
def test_what_lies_beyond_a_length_is_never_read(function):
    query, keys, values = torch.randn(3, 2, 8), torch.randn(3, 2, 90, 8), torch.randn(3, 2, 90, 8)
    lengths = torch.tensor([90, 3, 70], dtype=torch.int32)
    out = decode_attention(query, keys, values, lengths)
    for n, length in enumerate(lengths.tolist()):
        keys[n, :, length:] = values[n, :, length:] = torch.nan
    args = (8**-0.5, 0) if function is decode_attention_ref else ()
    torch.testing.assert_close(function(query, keys, values, lengths, *args), out)


def test_large_scores_do_not_overflow():
    query = torch.full((1, 1, 4), 100.0)
    keys = torch.cat([torch.full((1, 1, 70, 4), -100.0), torch.full((1, 1, 70, 4), 100.0)], 2)
    values = torch.arange(140.0)[None, None, :, None].expand(1, 1, 140, 4).contiguous()
    out = decode_attention(query, keys, values, torch.tensor([140], dtype=torch.int32))
    torch.testing.assert_close(out, torch.full((1, 1, 4), 104.5))


def test_views_of_a_larger_cache_give_the_same():
    query, lengths = torch.randn(3, 4, 16), torch.tensor([20, 1, 9], dtype=torch.int32)
    keys, values = torch.randn(2, 8, 2, 64, 16)
    whole = decode_attention(query, keys, values, lengths)
    assert torch.equal(decode_attention(query, keys[:3, :, :20], values[:3, :, :20], lengths), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_does_not_depend_on_its_batch_or_on_the_room_in_the_cache(dtype):
    query, (keys, values) = torch.randn(4, 4, 16, dtype=dtype), torch.randn(2, 4, 2, 600, 16, dtype=dtype)
    lengths = torch.tensor([600, 256, 257, 1], dtype=torch.int32)
    together = decode_attention(query, keys, values, lengths)
    for n, length in filled(enumerate(lengths.tolist())):
        row, room = slice(n, n + 1), slice(0, length)
        alone = decode_attention(query[row], keys[row, :, room], values[row, :, room], lengths[row])
        assert torch.equal(alone, together[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_attention(dtype):
    query, (keys, values) = torch.randn(3, 4, 16), torch.randn(2, 3, 2, 64, 16)
    lengths = torch.tensor([64, 1, 30], dtype=torch.int32)
    query, keys, values = (t.to(dtype) for t in (query, keys, values))
    exact = expected(query.double(), keys.double(), values.double(), lengths)
    out = decode_attention(query, keys, values, lengths)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)


GOOD = {
    "query": torch.zeros(2, 4, 8),
    "key_cache": torch.zeros(3, 2, 5, 8),
    "value_cache": torch.zeros(3, 2, 5, 8),
    "lengths": torch.ones(2, dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"query": torch.zeros(2, 8)}, ValueError, "query must be (N, H, K)"),
        ({"query": torch.zeros(2, 3, 8)}, ValueError, "the 3 query heads must be a multiple of the 2 kv heads"),
        ({"query": torch.zeros(2, 4, 6)}, ValueError, "key_cache must be (slots, kv heads, Tmax, K)"),
        ({"query": torch.zeros(2, 4, 8).double()}, TypeError, "key_cache must be float64, got float32"),
        ({"value_cache": torch.zeros(3, 2, 4, 8)}, ValueError, "must have the same shape"),
        ({"query": torch.zeros(4, 4, 8), "lengths": torch.ones(4).int()}, ValueError, "a slot for each of the 4 rows"),
        ({"lengths": torch.ones(2, dtype=torch.int64)}, TypeError, "lengths must be int32"),
        ({"lengths": torch.tensor([1, 6], dtype=torch.int32)}, ValueError, "lengths must be in [0, 6)"),
        ({"lengths": torch.tensor([-1, 5], dtype=torch.int32)}, ValueError, "lengths must be in [0, 6)"),
        ({"lengths": torch.ones(2, dtype=torch.int32, device="meta")}, ValueError, "must be on one device"),
        ({"window": 0}, ValueError, "window must be at least 1 or None, got 0"),
    ],
)
def test_bad_input_is_named(change, error, text):
    with pytest.raises(error) as caught:
        decode_attention(**{**GOOD, **change})
    assert "decode_attention: " in str(caught.value) and text in str(caught.value)
