"""HTTP connections with one deadline for everything; a socket's own timeout starts again with each byte."""

from __future__ import annotations

import io
import socket
import time
import urllib.request
from functools import partial
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any

MOST = 1e9  # seconds; sockets refuse a longer timeout


def _left(ends: float) -> float:
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return min(left, MOST)


class _Reader(io.RawIOBase):
    """Reads from a socket until the deadline `ends`."""

    def __init__(self, sock: socket.socket, ends: float) -> None:
        self.sock, self.ends, self.file = sock, ends, sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self.sock.settimeout(_left(self.ends))
        return self.file.readinto(buffer)

    def close(self) -> None:
        self.file.close()
        super().close()


class _Response(HTTPResponse):
    def __init__(self, ends: float, sock: socket.socket, **options: Any) -> None:
        super().__init__(sock, **options)
        reader = _Reader(sock, ends)
        self.fp.close()
        self.fp = io.BufferedReader(reader)


class _Connection(HTTPConnection):
    """timeout: seconds for everything together, but for looking up the host's name, which has the system's limit"""

    def __init__(self, host: str, *, timeout: float, **options: Any) -> None:
        super().__init__(host, timeout=timeout, **options)
        self.ends = time.monotonic() + timeout
        self.response_class = partial(_Response, self.ends)  # type: ignore[assignment]
        self._create_connection = self._reach

    def _reach(self, address: tuple[str, int], *_: Any) -> socket.socket:
        addresses = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
        for *_kind, where in addresses:
            try:
                return socket.create_connection(where[:2], _left(self.ends))  # type: ignore[arg-type]
            except OSError:
                if where == addresses[-1][-1]:
                    raise
        raise socket.gaierror(f"{address[0]} has no address")

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        self.sock.settimeout(_left(self.ends))
        super().send(data)


class _SecureConnection(_Connection, HTTPSConnection):
    pass


class Handler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_Connection, request)  # type: ignore[arg-type]


class SecureHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_SecureConnection, request, context=self._context)  # type: ignore[arg-type, attr-defined]
