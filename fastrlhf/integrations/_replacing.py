"""How a function of a peer is replaced: known parameters, a self-test against it, then every place that binds it."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("fastrlhf")
# how far ours may be from the original, which is the less accurate of the two, as a fraction of the largest value;
# by the coarsest dtype of arguments and result
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
LEAST = 0.05  # values below this are compared as if they were this large: peers lose digits to larger terms
MARK = "__replaced_by_fastrlhf__"


@dataclass(frozen=True)
class Known:
    """One form that a function of a peer has, and what stands in for it.

    parameters: as `parameters_of` gives them
    versions: of the peer, in words
    make: from the original to ours, which calls the original for inputs that it does not cover
    cases: the arguments of the self-test, on a device; tensors that require a gradient are compared in theirs too
    """

    parameters: str
    versions: str
    make: Callable[[Any], Any]
    cases: Callable[[str], Iterator[tuple[Any, ...]]]


@dataclass(frozen=True)
class Replacement:
    """A function of a peer, at "module:name" or "module:Class.method", and the forms of it that we know.

    offer: (the peer's function that registers, its registry, a name): ours is put there beside the original
    """

    path: str
    known: tuple[Known, ...]
    offer: tuple[str, str, str] | None = None


@dataclass
class Patch:
    """What a call of `patch` did. replaced: path -> where it was bound; left: path -> why it was left alone."""

    replaced: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    pairs: list[tuple[str, Any, Any]] = field(default_factory=list, repr=False)
    offers: list[tuple[dict[str, Any], str]] = field(default_factory=list, repr=False)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"replaced   {path} in {', '.join(places)}" for path, places in self.replaced.items()]
        return "\n".join(lines + [f"left alone {path}: {why}" for path, why in self.left.items()])

    def undo(self) -> None:
        """Gives back what this call replaced, also in modules that were imported since."""
        while self.pairs:
            path, original, ours = self.pairs.pop()
            _rebind(path, ours, original)
        while self.offers:
            registry, name = self.offers.pop()
            registry.pop(name, None)


def replace(replacement: Replacement, done: Patch) -> None:
    """Replaces one function and notes it in `done`, or notes why not."""
    path = replacement.path
    try:
        original = _find(path)
    except (ImportError, AttributeError) as error:  # another version, or a part that needs what is not installed
        done.left[path] = f"not found ({error})"
        return
    if getattr(original, MARK, False) or (replacement.offer and replacement.offer[2] in _find(replacement.offer[1])):
        done.left[path] = "already replaced"
        return
    parameters = parameters_of(original)
    known = next((form for form in replacement.known if form.parameters == parameters), None)
    if known is None:
        forms = "; ".join(f"{form.parameters} of {form.versions}" for form in replacement.known)
        _leave(done, path, f"its parameters are {parameters}, and we know {forms}")
        return
    ours = known.make(original)
    setattr(ours, MARK, True)
    for device in _devices():
        try:
            for case in known.cases(device):
                same(original, ours, case)
        except Exception as error:  # whatever it is, the original still works
            _leave(done, path, f"the self-test on {device} failed: {type(error).__name__}: {error}")
            return
    if replacement.offer:
        register, registry, name = replacement.offer
        _find(register)(name)(ours)
        done.offers.append((_find(registry), name))
        done.replaced[path] = [f"{registry.replace(':', '.')}[{name!r}]"]
    else:
        done.replaced[path] = _rebind(path, original, ours)
        done.pairs.append((path, original, ours))
    log.info("replaced %s in %s", path, ", ".join(done.replaced[path]))


def _leave(done: Patch, path: str, why: str) -> None:
    done.left[path] = why
    warnings.warn(f"fastrlhf.patch leaves {path} alone: {why}", RuntimeWarning, stacklevel=4)


def _devices() -> list[str]:
    """Where the self-tests run: the CPU, and the GPU that launchers give to this process."""
    if not torch.cuda.is_available():
        return ["cpu"]
    return ["cpu", f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"]


def _split(path: str) -> tuple[str, list[str]]:
    module, names = path.split(":")
    return module, names.split(".")


def _find(path: str) -> Any:
    module, names = _split(path)
    found: Any = importlib.import_module(module)
    for name in names:
        found = getattr(found, name)
    return found


def parameters_of(function: Any) -> str:
    """The parameters as text, without annotations, ctx and self: "(logits, index, temperature=1.0)"."""
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        function = function.forward
    found = inspect.signature(function).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found if p.name not in ("ctx", "self")]
    return str(inspect.Signature(plain))


def same(original: Any, ours: Any, case: tuple[Any, ...]) -> None:
    """Raises AssertionError unless both give the same dtypes, values and gradients for the arguments of `case`."""
    expected, expected_grads = _outcome(original, case)
    got, got_grads = _outcome(ours, case)
    tolerance = max((TOLERANCE.get(a.dtype, 0.0) for a in case if isinstance(a, Tensor)), default=0.0)
    assert len(got) == len(expected), f"{len(got)} outputs instead of {len(expected)}"
    for mine, theirs in zip([*got, *got_grads], [*expected, *expected_grads], strict=True):
        if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
            finite = theirs.detach().double().nan_to_num(0.0, 0.0, 0.0).abs()
            largest = float(finite.max()) if finite.numel() else 0.0
            absolute = max(tolerance, TOLERANCE.get(theirs.dtype, 0.0)) * max(largest, LEAST)
            torch.testing.assert_close(mine, theirs, rtol=0.0, atol=absolute, equal_nan=True)
        else:
            assert mine == theirs, f"{mine!r} instead of {theirs!r}"


def _outcome(function: Any, case: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """The outputs and the gradients of the arguments that require one, for fixed random upstream gradients."""
    leaves = [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in case]
    # copies, since some peers write over their arguments
    passed = [a.clone() if isinstance(a, Tensor) else a for a in leaves]
    call = function.apply if hasattr(function, "apply") else function
    # what a peer wraps in torch.compile is run as it is, since compiling takes longer than all self-tests
    with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
        output = call(*passed)
    outputs = list(output) if isinstance(output, (tuple, list)) else [output]
    metrics = [part for part in outputs if isinstance(part, dict)]
    outputs = [part for part in outputs if not isinstance(part, dict)]
    for part in metrics:  # as keys, which must be equal, and numbers, which must be near
        outputs += [list(part), torch.tensor(list(part.values()))]
    generator = torch.Generator().manual_seed(1)
    pairs = [(o, torch.randn(o.shape, generator=generator).to(o)) for o in outputs if isinstance(o, Tensor)]
    pairs = [(o, upstream) for o, upstream in pairs if o.requires_grad]
    wanted = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
    if not pairs or not wanted:
        return outputs, [None] * len(wanted)
    roots, upstream = zip(*pairs, strict=True)
    grads = torch.autograd.grad(roots, wanted, upstream, allow_unused=True)
    return outputs, list(grads)


def _rebind(path: str, old: Any, new: Any) -> list[str]:
    """Puts `new` where `old` is bound; returns where: globals of all modules, and dicts that are globals of the peer's.

    Those dicts are its registries. A method is bound in its class only."""
    module, names = _split(path)
    if len(names) > 1:
        setattr(_find(f"{module}:{'.'.join(names[:-1])}"), names[-1], new)
        return [module]
    places = []
    for holder in list(sys.modules.values()):
        if not isinstance(holder, ModuleType):
            continue
        for name, value in list(vars(holder).items()):
            if value is old:
                setattr(holder, name, new)
                places.append(f"{holder.__name__}.{name}".removesuffix(f".{names[0]}"))
            elif type(value) is dict and holder.__name__.split(".")[0] == module.split(".")[0]:
                for key in [key for key, entry in value.items() if entry is old]:
                    value[key] = new
                    places.append(f"{holder.__name__}.{name}[{key!r}]")
    return places
