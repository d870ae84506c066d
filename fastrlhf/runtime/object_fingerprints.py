"""Fingerprints of the objects that Python gave a run in place of paths."""

from __future__ import annotations

import json
import zlib
from typing import Any

from fastrlhf.data.objects import rows_of
from fastrlhf.settings.objects import GivenObject

SAMPLES = 2**16  # numbers of a tensor that are looked at, evenly spread; all of a small one
# of a model's settings: no part of what it computes
NO_PART = ("_name_or_path", "architectures", "dtype", "transformers_version")


def fingerprint_of_object(given: GivenObject) -> dict[str, str]:
    """Checksums of a model's weights (a sample of them) and settings, of a tokenizer, or of rows, each by its name."""
    value = given.value
    if hasattr(value, "state_dict"):
        return {"weights": f"{_of_weights(value):08x}", "config": f"{_crc(_settings(value.config)):08x}"}
    if hasattr(value, "convert_ids_to_tokens"):
        is_fast = getattr(value, "is_fast", False)
        whole = value.backend_tokenizer.to_str() if is_fast else sorted(value.get_vocab().items())
        special = {name: str(token) for name, token in value.special_tokens_map.items()}
        return {"tokenizer": f"{_crc((whole, value.chat_template, sorted(special.items()))):08x}"}
    checksum = 0
    for _, row in rows_of(given):
        checksum = zlib.crc32(json.dumps(row).encode(), checksum)
    return {"rows": f"{checksum:08x}"}


def _of_weights(model: Any) -> int:
    checksum = 0
    for name, tensor in model.state_dict().items():
        checksum = zlib.crc32(f"{name} {tuple(tensor.shape)}".encode(), checksum)
        flat = tensor.detach().flatten()
        sample = flat[:: -(-flat.numel() // SAMPLES) or 1].float().cpu().contiguous()
        checksum = zlib.crc32(sample.numpy().tobytes(), checksum)
    return checksum


def _settings(config: Any) -> list[tuple[str, Any]]:
    return sorted((name, value) for name, value in config.to_dict().items() if name not in NO_PART)


def _crc(value: Any) -> int:
    return zlib.crc32(repr(value).encode())
