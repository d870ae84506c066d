"""Serves a reward function over HTTP: python -m fastrlhf.rewards.serve my_rewards:score --port 8000

`fastrlhf ppo --reward http://HOST:8000` then trains against it, as against my_rewards:score itself, while the function
runs on another machine or with other packages. What a server has to do is in docs/rewards.md; this one is short, to be
read as an example too. It answers one request at a time, so the function need not be safe for threads.
"""

from __future__ import annotations

import argparse
import hmac
import json
import traceback
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from fastrlhf.rewards.named_functions import keywords_of, load_function
from fastrlhf.runtime.http import MAX_BYTES, read_key


class _Handler(BaseHTTPRequestHandler):
    timeout = 60  # seconds that a client may say nothing for: the next one waits
    server: RewardHTTPServer

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length") or "0"
        if not (length.isascii() and length.isdigit()) or int(length) > MAX_BYTES:
            return self._answer(413, {"error": f"Content-Length must be a number of bytes up to {MAX_BYTES}"})
        body = self.rfile.read(int(length))
        key = self.server.key
        given = (self.headers.get("Authorization") or "").encode()
        if key is not None and not hmac.compare_digest(given, f"Bearer {key}".encode()):
            return self._answer(401, {"error": "the key is missing or wrong"})
        try:
            scores = scores_of(self.server.function, json.loads(body))
        except Exception as error:  # the function's: told on both sides, and the next request may do better
            traceback.print_exc()
            return self._answer(500, {"error": f"{type(error).__name__}: {error}"})
        self._answer(200, {"scores": scores})

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


class RewardHTTPServer(HTTPServer):
    """A server of a reward function. key: that clients must send"""

    def __init__(self, address: tuple[str, int], function: Callable[..., Any], key: str | None = None) -> None:
        super().__init__(address, _Handler)
        self.function, self.key = function, key


def scores_of(function: Callable[..., Any], request: dict[str, Any]) -> list[float]:
    """Returns what a function says of the responses in a request."""
    if not request["responses"]:  # the first request, which asks whether there is a server
        return []
    given = {**request["columns"], "response_ids": request["response_ids"], "finished": request["finished"]}
    taken = {name: given[name] for name in keywords_of(function, given)}
    return [float(score) for score in function(request["prompts"], request["responses"], **taken)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(prog="python -m fastrlhf.rewards.serve", description=__doc__.splitlines()[0])
    parser.add_argument("function", help="module:function, as --reward of fastrlhf ppo takes it")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all of this machine")
    parser.add_argument("--port", type=int, default=8000, help="0: any free port")
    parser.add_argument("--key-file", help="file with a key that clients must send (their reward_key_file)")
    options = parser.parse_args(arguments)
    try:
        function = load_function(options.function, "function")
        key = None if options.key_file is None else read_key(options.key_file, "--key-file")
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    with RewardHTTPServer((options.host, options.port), function, key) as server:
        print(f"serving {options.function} at http://{options.host}:{server.server_port}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    main()
