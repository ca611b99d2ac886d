"""What clients do to a server on the wire: leave, stall, lie about lengths, come in crowds; and what curl and lm-eval send."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import shutil
import socket
import subprocess
import time
from typing import Any

import pytest
from serving import Served, events, raw_post

LONG = {"prompt": "The king", "max_tokens": 480, "ignore_eos": True, "temperature": 1}


def read_all(sock: socket.socket) -> bytes:
    data = b""
    try:
        while piece := sock.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    return data


def assert_cut_off(sock: socket.socket, data: bytes) -> None:
    """Send, slowly, until the server is seen to have closed the connection."""
    for _ in range(50):
        try:
            sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            sock.close()
            return
        time.sleep(0.1)
    raise AssertionError("the connection is still open after 5 s")


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl_streams(served: Served) -> None:
    body = json.dumps({**LONG, "max_tokens": 12, "stream": True})
    command = ["curl", "-sN", "-H", "Content-Type: application/json", "-d", body, f"{served.url}/v1/completions"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    frames = done.stdout.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    choices = [json.loads(frame.removeprefix("data: "))["choices"][0] for frame in frames[:-2]]
    assert choices[-1]["finish_reason"] == "length"
    assert all(choice["finish_reason"] is None for choice in choices[:-1])


def test_lm_evaluation_harness_requests(served: Served) -> None:
    """The bodies that lm-eval 0.4's local-completions and local-chat-completions send (recorded), and how it reads them."""
    ids = served.ask("/tokenize", {"prompt": "The king said to the queen"})[1]["tokens"]
    context = 3
    body = {
        "prompt": [ids, ids[:5]],
        "model": served.model,
        "echo": True,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 1,
    }
    status, reply = served.ask("/v1/completions", {**body, "seed": 1234})
    assert status == 200
    for choice, sent in zip(sorted(reply["choices"], key=lambda c: c["index"]), (ids, ids[:5]), strict=True):
        logprobs = choice["logprobs"]
        scores, tops = logprobs["token_logprobs"][context:-1], logprobs["top_logprobs"][context:-1]
        assert len(scores) == len(sent) - context
        assert all(score <= max(top.values()) for score, top in zip(scores, tops, strict=True))
        assert sum(scores) < 0
    until = {"prompt": [ids], "model": served.model, "max_tokens": 8, "temperature": 0, "stop": ["\n\n"], "seed": 1234}
    assert served.ask("/v1/completions", until)[1]["choices"][0]["text"]
    messages = [{"role": "user", "content": "Who is it?", "type": "text"}]
    chat = {
        "messages": messages,
        "model": served.model,
        "max_tokens": 8,
        "temperature": 0,
        "stop": ["\n\n"],
        "seed": 1234,
    }
    assert served.ask("/v1/chat/completions", chat)[1]["choices"][0]["message"]["content"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_cancelled_at_once(stream: bool, served: Served) -> None:
    served.wait_until_idle()
    aborted = served.metrics()[f'vllm:request_success_total{{finished_reason="abort",model_name="{served.model}"}}']
    sock = served.connect()
    sock.sendall(raw_post("/v1/completions", json.dumps({**LONG, "n": 2, "stream": stream}).encode()))
    if stream:
        assert b"data: " in sock.recv(65536) + sock.recv(65536)
    until = time.monotonic() + 20
    while served.running() < 2:
        assert time.monotonic() < until
    sock.close()
    steps = served.metrics()
    served.wait_until_idle(5)
    after = served.metrics()
    name = f'vllm:engine_steps_total{{model_name="{served.model}"}}'
    assert after[name] - steps[name] < 100, "it went on: 480 steps were asked for"
    reason = f'vllm:request_success_total{{finished_reason="abort",model_name="{served.model}"}}'
    assert after[reason] == aborted + 2
    assert after[f'vllm:kv_cache_usage_perc{{model_name="{served.model}"}}'] == 0


def test_a_client_that_does_not_read_is_cut_off_and_slows_nobody(served: Served) -> None:
    sock = served.connect(receive_buffer=4096)
    body = {**LONG, "n": 8, "stream": True, "logprobs": 20}  # far more than socket buffers hold
    sock.sendall(raw_post("/v1/completions", json.dumps(body).encode()))
    time.sleep(0.3)
    status, reply = served.ask("/v1/completions", {"prompt": "The queen", "max_tokens": 5})
    assert (status, reply["usage"]["completion_tokens"]) == (200, 5)
    served.wait_until_idle(30)
    time.sleep(2.5)  # write-timeout
    assert_cut_off(sock, b"x" * 65536)


def test_a_hundred_clients_at_once(served: Served) -> None:
    def one(i: int) -> Any:
        body = {"prompt": f"{i} kings", "max_tokens": 4 + i % 5, "temperature": 1, "seed": i, "ignore_eos": True}
        if i % 2:
            response = served.request("/v1/completions", {**body, "stream": True})
            return [e for e in events(response) if e != "[DONE]"][-1]["choices"][0]["finish_reason"], response.status
        status, reply = served.ask("/v1/completions", body)
        assert reply["usage"]["completion_tokens"] == 4 + i % 5
        return reply["choices"][0]["finish_reason"], status

    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        assert list(pool.map(one, range(100))) == [("length", 200)] * 100
    served.wait_until_idle()


def test_a_full_queue_says_when_to_come_back(served: Served) -> None:
    served.wait_until_idle()
    socks = []
    try:
        for _ in range(17):  # 17 x 8 = 136 sequences fill 16 places and a queue of 120
            socks.append(served.connect())
            socks[-1].sendall(raw_post("/v1/completions", json.dumps({**LONG, "n": 8}).encode()))
        until = time.monotonic() + 20
        while served.running() < 136:
            assert time.monotonic() < until
        response = served.request("/v1/completions", {"prompt": "a"})
        assert (response.status, response.headers["Retry-After"]) == (429, "1")
        assert json.loads(response.read())["error"]["code"] == "queue_full"
        assert served.health() == 200
    finally:
        for sock in socks:
            sock.close()
    served.wait_until_idle(20)


def test_silent_and_slow_connections_are_closed(served: Served) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    head, _, _ = raw_post("/v1/completions", body).partition(b"\r\n\r\n")
    starts = [
        b"",
        b"GET /health HT",
        head[:30],
        head + b"\r\n\r\n" + body[:5],
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ]
    started = time.monotonic()
    socks = [served.connect() for _ in starts]
    for sock, start in zip(socks, starts, strict=True):
        sock.sendall(start)
    answers = [read_all(sock) for sock in socks]
    assert time.monotonic() - started < 10
    assert b"408" in answers[3].partition(b"\r\n")[0]
    assert b"200 OK" in answers[4]


def test_a_trickle_of_header_bytes_does_not_keep_a_connection(served: Served) -> None:
    sock = served.connect()
    assert_cut_off(sock, b"X")


def header_lines(count: int, size: int) -> bytes:
    return b"".join(b"X-%d: " % i + b"a" * size + b"\r\n" for i in range(count))


BAD_HTTP: list[tuple[bytes, tuple[int, ...]]] = [
    (b"NONSENSE\r\n\r\n", (400,)),
    (b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", (200, 400, 404, 505)),
    (b"GET /health HTTP/1.1\r\n\r\n", (400, 403)),
    (b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n", (403,)),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n", (400, 403)),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + header_lines(80, 4) + b"\r\n", (431,)),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + header_lines(2, 9000) + b"\r\n", (400, 431)),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + header_lines(1, 300_000) + b"\r\n", (400, 431)),
    (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", (400, 431)),
    (b"DELETE /health HTTP/1.1\r\nHost: localhost\r\n\r\n", (405,)),
    (b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", (405,)),
    (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n", (404,)),
    (b"GET /%2e%2e/x HTTP/1.1\r\nHost: localhost\r\n\r\n", (404,)),
    (raw_post("/v1/completions", b"{}", "Transfer-Encoding: chunked"), (400,)),  # both lengths: smuggling
    (raw_post("/v1/completions", b"{}", "Content-Length: 3"), (400,)),
    (raw_post("/v1/completions", b"{}", "Content-Encoding: gzip"), (415,)),
    (raw_post("/v1/completions", b"{}", "Origin: https://evil.example"), (403,)),
    (raw_post("/v1/completions", b"[" * 100_000), (400,)),
    (raw_post("/v1/completions", b"x" * 300_000), (413,)),
    (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n" + (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 5,
        (413,),
    ),
    (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        (400, 408),
    ),
    (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 99999999999999999999\r\n\r\n",
        (400, 413),
    ),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), (400,)),  # TLS to a plain port
]


