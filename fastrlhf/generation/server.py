"""JSON to and from an OpenAI-compatible server, and what its failures are called."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any


class ServerError(RuntimeError):
    """A server that cannot be reached, or whose answer cannot be used.

    status: of its answer, where there was one"""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


class Server:
    """An OpenAI-compatible server.

    caller: who asks, for errors; url: such as http://localhost:8000, with or without /v1 after it; model: one that it
    serves; timeout: seconds for one answer; api_key: sent as the bearer token"""

    def __init__(self, caller: str, url: str, model: str, *, timeout: float, api_key: str | None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{caller}: url must start with http:// or https://, got {url!r}")
        if timeout <= 0:
            raise ValueError(f"{caller}: timeout must be above 0, got {timeout}")
        self.caller, self.model, self.timeout = caller, model, timeout
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self.headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self.headers["Authorization"] = f"Bearer {api_key}"

    def check_model(self) -> None:
        """Raises ServerError for a server that is not there, and for one that does not serve the model."""
        answer = self._open("/v1/models", None)
        try:
            served = [model["id"] for model in answer["data"]]
        except (KeyError, TypeError):
            raise ServerError(f"{self.caller}: {self.url}/v1/models returned no list of models") from None
        if self.model not in served:
            raise ServerError(f"{self.caller}: {self.url} serves {', '.join(served)}, not {self.model}")

    def post(self, path: str, request: dict[str, Any]) -> Any:
        """The server's answer to a request, parsed.

        Raises: ServerError when there is none in time, when it is an error, or when it is no JSON."""
        return self._open(path, json.dumps(request).encode())

    def _open(self, path: str, body: bytes | None) -> Any:
        request = urllib.request.Request(self.url + path, data=body, headers=self.headers)
        where = f"{self.caller}: {self.url}{path}"
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read(1000).decode(errors="replace")
            raise ServerError(f"{where} answered {error.code}: {said}", error.code) from error
        except json.JSONDecodeError as error:
            raise ServerError(f"{where} did not answer in JSON: {error}") from error
        except (OSError, HTTPException) as error:  # no connection, a broken one, a timeout
            slow = isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)
            why = f"gave no answer in {self.timeout:g} s" if slow else f"cannot be reached: {error}"
            raise ServerError(f"{self.caller}: {self.url} {why}") from error
