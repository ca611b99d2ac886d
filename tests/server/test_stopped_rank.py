"""What the server itself notices and does while a step stands still: rank 1 is stopped, and the watchdog is off."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import Served, raw_post

LONG: dict[str, Any] = {"prompt": "The king", "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(packed_demo: Callable[..., Path]) -> Iterator[Served]:
    limits = ("--health-timeout", 1, "--ping-interval", 0.2, "--request-timeout", 4)
    with Served(packed_demo(2, "f32"), *limits, environment={"LLMRUN_WATCHDOG_S": "0"}) as server:
        yield server


@pytest.fixture(scope="module")
def rank(server: Served) -> int:
    """The pid of rank 1; looking for it takes longer than an answer on a busy machine."""
    return server.job.rank_pid(1)


@contextlib.contextmanager
def stopped(rank: int) -> Iterator[None]:
    os.kill(rank, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(rank, signal.SIGCONT)


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def count(server: Served, name: str, **labels: str) -> float:
    text = ",".join(f'{key}="{value}"' for key, value in {**labels, "model_name": server.model}.items())
    return server.metrics()[f"vllm:{name}{{{text}}}"]


def test_health_says_so_and_requests_end_in_time(server: Served, rank: int) -> None:
    stream = server.request("/v1/completions", {**LONG, "stream": True})
    assert stream.readline().startswith(b"data: {")
    whole: list[Any] = []
    with stopped(rank):
        waiter = threading.Thread(target=lambda: whole.extend(server.ask("/v1/completions", LONG)))
        waiter.start()
        wait_for(lambda: server.ask("/health") == (503, {"status": "stuck"}))
        until = time.monotonic() + 20
        lines = []
        for line in stream:  # pings at least
            assert time.monotonic() < until
            lines += [line.rstrip(b"\n")] if line != b"\n" else []
        waiter.join(20)
    assert lines.count(b": ping") >= 5
    assert json.loads(lines[-1].removeprefix(b"data: "))["error"]["code"] == "request_timeout"
    assert (whole[0], whole[1]["error"]["code"]) == (408, "request_timeout")
    wait_for(lambda: server.ask("/health") == (200, {"status": "ok"}))
    assert server.ask("/v1/completions", {"prompt": "The king", "max_tokens": 2})[0] == 200


def test_openais_client_does_not_ask_again_for_what_took_too_long(server: Served, rank: int) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60)  # it retries by default
    late = 'llmrun:http_responses_total{status="408"}'
    before = server.metrics().get(late, 0)
    with stopped(rank), pytest.raises(openai.APIStatusError, match="took longer"):
        client.completions.create(model=server.model, prompt="The king", max_tokens=2)
    assert server.metrics()[late] == before + 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_cancelled_before_the_next_step(stream: bool, server: Served, rank: int) -> None:
    server.wait_until_idle()
    aborted = count(server, "request_success_total", finished_reason="abort")
    before = count(server, "generation_tokens_total")
    sock = server.connect()
    sock.sendall(raw_post("/v1/completions", json.dumps({**LONG, "n": 2, "stream": stream}).encode()))
    wait_for(lambda: count(server, "generation_tokens_total") >= before + 4)
    with stopped(rank):
        time.sleep(0.3)  # a step that began before ends, if rank 1 had done its part
        steps = count(server, "engine_steps_total")
        assert server.running() == 2
        sock.close()
        wait_for(lambda: count(server, "request_success_total", finished_reason="abort") == aborted + 2)
    server.wait_until_idle()
    assert count(server, "engine_steps_total") <= steps + 1  # the one that stood still
    assert count(server, "kv_cache_usage_perc") == 0
