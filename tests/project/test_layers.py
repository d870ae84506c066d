"""Who may import whom: the table of rooms in CONTRIBUTING.md, read from the sources.

A new module fails `test_every_module_has_a_room` until it is given one here.
"""

import ast
import re
import sys
from pathlib import Path

import pytest
from compare import filled

ROOT = Path(__file__).parents[2]

# room -> (its modules, rooms that it may import besides itself, packages that it may import besides Python's own)
ROOMS = {
    "errors": ({"errors"}, set(), set()),
    "start": ({"_start"}, set(), set()),
    "native": ({"_cpu", "_cuda"}, set(), set()),
    "kernels": ({"kernels"}, set(), {"torch", "triton"}),
    "ops": ({"ops"}, {"native", "kernels"}, {"torch"}),
    "integrations": ({"integrations"}, {"ops"}, {"torch", "numpy"}),
    "stats": ({"stats"}, set(), {"torch"}),
    "packing": ({"packing"}, set(), {"torch"}),
    "settings": ({"settings"}, set(), {"torch", "yaml"}),
    "formulas": ({"formulas"}, {"ops"}, {"torch"}),
    "data": ({"data"}, {"settings"}, {"torch", "transformers", "jinja2", "numpy", "huggingface_hub"}),
    "runtime": (
        {"runtime"},
        {"native", "settings", "data"},
        {"torch", "transformers", "numpy", "yaml", "rich", "safetensors", "huggingface_hub"},
    ),
    "models": (
        {"models"},
        {"ops", "packing", "data", "runtime"},
        {"torch", "transformers", "safetensors", "numpy"},
    ),
    "generation": (
        {"generation"},
        {"ops", "packing", "data", "runtime", "models"},
        {"torch", "transformers"},
    ),
    "rewards": (
        {"rewards"},
        {"packing", "data", "runtime", "models", "generation"},
        {"torch", "transformers"},
    ),
    "evaluation": (
        {"evaluation"},
        {"stats", "ops", "packing", "data", "runtime", "models", "generation"},
        {"torch", "jinja2", "markupsafe"},
    ),
    "trainers": (
        {"trainers"},
        {"stats", "ops", "packing", "settings", "formulas", "data", "runtime", "models", "generation", "rewards"},
        {"torch", "numpy", "transformers"},
    ),
    "commands": (
        {"commands"},
        {
            *("stats", "ops", "packing", "settings", "data", "runtime", "models", "generation"),
            *("rewards", "evaluation", "trainers"),
        },
        {"torch", "transformers", "huggingface_hub", "numpy", "yaml", "markupsafe"},
    ),
    "cli": (
        {"cli", "__main__"},
        {"native", "ops", "settings", "data", "runtime", "models", "rewards"},
        {"torch", "transformers", "yaml"},
    ),
}
PURE = {"start", "native", "kernels", "ops", "integrations", "packing"}  # import no errors of ours either
OPTIONAL = {
    "bitsandbytes",
    "gguf",
    "matplotlib",
    "pyarrow",
    "torch.utils.tensorboard",
}  # extras: imported where they are used
NARROWER = {  # rules within a room: file -> modules that it never imports
    "trainers/sft.py": {"trainers.reward", "trainers.ppo"},
    "trainers/reward.py": {"trainers.sft", "trainers.ppo"},
    "trainers/ppo/trainer.py": {"trainers.sft", "trainers.reward"},
    "trainers/base.py": {"trainers.sft", "trainers.reward", "trainers.ppo"},
    "models/attention.py": {"models.policy"},
}
READ_THE_ENVIRONMENT = {
    "ops/_registry.py",
    "ops/_check.py",
    "integrations/_replacing.py",
    "integrations/startup/sitecustomize.py",
}


def sources():
    """(name inside the package, path) of every Python file, those of kernels/ included."""
    package, kernels = ROOT / "fastrlhf", ROOT / "kernels"
    inside = [p for p in package.rglob("*.py") if "kernels" not in p.relative_to(package).parts]
    yield from ((p.relative_to(package).as_posix(), p) for p in sorted(inside))
    yield from ((f"kernels/{p.relative_to(kernels).as_posix()}", p) for p in sorted(kernels.rglob("*.py")))


SOURCES = dict(sources())


def module_of(name):
    """The first part of a module's name below fastrlhf: ops/gae.py -> ops."""
    return name.split("/")[0].removesuffix(".py")


