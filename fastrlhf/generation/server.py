"""A client of OpenAI-compatible servers, and checks of the log-probabilities that they return."""

from __future__ import annotations

from typing import Any

from fastrlhf.errors import UserError
from fastrlhf.runtime.http import HTTPClient, ServerError, shown

__all__ = ["ModelClient", "ServerError", "check_logprob", "check_probabilities"]
ROUNDING = 1e-3  # of log-probabilities above 0 and of probabilities that add up to more than 1


class ModelClient(HTTPClient):
    """A client of an OpenAI-compatible server.

    url: such as http://localhost:8000, with or without /v1 after it; model: one that it serves
    caller, timeout, timeout_option, key: see `Server`"""

    def __init__(
        self, caller: str, url: str, model: str, *, timeout: float, key: str | None, timeout_option: str = ""
    ) -> None:
        super().__init__(caller, url, timeout=timeout, timeout_option=timeout_option, key=key)
        if "?" in url:
            raise UserError(f"{caller}: url must be that of a server, such as http://localhost:8000, got {url!r}")
        self.model, self.url = model, self.url.removesuffix("/v1").rstrip("/")
        self.has_answered = False

    def models(self) -> dict[str, dict[str, Any]]:
        """Returns what the server says of its models, by name. Without retries until it has answered once."""
        answer = self.get("/v1/models", tries=None if self.has_answered else 1)
        listed = answer.get("data")
        if not isinstance(listed, list) or not all(
            isinstance(m, dict) and isinstance(m.get("id"), str) for m in listed
        ):
            raise self.error("/v1/models", f"returned no list of models: {shown(str(answer))}")
        self.has_answered = True
        return {model["id"]: model for model in listed}

    def check_model(self) -> None:
        """Raises ServerError for a server that is not there, and for one that does not serve the model."""
        served = list(self.models())
        if self.model not in served:
            names = shown(", ".join(served)) or "no model"
            raise self.error("", f"serves {names}, not {self.model}")

    def max_model_len(self) -> int | None:
        """Most tokens of a prompt and its response together; None where the server does not say."""
        models = self.models()
        own = models.get(self.model, {})
        # vLLM gives the length of an adapter's model, not of the adapter, which may also be loaded later
        for known in ([own], [models.get(str(own.get("parent")), {})], list(models.values())):
            lengths = [length for model in known if (length := model.get("max_model_len")) is not None]
            if not all(type(length) is int and length > 0 for length in lengths):
                raise self.error("/v1/models", f"gives no whole numbers as max_model_len: {shown(str(lengths))}")
            if lengths:
                return min(lengths)
        return None


def check_logprob(value: Any) -> float:
    """Returns a log-probability as a float. Raises: ValueError unless it is a number of at most 0 but for rounding."""
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not float(value) <= ROUNDING:
            raise ValueError
    except (ValueError, OverflowError):
        raise UserError(f"{shown(str(value), 40)} is no log-probability") from None
    return float(value)


def check_probabilities(total: float) -> None:
    """Raises ValueError where the probabilities of different tokens come to more than 1."""
    if total > 1 + ROUNDING:
        raise UserError(f"the probabilities of different tokens come to {total:.3g}")
