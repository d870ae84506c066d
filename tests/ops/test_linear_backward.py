"""The ways to the gradient of linear_token_logprobs: what each costs, and that all of them lead to the same."""

import pytest
import torch
import torch.nn.functional as F
from compare import filled, peak_bytes
from torch.autograd.profiler import profile

from fastrlhf import linear_token_logprobs
from fastrlhf.ops._linear import Head
from fastrlhf.ops._linear_backward import LOGITS
from fastrlhf.ops._registry import OPS

T, D, V = 90, 40, 900
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ALL = 2**40  # bytes that keep every row
OPTIONS = [
    {},
    {"temperature": torch.linspace(0.05, 5.0, T), "logit_scale": 3.0, "bias": torch.randn(V)},
    {"temperature": 0.3, "logit_scale": 2.0, "logit_softcap": 4.0},
]


def inputs(dtype=torch.float32, num_rows=T):
    weight = (torch.randn(V, D) / 4).to(dtype)
    return torch.randn(num_rows, D).to(dtype), weight, torch.randint(V, (num_rows,))


def gradients(trained, hidden, weight, targets, upstream=None, **options):
    """Of the log-probabilities, in the inputs whose names are in `trained`."""
    leaves = {"hidden": hidden.clone(), "weight": weight.clone()}
    chosen = [leaves[name].requires_grad_() for name in trained]
    logprobs = linear_token_logprobs(leaves["hidden"], leaves["weight"], targets, **options)
    return torch.autograd.grad(logprobs, chosen, torch.ones_like(logprobs) if upstream is None else upstream)


def exact(hidden, weight, targets, upstream, *, bias=None, temperature=1.0, logit_scale=1.0, logit_softcap=None):
    """Gradients in hidden and weight by autograd, in float64, of whole logits."""
    leaves = [t.double().requires_grad_() for t in (hidden, weight)]
    logits = logit_scale * F.linear(*leaves, None if bias is None else bias.double())
    if logit_softcap is not None:
        logits = logit_softcap * (logits / logit_softcap).tanh()
    divisor = temperature.double()[:, None] if isinstance(temperature, torch.Tensor) else temperature
    logprobs = (logits / divisor).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return torch.autograd.grad(logprobs, leaves, upstream.double())


def products(function):
    """The shapes of the first factor of each matrix product that the function makes."""
    with profile(record_shapes=True) as recorded:
        function()
    first = {"aten::mm": 0, "aten::addmm_": 1}
    return [e.input_shapes[first[e.name]] for e in recorded.function_events if e.name in first]


WAYS = {
    "by rows": (["hidden", "weight"], {"chunk_size": 64, "batch_invariant": True}),
    "logits made again": (["hidden", "weight"], {}),
    "a third of the gradients kept": (["hidden", "weight"], {"memory_budget": 30 * V * 4}),
    "all gradients kept": (["hidden", "weight"], {"memory_budget": ALL}),
    "hidden alone": (["hidden"], {}),
    "weight alone": (["weight"], {"memory_budget": ALL}),
}


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "scaled", "soft-capped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_way_is_about_as_exact_as_making_the_logits_again(dtype, options):
    options = {k: v.to(dtype) if k == "bias" else v for k, v in options.items()}
    *args, upstream = *inputs(dtype), torch.randn(T) * torch.logspace(-4, 0, T)
    names, chunks = ("hidden", "weight"), {"chunk_size": 16, **options}
    upstream = upstream.to(torch.promote_types(dtype, torch.float32))
    expected = dict(zip(names, exact(*args, upstream, **options), strict=True))
    allowed = {}
    for trained, way in WAYS.values():
        for name, grad in filled(zip(trained, gradients(trained, *args, upstream, **{**chunks, **way}), strict=True)):
            assert grad.dtype == dtype
            error = (grad.double() - expected[name]).norm() / expected[name].norm()
            allowed.setdefault(name, 2 * error + 1e-16)  # by rows, with all logits made again
            assert error <= allowed[name] <= 4 * torch.finfo(dtype).eps + 4e-6 * (dtype == torch.float32)


def test_float16_keeps_the_gradients_of_improbable_tokens():
    """A gradient of 1e-8 is below what float16 holds, unless multiplied first."""
    hidden, weight = torch.ones(1, 1).half(), torch.zeros(100, 1).half()
    weight[0] = 18.0
    upstream = torch.tensor([2.0**15])  # as a scaled loss has it
    (grad,) = gradients(["weight"], hidden, weight, torch.tensor([0]), upstream, memory_budget=ALL)
    _, expected = exact(hidden, weight, torch.tensor([0]), upstream)
    assert 1e-8 < -expected[1].item() / 2**15 < 2e-8
    torch.testing.assert_close(grad[1:].double(), expected[1:], rtol=2e-3, atol=0)


