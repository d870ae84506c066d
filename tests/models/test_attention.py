"""The attention function against dense softmax attention in float64, and what it refuses."""

import math

import pytest
import torch
from compare import assert_accurate, filled
from tiny import tiny_model
from transformers import AttentionMaskInterface

from fastrlhf.models import attention
from fastrlhf.models.attention import ATTENTION, attend, causal_mask, gather
from fastrlhf.packing import pack

LENGTHS = (5, 1, 37, 20, 64, 1)
H, K = 4, 16
MODULE = torch.nn.Module()


def keywords(lengths=LENGTHS, device="cpu", prefixes=()):
    inputs = pack([[0] * n for n in lengths], prefix_lengths=prefixes, device=device).model_inputs()
    others = ("input_ids", "position_ids", "attention_mask", "use_cache")
    return {name: value for name, value in inputs.items() if name not in others}


def qkv(num_kv_heads=H, dtype=torch.float32, device="cpu", lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    for heads in (H, num_kv_heads, num_kv_heads):
        tensor = torch.randn(1, heads, sum(lengths), K, generator=generator).to(device, dtype)
        yield tensor.requires_grad_()


def dense(query, key, value, *, window=None, scaling=None, softcap=None, lengths=LENGTHS):
    """Attention over the whole pack at once, under a block-diagonal mask."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    sequence = torch.repeat_interleave(torch.tensor(lengths)).to(query.device)
    row = torch.arange(len(sequence), device=query.device)
    sees = (sequence[:, None] == sequence) & (row[:, None] >= row)
    if window is not None:
        sees &= row[:, None] - row < window
    logits = query @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    return (logits.masked_fill(~sees, -math.inf).softmax(-1) @ value).transpose(1, 2)


CASES = [
    pytest.param({}, id="plain"),
    pytest.param({"window": 2}, id="window 2"),
    pytest.param({"window": 8}, id="window 8"),
    pytest.param({"window": 64, "scaling": 0.3}, id="window as long as the longest"),
    pytest.param({"window": 200}, id="window longer than any"),
    pytest.param({"softcap": 0.5, "scaling": 0.7}, id="softcap"),
    pytest.param({"softcap": 0.5, "window": 8}, id="softcap and window"),
]


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("case", CASES)
def test_each_token_attends_to_its_own_sequence_up_to_itself(case, num_kv_heads, device):
    dtypes = [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16, torch.float16]
    for dtype in filled(dtypes):
        inputs = list(qkv(num_kv_heads, dtype, device))
        exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
        plain_inputs = [t.detach().clone().requires_grad_() for t in inputs]
        options = {"scaling": case.get("scaling"), "sliding_window": case.get("window"), "softcap": case.get("softcap")}
        out, weights = attend(MODULE, *inputs, None, **options, **keywords(device=device))
        exact, plain = dense(*exact_inputs, **case), dense(*plain_inputs, **case)
        assert weights is None and out.dtype == dtype
        assert_accurate(out, exact, plain, "output")
        grad = torch.randn(out.shape, device=device).to(dtype)
        for tensor in (out, plain):
            tensor.backward(grad)
        exact.backward(grad.double())
        for ours, e, p in filled(zip(inputs, exact_inputs, plain_inputs, strict=True)):
            assert_accurate(ours.grad, e.grad, p.grad, "gradient")


# 20 tokens, 9 after all of them, 7 after the first 11, 1 after all of another 20
SHARED, PREFIXES = (20, 9, 7, 20, 1), (0, 20, 11, 0, 20)


def repeated_rows():
    """Rows of the pack in which each sequence repeats its prefix, and which of those are not repeated."""
    starts, wholes = (0, 20, 29, 36, 56), (0, 0, 0, 36, 36)
    repeated, kept = [], []
    for whole, start, length, prefix in zip(wholes, starts, SHARED, PREFIXES, strict=True):
        repeated += range(whole, whole + prefix)
        kept += range(len(repeated), len(repeated) + length)
        repeated += range(start, start + length)
    return repeated, kept


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_prefix_is_seen_as_if_the_sequence_repeated_it(case, num_kv_heads, device):
    """float64 on repeated rows; half precision has no kernel on the CPU."""
    repeated, kept = repeated_rows()
    whole = [n + p for n, p in zip(SHARED, PREFIXES, strict=True)]
    options = {"scaling": case.get("scaling"), "sliding_window": case.get("window"), "softcap": case.get("softcap")}
    for dtype in [torch.float32, torch.bfloat16]:
        inputs = list(qkv(num_kv_heads, dtype, device, lengths=SHARED))
        exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
        plain_inputs = [t.detach().clone().requires_grad_() for t in inputs]
        out, _ = attend(MODULE, *inputs, None, **options, **keywords(SHARED, device, PREFIXES))
        exact, plain = (
            dense(*(t[:, :, repeated] for t in given), lengths=whole, **case)[:, kept]
            for given in (exact_inputs, plain_inputs)
        )
        assert_accurate(out, exact, plain, "output")
        grad = torch.randn(out.shape, device=device).to(dtype)
        for tensor in (out, plain):
            tensor.backward(grad)
        exact.backward(grad.double())
        for ours, e, p in zip(inputs, exact_inputs, plain_inputs, strict=True):
            assert_accurate(ours.grad, e.grad, p.grad, "gradient")


def flash_attention(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What torch's varlen_attn says it computes, the mask of each sequence aligned at its end, one by one."""
    assert window_size[1] == 0 and max_q >= cu_q.diff().max() and max_k >= cu_k.diff().max()
    outputs = []
    for start, end, first, last in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        q, k, v = (t.transpose(0, 1) for t in (query[start:end], key[first:last], value[first:last]))
        k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
        distance = torch.arange(last - first - (end - start), last - first)[:, None] - torch.arange(last - first)
        sees = (distance >= 0) & ((window_size[0] < 0) | (distance <= window_size[0]))
        logits = q @ k.transpose(1, 2) * (1 / math.sqrt(q.shape[2]) if scale is None else scale)
        outputs.append((logits.masked_fill(~sees, -math.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 8])
def test_flash_attention_is_given_the_keys_of_prefixes(window, monkeypatch):
    """A GPU's path, with a stand-in for its kernel, equals that of a CPU, gradients included."""
    monkeypatch.setattr(attention, "varlen_attn", flash_attention)
    cpu, gpu = (list(qkv(2, lengths=SHARED)) for _ in range(2))
    given = keywords(SHARED, prefixes=PREFIXES)
    expected, _ = attend(MODULE, *cpu, None, sliding_window=window, **given)
    rows, bounds = given["key_rows"], ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    query, key, value = gpu[0], gpu[1][:, :, rows], gpu[2][:, :, rows]
    out = attention._varlen(query, key, value, None, window, tuple(given[name] for name in bounds))
    torch.testing.assert_close(out, expected)
    grad = torch.randn(out.shape)
    for tensor in (out, expected):
        tensor.backward(grad)
    for ours, theirs in zip(gpu, cpu, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_gradient_of_gathered_rows_is_the_same_each_time_on_several_threads():
    """Of 64 rows, each 16 times."""
    before, found = torch.get_num_threads(), set()
    x, rows = torch.randn(1, 400, 64, requires_grad=True), (torch.arange(1024) * 7) % 64
    grad = torch.randn(1, 1024, 64)
    torch.set_num_threads(2)
    try:
        for _ in range(30):
            (of_x,) = torch.autograd.grad(gather(x, 1, rows), x, grad)
            found.add(of_x.numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
    exact = torch.zeros(400, 64, dtype=torch.float64).index_add_(0, rows, grad[0].double())
    torch.testing.assert_close(of_x[0].double(), exact, rtol=1e-4, atol=1e-4)


def test_a_sequence_is_untouched_by_its_neighbours():
    query, key, value = (t.detach() for t in qkv())
    whole, _ = attend(MODULE, query, key, value, None, **keywords())
    start = sum(LENGTHS[:3])
    rows = slice(start, start + LENGTHS[3])
    alone, _ = attend(MODULE, query[:, :, rows], key[:, :, rows], value[:, :, rows], None, **keywords((LENGTHS[3],)))
    assert torch.equal(whole[:, rows], alone)


def test_lengths_on_the_host_are_optional():
    given = keywords()
    expected, _ = attend(MODULE, *qkv(), None, **given)
    del given["sequence_lengths"]
    assert torch.equal(attend(MODULE, *qkv(), None, **given)[0], expected)


def test_queries_and_keys_take_the_dtype_of_the_values(device):
    """As under autocast, where rotary embeddings leave them in float32."""
    query, key, value = qkv(device=device)
    expected, _ = attend(MODULE, query.bfloat16(), key.bfloat16(), value.bfloat16(), None, **keywords(device=device))
    out, _ = attend(MODULE, query, key, value.bfloat16(), None, **keywords(device=device))
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


def test_window_masks_are_made_once():
    device = torch.device("cpu")
    mask = causal_mask(5, 2, device)
    assert mask is causal_mask(5, 2, device)
    assert mask.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_slots_take_over_when_given():
    class Slots:
        def attend(self, *args):
            return args

    slots, (query, key, value) = Slots(), qkv()
    seen = attend(MODULE, query, key, value, None, scaling=0.5, sliding_window=3, slots=slots)
    assert seen == (MODULE, query, key, value, 0.5, 3)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"cu_seq_lens_q": None}, "call the model with"),
        ({"max_length_q": None}, "call the model with"),
        ({"s_aux": torch.zeros(4)}, "Module wants s_aux, which is not supported"),
        ({"dropout": 0.1}, "dropout must be 0, got 0.1"),
        ({"attention_mask": torch.ones(1, 1, 128, 128, dtype=torch.bool)}, "attention_mask must be None"),
    ],
)
def test_what_would_be_wrong_is_refused(changes, text):
    with pytest.raises(ValueError, match=f"fastrlhf attention: {text}"):
        attend(MODULE, *qkv(), **{"attention_mask": None, **keywords(), **changes})


def test_several_rows_are_refused():
    tensors = [t.expand(2, -1, -1, -1) for t in qkv()]
    with pytest.raises(ValueError, match="a pack is one row of tokens, got 2 rows"):
        attend(MODULE, *tensors, None, **keywords())


def test_models_refuse_padding_and_calls_without_a_pack():
    model = tiny_model("llama")
    model.set_attn_implementation(ATTENTION)
    ids = torch.ones(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="takes packed sequences, not padding"):
        model(ids, attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]))
    with pytest.raises(ValueError, match="call the model with"):
        model(ids)


def test_chunked_attention_is_refused():
    config = tiny_model("llama").config
    config.attention_chunk_size = 16
    with pytest.raises(ValueError, match="llama attends within chunks"):
        AttentionMaskInterface()[ATTENTION](config=config, attention_mask=None)
