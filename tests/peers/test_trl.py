"""Our replacements against TRL's originals: outputs, dtypes and gradients, in and out of what our ops cover."""

import inspect

import pytest
import torch
from compare import filled

import fastrlhf
from fastrlhf.integrations._replacing import same

utils = pytest.importorskip("trl.trainer.utils", reason="TRL is not installed")
HAS_TEMPERATURE = "temperature" in inspect.signature(utils.selective_log_softmax).parameters
with_temperature = pytest.mark.skipif(not HAS_TEMPERATURE, reason="this TRL has no temperature here")


@pytest.fixture(scope="module")
def pairs():
    """name -> (TRL's, ours)."""
    names = [n for n in vars(utils) if n in ("selective_log_softmax", "entropy_from_logits", "_ChunkedLogProbFunction")]
    names += ["selective_log_softmax_and_entropy"] * hasattr(utils, "selective_log_softmax_and_entropy")
    originals = {name: getattr(utils, name) for name in names}
    with fastrlhf.patch("trl") as done:
        assert set(done.replaced) == {f"trl.trainer.utils:{name}" for name in names}
        found = {name: (original, getattr(utils, name)) for name, original in originals.items()}
    assert all(getattr(utils, name) is original for name, original in originals.items())
    return found


def rows(*shape, dtype=torch.float32, scale=4.0):
    logits = (scale * torch.randn(shape)).to(dtype).requires_grad_()
    return logits, torch.randint(shape[-1], shape[:-1])