CHUNK, CHUNK_BACK = [[45, D]], [[45, V], [V, 45]]


@pytest.mark.parametrize(
    ("trained", "options", "shapes"),
    [
        (["hidden"], {}, [[45, D], [45, V]] * 2),  # all of them in the forward
        (["hidden"], {"memory_budget": ALL}, [[45, D], [45, V]] * 2),
        (["hidden"], {"return_entropy": True}, CHUNK * 2 + [[45, D], [45, V]] * 2),
        (["weight"], {}, CHUNK * 2 + [[45, D], [V, 45]] * 2),
        (["hidden", "weight"], {}, CHUNK * 2 + (CHUNK + CHUNK_BACK) * 2),
        (["hidden", "weight"], {"memory_budget": 45 * V * 4}, CHUNK * 2 + CHUNK_BACK + CHUNK + CHUNK_BACK),
        (["hidden", "weight"], {"memory_budget": ALL}, CHUNK * 2 + CHUNK_BACK * 2),
    ],
)
def test_products_are_made_no_oftener_than_needed(trained, options, shapes):
    hidden, weight, targets = inputs()
    leaves = [{"hidden": hidden, "weight": weight}[name].requires_grad_() for name in trained]

    def run():
        outputs = linear_token_logprobs(hidden, weight, targets, chunk_size=45, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, leaves, [torch.ones(T)] * len(outputs))

    assert products(run) == shapes


def test_half_precision_makes_the_weight_gradient_in_one_product_a_block_of_the_vocabulary():
    shapes = products(lambda: gradients(["hidden", "weight"], *inputs(torch.bfloat16), chunk_size=45))
    widths = 448, 448, V - 896  # T x 448 logits are 45 x V at most
    assert shapes == CHUNK * 2 + [shape for n in widths for shape in ([T, D], [T, n], [n, T])]


def test_half_precision_holds_no_weight_gradient_in_float32():
    num_rows, width, size, chunk_size = 128, 256, 6000, 16
    hidden, weight = torch.randn(num_rows, width).bfloat16(), torch.randn(size, width).bfloat16()
    leaves, targets = [hidden.requires_grad_(), weight.requires_grad_()], torch.randint(size, (num_rows,))
    peaks = []
    for options in ({"chunk_size": chunk_size}, {"chunk_size": 64, "batch_invariant": True}):
        logprobs = linear_token_logprobs(hidden, weight, targets, **options)
        peaks.append(peak_bytes(lambda o=logprobs: torch.autograd.grad(o, leaves, torch.ones(num_rows))))
    grads, tile = 2 * (num_rows + size) * width, chunk_size * size * 4 + num_rows * 16 * 4
    block = 4 * 704 * width * 2  # of the weight and of its gradient
    assert peaks[0] <= grads + tile + block + 4 * (4 * num_rows * width) + 24 * num_rows * 8
    assert peaks[1] >= 6 * size * width


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_by_columns_every_gradient_is_about_as_exact_as_by_rows(dtype):
    hidden, weight, targets = inputs(dtype)
    tensors = [t.to(dtype) for t in (hidden, weight, torch.randn(V), torch.randn(3, D) / 6, torch.randn(V, 3))]
    upstream, errors = torch.randn(2, T), []
    leaves = [t.double().requires_grad_() for t in tensors]
    hidden, weight, bias, a, b = leaves
    table = F.linear(hidden, weight + 0.5 * b @ a, bias).log_softmax(-1)
    outputs = table.gather(1, targets[:, None])[:, 0], -(table.exp() * table).sum(-1)
    exact_grads = torch.autograd.grad(outputs, leaves, tuple(upstream.double()))
    for options in ({"chunk_size": 64, "batch_invariant": True}, {"chunk_size": 45}):
        leaves = [t.clone().requires_grad_() for t in tensors]
        hidden, weight, bias, *lora = leaves
        options = {"bias": bias, "lora": (*lora, 0.5), "return_entropy": True, **options}
        outputs = linear_token_logprobs(hidden, weight, targets, **options)
        grads = torch.autograd.grad(outputs, leaves, tuple(upstream))
        errors.append([(g.double() - e).norm() / e.norm() for g, e in zip(grads, exact_grads, strict=True)])
    assert all(columns <= 1.1 * rows < torch.finfo(dtype).eps for rows, columns in filled(zip(*errors, strict=True)))


def test_a_target_out_of_range_gives_nan_by_columns_too():
    hidden, weight, targets = inputs(torch.bfloat16)
    targets[3], targets[5] = V, -1
    hidden.requires_grad_(), weight.requires_grad_()
    head = Head(hidden, weight, None, None, None, 1.0, 1.0, None, 45, False)
    logprobs, *_ = OPS["linear_token_logprobs"](*head, targets, torch.ones(1), LOGITS, 0, False)
    grad, _ = torch.autograd.grad(logprobs, (hidden, weight), torch.ones(T))
    assert grad.isnan().all(1).nonzero()[:, 0].tolist() == grad.isnan().any(1).nonzero()[:, 0].tolist() == [3, 5]


