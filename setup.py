"""Builds fastrlhf._cpu always and fastrlhf._cuda where nvcc is found. Needs neither torch nor a GPU.

FASTRLHF_CUDA=0|1|auto   never | must | when nvcc is found (auto, the default)
FASTRLHF_CUDA_ARCHS      compute capabilities, default what nvcc knows of 80;90;100;120 (and PTX of the last)
CXX, CXXFLAGS, LDFLAGS, NVCC, CUDA_HOME, MAX_JOBS   as usual
"""

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = {"base": []}
if X86:
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISAS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
OPENMP = ["-fopenmp"] if platform.system() == "Linux" else []
SHARED = ["-shared"] if platform.system() == "Linux" else ["-bundle", "-undefined", "dynamic_lookup"]
ARCHS = ("80", "90", "100", "120")


def find_nvcc() -> str | None:
    wanted = os.environ.get("FASTRLHF_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"FASTRLHF_CUDA must be 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or (home and shutil.which("nvcc", path=f"{home}/bin"))
    if wanted == "1" and not nvcc:
        raise SystemExit("FASTRLHF_CUDA=1, but nvcc was not found: put it on PATH, or set NVCC or CUDA_HOME")
    return nvcc or None


def architectures(nvcc: str) -> list[str]:
    if os.environ.get("FASTRLHF_CUDA_ARCHS"):
        return os.environ["FASTRLHF_CUDA_ARCHS"].split(";")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    chosen = [arch for arch in ARCHS if f"sm_{arch}" in known]
    if not chosen:
        raise SystemExit(f"{nvcc} knows none of {', '.join(ARCHS)}; set FASTRLHF_CUDA_ARCHS, or FASTRLHF_CUDA=0")
    return chosen


def in_ninja(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def cudart_folder(nvcc: str) -> Path:
    # nvcc may be a wrapper script, so its own location says nothing: ask it for its root
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    for line in dryrun.splitlines():
        if line.startswith("#$ TOP="):
            top = Path(line[len("#$ TOP=") :].strip())
            for folder in ("lib64", "lib", "targets/x86_64-linux/lib"):
                if (top / folder / "libcudart_static.a").exists():
                    return top / folder
    raise SystemExit(f"libcudart_static.a was not found beside {nvcc}; set FASTRLHF_CUDA=0 to build without CUDA")


class NinjaBuild(build_ext):
    """Compiles every file of csrc/cpu once per instruction set (module.cpp once) and every file of csrc/cuda."""

    def run(self) -> None:
        import ninja
        import pybind11

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cxx, nvcc = os.environ.get("CXX", "g++"), find_nvcc()
        include = [f"-I{ROOT / 'csrc'}"]
        python = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
        flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", *OPENMP, "-ffp-contract=fast", "-fno-math-errno"]
        flags += ["-fno-trapping-math", "-Wall", "-Wno-psabi"]  # psabi: vectors wider than base has, all inlined
        flags += [*shlex.split(os.environ.get("CXXFLAGS", "")), *include]
        depfile = "-MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
        lines = [
            f"builddir = {build}",
            f"rule cxx\n  command = {cxx} {depfile}",
            f"rule link\n  command = {cxx} {' '.join(SHARED)} -o $out $in $flags",
        ]

        def compile_with(rule: str, source: Path, stem: str, options: list[str]) -> str:
            out = build / f"{stem}.o"
            lines.append(f"build {in_ninja(out)}: {rule} {in_ninja(source)}\n  flags = {shlex.join(options)}")
            return in_ninja(out)

        def link(name: str, objects: list[str], options: list[str]) -> Path:
            out = build / (name + sysconfig.get_config_var("EXT_SUFFIX"))
            lines.append(f"build {in_ninja(out)}: link {' '.join(objects)}\n  flags = {shlex.join(options)}")
            return out

        objects = [compile_with("cxx", ROOT / "csrc/cpu/module.cpp", "cpu/module", flags + python)]
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            if source.name != "module.cpp":
                for isa, options in ISAS.items():
                    options = [*flags, *options, f"-DFASTRLHF_ISA={isa}"]
                    objects.append(compile_with("cxx", source, f"cpu/{source.stem}_{isa}", options))
        libraries = {"_cpu": link("_cpu", objects, [*OPENMP, *shlex.split(os.environ.get("LDFLAGS", ""))])}

        if nvcc:
            lines.append(f"rule nvcc\n  command = {shlex.quote(nvcc)} {depfile}")
            archs = architectures(nvcc)
            arch = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
            arch += [f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
            flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static", "-lineinfo"]
            flags += [*arch, *include, "-DFASTRLHF_ISA=cuda"]
            objects = [
                compile_with("nvcc", source, f"cuda/{source.stem}", flags + python * (source.stem == "module"))
                for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))
            ]
            static = [f"-L{cudart_folder(nvcc)}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
            libraries["_cuda"] = link("_cuda", objects, [*static, "-Wl,--exclude-libs,ALL", "-s"])

        (build / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.check_call([str(Path(ninja.BIN_DIR) / "ninja"), "-f", str(build / "build.ninja"), *jobs], cwd=ROOT)
        for name, library in libraries.items():
            target = Path(self.get_ext_fullpath(f"fastrlhf.{name}"))  # in place for editable installs
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(library, f"{target}.new")
            os.replace(f"{target}.new", target)  # a running process keeps the old file

    def get_outputs(self) -> list[str]:  # editable wheels ask for these
        return [self.get_ext_fullpath(extension.name) for extension in self.extensions]


extensions = [Extension("fastrlhf._cpu", [])]
if find_nvcc():
    extensions.append(Extension("fastrlhf._cuda", []))
setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
