"""A small server that answers as OpenAI-compatible ones do; what it says is up to the test."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeServer(ThreadingHTTPServer):
    """answers: by path, a function from the request's body to the answer.

    change: of an answer, given the body and it; returns (status, text) for an error
    models: those that it says it serves"""

    def __init__(self, answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests, self.running, self.most_running = answers, [], 0, 0
        self.models = [{"id": "base"}, {"id": "policy"}]
        self.lock = threading.Lock()
        self.change = lambda body, answer: answer
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status, text, missing=0):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode()) + missing))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        assert self.path == "/v1/models"
        self.send(200, json.dumps({"object": "list", "data": self.server.models}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append((body, dict(self.headers)))
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        try:
            answer = server.change(body, server.answers[self.path](body))
        finally:
            with server.lock:
                server.running -= 1
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client may have given up
            self.send(*(answer if isinstance(answer, tuple) else (200, json.dumps(answer))))


@contextlib.contextmanager
def serving(answers):
    """A FakeServer that runs in a thread."""
    with FakeServer(answers) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield running
        finally:
            running.shutdown()
            thread.join()
