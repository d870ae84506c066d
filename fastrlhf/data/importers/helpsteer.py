"""HelpSteer's rated responses, and the preferences of HelpSteer2.

Format: the cards of nvidia/HelpSteer and nvidia/HelpSteer2. `helpfulness`, `correctness`, `coherence`, `complexity` and
`verbosity` go from 0 to 4. In a prompt of several turns, lines `<extra_id_1>Assistant` and `<extra_id_1>User` stand
before all but the first. Preferences (the folder `preference`): `preference_strength` from -3, response_1 is much
better, to 3, response_2 is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastrlhf.data.importers._parts import number_of, pair
from fastrlhf.data.report import Reason, Rejected
from fastrlhf.settings.data import DataConvertConfig

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
COLUMNS = (("prompt", "response", *ATTRIBUTES), ("prompt", "response_1", "response_2", "preference_strength"))
TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def convert(row: Mapping[str, Any], config: DataConvertConfig) -> Iterator[dict[str, Any]]:
    """Yields a rated row; of a preference a pair, with its `strength`, 0 to 3."""
    prompt = _turns(row["prompt"])
    if "response" in row:
        ratings = {name: number_of(row[name], name) for name in ATTRIBUTES}
        yield {"prompt": prompt, "completion": row["response"], "ratings": ratings}
        return
    strength = number_of(row["preference_strength"], "preference_strength")
    if abs(strength) > 3:
        raise Rejected(Reason.BAD_LABEL, f"preference_strength is {strength}")
    sides = (row["response_1"], row["response_2"])
    others = {name: row[name] for name in ("split",) if row.get(name) is not None}
    yield {**pair(prompt, sides, (strength > 0) - (strength < 0), config), "strength": abs(strength), **others}


def _turns(prompt: Any) -> Any:
    """The messages of a prompt of several turns; another prompt as it is."""
    if not isinstance(prompt, str) or not TURN.search(prompt):
        return prompt
    pieces = TURN.split(prompt)  # text, role, text, role, text, ...
    roles = ["user", *(role.lower() for role in pieces[1::2])]
    return [{"role": role, "content": text} for role, text in zip(roles, pieces[::2], strict=True)]
