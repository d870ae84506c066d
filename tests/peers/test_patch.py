"""What `patch` does, on a made-up peer: where it binds, when it leaves a function alone, how it undoes."""

import functools
import os
import subprocess
import sys
import textwrap
import types
import warnings
from pathlib import Path

import pytest
import torch

import fastrlhf
from fastrlhf import integrations
from fastrlhf.integrations._replacing import Known, Replacement, parameters_of, same

ROOT = Path(__file__).parents[2]
DOUBLE = "madeup.ops:double"


def module(monkeypatch, name, **names):
    made = types.ModuleType(name)
    vars(made).update(names)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def cases(device):
    yield (torch.randn(4, device=device, requires_grad=True),)
    yield torch.randn(4, device=device, dtype=torch.float64), 3


@pytest.fixture
def offer(monkeypatch):
    """Makes a peer whose `double` is to be replaced by what the test gives; returns its modules."""

    def double(x, times=2):
        return x * times

    def offer(ours, parameters="(x, times=2)", name=None):
        losses = {"double": double}
        register = lambda name: functools.partial(losses.__setitem__, name)  # noqa: E731
        package = module(monkeypatch, "madeup")
        ops = module(monkeypatch, "madeup.ops", double=double, register=register, LOSSES=losses)
        package.__spec__ = types.SimpleNamespace()
        user = module(monkeypatch, "madeup.user", twice=double, REGISTRY={"double": double})
        form = Known(parameters, "1.0", lambda original: ours, cases)
        how = ("madeup.ops:register", "madeup.ops:LOSSES", name) if name else None
        monkeypatch.setattr(integrations, "PEERS", {"madeup": (Replacement(DOUBLE, (form,), how),)})
        return ops, user

    yield offer
    fastrlhf.unpatch()


def added(x, times=2):
    return sum([x] * times)


def left_alone(offer, ours, why, **how):
    ops, _ = offer(ours, **how)
    double = ops.double
    with pytest.warns(RuntimeWarning, match="leaves madeup.ops:double alone"):
        done = fastrlhf.patch("madeup")
    assert ops.double is double and not done.replaced and why in done.left[DOUBLE]


def test_a_function_is_replaced_wherever_it_is_bound_and_given_back(offer):
    ops, user = offer(added)
    double = ops.double
    done = fastrlhf.patch("madeup")
    assert ops.double is user.twice is user.REGISTRY["double"] is added
    places = ["madeup.ops", "madeup.ops.LOSSES['double']", "madeup.user.REGISTRY['double']", "madeup.user.twice"]
    assert sorted(done.replaced[DOUBLE]) == places
    fastrlhf.unpatch()
    assert ops.double is user.twice is user.REGISTRY["double"] is double


def test_a_module_imported_after_the_patch_gets_the_original_back_too(offer, monkeypatch):
    ops, _ = offer(added)
    double = ops.double
    with fastrlhf.patch("madeup"):
        late = module(monkeypatch, "madeup.late", double=ops.double)
        assert late.double is added
    assert late.double is double


def test_a_second_patch_says_so_and_undoes_nothing(offer):
    ops, _ = offer(added)
    fastrlhf.patch("madeup")
    with fastrlhf.patch("madeup") as second:
        assert second.left[DOUBLE] == "already replaced"
    assert ops.double is added


def test_an_inner_patch_ends_without_the_outer_one(offer):
    ops, _ = offer(added)
    double = ops.double
    with fastrlhf.patch("madeup") as outer:
        with fastrlhf.patch("madeup") as inner:
            assert ops.double is added
        assert ops.double is added and outer.replaced and not inner.replaced
    assert ops.double is double
    with fastrlhf.patch("madeup") as again:
        assert ops.double is added and again.replaced


def test_an_error_inside_the_block_gives_the_original_back(offer):
    ops, user = offer(added)
    double = ops.double
    with pytest.raises(KeyError), fastrlhf.patch("madeup"):
        raise KeyError
    assert ops.double is user.twice is double


def test_the_report_lists_what_was_replaced_and_what_was_left_alone(offer, monkeypatch):
    offer(added)
    (form,) = integrations.PEERS["madeup"][0].known
    more = (Replacement("madeup.ops:triple", (form,)), Replacement("madeup.user:twice", (form,)))
    monkeypatch.setattr(integrations, "PEERS", {"madeup": integrations.PEERS["madeup"] + more})
    lines = str(fastrlhf.patch("madeup")).splitlines()
    assert lines[0].startswith(f"replaced   {DOUBLE} in ") and "madeup.user.twice" in lines[0]
    assert lines[1].startswith("left alone madeup.ops:triple: not found")
    assert lines[2] == "left alone madeup.user:twice: already replaced"


