"""Settings of reward functions and reward servers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastrlhf.settings.option import rare
from fastrlhf.settings.training import JobConfig

REWARDS = ("reward", "eval_reward", "gold", "first", "second", "model")  # settings that may be the URL of a server
ORIGIN = re.compile(r"https?://[^/,|;()=]+", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ScoringConfig(JobConfig):
    """Settings of every job that calls reward functions or reward servers (docs/rewards.md)."""

    reward_timeout: float | None = rare(
        3600.0,
        "seconds for one call of a reward function or server; none: no limit",
        above=0,
        at_most=1e9,
        resume="free",
    )  # clocks take no more
    reward_batch: int | None = rare(
        None, "most responses in one request to a reward server; default: all of a step", at_least=1, resume="free"
    )
    reward_key_file: str | None = rare(None, "file with the API key of the reward server", path="file", resume="free")

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        texts = [str(getattr(self, name, None)) for name in REWARDS]
        origins = sorted({origin for text in texts for origin in ORIGIN.findall(text)})
        for name in ("reward_batch", "reward_key_file"):
            if getattr(self, name) is not None and not origins:
                yield f"{name} is for reward servers, and no reward is the URL of one: leave it out"
        if self.reward_key_file is not None and len(origins) > 1:
            yield f"reward_key_file: one server would get the key of another: {', '.join(origins)}"

    def reward_options(self) -> dict[str, Any]:
        """Returns these settings as keywords of a `Scorer`."""
        names = ("reward_timeout", "reward_batch", "reward_key_file")
        return {name: getattr(self, name) for name in names}
