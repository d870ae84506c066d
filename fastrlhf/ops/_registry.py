"""One declaration per op. The only file that talks to torch.library and that reads FASTRLHF_BACKEND.

`leaf` defines an operator: its reference serves every device, native launchers replace it where there are some, and the
fake makes it traceable. `op` adds the gradient (twice from one pair of functions: through torch.library for
`torch.ops.fastrlhf.*`, opcheck and torch.compile; and as an autograd.Function, three times cheaper per call, for eager
callers) and files the result in OPS, from which the contract tests and the benchmarks are derived. An eager call of
plain tensors goes straight to the function that serves their device, past torch's dispatcher, which takes the time of
a small kernel. So the first argument is a tensor.

FASTRLHF_BACKEND=ref makes the references the implementation everywhere, for debugging.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

# what watches operators; torch has no public names for them
_modes, _transforms = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
_trace, _profiled = torch._C._get_tracing_state, torch._C._autograd._profiler_enabled

SCALARS = frozenset((type(None), bool, int, float, str))

_lib = torch.library.Library("fastrlhf", "DEF")
BACKEND = os.environ.get("FASTRLHF_BACKEND", "native")
if BACKEND not in ("native", "ref"):
    raise ValueError(f"FASTRLHF_BACKEND must be native or ref, got {BACKEND!r}")

OPS: dict[str, "Op"] = {}
BACKENDS: dict[str, dict[str, str]] = {}  # leaf -> device -> what serves it there, for `fastrlhf info`
SERVING: dict[str, dict[str, Callable[..., Any]]] = {}  # leaf -> device -> the function that does


def leaf(
    schema: str,
    *,
    ref: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Defines `fastrlhf::<schema>` and returns it: the reference on every device, a native kernel where there is one.

    check: called with the arguments before either. Outputs may not alias inputs (opcheck rejects it)."""
    name = schema.split("(")[0]
    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _lib.impl(name, _after(check, ref), "CompositeExplicitAutograd")
    BACKENDS[name] = {"cpu": "reference", "cuda": "reference"}
    SERVING[name] = dict.fromkeys(("cpu", "cuda"), _after(check, ref))
    SERVING[name]["meta"] = _after(check, fake)  # the dispatcher would call the fake alone
    for device, kernel in (("cpu", cpu), ("cuda", cuda)):
        if kernel is not None and BACKEND == "native":
            SERVING[name][device] = _after(check, kernel)
            _lib.impl(name, SERVING[name][device], device.upper())
            BACKENDS[name][device] = "native"
    torch.library.register_fake(f"fastrlhf::{name}", fake, lib=_lib)
    return getattr(torch.ops.fastrlhf, name).default


def _after(check: Callable[..., None] | None, function: Callable[..., Any]) -> Callable[..., Any]:
    if check is None:
        return function

    def checked(*args: Any) -> Any:
        check(*args)
        return function(*args)

    return checked


def _is_watched() -> bool:
    """Whether a mode, a transform, a trace or a profile wants to see operators."""
    return bool(_modes() or _profiled()) or _transforms() is not None or _trace() is not None


class _Refused(torch.autograd.Function):
    """Gradients as they are, on a node that raises when it is differentiated."""

    @staticmethod
    def forward(ctx: Any, name: str, tie: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tuple(None if g is None else g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{ctx.name}: has no second derivative; detach its gradient, or leave out create_graph")


def once(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward of an op, its gradients such that a second derivative raises: unlike with `once_differentiable` of
    torch even where the upstream gradient is a constant, as that of a sum, since the gradient depends on the inputs."""

    def backward_once(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():  # nothing is recorded, so there is no second derivative
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        return _Refused.apply(name, torch.empty(0, requires_grad=True), *results)

    return backward_once


@dataclass(frozen=True)
class Op:
    """What the contract tests and the benchmarks need to know of an op.

    forward: the leaf operator. reference: plain torch, same arguments. samples(device, dtype): argument tuples of the
    leaf, small, among them empty, one-token and ragged ones. grads: names of the arguments that get a gradient.
    """

    name: str
    forward: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[str, torch.dtype], Iterator[tuple[Any, ...]]]
    grads: tuple[str, ...]
    apply: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.apply(*args)

    @property
    def differentiable(self) -> bool:
        return bool(self.grads)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the leaf's arguments."""
        return tuple(a.name for a in self.forward._schema.arguments)  # type: ignore[attr-defined]


def _eager_function(name: str, setup_context: Any, backward: Callable[..., Any]) -> Callable[..., Any]:
    """The op of a leaf for eager callers who want a gradient."""
    serving = SERVING[name]

    def forward(ctx: Any, *args: Any) -> Any:
        output = serving[args[0].device.type](*args)
        setup_context(ctx, args, output)
        return output

    # setup_context stays a plain call: as a staticmethod of the Function its argument binding costs 37 µs
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(name, (torch.autograd.Function,), methods)
    # past the Python of Function.apply, which is for functorch (see _is_watched) and as long as a small kernel
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def op(
    schema: str,
    *,
    ref: Callable[..., Any],
    fake: Callable[..., Any],
    samples: Callable[[str, torch.dtype], Iterator[tuple[Any, ...]]],
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    check: Callable[..., None] | None = None,
    reference: Callable[..., Any] | None = None,
    grads: tuple[str, ...] = (),
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Op:
    """Defines a leaf, attaches the gradient to it and files it in OPS.

    reference: plain torch, where ref is not
    grads: names of the arguments that get a gradient; a caller who wants one of another argument is told to detach it
    setup_context(ctx, inputs, output), backward(ctx, *grads): those of torch.library.register_autograd"""
    forward, name = leaf(schema, ref=ref, fake=fake, cpu=cpu, cuda=cuda, check=check), schema.split("(")[0]
    parameters = [a.name for a in forward._schema.arguments]  # type: ignore[attr-defined]
    constant = [i for i, a in enumerate(forward._schema.arguments) if a.name not in grads and "Tensor" in str(a.type)]  # type: ignore[attr-defined]
    serving = SERVING[name]
    function_apply: Any = None
    if backward is not None:
        backward = once(name, backward)
        torch.library.register_autograd(f"fastrlhf::{name}", backward, setup_context=setup_context, lib=_lib)
        function_apply = _eager_function(name, setup_context, backward)

    def apply(*args: Any) -> Any:
        plain, wanted = not torch.compiler.is_compiling(), False
        for a in args:
            kind = type(a)
            if kind is Tensor or kind is Parameter:
                wanted = wanted or a.requires_grad
                plain = plain and not a.is_neg()  # the memory of a negative view does not hold what it shows,
            elif kind not in SCALARS and isinstance(a, Tensor):
                wanted, plain = wanted or a.requires_grad, False  # nor has that of a subclass to
        wanted = wanted and torch.is_grad_enabled()
        if wanted:
            for i in constant:
                if args[i] is not None and args[i].requires_grad:
                    raise ValueError(f"{name}: {parameters[i]} gets no gradient, so it must be detached")
        straight = serving.get("cpu" if args[0].is_cpu else args[0].device.type)
        if straight is None or not plain or _is_watched():
            return forward(*args)
        return function_apply(*args) if wanted else straight(*args)

    OPS[name] = Op(name, forward, reference or ref, samples, grads, apply)
    return OPS[name]
