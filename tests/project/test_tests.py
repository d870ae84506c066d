"""What every test does: it reaches an assertion whatever comes out, and it replaces no method of ours."""

import ast
import builtins
import importlib.util
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
ASSERT = (
    "assert_",
    "same",
    "raises",
    "warns",
    "fail",
    "opcheck",
    "gradcheck",
    "deprecated_call",
)  # how such calls begin; same: of fastrlhf.integrations


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def called(node):
    """The last part of the name of what a call calls: raises of pytest.raises(...)."""
    function = node.func
    return getattr(function, "attr", getattr(function, "id", ""))


def is_filled(node, filled):
    """Whether what is looped over is surely not empty: it is written out, or drawn from names that are."""
    if isinstance(node, (ast.Tuple, ast.List, ast.Set, ast.Dict)):
        items = node.keys if isinstance(node, ast.Dict) else node.elts
        return any(not isinstance(item, ast.Starred) or is_filled(item.value, filled) for item in items)
    if isinstance(node, ast.Name):
        return node.id in filled
    if isinstance(node, ast.BinOp):
        return is_filled(node.left, filled) or is_filled(node.right, filled)
    if isinstance(node, (ast.ListComp, ast.GeneratorExp)):
        return all(is_filled(loop.iter, filled) and not loop.ifs for loop in node.generators)
    if isinstance(node, ast.Call) and called(node) == "filled":
        return True
    if isinstance(node, ast.Call) and called(node) in ("range", "count"):
        return all(isinstance(argument, ast.Constant) for argument in node.args)
    if isinstance(node, ast.Call) and called(node) in ("items", "values", "keys"):
        return is_filled(node.func.value, filled)
    if isinstance(node, ast.Call) and called(node) in ("zip", "enumerate", "sorted", "reversed", "list", "product"):
        one = called(node) == "zip" and any(keyword.arg == "strict" for keyword in node.keywords)
        return (any if one else all)(is_filled(argument, filled) for argument in node.args)
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def may_be_vacuous(test, filled):
    """Whether an assertion says nothing where a sequence is empty: all(...) of what is computed."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return all(may_be_vacuous(value, filled) for value in test.values)
    if not (isinstance(test, ast.Call) and called(test) == "all" and test.args):
        return False
    over = test.args[0]
    if isinstance(over, (ast.GeneratorExp, ast.ListComp)):
        return not is_filled(over.generators[0].iter, filled)
    return not is_filled(over, filled)


def asserts(statements, filled, helpers):
    """Whether these statements reach an assertion whatever is computed."""
    return any(statement_asserts(statement, filled, helpers) for statement in statements)


def statement_asserts(node, filled, helpers):
    if isinstance(node, ast.Assert):
        return not may_be_vacuous(node.test, filled)
    if isinstance(node, ast.For):
        in_body = is_filled(node.iter, filled) and asserts(node.body, filled, helpers)
        return in_body or asserts(node.orelse, filled, helpers)
    if isinstance(node, ast.If):
        return asserts(node.body, filled, helpers) and asserts(node.orelse, filled, helpers)
    if isinstance(node, ast.Try):
        whole = asserts(node.body, filled, helpers) and all(asserts(h.body, filled, helpers) for h in node.handlers)
        return whole or asserts([*node.orelse, *node.finalbody], filled, helpers)
    if isinstance(node, ast.With):
        return any(call_asserts(item.context_expr, helpers) for item in node.items) or asserts(
            node.body, filled, helpers
        )
    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.While)):
        return False
    return call_asserts(node, helpers)


def call_asserts(node, helpers):
    """Whether an expression calls what asserts, other than in a function or for each of a sequence."""
    if isinstance(node, (ast.Lambda, ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp, ast.IfExp)):
        return False
    if isinstance(node, ast.Call) and (called(node).startswith(ASSERT) or called(node) in helpers):
        return True
    return any(call_asserts(child, helpers) for child in ast.iter_child_nodes(node))


def parameters(function):
    """The names that are parametrised: pytest skips a test for which there is nothing."""
    return {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}


def written_out(tree):
    """The names of a module that are assigned what is not empty."""
    filled = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and is_filled(node.value, filled):
            filled |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return filled


def checked(function, filled):
    """The names of a function that it writes out, or asserts to be filled: assert x, assert len(x) == 2, x == [...]."""
    names = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = zip(target.elts, node.value.elts, strict=False)
                names |= {t.id for t, value in pairs if isinstance(t, ast.Name) and is_filled(value, filled | names)}
        if isinstance(node, ast.Assert):
            parts = node.test.values if isinstance(node.test, ast.BoolOp) else [node.test]
            parts = [part.left if isinstance(part, ast.Compare) else part for part in parts]
            parts = [part.args[0] if isinstance(part, ast.Call) and called(part) == "len" else part for part in parts]
            names |= {part.id for part in parts if isinstance(part, ast.Name)}
    return names


def helpers():
    """The functions of tests that assert, by name."""
    constants = set().union(*map(written_out, TREES.values()))
    found = set()
    for _ in range(4):  # helpers call helpers
        for tree in TREES.values():
            for function in functions(tree):
                if not hasattr(builtins, function.name) and asserts(function.body, constants, found):
                    found.add(function.name)
    return found - {
        function.name for tree in TREES.values() for function in functions(tree) if function.name.startswith("test_")
    }


def all_tests():
    constants = set().union(*map(written_out, TREES.values()))
    for path, tree in TREES.items():
        if path.name.startswith("test_"):
            for function in functions(tree):
                if function.name.startswith("test_"):
                    filled = constants | parameters(function)
                    yield path.relative_to(TESTS), function, filled | checked(function, filled)


def test_every_test_reaches_an_assertion():
    known, missing, number = helpers(), [], 0
    for path, function, filled in all_tests():
        number += 1
        if not asserts(function.body, filled, known):
            missing.append(f"{path}:{function.lineno} {function.name}")
    assert number > 1000
    assert not missing, "\n".join(missing)


def test_no_test_swallows_an_error():
    passed = [
        f"{path.relative_to(TESTS)}:{handler.lineno}"
        for path, tree in TREES.items()
        if path.name.startswith("test_")
        for handler in ast.walk(tree)
        if isinstance(handler, ast.ExceptHandler) and all(isinstance(line, ast.Pass) for line in handler.body)
    ]
    assert not passed


EMPTY = "def test_it():\n    "


@pytest.mark.parametrize(
    ("text", "reaches"),
    [
        ("assert f()", True),
        ("if f():\n        assert g()", False),
        ("if f():\n        assert g()\n    else:\n        assert h()", True),
        ("for x in (1, 2):\n        assert f(x)", True),
        ("for x in f():\n        assert x", False),
        ("for x in filled(f()):\n        assert x", True),
        ("xs = f()\n    assert len(xs) == 3\n    for x in xs:\n        assert x", True),
        ("xs = [f(x) for x in 'ab']\n    for x in xs:\n        assert x", True),
        ("xs = [x for x in 'ab' if f(x)]\n    for x in xs:\n        assert x", False),
        ("assert all(x for x in f())", False),
        ("assert all(x for x in 'ab')", True),
        ("with pytest.raises(ValueError):\n        f()", True),
        ("with f():\n        g()", False),
        ("try:\n        assert f()\n    except ValueError:\n        g()", False),
        ("def inner():\n        assert f()\n    inner()", False),
        ("f(lambda: pytest.fail('no'))", False),
        ("assert_same(f())", True),
    ],
)
def test_the_check_tells_what_is_reached_from_what_may_not_be(text, reaches):
    (function,) = ast.parse(EMPTY + text).body
    assert asserts(function.body, checked(function, set()), set()) == reaches


def is_module(name):
    """Whether a dotted name is a module."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def imported(tree):
    """Name -> the dotted name that an import gives it."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                for a in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Assign) and any(
            text in ast.unparse(node.value) for text in ("import_module(", "importorskip(", "sys.modules[")
        ):
            names |= {target.id: "another" for target in node.targets if isinstance(target, ast.Name)}
    return names


def replaced(tree):
    """(line, text) of each place where a test replaces an attribute of an object or a class, other than of a module,
    another library's class, or what the tests themselves define."""
    names = imported(tree)
    defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node) == "setattr" and len(node.args) in (2, 3):
            target = node.args[0]
            if len(node.args) == 2:
                owner = target.value.rpartition(".")[0] if isinstance(target, ast.Constant) else ast.unparse(target)
            else:
                root, _, rest = ast.unparse(target).partition(".")
                owner = ".".join(filter(None, (names.get(root, f"?{root}"), rest)))
            if owner.startswith("?") or (owner.startswith("fastrlhf") and not is_module(owner)):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Assign):
            is_function = isinstance(node.value, ast.Lambda) or ast.unparse(node.value) in defined
            for target in node.targets:
                if is_function and isinstance(target, ast.Attribute) and target.attr not in ("change", "say"):
                    yield node.lineno, ast.unparse(node)


