"""The judge against a real HTTP server on this machine."""

import asyncio
import json
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from colora.rewards.judge import Judge
from colora.rewards.runner import RewardRunner

pytest.importorskip("httpx")


class Endpoint(BaseHTTPRequestHandler):
    """Does what the judged completion, the last word of the prompt, asks for."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        order = request["messages"][0]["content"].split()[-1]
        with server.lock:
            server.requests.append((self.path, self.headers.get("Authorization"), request))
            server.seen[order] += 1
            server.active += 1
            server.most = max(server.most, server.active)
            if server.most >= 3:
                server.three_at_once.set()
        try:
            self._answer(order, server.seen[order])
        finally:
            with server.lock:
                server.active -= 1

    def _answer(self, order, attempt):
        if order == "slow":
            self.server.three_at_once.wait(60)
            time.sleep(0.05)  # for more to come, if they did
        if order == "hang":
            self.server.released.wait(300)
            self.close_connection = True  # the judge has hung up long ago
            return None
        if order == "busy" and attempt == 1:
            return self._send(503, "overloaded")
        if order == "forbidden":
            return self._send(401, "wrong key")
        if order == "html":
            return self._send(200, "<html>")
        replies = {
            "silent": "I would rather not.",
            "eleven": "Score: 11",
            "null": None,
            "json": 'Thus:\n{"score": 5, "why": "{"}',
        }
        reply = replies.get(order, "Score: 2 at first.\nScore: 7.5")
        return self._send(200, json.dumps({"choices": [{"message": {"content": reply}}]}))

    def _send(self, status, text):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # with the usual 5 the kernel drops connections that come at once


@pytest.fixture
def server():
    server = Server(("127.0.0.1", 0), Endpoint)
    server.lock, server.released, server.seen = threading.Lock(), threading.Event(), Counter()
    server.requests, server.active, server.most, server.three_at_once = [], 0, 0, threading.Event()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.released.set()
    server.three_at_once.set()
    server.shutdown()
    thread.join()
    server.server_close()


def score(judge, completions, **columns):
    runner = RewardRunner([judge])
    scores = runner.score(["q"] * len(completions), completions, [[]] * len(completions), columns)
    runner.close()
    values = [None if value != value else value for value in scores.values[:, 0].tolist()]
    return values, scores.extra["judge_failure"], scores.metrics


def test_the_last_score_counts_and_the_request_is_as_asked(server):
    judge = Judge("m", server.url, api_key="secret", template="{prompt} {answer} {{}} {completion}")
    message = [{"role": "assistant", "content": "braces {x} fine"}]
    assert score(judge, [message], answer=["42"]) == ([0.75], [None], {"judge/failed": 0.0})
    ((path, key, request),) = server.requests
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    content = {"role": "user", "content": "q 42 {} braces {x} fine"}
    assert request == {"model": "m", "messages": [content], "temperature": 0.0}
    assert "secret" not in repr(judge)


def test_failures_are_none_with_their_reason_and_spare_the_others(server):
    judge = Judge("m", server.url, timeout=60.0, retries=1)
    orders = ["busy", "\ud800 fine", "forbidden", "html", "null", "silent", "eleven"]
    values, reasons, metrics = score(judge, orders)
    assert values == [0.75, 0.75, *[None] * 5] and metrics == {"judge/failed": pytest.approx(5 / 7)}
    parts = [
        None,
        None,
        "status 401",
        "not a chat completion",
        "without text",
        "would rather not",
        "not in 0.0..10.0",
    ]
    assert all(reason is None if part is None else part in reason for reason, part in zip(reasons, parts, strict=True))
    # What another attempt may help was asked twice, the rest once.
    assert [server.seen[order.split()[-1]] for order in orders] == [2, 1, 1, 1, 1, 1, 1]


def test_a_server_that_hangs_costs_its_sample_and_spares_the_others(server):
    judge = Judge("m", server.url, timeout=1.0, retries=2)  # two further attempts for what a busy machine is late with
    values, reasons, metrics = score(judge, ["fine", "hang"])
    assert values == [0.75, None] and metrics == {"judge/failed": 0.5}
    assert "no reply in 1" in reasons[1] and "attempt 3" in reasons[1]


def test_no_server_at_all(server):
    judge = Judge("m", "http://127.0.0.1:1/v1", retries=1)
    values, reasons, metrics = score(judge, ["fine"])
    assert values == [None] and "ConnectError" in reasons[0] and "attempt 2" in reasons[0]
    assert metrics == {"judge/failed": 1.0}


def test_the_concurrency_limit_is_over_all_calls(server):
    judge = Judge("m", server.url, concurrency=3)

    async def several():
        return await asyncio.gather(*(judge(["q"] * 4, ["slow"] * 4) for _ in range(4)))

    assert asyncio.run(several()) == [[0.75] * 4] * 4
    assert server.most == 3
    assert asyncio.run(judge(["q"], ["fine"])) == [0.75]  # on a loop of its own


def test_loops_of_several_threads_keep_their_limits(server):
    """As in `colora rewards run --workers 2`: what runs on one loop does not take the other one's, or a new one."""
    judge = Judge("m", server.url)

    async def slots():
        return judge._semaphore()

    with asyncio.Runner() as one, asyncio.Runner() as other:
        first = one.run(slots())
        assert other.run(slots()) is not first and one.run(slots()) is first


def test_a_field_of_a_json_object(server):
    judge = Judge("m", server.url, score_field="score", score_range=(1, 5))
    values, reasons, _ = score(judge, ["json", "fine"])
    assert values == [1.0, None] and "no score in the reply" in reasons[1]


def test_wrong_arguments_are_errors(server, monkeypatch):
    with pytest.raises(ValueError, match="concurrency=0"):
        Judge("m", server.url, concurrency=0)
    with pytest.raises(ValueError, match="needs a group"):
        Judge("m", server.url, score_pattern=r"\d+")
    with pytest.raises(ValueError, match=r"KeyError: 'reference'.*\['answer', 'completion', 'prompt'\]"):
        asyncio.run(Judge("m", server.url, template="{reference}")(["q"], ["a"], answer=["4"]))
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ImportError, match=r"pip install colora\[judge\]"):
        Judge("m", server.url)