def test_an_offer_stands_in_the_registry_beside_the_original(offer):
    ops, _ = offer(added, name="ours")
    double = ops.double
    with fastrlhf.patch("madeup") as done:
        assert ops.double is ops.LOSSES["double"] is double and ops.LOSSES["ours"] is added
        assert done.replaced[DOUBLE] == ["madeup.ops.LOSSES['ours']"]
        assert fastrlhf.patch("madeup").left[DOUBLE] == "already replaced"
    assert list(ops.LOSSES) == ["double"] and ops.LOSSES["double"] is double


def test_an_offer_that_fails_its_self_test_is_not_registered(offer):
    left_alone(offer, lambda x, times=2: x * times + 1, "not close", name="ours")
    assert list(sys.modules["madeup.ops"].LOSSES) == ["double"]


def test_unknown_parameters_leave_the_function_alone(offer):
    left_alone(offer, added, "parameters are (x, times=2), and we know (x) of 1.0", parameters="(x)")


@pytest.mark.parametrize(
    ("ours", "why"),
    [
        (lambda x, times=2: x * times + 1e-3, "not close"),
        (lambda x, times=2: (x * times).double(), "dtype"),
        (lambda x, times=2: (x * times).detach(), "None instead of"),
        (lambda x, times=2: x.detach() * times - x + x.detach(), "not close"),
        (lambda x, times=2: (x * times, None), "2 outputs instead of 1"),
        (lambda x, times=2: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["value", "dtype", "no gradient", "gradient", "outputs", "error"],
)
def test_a_failed_self_test_leaves_the_function_alone(offer, ours, why):
    left_alone(offer, ours, why)


def test_a_part_that_another_version_lacks_is_left_alone_without_a_warning(offer):
    ops, _ = offer(added)
    del ops.double
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "not found" in fastrlhf.patch("madeup").left[DOUBLE]


def test_auto_patches_what_is_imported_already(offer, monkeypatch):
    offer(added)
    assert list(fastrlhf.patch().replaced) == [DOUBLE]
    monkeypatch.delitem(sys.modules, "madeup")
    assert not fastrlhf.patch("auto").left


def test_unknown_and_missing_peers_are_named(monkeypatch):
    with pytest.raises(ValueError, match="must be one of trl, openrlhf, verl, auto, got 'trll'"):
        fastrlhf.patch("trll")
    monkeypatch.setattr(integrations, "PEERS", {"no_such_peer": ()})
    with pytest.raises(ImportError, match="no_such_peer is not installed"):
        fastrlhf.patch("no_such_peer")


def test_parameters_of_an_autograd_function_are_those_of_its_forward():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: torch.Tensor, times: int = 2) -> torch.Tensor:
            return x * times

    assert parameters_of(Doubled) == parameters_of(added) == "(x, times=2)"


def test_functions_that_write_over_their_argument_can_be_compared():
    same(lambda x: x.mul_(2), lambda x: x * 2, (torch.ones(3, requires_grad=True),))


def test_dictionaries_of_numbers_are_compared_by_key_and_value():
    x = torch.ones(3, requires_grad=True)
    same(lambda x: (x, {"mean": 1.0}), lambda x: (x * 1, {"mean": 1.0 + 1e-7}), (x,))
    for wrong in ({"mean": 1.1}, {"average": 1.0}):
        with pytest.raises(AssertionError):
            same(lambda x: (x, {"mean": 1.0}), lambda x, wrong=wrong: (x, wrong), (x,))


def test_importing_fastrlhf_imports_no_trainer(tmp_path):
    for peer in integrations.PEERS:
        (tmp_path / f"{peer}.py").write_text("raise SystemExit('imported')")
    path = os.pathsep.join(map(str, (tmp_path, ROOT)))
    script = "import sys, fastrlhf, fastrlhf.integrations.external; print(sorted({*sys.argv[1:]} & {*sys.modules}))"
    command = [sys.executable, "-c", script, *integrations.PEERS]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


TRL = """
import torch
def selective_log_softmax(logits, index):
    return torch.gather(logits.log_softmax(-1), -1, index.unsqueeze(-1)).squeeze(-1)
"""


@pytest.mark.parametrize(("setting", "replaced"), [("trl", True), ("auto", True), ("verl", False), ("", False)])
def test_the_environment_patches_a_trainer_when_it_is_imported(tmp_path, setting, replaced):
    (tmp_path / "trl/trainer").mkdir(parents=True)
    (tmp_path / "trl/__init__.py").touch()
    (tmp_path / "trl/trainer/__init__.py").touch()
    (tmp_path / "trl/trainer/utils.py").write_text(textwrap.dedent(TRL))
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.shadowed = True")
    startup = ROOT / "fastrlhf/integrations/startup"
    path = os.pathsep.join(map(str, (startup, tmp_path, ROOT)))
    script = (
        "import sys; assert 'torch' not in sys.modules and sys.shadowed\n"
        "from trl.trainer.utils import selective_log_softmax as f; print(hasattr(f, '__wrapped__'))"
    )
    environment = {**os.environ, "PYTHONPATH": path, "FASTRLHF_PATCH": setting}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(replaced)
    assert ("replaced   trl.trainer.utils:selective_log_softmax" in done.stderr) == replaced
