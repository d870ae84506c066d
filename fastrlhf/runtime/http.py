"""The HTTP client of rollout servers, judge servers and reward servers.

A request has one deadline, retries included, which also ends a server that sends a byte now and then. 429, 503 and
broken connections are retried, after waits that grow. Redirects are refused, so the key and the texts go to
the address that was given and to no other. Proxies are those of the environment, as in urllib.

It stands on urllib, not on the client that transformers brings: that has one name in some versions (httpx), another in
others (httpx2), and its timeouts count from the last byte.
"""

from __future__ import annotations

import json
import random
import socket
import time
import urllib.request
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urljoin, urlsplit

from fastrlhf.errors import MachineError, UserError
from fastrlhf.runtime.http_deadline import Handler, SecureHandler
from fastrlhf.runtime.terminal import printable

TRIES = 8  # of a request; the waits between them come to about a minute
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between tries; each wait is twice the last
MAX_BYTES = 64 * 2**20  # of an answer
BUSY = (429, 503)
UNSENT = (ConnectionRefusedError, socket.gaierror)  # the server has not seen the request
BROKEN = (ConnectionError, HTTPException)
_jitter = random.Random()  # its own, since the loops seed Python's


class ServerError(MachineError):
    """A server that cannot be reached, or whose answer cannot be used.

    status: of its answer, where there was one
    wait: seconds after which the request may be tried again; None: it should not be"""

    def __init__(self, text: str, status: int | None = None, wait: float | None = None) -> None:
        super().__init__(text)
        self.status, self.wait = status, wait


class HTTPClient:
    """A server that takes and gives JSON.

    caller: who asks, for errors; url: what paths are added to, such as http://localhost:8000
    timeout: seconds for a request: all its tries, the waits between them, and reading the answer
    timeout_option: what raises that limit, for errors; key: sent as the bearer token, see `read_key`
    tries: of a request; max_bytes: of an answer

    Raises: ValueError for a malformed url, and for a timeout that is not above 0."""

    def __init__(
        self,
        caller: str,
        url: str,
        *,
        timeout: float,
        timeout_option: str = "",
        key: str | None = None,
        tries: int = TRIES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        if not timeout > 0:
            raise UserError(f"{caller}: timeout must be above 0, got {timeout}")
        self.caller, self.url, self.key = caller, checked_url(url, caller), key
        self.timeout, self.timeout_option = timeout, timeout_option
        self.tries, self.max_bytes = tries, max_bytes
        self.headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "fastrlhf"}
        if key is not None:
            self.headers["Authorization"] = f"Bearer {key}"
        self.opener = urllib.request.OpenerDirector()  # without handlers of redirects, of files and of errors
        for handler in (urllib.request.ProxyHandler(), Handler(), SecureHandler()):
            self.opener.add_handler(handler)

    def get(self, path: str = "", *, tries: int | None = None) -> dict[str, Any]:
        """The JSON object at a path. Raises: see `post`."""
        return self._parsed(path, self._ask(path, None, True, tries or self.tries))

    def post(self, path: str, request: Any, *, repeat: bool = True, tries: int | None = None) -> dict[str, Any]:
        """Sends a request as JSON; returns the JSON object in the answer.

        repeat: whether to send the request again when the connection breaks: the server may then get it twice

        Raises: ServerError, one line that names the server, if no answer comes in time, or if the answer is an error, a
        redirect, too long, or no JSON object."""
        return self._parsed(path, self._ask(path, self._body(request), repeat, tries or self.tries))

    def post_text(self, path: str, request: Any = None, *, repeat: bool = True, tries: int | None = None) -> str:
        """Returns the text of the answer, JSON or not. request: sent as JSON; None: an empty body. Else as `post`."""
        body = b"" if request is None else self._body(request)
        return self._ask(path, body, repeat, tries or self.tries).decode(errors="replace")

    def error(self, path: str, text: str, status: int | None = None, wait: float | None = None) -> ServerError:
        """Returns an error that names the caller and the address, with *** in place of the key. text: `shown`"""
        return ServerError(without_key(f"{self.caller}: {self.url}{path} {text}", self.key), status, wait)

    def _hidden(self, data: bytes) -> bytes:
        """Hides the key in what the server says, before that is cut short."""
        return data if self.key is None else data.replace(self.key.encode(), b"***")

    def _body(self, request: Any) -> bytes:
        try:
            return json.dumps(request, allow_nan=False).encode()
        except ValueError as error:
            raise UserError(f"{self.caller}: a request cannot be written as JSON: {error}") from None

    def _ask(self, path: str, body: bytes | None, repeat: bool, tries: int) -> bytes:
        """Returns the bytes of the answer, after retries."""
        start, pause = time.monotonic(), FIRST_WAIT
        for number in range(1, tries + 1):
            try:
                return self._try(path, body, repeat, self.timeout - (time.monotonic() - start))
            except ServerError as error:  # kept in no variable: a cycle would keep what the caller holds
                if error.wait is None:
                    raise
                wait, spent = max(error.wait, pause * _jitter.uniform(0.5, 1)), time.monotonic() - start
                if number == tries or wait >= self.timeout - spent:
                    times = f" (tried {number} times in {spent:.3g} s)" if number > 1 else ""
                    later = f" (it asks to wait {error.wait:g} s)" if error.wait >= self.timeout - spent else ""
                    raise ServerError(f"{error}{times}{later}", error.status) from error
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_WAIT)
        raise UserError(f"{self.caller}: tries must be at least 1, got {tries}")

    def _try(self, path: str, body: bytes | None, repeat: bool, left: float) -> bytes:
        request = urllib.request.Request(self.url + path, data=body, headers=self.headers)
        try:
            with self.opener.open(request, timeout=left) as answer:
                length = answer.length or 0
                data = b"" if length > self.max_bytes else answer.read(None if length else self.max_bytes + 1)
                status, headers = answer.status, answer.headers
        except (OSError, HTTPException) as error:
            raise self._broken(error.reason if isinstance(error, URLError) else error, path, repeat) from error
        except ValueError as error:  # http.client's, of a chunk with a negative size
            raise self.error(path, f"did not answer in HTTP: {shown(str(error))}") from error
        if max(length, len(data)) > self.max_bytes:
            raise self.error(path, f"answered with more than {self.max_bytes / 2**20:g} MiB")
        if 300 <= status < 400:
            where = shown(_target(self.url + path, headers.get("Location") or ""))
            raise self.error(path, f"answered {status}, a redirect to {where}: give that address, if you trust it")
        if not 200 <= status < 300:
            wait = _seconds(headers.get("Retry-After")) if status in BUSY else None
            raise self.error(path, f"answered {status}: {reason_in(self._hidden(data))}", status, wait)
        return bytes(data)

    def _broken(self, cause: Any, path: str, repeat: bool) -> ServerError:
        """Returns the error for a connection that could not be made or that broke."""
        if isinstance(cause, TimeoutError):
            advice = f"; raise {self.timeout_option} if it needs longer" if self.timeout_option else ""
            return self.error("", f"gave no answer in {self.timeout:g} s{advice}")
        why = shown(f"{type(cause).__name__}: {cause}")
        if isinstance(cause, BROKEN) and not isinstance(cause, UNSENT):
            return self.error(path, f"gave no whole answer: {why}", wait=0 if repeat else None)
        return self.error("", f"cannot be reached: {why}", wait=0 if isinstance(cause, UNSENT) else None)

    def _parsed(self, path: str, data: bytes) -> dict[str, Any]:
        said = shown(self._hidden(data)[:400].decode(errors="replace"), 100)
        try:
            answer = json.loads(data.decode("utf-8"), parse_constant=_constant)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise self.error(path, f"did not answer in JSON: {shown(str(error), 100)}; it said: {said}") from error
        if not isinstance(answer, dict):
            raise self.error(path, f"did not answer with a JSON object; it said: {said}")
        return answer


