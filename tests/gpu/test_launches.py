"""Launches go to the current stream and nothing waits for them, so that graphs can capture every op with a kernel.

Of the ops on a linear head, made of matrix products and of other ops' kernels, only forwards that are no losses: losses
and gradients count the rows that take part before they allocate, for which the host waits.
"""

import pytest
import torch
from compare import flat
from torch import Tensor

from fastrlhf.ops._registry import BACKENDS, OPS

NATIVE = [name for name in OPS if BACKENDS[name]["cuda"] == "native" and not name.startswith("linear_")]
# of matrix products and other ops; packed_attention and thin_linear are for the CPU
COMPOSED = {*(name for name in OPS if name.startswith("linear_")), "packed_attention", "thin_linear"}
FORWARDS = ("linear_token_logprobs", "linear_kl_divergence")
CYCLES = 200_000_000  # a tenth of a second, in which the host launches all samples of an op


def results_of(name, args):
    """The outputs of an op and, where it has one that can be captured, its gradient for ones."""
    named, grads_of = zip(OPS[name].parameters, args, strict=True), () if name in FORWARDS else OPS[name].grads
    leaves = [a.detach().requires_grad_() if n in grads_of and isinstance(a, Tensor) else a for n, a in named]
    outputs = flat(OPS[name](*leaves))
    wanted = [output for output in outputs if output.requires_grad]
    grads = ()
    if wanted:
        inputs = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
        grads = torch.autograd.grad(wanted, inputs, [torch.ones_like(o) for o in wanted], allow_unused=True)
    return [t.detach() for t in (*outputs, *grads) if t is not None]


@pytest.fixture
def prepared(device):
    """prepared(op): its samples, what it makes of them, and tensors like them whose numbers are still to be filled in.

    The kernels for both have been loaded, which neither a capture nor a race against a waiting stream allows for."""

    def prepare(name):
        filled = list(OPS[name].samples(device, torch.float32))
        expected = [results_of(name, args) for args in filled]
        blank = [[blank_of(a) if isinstance(a, Tensor) else a for a in args] for args in filled]
        for args in blank:
            results_of(name, args)
        torch.cuda.synchronize()
        return filled, expected, blank

    return prepare


def blank_of(tensor):
    return torch.zeros_like(tensor) if tensor.is_floating_point() else tensor.clone()


def fill(blank, filled):
    for targets, sources in zip(blank, filled, strict=True):
        for target, source in zip(targets, sources, strict=True):
            if isinstance(target, Tensor):
                target.copy_(source)


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        for a, e in zip(one, other, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


def test_every_op_that_is_not_composed_has_a_kernel():
    assert set(OPS) - set(NATIVE) == COMPOSED, "the others take the reference: without Triton, or built without nvcc"


@pytest.mark.parametrize("name", [*NATIVE, *FORWARDS])
def test_a_captured_graph_computes_from_what_its_inputs_hold_when_it_is_replayed(name, prepared):
    filled, expected, blank = prepared(name)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [results_of(name, args) for args in blank]
    fill(blank, filled)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(results, expected)


@pytest.mark.parametrize("name", [*NATIVE, *FORWARDS])
def test_a_stream_other_than_the_default_gives_the_same(name, prepared):
    filled, expected, blank = prepared(name)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)  # a kernel on any other stream would run now, and read blanks
        fill(blank, filled)
        results = [results_of(name, args) for args in blank]
    torch.cuda.synchronize()
    assert_same(results, expected)
