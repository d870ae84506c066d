"""Every op on what nobody meant to give it: a named error, or what the reference makes of it; never a crash.

An example is a sample of the op with up to three changes to its tensors, and at times something that is no tensor or
no number, given to the public function. What that then gives to operators is compared with their references, and their
backward runs. `make fuzz` runs 500 examples an op, the suite 30."""

import functools
import inspect
import math

import numpy as np
import pytest
import torch
from compare import flat, to_double
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor

import fastrlhf
from fastrlhf import ops
from fastrlhf.ops._registry import OPS, Op

LARGEST_SAMPLE = 2000  # elements, as references walk token by token
CALLS = {  # ops without a public function of their name
    "masked_moments": OPS["masked_moments"],
    "ppo_sequence_loss": functools.partial(fastrlhf.ppo_policy_loss, ratio="sequence"),
}
FOR_CALLERS = {  # outputs; the rest is for the backward
    "token_logprobs": 2,
    "linear_token_logprobs": 2,
    "kl_divergence": 1,
    "linear_kl_divergence": 1,
}
BEFORE_GRADIENTS = {"linear_cross_entropy": 1, "linear_dpo_loss": 2, "linear_ppo_loss": 2}  # which are 0 inf somewhere
SPEAKS_AS = {"masked_moments": "masked_whiten", "ppo_sequence_loss": "ppo_policy_loss"}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.bool)
LEFT_ALONE = ("group", "lora", "lora_p", "lora_q")
NUMBERS = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -200.0, 1e4, 1e-40)
INTEGERS = (-(2**63), -(2**31), -1, 0, 1, 2**31 - 1, 2**63 - 1)


@functools.cache
def small_samples(name):
    def size(args):
        return sum(a.numel() for a in args if isinstance(a, Tensor))

    return [args for args in OPS[name].samples("cpu", torch.float32) if size(args) <= LARGEST_SAMPLE]


def reshaped(draw, x):
    axis = draw(st.integers(0, max(x.ndim - 1, 0)))
    ways = [x[None], x.flatten(), x[..., None]]
    if x.ndim:
        ways += [x.narrow(axis, 0, 0), x[:-1], torch.cat([x, x]), x.transpose(0, -1), x.sum(axis).to(x.dtype)]
    return draw(st.sampled_from(ways))


def restrided(draw, x):
    return torch.stack([x, x], -1)[..., 0] if draw(st.booleans()) else x.t().contiguous().t() if x.ndim == 2 else x


def refilled(draw, x):
    if x.dtype == torch.bool:
        return torch.full_like(x, draw(st.booleans()))
    if x.is_floating_point():
        value = draw(st.sampled_from(NUMBERS))
    else:
        info = torch.iinfo(x.dtype)
        value = min(max(draw(st.sampled_from(INTEGERS)), info.min), info.max)
    x = x.clone(memory_format=torch.contiguous_format)
    if x.numel() and draw(st.booleans()):
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    elif x.ndim > 1 and len(x) and draw(st.booleans()):
        x[draw(st.integers(0, len(x) - 1))] = value  # a row of nothing else
    else:
        x.fill_(value)
    return x


def reordered(draw, x):
    """A neighbour repeated (in bounds: an empty sequence), two swapped, or all reversed."""
    if x.ndim == 0 or len(x) < 2:
        return x
    x, i = x.clone(), draw(st.integers(0, len(x) - 2))
    way = draw(st.sampled_from(["repeat", "swap", "reverse"]))
    if way == "repeat":
        x[i] = x[i + 1]
    elif way == "swap":
        x[[i, i + 1]] = x[[i + 1, i]]
    return x.flip(0) if way == "reverse" else x


def strange(draw, name, args):
    """Puts what is no tensor, or no number, in place of an argument that the caller gives or leaves at its default."""
    signature = inspect.signature(getattr(fastrlhf, name))
    choices = [p for p in signature.parameters.values() if p.name not in LEFT_ALONE]
    chosen = draw(st.sampled_from(choices))
    given = args.get(chosen.name)
    values = [None, "text", [1.0], np.ones(3), 1.5, -1, math.nan, math.inf, torch.tensor(2), torch.tensor(0.5)]
    if isinstance(given, Tensor) and given.device.type == "cpu":
        values += [given.tolist(), given.to(torch.float8_e4m3fn), given.to_sparse()]
    args[chosen.name] = draw(st.sampled_from(values))
    note(f"{chosen.name}: {type(args[chosen.name]).__name__}")


CHANGES = {
    "shape": reshaped,
    "dtype": lambda draw, x: x.to(draw(st.sampled_from(DTYPES))),
    "device": lambda draw, x: x.to("meta"),
    "strides": restrided,
    "values": refilled,
    "order": reordered,
}


