"""What a benchmark file declares, and `python -m benchmarks` and `pytest benchmarks` run: sizes and cases.

SIZES = {"cpu": [(4096,)], "cuda": [(1048576,)], "tiny": [(3,)]}

def cases(sizes: list[tuple[int, ...]], device: str) -> Iterator[Case]:
    for (num,) in sizes:
        yield Case(f"{num} tokens", {"fastrlhf": ours, "torch": theirs}, lambda num=num: (torch.randn(num),), theirs)
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]
Function = Callable[..., Any]


def _same(*inputs: Any) -> tuple[Any, ...]:
    return inputs


@dataclass(frozen=True)
class Prepared:
    """A function whose arguments are made anew for every call, outside the timed region: run(*prepare(*inputs)).

    shown: what the check compares, made of the outputs, where they are laid out in another way than the others'
    finish: what is to be done with the arguments after the call, outside the timed region too"""

    prepare: Callable[..., tuple[Any, ...]]
    run: Function
    shown: Callable[..., tuple[Tensor, ...]] = _same
    finish: Callable[..., object] = _same


@dataclass(frozen=True)
class Case:
    """Functions of the same inputs that compute the same.

    functions: ours first. Each is called with the inputs and returns a tensor or a tuple, those that have a gradient
        first; a peer may leave out the last
    inputs: makes them, on torch's default device, when the case's turn has come
    exact: says what is right, on the inputs in float64
    grads: the places of the inputs that the backward goes to; where there are none, the forward alone is timed
    few: cuts the inputs, to check on less than is timed
    loose: the absolute tolerance of functions that are known to round more
    check: instead of `exact`: raises if a function is wrong on the inputs, returns errors by name
    work: amounts by name of a column, such as gb_s, that says how much of it each function does in a second
    memory: whether a column says what is allocated at the peak beyond inputs and outputs
    """

    name: str
    functions: Mapping[str, Function | Prepared]
    inputs: Callable[[], tuple[Any, ...]] = tuple
    exact: Callable[..., Outputs] | None = None
    grads: tuple[int, ...] = ()
    few: Callable[..., tuple[Any, ...]] = _same
    rtol: float = 1e-4
    atol: float = 1e-5
    loose: Mapping[str, float] = field(default_factory=dict)
    check: Callable[..., dict[str, float]] | None = None
    work: Mapping[str, float] = field(default_factory=dict)
    memory: bool = False

    def make(self, device: str) -> tuple[Any, ...]:
        """The inputs, the same each time."""
        torch.manual_seed(0)
        with torch.device(device):
            return self._leaves(self.inputs())

    def errors(self, inputs: tuple[Any, ...]) -> dict[str, float]:
        """The largest error of each function, gradients included. Raises if ours is wrong; a peer that is wrong or
        fails is left out, with a line that says so."""
        if self.check is not None:
            return self.check(*inputs)
        few, upstream = self.few(*inputs), list[Tensor]()
        double = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in few]
        exact = self._results(self.exact, double, upstream)
        errors = {}
        for name, function in self.functions.items():
            near = {"rtol": self.rtol, "atol": self.loose.get(name, self.atol)}
            try:
                results = self._results(function, few, upstream)
                pairs = [*zip(results[0], exact[0], strict=False), *zip(results[1], exact[1], strict=True)]
                errors[name] = max(expect_close(name, a.reshape(e.shape), e, **near) for a, e in pairs)
            except Exception as failure:
                if name.startswith("fastrlhf"):
                    raise
                print(f"{self.name}: {name} is left out: {type(failure).__name__}: {failure}")
        return errors

    def timed(self, name: str, inputs: tuple[Any, ...]) -> Prepared:
        """What is called on the clock: the function or, where there are gradients, the way there and back."""
        function = _prepared(self.functions[name])
        if not self.grads:
            return Prepared(lambda: function.prepare(*inputs), function.run)
        outputs = function.run(*function.prepare(*inputs))
        upstream = [torch.randn_like(o) if o.ndim else None for o in _tensors(outputs) if o.requires_grad]
        kept = slice(len(upstream)) if isinstance(outputs, tuple) else ...
        del outputs

        def run(*args: Any) -> tuple[Tensor, ...]:
            return torch.autograd.grad(function.run(*args)[kept], [args[i] for i in self.grads], upstream)

        return Prepared(lambda: function.prepare(*inputs), run)

    def _leaves(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(x.detach().requires_grad_() if i in self.grads else x for i, x in enumerate(inputs))

    def _results(
        self, function: Function | Prepared | None, inputs: Sequence[Any], upstream: list[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Outputs and gradients. The first call fills `upstream`, the gradients of the outputs, for all."""
        assert function is not None, f"{self.name}: needs `exact` or `check`"
        function = _prepared(function)
        args = function.prepare(*self._leaves(inputs))
        outputs = _tensors(function.run(*args))
        if not self.grads:
            return function.shown(*outputs), ()
        wanted = [o for o in outputs if o.requires_grad]
        if not upstream:
            upstream += [torch.randn_like(o) if o.ndim else torch.ones_like(o) for o in wanted]
        into = [u.to(o.dtype).reshape(o.shape) for u, o in zip(upstream, wanted, strict=True)]
        return outputs, torch.autograd.grad(wanted, [args[i] for i in self.grads], into)


def _prepared(function: Function | Prepared) -> Prepared:
    return function if isinstance(function, Prepared) else Prepared(_same, function)


def _tensors(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def expect_close(what: str, actual: Tensor, expected: Tensor, *, rtol: float = 1e-5, atol: float = 1e-5) -> float:
    """Returns the largest error; raises if `what` is wrong, because the time of a wrong result means nothing."""
    actual, expected = actual.detach().double(), expected.detach().double()
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda text: f"{what} is wrong: {text}")
    return (actual - expected).abs().nan_to_num().max().item() if actual.numel() else 0.0


def once(function: Prepared, calls: int = 1) -> float:
    """Milliseconds of one call, the average of `calls`; what a call returns is freed outside the timed region."""
    arguments, results = [function.prepare() for _ in range(calls)], []
    synchronize()
    start = time.perf_counter()
    for args in arguments:
        results.append(function.run(*args))
    synchronize()
    took = time.perf_counter() - start
    for args in arguments:
        function.finish(*args)
    return took * 1e3 / calls


def peak_mib(function: Function | Prepared, *, beside_outputs: bool = False) -> float:
    """The most memory in MiB that torch held at a time during one call, beyond its arguments (and what it returned)."""
    function = _prepared(function)
    arguments = function.prepare()
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        outputs = function.run(*arguments)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with torch.autograd.profiler.profile(profile_memory=True) as recorded:
            outputs = function.run(*arguments)
        changes = [event.nbytes() for event in recorded.kineto_results.events() if event.name() == "[memory]"]
        peak = max(itertools.accumulate(changes), default=0)
    return (peak - beside_outputs * sum(output.nbytes for output in _tensors(outputs))) / 2**20


def synchronize() -> None:
    """Waits for what was started on a GPU, if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