@pytest.mark.parametrize("options", [{}, {"memory_budget": ALL}])
def test_a_forward_alone_makes_no_gradient(options):
    hidden, weight, targets = inputs()
    assert products(lambda: linear_token_logprobs(hidden, weight, targets, chunk_size=45, **options)) == CHUNK * 2
    hidden.requires_grad_()
    with torch.no_grad():
        assert products(lambda: linear_token_logprobs(hidden, weight, targets, chunk_size=45, **options)) == CHUNK * 2


def test_half_precision_keeps_twice_the_rows():
    made = {}
    for dtype in (torch.float32, torch.bfloat16):
        args = inputs(dtype)
        budget = {"chunk_size": 10, "memory_budget": 40 * V * 4}
        shapes = products(lambda args=args, budget=budget: gradients(["weight"], *args, **budget))
        made[dtype] = sum(shape[0] for shape in shapes if shape[1] == D) - T  # rows of logits made again
    assert made == {torch.float32: T - 40, torch.bfloat16: T - 80}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_holds_one_gradient_of_hidden(dtype):
    num_rows, width, size, chunk_size = 512, 64, 5000, 16
    hidden, weight = torch.randn(num_rows, width).to(dtype), torch.randn(size, width).to(dtype)
    targets, chunk = torch.randint(size, (num_rows,)), chunk_size * (size + 2 * width) * 4
    block = 4096 * width * 4 if dtype == torch.bfloat16 else 0
    small = 24 * num_rows * 4
    hidden.requires_grad_()
    forward = peak_bytes(lambda: linear_token_logprobs(hidden, weight, targets, chunk_size=chunk_size))
    assert forward <= chunk + block + small + num_rows * width * 4
    logprobs = linear_token_logprobs(hidden, weight, targets, chunk_size=chunk_size)
    backward = peak_bytes(lambda: torch.autograd.grad(logprobs, hidden, torch.ones(num_rows)))
    assert backward <= num_rows * width * 8 + small


@pytest.mark.parametrize("options", [{}, {"memory_budget": 45 * V * 4}])
@pytest.mark.parametrize("trained", [["hidden"], ["hidden", "weight"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_without_a_gradient_are_as_if_left_out(dtype, trained, options):
    hidden, weight, targets = inputs(dtype)
    used = torch.rand(T) < 0.5
    upstream = torch.where(used, torch.randn(T), 0.0)
    expected = gradients(trained, hidden[used], weight, targets[used], upstream[used], chunk_size=16)
    hidden[~used] = torch.nan
    actual = gradients(trained, hidden, weight, targets, upstream, chunk_size=16, **options)
    assert not actual[0][~used].any()
    for ours, theirs in zip((actual[0][used], *actual[1:]), expected, strict=True):
        eps = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=max(1e-5, eps), atol=max(1e-6, eps))


@pytest.mark.parametrize("trained", [["hidden"], ["hidden", "weight"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_invariant_rows_do_not_depend_on_the_others_nor_on_what_is_kept(dtype, trained):
    hidden, weight, targets = inputs(dtype, 200)
    options = {"chunk_size": 64, "batch_invariant": True, "memory_budget": 40 * V * 4}
    alone = gradients(trained, hidden[70:71], weight, targets[70:71], **options)[0][0]
    for rows in (slice(70, 77), slice(3, 77), slice(13, 200), slice(0, 200)):
        grads = gradients(trained, hidden[rows], weight, targets[rows], **options)
        assert torch.equal(grads[0][70 - rows.start], alone)


@pytest.mark.parametrize(("trained", "way"), WAYS.values(), ids=WAYS)
def test_compiles_with_its_gradient(trained, way):
    torch.compiler.reset()
    *tensors, targets = inputs()
    results = []

    def loss(hidden, weight):
        return linear_token_logprobs(hidden, weight, targets, **{"chunk_size": 16, **way}).sum()

    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = dict(zip(("hidden", "weight"), (t.clone() for t in tensors), strict=True))
        chosen = [leaves[name].requires_grad_() for name in trained]
        results.append(torch.autograd.grad(function(**leaves), chosen))
    assert all(torch.equal(a, b) for a, b in filled(zip(*results, strict=True)))


def test_a_second_backward_gives_the_same():
    hidden, weight, targets = inputs()
    hidden.requires_grad_()
    logprobs = linear_token_logprobs(hidden, weight, targets).sum()
    first, second = (torch.autograd.grad(logprobs, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