@pytest.mark.parametrize(("data", "statuses"), BAD_HTTP, ids=range(len(BAD_HTTP)))
def test_bad_http_is_answered_and_closed(data: bytes, statuses: tuple[int, ...], served: Served) -> None:
    sock = served.connect()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(data)
    answer = read_all(sock)
    if answer:  # a reset may outrun the answer to more than the server reads
        assert int(answer.split(b" ", 2)[1]) in statuses, answer[:200]
    else:
        assert len(data) > 60_000
    assert served.health() == 200


def read_response(sock: socket.socket) -> tuple[bytes, bytes]:
    """Read one response that says its length; return its first line and its body."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        assert piece, data
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0])
    while len(body) < length:
        body += sock.recv(65536)
    return head.partition(b"\r\n")[0], body


def test_a_refusal_before_the_body_came_leaves_the_connection_to_the_next_request(served: Served) -> None:
    body = json.dumps({"input": "a"}).encode()
    head, _, _ = raw_post("/v1/embeddings", body).partition(b"\r\n\r\n")
    long = json.dumps({**LONG, "n": 8, "stream": True}).encode()  # takes longer than the server waits for a body
    with served.connect() as sock:
        sock.sendall(head + b"\r\n\r\n")
        assert b"404" in read_response(sock)[0]
        sock.sendall(body + raw_post("/v1/completions", long, "Connection: close"))
        started = time.monotonic()
        answer = read_all(sock)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"data: [DONE]" in answer, f"it was cut off after {time.monotonic() - started:.1f} s"


@pytest.mark.parametrize("connection", ["close", "keep-alive"])  # urllib and nginx send the first
def test_a_client_that_still_sends_gets_its_refusal(connection: str, served: Served) -> None:
    for _ in range(5):
        body = b"x" * 5_000_000
        headers = {"Content-Type": "application/json", "Connection": connection}
        assert served.request("/v1/completions", body, headers=headers).status == 413


def test_two_requests_in_one_packet(served: Served) -> None:
    sock = served.connect()
    body = json.dumps({"prompt": "The king", "max_tokens": 2}).encode()
    sock.sendall(
        raw_post("/v1/completions", body) + b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )
    answer = read_all(sock)
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert answer.index(b"text_completion") < answer.index(b'"version"')


def test_more_connections_than_allowed_are_refused_and_streams_go_on(served: Served) -> None:
    stream = served.request("/v1/completions", {**LONG, "max_tokens": 100, "stream": True})
    idle = [served.connect() for _ in range(255)]
    for _ in range(30):  # whether they send before or after the refusal
        refused = served.request("/v1/completions", {"prompt": "a"})
        assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
        assert json.loads(refused.read())["error"]["code"] == "too_many_connections"
    with served.connect() as sock:
        answer = read_all(sock)
    assert b"503" in answer.partition(b"\r\n")[0]
    assert list(events(stream))[-1] == "[DONE]"
    for sock in idle:
        sock.close()
    until = time.monotonic() + 10
    while True:
        try:
            assert served.health() == 200
            return
        except (AssertionError, OSError):
            assert time.monotonic() < until
            time.sleep(0.1)


@pytest.mark.parametrize(
    "head",
    [b"GET /health HTTP/1.0\r\n", b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"],
)
def test_probes_and_proxies_have_their_forms(head: bytes, served: Served) -> None:
    sock = served.connect()
    sock.sendall(head + b"\r\n")
    assert read_all(sock).split(b"\r\n")[0] == b"HTTP/1.1 200 OK"


def test_other_routes(served: Served) -> None:
    assert served.ask("/version")[0] == 200
    document = served.ask("/openapi.json")[1]
    assert {"/v1/chat/completions", "/v1/completions", "/health", "/metrics"} <= set(document["paths"])
    assert served.ask("/v1/embeddings", {"input": "a"})[0] == 404
    assert served.request("/health", method="HEAD").status == 200
    for path, methods in (("/v1/completions", "POST"), ("/health", "GET, HEAD")):
        refused = served.request(path, method="DELETE")
        assert (refused.status, refused.headers["Allow"]) == (405, methods)
    page = served.request("/")
    assert page.status in (200, 404)
    if page.status == 200:
        policy = page.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


VLLM_NAMES = (
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total"),
    *("prompt_tokens_total", "generation_tokens_total", "prefix_cache_queries_total", "prefix_cache_hits_total"),
)
VLLM_HISTOGRAMS = {"time_to_first_token_seconds": 1, "inter_token_latency_seconds": 4, "e2e_request_latency_seconds": 1}
VLLM_HISTOGRAMS |= {f"request_{part}_time_seconds": 1 for part in ("queue", "prefill", "decode")}
VLLM_HISTOGRAMS |= {"request_prompt_tokens": 1, "request_generation_tokens": 1}


def test_a_request_is_counted_under_vllms_names(served: Served) -> None:
    served.wait_until_idle()
    before = served.metrics()
    ids = served.ask("/tokenize", {"prompt": "The king of nowhere"})[1]["tokens"]
    served.ask("/v1/completions", {"prompt": ids, "max_tokens": 5, "ignore_eos": True})
    after = served.metrics()
    label = f'{{model_name="{served.model}"}}'
    gained = {name: after[name] - before[name] for name in after if name in before}
    for name in VLLM_NAMES:
        assert f"vllm:{name}{label}" in after
    assert gained[f"vllm:prompt_tokens_total{label}"] == len(ids)
    assert gained[f"vllm:generation_tokens_total{label}"] == 5
    assert gained[f'vllm:request_success_total{{finished_reason="length",model_name="{served.model}"}}'] == 1
    for name, count in VLLM_HISTOGRAMS.items():
        assert gained[f"vllm:{name}_count{label}"] == count, name
    seconds = {name: gained[f"vllm:{name}_sum{label}"] for name in VLLM_HISTOGRAMS if name.endswith("_seconds")}
    parts = sum(seconds[f"request_{part}_time_seconds"] for part in ("queue", "prefill", "decode"))
    assert 0 < seconds["request_prefill_time_seconds"] <= seconds["time_to_first_token_seconds"]
    assert parts <= seconds["e2e_request_latency_seconds"] * 1.01


def test_ignored_fields_are_named(served: Served) -> None:
    response = served.request(
        "/v1/completions", {"prompt": "a", "max_tokens": 1, "mirostat": 2, "a b": 1, "user": "me"}
    )
    assert response.headers["x-llmrun-ignored"] == "mirostat"