def checked_url(url: str, name: str) -> str:
    """Returns the url without a / at its end. Raises: ValueError for one that is malformed or holds a password."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{name}: url must start with http:// or https://, got {url!r}")
    if "@" in url.split("/")[2]:
        raise UserError(f"{name}: the url is printed: no user and no password may stand in it")
    try:
        parts = urlsplit(url)
        whole = bool(parts.hostname and parts.hostname.encode("idna")) and (parts.port is None or parts.port > 0)
    except ValueError:  # such as a port that is no number, and a name with two dots side by side
        whole = False
    if not whole or not url.isascii() or not url.isprintable() or " " in url or "#" in url:
        raise UserError(f"{name}: url must be http(s)://HOST:PORT/PATH in ASCII, got {url!r}")
    return url.rstrip("/")


def read_key(path: str | Path, option: str) -> str:
    """Returns the key in a file, without the white space around it.

    Raises: ValueError naming the option, and never the key, for a file that cannot be read or holds no key."""
    try:
        key = Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be read: {error.strerror or type(error).__name__}") from None
    except ValueError:
        raise UserError(f"{option}: {path} is no text in UTF-8") from None
    if not key:
        raise UserError(f"{option}: {path} is empty")
    if not key.isascii() or not key.isprintable() or " " in key:
        expected = "must hold one key: ASCII, without white space or line ends in it"
        raise UserError(f"{option}: {path} {expected}; what it holds is not shown")
    return key


def shown(text: str, length: int = 300) -> str:
    """Returns foreign text as one line of at most `length` characters, with escapes for those that a terminal obeys."""
    start = printable(" ".join(text[: 2 * length].split()))
    return start if len(start) <= length and len(text) <= 2 * length else start[: length - 4] + " ..."


def without_key(text: str, key: str | None) -> str:
    """Returns a text with *** in place of a key, and of the start of a key where `shown` has cut the text."""
    if key is None:
        return text
    text = text.replace(key, "***")
    for size in range(len(key) - 1, 3, -1):
        text = text.replace(f"{key[:size]} ...", "*** ...")
    return text


def reason_in(data: bytes) -> str:
    """Returns the reason in an error's body: the message in the JSON of OpenAI, vLLM or FastAPI, or else the text."""
    text = data[:4000].decode(errors="replace")
    try:
        found = json.loads(text)
        found = found.get("error", found)
        found = found if isinstance(found, str) else found.get("message") or found["detail"]
        return shown(found if isinstance(found, str) else json.dumps(found))
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return shown(text) or "no reason given"


def _target(url: str, location: str) -> str:
    """Returns the address that a redirect from an url names, or its text if that is malformed."""
    try:
        return urljoin(url, location)
    except ValueError:
        return location


def _seconds(retry_after: str | None) -> float:
    """Returns the seconds of a Retry-After header, a number or a date; 0 if there is none or it is neither."""
    try:
        return max(0.0, float(int(retry_after or 0)))
    except (ValueError, OverflowError):
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after or "").timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _constant(name: str) -> float:
    """Takes -Infinity, the logarithm of 0, and refuses NaN and Infinity: Python's json would take all three."""
    if name != "-Infinity":
        raise UserError(f"{name} is no JSON")
    return float("-inf")