SHAPES = [(1, 1, 2), (3, 5, 7), (5, 1000), (2, 9, 4099)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_log_probs_and_entropies_are_trls(pairs, shape, dtype):
    logits, index = rows(*shape, dtype=dtype)
    same(*pairs["selective_log_softmax"], (logits, index))
    same(*pairs["entropy_from_logits"], (logits,))
    same(*pairs["entropy_from_logits"], (logits, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_the_cpu_is_trls_bit_by_bit(pairs, dtype):
    logits, index = rows(3, 5, 100, dtype=dtype)
    for name, arguments in (("selective_log_softmax", (logits, index)), ("entropy_from_logits", (logits,))):
        theirs, ours = (function(*arguments) for function in pairs[name])
        assert torch.equal(theirs, ours)


def test_slices_and_transposed_logits_are_read_in_place(pairs):
    logits, index = rows(3, 6, 50)
    for view, where in ((logits[:, :-1], index[:, :-1]), (logits[:, 1::2], index[:, 1::2])):
        same(*pairs["selective_log_softmax"], (view, where))
        same(*pairs["entropy_from_logits"], (view,))
    turned = torch.randn(4, 50, 6, requires_grad=True).transpose(1, 2)
    same(*pairs["selective_log_softmax"], (turned, torch.randint(50, (4, 6))))


def test_the_gradient_reaches_the_tensor_that_was_sliced(pairs):
    grads = []
    for function in pairs["selective_log_softmax"]:
        logits, index = rows(3, 6, 50)
        torch.manual_seed(0)
        logits = torch.randn(3, 6, 50, requires_grad=True)
        function(logits[:, :-1], index[:, 1:] * 0 + 3).square().sum().backward()
        grads.append(logits.grad)
    torch.testing.assert_close(*grads)
    assert not grads[1][:, -1].any()


def test_several_indices_a_row_go_to_the_original(pairs):
    logits, _ = rows(2, 3, 20)
    same(*pairs["selective_log_softmax"], (logits, torch.randint(20, (2, 3, 4))))


def test_large_and_far_apart_logits_are_trls(pairs):
    logits, index = rows(2, 3, 500, scale=1.0)
    for moved in (logits + 300.0, logits - 300.0, logits * 60):
        same(*pairs["selective_log_softmax"], (moved.detach().requires_grad_(), index))


@with_temperature
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_temperature_and_row_mask_are_trls(pairs, temperature, requires_grad):
    logits, index = rows(3, 7, 200)
    for row_mask in (None, index % 3 > 0, (index % 3 > 0).long(), torch.zeros_like(index)):
        same(*pairs["selective_log_softmax"], (logits, index, temperature, row_mask))
        same(*pairs["selective_log_softmax_and_entropy"], (logits, index, requires_grad, temperature, row_mask))


@with_temperature
def test_bad_temperatures_raise_as_in_trl(pairs):
    logits, index = rows(2, 3, 5)
    for temperature in (0.0, -1.0):
        for function in filled(pairs["selective_log_softmax"]):
            with pytest.raises(ValueError, match="temperature must be positive"):
                function(logits, index, temperature)


def head(num_rows=13, width=16, size=130, dtype=torch.float32):
    hidden, weight, bias = (torch.randn(shape) / 2 for shape in ((num_rows, width), (size, width), (size,)))
    hidden, weight, bias = (t.to(dtype).requires_grad_() for t in (hidden, weight, bias))
    return hidden, weight, bias, torch.randint(size, (num_rows,))


OPTIONS = [(1.0, 64, None, 1.0), (0.7, 130, None, 0.3), (1.3, 50, 5.0, 2.0), (1.0, 64, None, 0.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("num_rows", [0, 1, 13])
def test_the_head_is_trls(pairs, num_rows, options, dtype):
    hidden, weight, bias, targets = head(num_rows, dtype=dtype)
    if not HAS_TEMPERATURE:
        same(*pairs["_ChunkedLogProbFunction"], (hidden, weight, targets, *options))
        return
    for outputs in (("log_probs",), ("log_probs", "entropy"), ("log_probs", "entropy", "is_top1", "mean_logits")):
        for b in (None, bias):
            same(*pairs["_ChunkedLogProbFunction"], (hidden, weight, b, targets, *options, outputs))


@pytest.mark.parametrize("change", ["int32", "beyond", "ignored", "tensor", "negative"])
def test_arguments_that_our_op_would_refuse_are_trls(pairs, change):
    hidden, weight, bias, targets = head()
    temperature = {"tensor": torch.tensor(0.7), "negative": -1.0}.get(change, 1.0)
    if change == "int32":
        targets = targets.int()
    if change in ("beyond", "ignored"):
        targets[3] = len(weight) if change == "beyond" else -100
    if HAS_TEMPERATURE:
        same(
            *pairs["_ChunkedLogProbFunction"], (hidden, weight, bias, targets, temperature, 64, None, 1.0, ("entropy",))
        )
    else:
        same(*pairs["_ChunkedLogProbFunction"], (hidden, weight, targets, temperature, 64, None, 1.0))


@pytest.mark.skipif(not HAS_TEMPERATURE, reason="this TRL has no gradient of the entropy here")
def test_a_frozen_head_and_autocast_are_trls(pairs):
    hidden, weight, bias, targets = head()
    rest = (targets, 0.9, 64, None, 1.0, ("log_probs", "entropy"))
    same(*pairs["_ChunkedLogProbFunction"], (hidden, weight.detach(), bias.detach(), *rest))
    same(*pairs["_ChunkedLogProbFunction"], (hidden.detach(), weight, None, *rest))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(*pairs["_ChunkedLogProbFunction"], (hidden, weight, bias, *rest))


def compiled_is(theirs, ours, inputs):
    """Compares in one graph, outputs and gradients; not by `same`, which runs what is compiled eagerly."""
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    results = []
    for outputs in (theirs(*inputs), torch.compile(ours, fullgraph=True)(*inputs)):
        outputs = outputs[:2] if isinstance(outputs, tuple) else (outputs,)
        results.append((*outputs, *torch.autograd.grad(outputs[0].square().sum(), wanted)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of dynamo's own
def test_torch_compile_takes_the_patched_functions_in_one_graph(pairs):
    compiled_is(*pairs["selective_log_softmax"], rows(2, 3, 40))
    hidden, weight, bias, targets = head()
    rest = (targets, *OPTIONS[1])
    inputs = (hidden, weight, bias, *rest, ("log_probs", "entropy")) if HAS_TEMPERATURE else (hidden, weight, *rest)
    compiled_is(*(function.apply for function in pairs["_ChunkedLogProbFunction"]), inputs)
