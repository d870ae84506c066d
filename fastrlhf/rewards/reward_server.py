"""A reward over HTTP: a server that scores responses (docs/rewards.md). fastrlhf.rewards.serve is one.

A request is a POST of {"prompts": [...], "responses": [...], "response_ids": [[...], ...], "finished": [...],
"columns": {name: [...]}}, and its answer {"scores": [...]}, a finite number for each response, in their order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from typing import Any

from fastrlhf.errors import UserTypeError
from fastrlhf.runtime.concurrency import concurrently
from fastrlhf.runtime.http import HTTPClient, read_key, shown

AT_ONCE = 8  # requests at a time
FIRST_TRIES = 3  # of the first request: a server that is not there is reported soon
FOREVER = 1e9  # seconds


class RewardClient:
    """A reward function that asks a server.

    columns: the names of those that it will be sent
    timeout: seconds for a request, retries included; None: no limit; batch: most responses in a request, None: all
    key_file: file with the key that goes with each request, and to no other address

    Raises: ValueError for a malformed url; ServerError unless the server answers a request without responses."""

    has_own_timeout = True  # of each request

    def __init__(
        self, url: str, *, columns: Collection[str], timeout: float | None, batch: int | None, key_file: str | None
    ) -> None:
        key = None if key_file is None else read_key(key_file, "reward_key_file")
        self.server = HTTPClient("reward", url, timeout=timeout or FOREVER, timeout_option="reward_timeout", key=key)
        self.batch = batch
        nothing: dict[str, Any] = {"prompts": [], "responses": [], "response_ids": [], "finished": []}
        nothing["columns"] = {name: [] for name in sorted(columns)}
        self._ask(nothing, tries=FIRST_TRIES)

    def __repr__(self) -> str:
        return f"the reward server {self.server.url}"

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **given: Any) -> list[float]:
        """Returns a score for each response. Raises: TypeError for a column that JSON cannot hold; ServerError."""
        lists = {"prompts": prompts, "responses": responses}
        lists |= {name: given.pop(name) for name in ("response_ids", "finished")}
        for name, values in given.items():
            _check_json(name, values)
        size = self.batch or max(1, len(responses))
        parts = []
        for start in range(0, len(responses), size):
            part: dict[str, Any] = {name: values[start : start + size] for name, values in lists.items()}
            parts.append({**part, "columns": {name: values[start : start + size] for name, values in given.items()}})
        found: dict[int, list[float]] = {}
        for number, _, scores in concurrently(self._ask, parts, AT_ONCE):
            found[number] = scores
        return [score for number in range(len(parts)) for score in found[number]]

    def _ask(self, request: dict[str, Any], *, tries: int | None = None) -> list[float]:
        """Returns the scores in the answer. Raises: ServerError unless there is a finite number for each response."""
        answer, num = self.server.post("", request, tries=tries), len(request["responses"])
        scores = answer.get("scores")
        if not isinstance(scores, list):
            raise self.server.error("", f'did not answer {{"scores": [...]}}: {shown(json.dumps(answer))}')
        if len(scores) != num:
            raise self.server.error("", f"answered {len(scores)} scores for {num} responses")
        for n, score in enumerate(scores):
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not _is_finite(score):
                text = f"answered {shown(json.dumps(score), 80)} for response {n} of {num}; a score is a finite number"
                raise self.server.error("", text)
        return [float(score) for score in scores]


def _check_json(name: str, values: Sequence[Any]) -> None:
    try:
        json.dumps(values, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        text = f"the column {name!r} cannot be sent to a reward server as JSON: {error}"
        raise UserTypeError(f"reward: {text}; leave it out of the data, or write its values as text") from None


def _is_finite(score: float) -> bool:
    try:
        return math.isfinite(score)
    except OverflowError:  # an integer that is too large for a float
        return False