def room_of(module):
    return next((room for room, (modules, *_) in ROOMS.items() if module in modules), None)


def imports(path):
    """(dotted name, whether inside a function) of everything that a file imports."""

    def visit(node, inside):
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from ((f"{node.module}.{alias.name}", inside) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(path.read_text()), False)


def ours(path):
    """The modules of fastrlhf that a file imports; a name taken from the package itself counts as an op."""
    found = {name.split(".")[1] for name, _ in imports(path) if name.startswith("fastrlhf.")}
    return {module if room_of(module) else "ops" for module in found}


def starts_with(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_every_module_has_a_room():
    without = [n for n in SOURCES if n != "__init__.py" and room_of(module_of(n)) is None]
    assert not without, f"give {', '.join(without)} a room in tests/project/test_layers.py and in CONTRIBUTING.md"


@pytest.mark.parametrize("name", [n for n in SOURCES if room_of(module_of(n))])
def test_imports_stay_within_what_the_room_may_use(name):
    module = module_of(name)
    room = room_of(module)
    _, rooms, packages = ROOMS[room]
    free = {room, *rooms} if room in PURE else {room, *rooms, "errors"}
    others = {other for other in ours(SOURCES[name]) if room_of(other) not in free}
    assert not others, f"{name} ({room}) may not import {', '.join(sorted(others))}"
    forbidden = {f"fastrlhf.{other}" for other in NARROWER.get(name, set())}
    met = {n for n, _ in imports(SOURCES[name]) if starts_with(n, forbidden)}
    assert not met, f"{name} may not import {', '.join(sorted(met))}"
    allowed = {*sys.stdlib_module_names, *packages, *OPTIONAL, "fastrlhf"}
    foreign = {n for n, _ in imports(SOURCES[name]) if not starts_with(n, allowed)}
    assert not foreign, f"{name} ({room}) may not import {', '.join(sorted(foreign))}"


@pytest.mark.parametrize("name", [n for n in SOURCES if n != "cli/main.py"])
def test_only_optional_packages_are_imported_inside_functions(name):
    late = {n for n, inside in imports(SOURCES[name]) if inside and not starts_with(n, OPTIONAL)}
    assert not late, f"{name} imports {', '.join(sorted(late))} inside a function"


def test_op_internals_stay_in_ops():
    # for `fastrlhf info` and `fastrlhf check`
    allowed = {f"fastrlhf.ops._registry.{name}" for name in ("BACKEND", "BACKENDS", "OPS", "Op")}
    others = {name: path for name, path in SOURCES.items() if module_of(name) != "ops"}
    for name, path in filled(others.items()):
        private = {n for n, _ in imports(path) if re.match(r"fastrlhf\.ops\._[a-z]", n)} - allowed
        assert not private, f"{name} imports {', '.join(sorted(private))}"


def attributes(path):
    """Every dotted name that a file uses, such as os.environ."""
    return {ast.unparse(n) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}


def test_torch_library_is_met_in_the_registry_only():
    def meets(path):
        names = attributes(path) | {name for name, _ in imports(path)}
        return any(starts_with(name, {"torch.library"}) for name in names)

    assert {name for name, path in SOURCES.items() if meets(path)} == {"ops/_registry.py"}


def test_the_environment_is_read_in_few_places_only():
    def reads(path):
        names = attributes(path) | {name for name, _ in imports(path)}
        return any(starts_with(name, {"os.environ", "os.getenv"}) for name in names)

    assert {name for name, path in SOURCES.items() if reads(path)} <= READ_THE_ENVIRONMENT


def native_sources():
    return sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu"))


def test_native_code_builds_without_torch():
    for path in filled(native_sources()):
        assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10)", path.read_text()), f"{path} includes torch"


def test_cpu_kernels_emit_no_function_that_the_linker_could_merge():
    """A file is compiled once per instruction set; of an inline function with linkage one copy would survive."""
    around = ("module.cpp", "module.h", "kernel.h")
    for path in filled(path for path in native_sources() if path.parent.name != "cuda" and path.name not in around):
        text = path.read_text()
        headers = re.findall(r"#\s*include\s*<(.*?)>", text)
        assert all(h.endswith(".h") for h in headers), f"{path} includes {headers}: C headers only"
        assert "namespace FASTRLHF_ISA {\nnamespace {" in text, f"{path}: all in an anonymous namespace of FASTRLHF_ISA"
