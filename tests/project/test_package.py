"""The package as it is installed: its files, and that it imports without what is optional."""

import inspect
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastrlhf
from fastrlhf.cli.commands import COMMANDS

ROOT = Path(__file__).parents[2]


def run(code, **environment):
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_is_a_link_without_init():
    link = ROOT / "fastrlhf" / "kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"
    # with it the folder would be a package named kernels wherever the root is on sys.path, before PyPI's
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_public_names_exist_are_listed_and_say_what_they_are():
    assert list(fastrlhf.ops.__all__) == sorted(fastrlhf.ops.__all__)
    assert {*fastrlhf.__all__} <= {*dir(fastrlhf)} and len({*fastrlhf.__all__}) == len(fastrlhf.__all__)
    for name in fastrlhf.__all__:
        found = getattr(fastrlhf, name)
        assert callable(found) and found.__name__ == name, name
        assert found.__doc__ and not found.__doc__.startswith(f"{name}("), f"{name} has no docstring"  # of a dataclass


@pytest.mark.parametrize("name", ["SFT", "RewardTrainer", "PPO", "DPO", "KTO"])
def test_a_trainer_its_settings_and_its_command_have_one_name(name):
    trainer, config = getattr(fastrlhf, name), getattr(fastrlhf, f"{name.removesuffix('Trainer')}Config")
    assert issubclass(trainer, fastrlhf.Trainer)
    assert COMMANDS[name.removesuffix("Trainer").lower()].config is config


def test_everything_public_of_a_trainer_that_is_a_method_says_what_it_does():
    for trainer in (fastrlhf.SFT, fastrlhf.RewardTrainer, fastrlhf.PPO, fastrlhf.DPO, fastrlhf.KTO):
        for name in ("run", "evaluate", "read_metrics", "save", "save_checkpoint", "close", "__next__"):
            assert inspect.getdoc(getattr(trainer, name)), f"{trainer.__name__}.{name}"


@pytest.mark.slow
def test_a_strictly_typed_program_of_a_user_passes_and_a_wrong_one_does_not(tmp_path):
    pytest.importorskip("mypy", reason="pip install mypy: checks types")
    program = (ROOT / "tests/project/typed_program.py").read_text()
    # what other packages declare is not followed, which would take minutes
    skipped = "[mypy-torch.*,transformers.*]\nfollow_imports = skip\n[mypy-fastrlhf.*]\nfollow_imports = silent\n"
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = True\n{skipped}")
    wrong = program.replace("config.steps + 1", "config.stepz + 1").replace("beta=0.2", "bet=0.2")
    for text, expected in (
        (program, ["Success"]),
        (wrong, ['"PPOConfig" has no attribute "stepz"', 'Unexpected keyword argument "bet"']),
    ):
        (tmp_path / "program.py").write_text(text)
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "program.py"],
            cwd=tmp_path,
            env={**os.environ, "MYPYPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert all(each in done.stdout for each in expected), done.stdout + done.stderr


def test_it_imports_without_cuda_extension_and_without_triton():
    code = """
import sys
sys.modules["triton"] = sys.modules["fastrlhf._cuda"] = None
import torch, fastrlhf
from fastrlhf.ops._registry import BACKENDS
assert "transformers" not in sys.modules, "import fastrlhf must stay light"
fastrlhf.approx_kl(torch.zeros(2), torch.zeros(2))
print(BACKENDS["approx_kl"])
"""
    assert run(code) == "{'cpu': 'native', 'cuda': 'reference'}"


def test_the_reference_can_serve_everything():
    code = "from fastrlhf.ops._registry import BACKENDS; print({b for d in BACKENDS.values() for b in d.values()})"
    assert run(f"import fastrlhf; {code}", FASTRLHF_BACKEND="ref") == "{'reference'}"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("FASTRLHF_BACKEND", "fast", "must be native or ref, got 'fast'"),
        ("FASTRLHF_ISA", "neon9", "FASTRLHF_ISA=neon9"),
    ],
)
def test_unknown_settings_are_refused(name, value, text):
    with pytest.raises(AssertionError, match=text):
        run("import fastrlhf", **{name: value})


def test_the_base_instruction_set_is_always_there():
    assert run("from fastrlhf import _cpu; print(_cpu.isa)", FASTRLHF_ISA="base") == "base"


@pytest.fixture
def nvcc(tmp_path):
    """A compiler of CUDA 12.4, as far as setup.py asks it."""
    path = tmp_path / "nvcc"
    path.write_text("#!/bin/sh\n[ $1 = --list-gpu-code ] && printf 'sm_80\\nsm_86\\nsm_90\\n'\n")
    path.chmod(0o755)
    return str(path)


def setup_py(code, **environment):
    pytest.importorskip("setuptools", reason="building needs setuptools")
    start = "import runpy, sys; sys.argv = ['setup.py', '--quiet', '--name']\n"
    start += f"s = runpy.run_path({str(ROOT / 'setup.py')!r})"
    return subprocess.run(
        [sys.executable, "-c", f"{start}\n{code}"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(("given", "expected"), [("", "['80', '90']"), ("90", "['90']"), ("75;80", "['75', '80']")])
def test_cuda_is_compiled_for_what_nvcc_knows_unless_told(nvcc, given, expected):
    done = setup_py(f"print(s['architectures']({nvcc!r}))", FASTRLHF_CUDA_ARCHS=given, FASTRLHF_CUDA="0")
    assert done.stdout.splitlines()[-1:] == [expected], done.stderr


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"FASTRLHF_CUDA": "1"}, "FASTRLHF_CUDA=1, but nvcc was not found: put it on PATH, or set NVCC or CUDA_HOME"),
        ({"FASTRLHF_CUDA": "yes"}, "FASTRLHF_CUDA must be 0, 1 or auto, got 'yes'"),
    ],
)
def test_a_build_that_cannot_have_cuda_says_so(tmp_path, environment, text):
    done = setup_py("", PATH=str(tmp_path), NVCC="", CUDA_HOME="", **environment)
    assert done.returncode != 0
    assert done.stderr.strip().endswith(text)


@pytest.mark.slow
def test_the_wheel_holds_fastrlhf_and_nothing_else(tmp_path):
    pytest.importorskip("pybind11", reason="building needs pybind11")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index"]
    # a copy, since setuptools leaves build/ and egg-info in the tree that it builds; its path may have spaces
    source = tmp_path / "my source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout, so which files belong to the package is not known")
    for name in filter(None, tracked.stdout.split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    environment = {**os.environ, "FASTRLHF_CUDA": "0", "CXXFLAGS": "-O0"}  # what is compiled is not run
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True, env=environment, timeout=550)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"fastrlhf"}
    assert "fastrlhf/kernels/approx_kl.py" in names and "fastrlhf/py.typed" in names
    assert any(n.startswith("fastrlhf/_cpu.") and n.endswith(".so") for n in names)
    sources = [path for ending in ("*.py", "*.j2") for path in (ROOT / "fastrlhf").rglob(ending)]
    expected = {path.relative_to(ROOT).as_posix() for path in sources}
    assert expected <= set(names), f"the wheel lacks {sorted(expected - set(names))}"
