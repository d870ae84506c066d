"""linear_token_logprobs against logits made whole, transformers' heads, and its own promises about memory and work."""

import pytest
import torch
import torch.nn.functional as F
from compare import filled, peak_bytes
from torch.autograd.profiler import profile
from torch.distributions import Categorical
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

from fastrlhf import linear_token_logprobs
from fastrlhf.ops._registry import BACKEND

T, D, V = 50, 24, 700


def inputs(dtype=torch.float32, *, num_rows=T, bias=True):
    hidden, weight = torch.randn(num_rows, D).to(dtype), (torch.randn(V, D) / 3).to(dtype)
    return hidden, weight, torch.randint(V, (num_rows,)), torch.randn(V).to(dtype) if bias else None


def exact(hidden, weight, targets, bias=None, temperature=1.0, logit_scale=1.0, logit_softcap=None):
    """From logits made whole, in float64, by torch.distributions."""
    logits = logit_scale * F.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    rows = Categorical(logits=logits / temperature)
    return rows.log_prob(targets), rows.entropy()


def gradients(function, hidden, weight, targets, bias, upstream, **options):
    leaves = [hidden, weight] if bias is None else [hidden, weight, bias]
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    outputs = function(*leaves[:2], targets, bias=leaves[2] if bias is not None else None, **options)
    return torch.autograd.grad(outputs, leaves, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)])


OPTIONS = [
    {},
    {"temperature": 0.7, "logit_scale": 0.0625},
    {"temperature": torch.linspace(0.5, 2.0, T), "logit_softcap": 2.0},
    {"logit_scale": 1.7, "logit_softcap": 5.0},
]


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 512])
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_that_of_the_whole_logits(options, bias, chunk_size):
    *args, bias = inputs(bias=bias)
    divided = {k: v[:, None] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    upstream = torch.randn(2, T).unbind()

    def ours(*args, **options):
        return linear_token_logprobs(*args, return_entropy=True, chunk_size=chunk_size, **options)

    for actual, expected in filled(zip(ours(*args, bias=bias, **options), exact(*args, bias, **divided), strict=True)):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=4e-6)
    pairs = zip(
        gradients(ours, *args, bias, upstream, **options),
        gradients(exact, *args, bias, upstream, **divided),
        strict=True,
    )
    for actual, expected in filled(pairs):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_lose_nothing_further(dtype):
    *args, bias = inputs(dtype)
    outputs = linear_token_logprobs(*args, bias=bias, return_entropy=True, chunk_size=16)
    for actual, expected in filled(zip(outputs, exact(*args, bias), strict=True)):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=4e-6)
    upstream = torch.randn(2, T).unbind()
    options = {"return_entropy": True, "chunk_size": 16}
    actual = gradients(linear_token_logprobs, *args, bias, upstream, **options)
    expected = gradients(exact, *(a.double() if a.is_floating_point() else a for a in (*args, bias)), upstream)
    for ours, theirs in filled(zip(actual, expected, strict=True)):
        assert ours.dtype == dtype
        eps = torch.finfo(dtype).eps  # rounded once, at the end
        torch.testing.assert_close(ours.double(), theirs, rtol=eps, atol=1e-6 + eps * 1e-2)


def test_half_precision_weights_are_widened_in_blocks():
    hidden, weight = torch.randn(3, 8).bfloat16(), torch.randn(10_000, 8).bfloat16()
    targets = torch.tensor([0, 4096, 9999])
    torch.testing.assert_close(
        linear_token_logprobs(hidden, weight, targets).double(), exact(hidden, weight, targets)[0], rtol=1e-6, atol=4e-6
    )


