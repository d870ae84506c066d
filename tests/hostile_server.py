"""A server that answers as none should: each kind of fault is a few bytes on a connection, or none."""

import contextlib
import json
import socket
import threading
import time


def answer(body, status="200 OK", **headers):
    """A whole HTTP answer."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"HTTP/1.1 {status}",
        f"Content-Length: {len(body)}",
        *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def drip(*pieces, pause=0.02):
    """The first pieces, then the last one again and again."""

    def send(connection):
        for piece in pieces[:-1]:
            connection.sendall(piece)
        while True:
            connection.sendall(pieces[-1])
            time.sleep(pause)

    return send


def silence(connection):
    connection.recv(1)  # until the client gives up


# kind -> what is sent, or a function of the connection that sends it
FAULTS = {
    "nothing, for ever": silence,
    "closes at once": b"",
    "no HTTP": b"\x00\x01 nonsense\r\n\r\n",
    "HTML": answer(b"<html><body>hi</body></html>"),
    "an empty body": answer(b""),
    "bytes that are no UTF-8": answer(b'{"id": "\xff"}'),
    "JSON 200000 deep": answer(b"[" * 200000),
    "an int of 5000 digits": answer(b'{"a": ' + b"9" * 5000 + b"}"),
    "NaN": answer(b'{"a": NaN}'),
    "Infinity": answer(b'{"a": Infinity}'),
    "a list": answer([1, 2]),
    "a number": answer(3),
    "null": answer(None),
    "half an answer": answer(b'{"choices": [').replace(b"Content-Length: 13", b"Content-Length: 1000"),
    "half a chunk": b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"cho\r\nZZ\r\n',
    "a body that drips": drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
    "headers that drip": drip(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "a line that drips": drip(b"HTTP/1.1 200 OK\r\nX: ", b"y"),
    "chunks that drip": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "100 for ever": drip(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "headers without end": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000,
    "a header of 100 kB": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100000 + b"\r\n\r\n",
    "a length of 300 MiB": b"HTTP/1.1 200 OK\r\nContent-Length: 314572800\r\n\r\n{}",
    "more than it may be": b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 2**21,
    "a chunk of a negative size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n{}",
    "many chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    + (b"1000\r\n" + b" " * 4096 + b"\r\n") * 300,
    "a redirect to a file": answer(b"", "302 Found", Location="file:///etc/passwd"),
    "a redirect to itself": answer(b"", "301 Moved", Location="/"),
    "a redirect to what is no address": answer(b"", "302 Found", Location="http://[::1\x1b"),
    "a redirect to nowhere": answer(b"", "307 Temporary"),
    "400": answer({"error": {"message": "too \x1b[31mlong\u202e", "code": 400}}, "400 Bad Request"),
    "401 with the key": answer({"error": "wrong key SECRET"}, "401 Unauthorized"),
    "401 with the key at its end": answer(b'{"error": "%sSE\\u0043RET!!!"}' % (b"k" * 292), "401 Unauthorized"),
    "a page with the key at its end": answer(b"k" * 92 + b"SECRET" * 20),
    "a page with the key after much space": answer(b"k" + b" " * 194 + b"SECRET" * 50),
    "404": answer({"detail": "Not Found"}, "404 Not Found"),
    "500 with a long text": answer(b"out of memory " * 1000, "500 Internal Server Error"),
    "429": answer({"e": "rate"}, "429 Too Many", Retry_After="0"),
    "429 for an hour": answer({"e": "rate"}, "429 Too Many", Retry_After="3600"),
    "503": answer(b"loading", "503 Service Unavailable"),
}


class HostileServer:
    """turns: what to do with connection 1, 2, ..., and the last one with all after it; `requests` are what came.

    One that has reads_requests is a function of head and body that returns what to do."""

    def __init__(self, *turns):
        self.turns, self.requests, self.open = list(turns), [], []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                self.open.append(connection)
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        with contextlib.suppress(OSError), connection:
            came = b""
            while b"\r\n\r\n" not in came:
                came += connection.recv(65536) or exit()
            head, _, body = came.partition(b"\r\n\r\n")
            length = next(
                (int(line.split(b":")[1]) for line in head.splitlines() if line.lower().startswith(b"content-length")),
                0,
            )
            while len(body) < length:
                body += connection.recv(65536) or exit()
            self.requests.append((head.decode(), body.decode()))
            turn = self.turns[min(len(self.requests), len(self.turns)) - 1]
            if getattr(turn, "reads_requests", False):
                turn = turn(head.decode(), body.decode())
            if callable(turn):
                turn(connection)
            else:
                connection.sendall(turn)

    def close(self):
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # close alone does not end accept
        self.socket.close()
        for connection in self.open:
            connection.close()
        self.thread.join()


@contextlib.contextmanager
def hostile(*turns):
    """A HostileServer that ends with the block; a turn is a kind of FAULTS, bytes, or a function of the connection."""
    server = HostileServer(*(FAULTS.get(turn, turn) if isinstance(turn, str) else turn for turn in turns))
    try:
        yield server
    finally:
        server.close()
