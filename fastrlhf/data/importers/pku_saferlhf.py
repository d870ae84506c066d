"""PKU-SafeRLHF: each pair of responses has two labels, which is more helpful and which is safer.

Format: the card of PKU-Alignment/PKU-SafeRLHF: `prompt`, `response_0`, `response_1`, `is_response_0_safe`,
`is_response_1_safe`, `better_response_id` and `safer_response_id` (0 or 1), and further columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastrlhf.data.importers._parts import pair
from fastrlhf.data.report import Reason, Rejected
from fastrlhf.settings.data import DataConvertConfig

HEADS = {"helpful": "better_response_id", "harmless": "safer_response_id"}
COLUMNS = (("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe", *HEADS.values()),)


def convert(row: Mapping[str, Any], config: DataConvertConfig) -> Iterator[dict[str, Any] | Rejected]:
    """Yields two pairs, of head helpful and of head harmless; chosen_is_safe and rejected_is_safe say what is safe."""
    for head, column in HEADS.items():
        better = row[column]
        if better not in (0, 1):
            yield Rejected(Reason.BAD_LABEL, f"{column} is {better!r}")
            continue
        safe = (row["is_response_0_safe"], row["is_response_1_safe"])
        responses = (row["response_0"], row["response_1"])
        yield pair(row["prompt"], responses, 1 if better else -1, config, head=head, is_safe=safe)