@st.composite
def calls(draw, name):
    """The arguments by name of a call of the public function."""
    args = dict(zip(OPS[name].parameters, draw(st.sampled_from(small_samples(name))), strict=True))
    known = {*inspect.signature(CALLS.get(name) or getattr(fastrlhf, name)).parameters}
    known |= {"lora_a", "lora_b"} if "lora" in known else set()
    if name != "masked_moments":  # options that the operator knows by number stay at the function's default
        number = {"kind", "estimator", "kl_estimator", "window"}
        args = {k: v for k, v in args.items() if k in known and (isinstance(v, Tensor) or k not in number)}
    for _ in range(draw(st.integers(0, 3))):
        chosen = draw(st.sampled_from(sorted(k for k, v in args.items() if isinstance(v, Tensor))))
        change = draw(st.sampled_from(sorted(CHANGES)))
        if args[chosen].device.type != "meta":
            args[chosen] = CHANGES[change](draw, args[chosen])
            note(f"{chosen}: {change}")
    if name in ops.__all__ and draw(st.integers(0, 3)) == 0:
        strange(draw, name, args)
    if draw(st.booleans()):
        for key in OPS[name].grads:
            if isinstance(args.get(key), Tensor) and args[key].is_floating_point():
                args[key] = args[key].detach().requires_grad_()
    return args


def with_lora(args):
    """The arguments of a public function on a linear head, where a low-rank change of it is one."""
    rest = {k: v for k, v in args.items() if not k.startswith("lora_")}
    return rest if args.get("lora_a") is None else rest | {"lora": (args["lora_a"], args["lora_b"], 0.5)}


def largest_of(args):
    """The largest magnitude among the floating-point elements that are not NaN, at least 1."""
    floats = [a.abs().nan_to_num(1.0, torch.inf) for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    return max([1.0, *(x.max().item() for x in floats if x.numel())])


def is_finite(args):
    return all(bool(a.isfinite().all()) for a in args if isinstance(a, Tensor))


def assert_agrees(actual, exact, plain, what, largest):
    """Near the reference in float64, or not finite where it is not: NaN for NaN, and with extreme inputs, whose
    infinities cancel in an order that is ours to choose, either for either. What overflows in the reference may too."""
    for i, (a, e, p) in enumerate(zip(flat(actual), flat(exact), flat(plain), strict=True)):
        assert a.shape == e.shape, f"{what} output {i}: shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        if not a.is_floating_point():
            assert torch.equal(a, p), f"{what} output {i} differs from the reference"
            continue
        a, p, eps, most = a.double(), p.double(), torch.finfo(a.dtype).eps, torch.finfo(a.dtype).max
        finite = e.isfinite() & p.isfinite()
        representable = e[finite] if bool(finite.any()) else e[e.abs() <= most]
        scale = max([min(largest, 1e4), *representable.abs().tolist()])
        allowed = 2 * max([0.0, *(p - e)[finite].abs().tolist()]) + 8 * eps * scale
        near = (a - e).abs() <= allowed
        same = ((largest >= 1e4) | (e.abs() > most)) & ~a.isfinite() & ~(e.isfinite() & p.isfinite())
        same |= (a == e) | (a == p) | (a.isnan() & (e.isnan() | p.isnan()))
        assert bool((near | same).all()), f"{what} output {i}: {a}\nfloat64 {e}\nplain {p}\nallowed {allowed:.3g}"


def refuses(error, name):
    """Whether an error is one of ours: a ValueError or TypeError that begins with the name of the function."""
    return type(error) in (ValueError, TypeError) and str(error).startswith(f"{SPEAKS_AS.get(name, name)}: ")


@pytest.mark.parametrize("name", OPS)
@given(data=st.data())
def test_any_input_is_refused_by_name_or_agrees_with_the_reference(name, data):
    args = data.draw(calls(name))
    made = []

    def record(op, *given):
        before = [a.detach().clone() if isinstance(a, Tensor) else a for a in given]
        made.append((op, before, op.apply(*given)))
        return made[-1][-1]

    original, Op.__call__ = Op.__call__, record
    try:
        if name in CALLS and CALLS[name] is OPS[name]:
            record(OPS[name], *args.values())
        else:
            result = (CALLS.get(name) or getattr(fastrlhf, name))(**with_lora(args))
            if name == "approx_kl" and args.get("estimator", "k1") == "k1":  # torch's own subtraction: no operator
                made.append((OPS[name], [args["logprobs"], args["ref_logprobs"], 1], result))
    except Exception as error:
        assert refuses(error, name), f"{type(error).__name__}: {error}"
        return
    finally:
        Op.__call__ = original
    assert made, f"{name} called no operator"
    for op, given_to_it, output in made:
        if all(a.device.type == "cpu" for a in given_to_it if isinstance(a, Tensor)):
            exact, plain = op.reference(*to_double(given_to_it)), op.reference(*given_to_it)
            counts = FOR_CALLERS if is_finite(given_to_it) else FOR_CALLERS | BEFORE_GRADIENTS
            compared = (flat(outputs)[: counts.get(op.name)] for outputs in (output, exact, plain))
            assert_agrees(*compared, op.name, largest_of(given_to_it))
        differentiable = [o for o in flat(output) if o.requires_grad]
        leaves = [a for a in args.values() if isinstance(a, Tensor) and a.requires_grad]
        if differentiable and leaves:  # how right it is the contract tests say: here it must not break
            grads = torch.autograd.grad(sum(o.sum() for o in differentiable), leaves)
            assert [g.shape for g in grads] == [x.shape for x in leaves]
