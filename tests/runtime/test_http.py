"""The client of every server, against servers that answer as none should."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import closing
from types import SimpleNamespace

import pytest
from hostile_server import FAULTS, answer, hostile, silence

from fastrlhf.runtime import http
from fastrlhf.runtime.concurrency import concurrently
from fastrlhf.runtime.http import HTTPClient, ServerError, checked_url, read_key, reason_in, shown

OK = answer({"ok": True})


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(http, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(http, "LONGEST_WAIT", 0.005)


def client(server, **options):
    return HTTPClient("test", server.url, **{"timeout": 5, "key": "SECRET", "max_bytes": 2**20, **options})


SAID = {
    "nothing, for ever": "gave no answer in 0.3 s",
    "closes at once": "gave no whole answer: RemoteDisconnected: Remote end closed connection without response",
    "no HTTP": "gave no whole answer: BadStatusLine",
    "HTML": "did not answer in JSON: Expecting value: line 1 column 1 (char 0); it said: <html><body>hi</body></html>",
    "an empty body": "did not answer in JSON",
    "bytes that are no UTF-8": "did not answer in JSON: 'utf-8' codec can't decode byte 0xff in position 8",
    "JSON 200000 deep": "did not answer in JSON: maximum recursion depth exceeded",
    "an int of 5000 digits": "did not answer in JSON: Exceeds the limit (4300 digits)",
    "NaN": "did not answer in JSON: NaN is no JSON",
    "Infinity": "did not answer in JSON: Infinity is no JSON",
    "a list": "did not answer with a JSON object; it said: [1, 2]",
    "a number": "did not answer with a JSON object; it said: 3",
    "null": "did not answer with a JSON object; it said: null",
    "half an answer": "gave no whole answer: IncompleteRead: IncompleteRead(13 bytes read, 987 more expected) (tried 8",
    "half a chunk": "gave no whole answer: IncompleteRead",
    "a body that drips": "gave no answer in 0.3 s",
    "headers that drip": "gave no answer in 0.3 s",
    "a line that drips": "gave no answer in 0.3 s",
    "chunks that drip": "gave no answer in 0.3 s",
    "100 for ever": "gave no answer in 0.3 s",
    "headers without end": "gave no whole answer: HTTPException: got more than 100 headers",
    "a header of 100 kB": "gave no whole answer: LineTooLong",
    "a length of 300 MiB": "answered with more than 1 MiB",
    "more than it may be": "answered with more than 1 MiB",
    "a chunk of a negative size": "did not answer in HTTP: read length must be non-negative or -1",
    "many chunks": "answered with more than 1 MiB",
    "a redirect to a file": "answered 302, a redirect to file:///etc/passwd: give that address, if you trust it",
    "a redirect to itself": "answered 301, a redirect to http://127.0.0.1:",
    "a redirect to what is no address": r"answered 302, a redirect to http://[::1\x1b: give that address",
    "a redirect to nowhere": "answered 307, a redirect to http://127.0.0.1:",
    "400": r"/v1/x answered 400: too \x1b[31mlong\u202e",
    "401 with the key": "answered 401: wrong key ***",
    "401 with the key at its end": "kkk*** ...",
    "a page with the key at its end": "(char 0); it said: kkkkk",
    "a page with the key after much space": "it said: k ***",
    "404": "answered 404: Not Found",
    "500 with a long text": "answered 500: out of memory out of memory",
    "429": 'answered 429: {"e": "rate"} (tried 8 times in ',
    "429 for an hour": 'answered 429: {"e": "rate"} (it asks to wait 3600 s)',
    "503": "answered 503: loading (tried 8 times in ",
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_a_server_does_wrong_is_one_line_that_names_it(kind):
    start = time.monotonic()
    with hostile(kind) as server, pytest.raises(ServerError) as caught:
        client(server, timeout=0.3 if "0.3 s" in SAID[kind] else 5).post("/v1/x", {"a": 1})
    text = str(caught.value)
    assert text.startswith(f"test: {server.url}") and SAID[kind] in text
    assert text.isprintable() and len(text) < 500 and "SECR" not in text
    assert caught.value.status == (int(kind[:3]) if kind[:3] in ("400", "401", "404", "500", "429", "503") else None)
    assert time.monotonic() - start < 2


def test_an_answer_is_the_json_object(monkeypatch):
    with hostile(OK) as server:
        assert client(server).post("/v1/x", {"a": "\ud800é"}) == client(server).get("/models") == {"ok": True}
        assert client(server).post_text("/reset") == '{"ok": true}'
    (head, body), (second, _), (third, nothing) = server.requests
    assert head.startswith("POST /v1/x HTTP/1.1") and "Authorization: Bearer SECRET" in head and "\\ud800" in body
    assert second.startswith("GET /models HTTP/1.1") and third.startswith("POST /reset ") and nothing == ""


def test_minus_infinity_may_be_the_logarithm_of_0():
    with hostile(answer(b'{"a": -Infinity}')) as server:
        assert client(server).get() == {"a": float("-inf")}


@pytest.mark.parametrize("status", ["301 a", "302 a", "303 a", "307 a", "308 a"])
def test_the_key_goes_to_no_other_address(status):
    with hostile(OK) as other, hostile(answer(b"", status, Location=f"{other.url}/v1/x")) as server:
        for ask in (lambda: client(server).post("/v1/x", {}), lambda: client(server).get("/v1/x")):
            with pytest.raises(ServerError, match=f"a redirect to {other.url}/v1/x"):
                ask()
    assert not other.requests


@pytest.mark.parametrize("kind", ["429", "503", "closes at once", "half an answer"])
def test_what_passes_is_tried_again(kind):
    with hostile(kind, kind, OK) as server:
        assert client(server).post("", {"a": 1}) == {"ok": True}
    assert len(server.requests) == 3 and len({body for _, body in server.requests}) == 1


@pytest.mark.parametrize("kind", ["400", "500 with a long text", "HTML", "a redirect to itself", "404"])
def test_what_stays_is_not_tried_again(kind):
    with hostile(kind) as server, pytest.raises(ServerError):
        client(server).post("", {})
    assert len(server.requests) == 1


def test_what_must_not_happen_twice_is_not_sent_twice_when_the_connection_breaks():
    with hostile("closes at once", OK) as server, pytest.raises(ServerError, match="gave no whole answer"):
        client(server).post("", {}, repeat=False)
    assert len(server.requests) == 1
    with hostile("503", OK) as server:  # it has said that it did nothing
        client(server).post("", {}, repeat=False)


def test_waits_grow_and_are_as_long_as_the_server_asks(monkeypatch):
    waits = []
    monkeypatch.setattr(http, "FIRST_WAIT", 0.5)
    monkeypatch.setattr(http, "LONGEST_WAIT", 30.0)
    # its own clock: threads of other servers sleep, too
    clock = SimpleNamespace(sleep=waits.append, monotonic=time.monotonic, time=time.time)
    monkeypatch.setattr(http, "time", clock)
    with hostile("503") as server, pytest.raises(ServerError, match="tried 8 times"):
        client(server, timeout=100).post("", {})
    longest = [min(0.5 * 2**n, 30.0) for n in range(7)]
    assert all(most / 2 <= wait <= most for most, wait in zip(longest, waits, strict=True))
    waits.clear()
    with hostile(answer(b"", "429 Busy", Retry_After="7"), OK) as server:
        client(server, timeout=100).post("", {})
    assert waits == [7]
    in_a_minute = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    with hostile(answer(b"", "503 Busy", Retry_After=in_a_minute), OK) as server:
        client(server, timeout=100).post("", {})
    assert 55 < waits[1] <= 60


@pytest.mark.parametrize("value", ["soon", "-3", "9" * 400, "9" * 5000, "1.5", "\xff", ""])
def test_a_retry_after_that_says_nothing_is_none(value):
    with hostile(answer(b"", "503 Busy", Retry_After=value), OK) as server:
        assert client(server).post("", {}) == {"ok": True}


def test_one_deadline_holds_for_all_tries():
    start = time.monotonic()
    with hostile("503", "503", silence) as server, pytest.raises(ServerError, match=r"gave no answer in 0.3 s"):
        client(server, timeout=0.3).post("", {})
    assert 0.29 < time.monotonic() - start < 0.6 and len(server.requests) == 3


def test_a_deadline_may_be_further_off_than_sockets_can_wait():
    with hostile(OK) as server:
        assert client(server, timeout=1e300).post("", {}) == {"ok": True}


def test_a_server_that_is_not_there_is_tried_again_unless_that_is_not_wanted():
    with hostile(OK) as server:
        pass
    with pytest.raises(ServerError, match=r"cannot be reached: ConnectionRefusedError: .* \(tried 8 times in"):
        client(server).post("", {})
    with pytest.raises(ServerError, match=r"cannot be reached: ConnectionRefusedError: [^(]*$"):
        client(server).post("", {}, tries=1)


@pytest.mark.parametrize("kind", ["503", "closes at once", "HTML", "a length of 300 MiB", "nothing, for ever", None])
def test_an_error_keeps_nothing_of_its_caller_alive(kind):
    class Held:
        pass

    def ask(url):
        held = Held()
        kept.append(weakref.ref(held))
        list(concurrently(lambda n: HTTPClient("test", url, timeout=0.2).post("", held and n), [1], 1))

    kept = []
    with hostile(kind or OK) as server:
        gc.disable()
        try:
            with contextlib.suppress(ServerError):
                ask(server.url if kind else "http://127.0.0.1:1")
        finally:
            gc.enable()
    time.sleep(0.01)  # the thread ends
    assert kept[0]() is None


def test_a_request_that_is_no_json_is_named():
    with hostile(OK) as server, pytest.raises(ValueError, match="test: a request cannot be written as JSON"):
        client(server).post("", {"a": float("nan")})


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("localhost:8000", "url must start with http:// or https://"),
        ("file:///etc/passwd", "url must start with http:// or https://"),
        ("http://", "url must be http"),
        ("http://:80", "url must be http"),
        ("http://host:port", "url must be http"),
        ("http://host:99999", "url must be http"),
        ("http://host/a b", "url must be http"),
        ("http://host/\r\nX: y", "url must be http"),
        ("http://hÖst/", "url must be http"),
        ("http://host/#a", "url must be http"),
        ("http://user:PASS@host:port", "no password may stand in it"),
        ("http://[::1", "url must be http"),
        ("http://a..b/", "url must be http"),
        (f"http://{'a' * 64}.org", "url must be http"),
    ],
)
def test_an_url_that_is_none_is_refused(url, text):
    with pytest.raises(ValueError, match="test: ") as caught:
        checked_url(url, "test")
    assert text in str(caught.value) and "PASS" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"SECRET\nSECOND", "must hold one key"),
        (b"SECRET SECOND", "must hold one key"),
        ("SECRETé".encode(), "must hold one key"),
        (b"SECRET\x00", "must hold one key"),
        (b"SECRET\xff", "is no text in UTF-8"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_without_a_key_is_refused_without_showing_it(tmp_path, content, text):
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="rollout_key_file: ") as caught:
        read_key(path, "rollout_key_file")
    assert text in str(caught.value) and str(path) in str(caught.value) and "SECRET" not in str(caught.value)
    path.write_bytes(b" SECRET\r\n")
    assert read_key(path, "rollout_key_file") == "SECRET"


def test_foreign_text_is_one_line_without_what_a_terminal_obeys():
    assert shown("a\n\tb\x1b[31m\u202ec é") == "a b\\x1b[31m\\u202ec é"
    assert len(shown("x" * 10**6)) == 300 and shown("x" * 10**6).endswith("x ...")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error": {"message": "no"}}', "no"),
        (b'{"object": "error", "message": "no"}', "no"),
        (b'{"error": "no"}', "no"),
        (b'{"detail": [{"msg": "no"}]}', '[{"msg": "no"}]'),
        (b"no", "no"),
        (b"[1]", "[1]"),
        (b"", "no reason given"),
        (b"[" * 10**5, "[" * 296 + " ..."),
    ],
)
def test_what_a_server_says_of_an_error_is_found(body, text):
    assert reason_in(body) == text


def test_results_come_as_they_are_done_and_so_many_at_once():
    running, most, lock = [0], [0], threading.Lock()

    def work(item):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.1 if item == 0 else 0.01)
        with lock:
            running[0] -= 1
        return item * 10

    found = list(concurrently(work, range(9), 3))
    assert sorted(found) == [(n, n, n * 10) for n in range(9)] and found[0][0] != 0 and most == [3]
    assert list(concurrently(work, [], 3)) == []


def test_the_first_error_ends_it_and_begins_no_more():
    begun = []

    def work(item):
        begun.append(item)
        if item == failing:
            raise ValueError("one")
        time.sleep(0.01)

    failing = 1
    with pytest.raises(ValueError, match="one"):
        list(concurrently(work, range(100), 2))
    failing = None
    with closing(concurrently(work, range(100), 2)) as results:
        next(results)
    num = len(begun)
    time.sleep(0.2)  # in which two threads would begin some 40
    assert len(begun) <= num + 2


def test_an_interrupt_ends_a_process_whose_requests_wait():
    code = """if True:
        import sys
        from fastrlhf.runtime.http import HTTPClient
        from fastrlhf.runtime.concurrency import concurrently
        server = HTTPClient("test", sys.argv[1], timeout=60)
        print("begun", flush=True)
        list(concurrently(lambda n: server.post("", n), range(8), 8))
    """
    with hostile(silence) as server:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(
            [sys.executable, "-c", code, server.url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        while len(server.requests) < 8:
            assert process.poll() is None
            time.sleep(0.01)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert time.monotonic() - start < 15 and b"KeyboardInterrupt" in errors and process.returncode != 0