def test_softcap_and_scale_are_those_of_transformers():
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    common |= {"num_key_value_heads": 1, "vocab_size": 90, "head_dim": 8, "pad_token_id": 0}
    tokens = torch.randint(90, (1, 20))
    for config, options in (
        (Gemma2Config(**common, final_logit_softcapping=0.5), {"logit_softcap": 0.5}),
        (CohereConfig(**common, logit_scale=0.3), {"logit_scale": 0.3}),
    ):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        with torch.no_grad():
            logits = model(tokens).logits[0]
            hidden = model.model(tokens).last_hidden_state[0]
            actual = linear_token_logprobs(hidden, model.lm_head.weight, tokens[0], **options)
        torch.testing.assert_close(actual, Categorical(logits=logits).log_prob(tokens[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [[], [3], range(0, T, 3)])
def test_rows_without_a_gradient_are_as_if_left_out(kept):
    hidden, weight, targets, bias = inputs()
    kept = torch.tensor(kept, dtype=torch.int64)
    upstream = torch.zeros(2, T)
    upstream[:, kept] = torch.randn(2, len(kept))
    hidden[torch.ones(T, dtype=torch.bool).index_fill(0, kept, False)] = torch.nan
    temperature = torch.linspace(0.5, 2.0, T)
    options = {"return_entropy": True, "chunk_size": 8}
    whole = gradients(
        linear_token_logprobs, hidden, weight, targets, bias, upstream.unbind(), temperature=temperature, **options
    )
    part = gradients(
        linear_token_logprobs,
        hidden[kept],
        weight,
        targets[kept],
        bias,
        upstream[:, kept].unbind(),
        temperature=temperature[kept],
        **options,
    )
    assert int(whole[0].any(1).sum()) == len(kept)  # every other row is exactly 0
    for ours, theirs in zip((whole[0][kept], *whole[1:]), part, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_only_what_needs_a_gradient_gets_one(trained):
    hidden, weight, targets, bias = inputs()
    named = {"hidden": hidden, "weight": weight, "bias": bias}
    both = gradients(linear_token_logprobs, hidden, weight, targets, bias, (torch.ones(T),) * 2, return_entropy=True)
    named[trained].requires_grad_()
    outputs = linear_token_logprobs(hidden, weight, targets, bias=bias, return_entropy=True)
    with profile() as recorded:
        torch.autograd.backward(outputs, (torch.ones(T),) * 2)
    assert torch.equal(named[trained].grad, dict(zip(named, both, strict=True))[trained])
    assert all(t.grad is None for name, t in named.items() if name != trained)
    products = sum(event.name in ("aten::mm", "aten::addmm_") for event in recorded.function_events)
    assert products == (1 if trained == "bias" else 2)  # the logits again, and one product for a matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_memory_is_that_of_a_chunk(dtype, softcap):
    num_rows, width, size, chunk_size = 512, 16, 5000, 16
    hidden, weight = torch.randn(num_rows, width).to(dtype), torch.randn(size, width).to(dtype)
    targets, chunk = torch.randint(size, (num_rows,)), chunk_size * size * 4
    options = {"chunk_size": chunk_size, "return_entropy": True, "logit_softcap": softcap}
    assert peak_bytes(lambda: torch.mm(hidden.float(), weight.float().t())) >= num_rows * size * 4  # the meter works
    block = 4096 * width * 4 if dtype == torch.bfloat16 else 0
    small = 24 * num_rows * 4 + 2 * chunk_size * width * 4
    forward = peak_bytes(lambda: linear_token_logprobs(hidden, weight, targets, **options))
    copies = 1 if BACKEND == "native" else 9  # the reference makes a few more tensors of the size of a chunk
    assert forward <= copies * chunk + block + small
    hidden.requires_grad_(), weight.requires_grad_()
    outputs = linear_token_logprobs(hidden, weight, targets, **options)
    backward = peak_bytes(lambda: torch.autograd.grad(outputs, (hidden, weight), (torch.ones(num_rows),) * 2))
    grads = 4 * (num_rows + size) * width + (2 * size * width if dtype == torch.bfloat16 else 0)
    assert backward <= chunk * (copies + (softcap is not None)) + grads + block + small
    assert max(forward, backward) < num_rows * size * 4 / 2


def test_autocast_does_not_touch_it():
    hidden, weight, targets, _ = inputs(bias=False)
    expected = linear_token_logprobs(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_token_logprobs(hidden, weight, targets), expected)


def test_compiles_with_its_gradient():
    torch.compiler.reset()
    hidden, weight, targets, bias = inputs()

    def loss(hidden, weight):
        logprobs, entropy = linear_token_logprobs(hidden, weight, targets, bias=bias, return_entropy=True)
        return logprobs.sum() + 0.1 * entropy.sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        results.append(torch.autograd.grad(function(*leaves), leaves))
    assert all(torch.equal(a, b) for a, b in filled(zip(*results, strict=True)))


def test_a_second_derivative_raises():
    hidden, weight, targets, _ = inputs()
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(
        (linear_token_logprobs(hidden, weight, targets) ** 2).sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="has no second derivative"):
        grad.sum().backward()


def test_a_transposed_weight_is_read_where_it_is():
    hidden, weight, targets, _ = inputs()
    stored = weight.t().contiguous()  # (D, V), as some models keep it
    torch.testing.assert_close(
        linear_token_logprobs(hidden, stored.t(), targets), linear_token_logprobs(hidden, weight, targets)
    )


GOOD = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "targets": torch.zeros(3, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"hidden": torch.zeros(3)}, ValueError, "hidden must be (T, D)"),
        ({"weight": torch.zeros(4, 5)}, ValueError, "weight must be (V, D) = (*, 4), got (4, 5)"),
        ({"weight": torch.zeros(0, 4)}, ValueError, "weight must have at least one row, got (0, 4)"),
        ({"weight": torch.zeros(5, 4).bfloat16()}, TypeError, "weight must be float32, got bfloat16"),
        ({"targets": torch.tensor([0, 5, 1])}, ValueError, "targets must be in [0, 5), got values from 0 to 5"),
        ({"targets": torch.zeros(3).int()}, TypeError, "targets must be int64, got int32"),
        ({"bias": torch.zeros(4)}, ValueError, "bias must be (V,) = (5,), got (4,)"),
        ({"bias": torch.zeros(5).double()}, TypeError, "bias must be float32, got float64"),
        ({"weight": torch.zeros(5, 4, device="meta")}, ValueError, "must be on one device"),
        ({"temperature": -1.0}, ValueError, "temperature must be above 0 and finite, got -1.0"),
        ({"temperature": torch.ones(2)}, ValueError, "temperature must be (3,) or (1,), got (2,)"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be above 0 and finite, got 0.0"),
        ({"logit_softcap": -3.0}, ValueError, "logit_softcap must be above 0 and finite, got -3.0"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(change, error, text):
    with pytest.raises(error) as caught:
        linear_token_logprobs(**{**GOOD, **change})
    assert "linear_token_logprobs: " in str(caught.value) and text in str(caught.value)


@pytest.mark.parametrize("options", [{}, {"return_entropy": True}, {"memory_budget": 10**9}, {"logit_softcap": 2.0}])
def test_top1_says_where_argmax_would_choose_the_target(options):
    hidden, weight, targets, bias = inputs(num_rows=33)
    logits = F.linear(hidden.double(), weight.double(), bias.double())
    targets[::2] = logits.argmax(-1)[::2]
    weight.requires_grad_()
    logprobs, *_, top1 = linear_token_logprobs(
        hidden, weight, targets, bias=bias, chunk_size=8, return_top1=True, **options
    )
    assert top1.dtype == torch.bool and top1.tolist() == (logits.argmax(-1) == targets).tolist()
    without = linear_token_logprobs(hidden, weight, targets, bias=bias, chunk_size=8, **options)
    assert torch.equal(logprobs, without[0] if "return_entropy" in options else without)
    grads = [
        torch.autograd.grad(x.sum(), weight)[0] for x in (logprobs, without[0] if type(without) is tuple else without)
    ]
    assert torch.equal(*grads)


@pytest.mark.parametrize("options", [{}, {"return_entropy": True}, {"return_top1": True}, {"logit_softcap": 2.0}])
def test_logsumexp_is_that_of_the_divided_logits(options):
    hidden, weight, targets, bias = inputs(num_rows=33)
    scale, cap, temperature = 1.7, options.get("logit_softcap"), torch.linspace(0.5, 2, 33)
    logits = F.linear(hidden.double(), weight.double(), bias.double()) * scale
    logits = logits if cap is None else cap * (logits / cap).tanh()
    outputs = linear_token_logprobs(
        *(hidden, weight.requires_grad_(), targets),
        bias=bias,
        temperature=temperature,
        logit_scale=scale,
        chunk_size=8,
        return_logsumexp=True,
        **options,
    )
    logsumexp = outputs[2 if "return_entropy" in options else 1]
    expected = (logits / temperature[:, None].double()).logsumexp(-1)
    torch.testing.assert_close(logsumexp.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert not logsumexp.requires_grad and len(outputs) == 2 + len({*options} & {"return_entropy", "return_top1"})


def test_of_equal_logits_the_first_is_the_likeliest():
    targets = torch.tensor([0, 1, V - 1])
    _, top1 = linear_token_logprobs(torch.zeros(3, D), torch.randn(V, D), targets, return_top1=True)
    assert top1.tolist() == [True, False, False]