REPLACED = {  # what tests replace all the same, and why
    ("commands/test_reward_report_command.py", "MetricsLog, 'progress'"): "what a bar was told, without a terminal",
    ("commands/test_rounds.py", "Run, '__next__'"): "a folder of `fastrlhf run` without its stages, which take minutes",
    ("data/test_chat_templates.py", "apply_chat_template"): "counts the calls of transformers' method",
    ("generation/test_weight_sync.py", "save_pretrained"): "a sharded model of transformers that is small",
    (
        "project/test_python_page.py",
        "config, '__init__'",
    ): "small settings for the programs of the page, run as they stand",
    ("models/test_lora.py", "mlp.forward"): "a layer of transformers as a user may change it",
    ("models/test_models.py", "__class__"): "a layer of transformers as a user may change it",
}


def test_no_test_replaces_a_method_of_ours():
    """Rewards, backends, files and torch's hooks reach what a run does; time, signals and GPUs are of modules."""
    found = [
        (str(path.relative_to(TESTS)), line, text)
        for path, tree in TREES.items()
        if path.name.startswith("test_")
        for line, text in replaced(tree)
    ]
    known = {key: [file for file, _, text in found if file == key[0] and key[1] in text] for key in REPLACED}
    assert all(known.values()), "an entry of REPLACED is no longer needed"
    new = [each for each in found if not any(each[0] == file and text in each[2] for file, text in REPLACED)]
    assert not new, "\n".join(f"{file}:{line}: {text[:100]}" for file, line, text in new)
