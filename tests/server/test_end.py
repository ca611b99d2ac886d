"""How a server begins and ends: ready after a decode, drained by SIGTERM, loud when a rank is lost, refusing to be careless."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import Served, events

from mpi.harness import mpirun_command, run_alone

Packed = Callable[..., Path]
LONG: dict[str, Any] = {"prompt": "The king", "max_tokens": 480, "ignore_eos": True, "stream": True}


def collect(response: Any, into: list[Any]) -> threading.Thread:
    thread = threading.Thread(target=lambda: into.extend(events(response)))
    thread.start()
    return thread


def test_sigterm_lets_answers_finish(packed_demo: Packed) -> None:
    with Served(packed_demo(2, "f32")) as served:
        got: list[Any] = []
        reader = collect(served.request("/v1/completions", LONG), got)
        while not got:
            time.sleep(0.01)
        served.job.process.terminate()
        time.sleep(0.5)
        with pytest.raises(ConnectionRefusedError):
            served.connect()
        outcome = served.wait(60)
        reader.join()
    assert (outcome.code, outcome.errors, outcome.leftovers) == (0, [], [])
    assert got[-1] == "[DONE]"
    assert got[-2]["choices"][0]["finish_reason"] == "length"


def test_a_drain_that_takes_too_long_ends_with_an_error_event(packed_demo: Packed) -> None:
    with Served(packed_demo(2, "f32"), "--drain-timeout", 0.05) as served:
        got: list[Any] = []
        reader = collect(served.request("/v1/completions", {**LONG, "n": 8}), got)
        while not got:
            time.sleep(0.01)
        served.job.process.terminate()
        outcome = served.wait()
        reader.join()
    assert (outcome.code, outcome.leftovers) == (0, [])
    assert got[-1]["error"]["code"] == "shutting_down"


BUSY = """
import time

import llmrun.server.grammar as grammar
import llmrun.server.json_body as json_body

parse_json, compile_grammar = json_body.parse_json, grammar.Grammars._compile


def parse_slowly(data, **options):
    time.sleep(60 if b"parse slowly" in data else 0)
    return parse_json(data, **options)


def compile_slowly(self, grammar):
    time.sleep(60 if "compile slowly" in grammar else 0)
    return compile_grammar(self, grammar)


json_body.parse_json, grammar.Grammars._compile = parse_slowly, compile_slowly
"""


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("fields", [{"user": "parse slowly"}, {"structured_outputs": {"choice": ["compile slowly"]}}])
def test_no_work_for_a_request_outlasts_the_server(
    fields: dict[str, Any], num_ranks: int, packed_demo: Packed, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BUSY)
    with Served(
        packed_demo(num_ranks, "f32"), "--drain-timeout", 1, environment={"PYTHONPATH": str(tmp_path)}
    ) as served:
        answers: list[Any] = []
        body = {"prompt": "The king", "max_tokens": 2, **fields}
        asker = threading.Thread(target=lambda: answers.append(served.request("/v1/completions", body).status))
        asker.daemon = True
        asker.start()
        time.sleep(1)
        assert not answers  # a thread is busy
        told = time.monotonic()
        served.job.process.terminate()
        served.job.process.wait(30)
        seconds = time.monotonic() - told
        outcome = served.wait()
    assert (outcome.code, outcome.errors, outcome.leftovers) == (0, [], [])
    assert seconds < 8  # a second of draining, two for the last connections


@pytest.mark.parametrize("how", ["killed", "stopped", "by mpirun"])
def test_a_lost_rank_is_told_to_every_stream(how: str, packed_demo: Packed) -> None:
    launcher = mpirun_command(2) if how == "by mpirun" else None
    with Served(packed_demo(2, "f32"), environment={"LLMRUN_WATCHDOG_S": "2"}, launcher=launcher) as served:
        got: list[list[Any]] = [[] for _ in range(4)]
        readers = [collect(served.request("/v1/completions", LONG), own) for own in got]
        while not all(got):
            time.sleep(0.01)
        os.kill(served.job.rank_pid(1), signal.SIGSTOP if how == "stopped" else signal.SIGKILL)
        lost = time.monotonic()
        outcome = served.wait()
        assert time.monotonic() - lost < 10
        for reader in readers:
            reader.join(20)
    assert outcome.leftovers == []
    assert outcome.code == 6 if launcher is None else outcome.code != 0
    assert len(outcome.errors) == 1
    for own in got:
        assert own[-1]["error"]["code"] == "peer_lost"


def test_health_waits_for_a_decode(packed_demo: Packed) -> None:
    """The first step takes 3 s here: until it is over the port is open and the answer is 503."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = Served(packed_demo(1, "f32"), "--port", port, environment={"LLMRUN_FAULT": "0:prefill:slow"})
    served.host, served.port = "127.0.0.1", port
    seen: list[tuple[int, str]] = []
    until = time.monotonic() + 30
    try:
        while not seen or seen[-1][0] != 200:
            assert time.monotonic() < until
            try:
                status, body = served.ask("/health")
                seen.append((status, body["status"]))
                if status != 200:
                    assert (
                        served.ask("/v1/models")[0] == 503 or served.health() == 200
                    )  # it may become ready in between
            except OSError:
                continue
    except BaseException:
        served.job.kill()
        raise
    with served:
        assert seen[0] == (503, "loading")
        assert seen[-1] == (200, "ok")


def test_beyond_loopback_a_key_is_needed(packed_demo: Packed) -> None:
    outcome = run_alone("serve", packed_demo(1, "f32"), "--host", "0.0.0.0", "--port", 0)
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert "--api-key-file" in outcome.errors[0]


def test_a_key_from_a_file_is_asked_for(packed_demo: Packed, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\n\ntwo \n")
    arguments = ("--host", "0.0.0.0", "--api-key-file", tmp_path / "keys")
    with Served(packed_demo(1, "f32"), *arguments, key="two") as served:
        served.host = "127.0.0.1"
        assert served.ask("/v1/models")[0] == 200
        served.key = "three"
        assert served.ask("/v1/models")[0] == 401
        assert served.health() == 200


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--port", 70000), 2),
        (("--host", "no.such.host.invalid", "--api-key", "a"), 2),
        (("--api-key", ""), 2),
        (("--api-key", "schlüssel"), 2),  # what clients make of it in a header differs
        (("--api-key-file", "/nonexistent"), 2),
        (("--api-key-file", "/dev/null"), 2),
        (("--max-queue", 0), 2),
        (("--max-num-seqs", 0), 2),
        (("--served-model-name", ""), 2),
        (("--allowed-host", "box", "--allowed-host", "https://box"), 2),
        (("--allowed-host", "box:8000"), 2),
        (("--cors-origin", "app.example"), 2),
        (("--cors-origin", "https://app.example/"), 2),
        (("--allowed-host", "*"), 2),
        (("--cors-origin", "https://App.example"), 2),
        (("--cors-origin", "https://app.example:443"), 2),
        (("--metrics-prefix", "my-llm"), 2),
        (("--metrics-prefix", ""), 2),
    ],
)
def test_a_careless_command_line_is_refused(arguments: tuple[Any, ...], code: int, packed_demo: Packed) -> None:
    outcome = run_alone("serve", packed_demo(1, "f32"), *arguments)
    assert (outcome.code, len(outcome.errors)) == (code, 1), outcome


def test_names_that_requests_are_known_by(packed_demo: Packed) -> None:
    names = ("--served-model-name", "org/model:8b", "--metrics-prefix", "llm:box", "--allowed-host", "box")
    origins = ("https://app.example:8443", "http://[::1]:3000", "null", "*")
    options = (
        *names,
        *(word for origin in origins for word in ("--cors-origin", origin)),
        "--allowed-host",
        "[fe80::1]",
    )
    with Served(packed_demo(1, "f32"), *options) as served:
        headers = {"Host": "box", "Origin": origins[0]}
        assert served.request("/v1/models/org/model:8b", headers=headers).status == 200
        assert "llm:box:num_requests_running" in served.request("/metrics").read().decode()


def test_a_taken_port_is_a_sentence(packed_demo: Packed) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        outcome = run_alone("serve", packed_demo(2, "f32"), "--port", sock.getsockname()[1])
    assert (outcome.code, len(outcome.errors), outcome.leftovers) == (5, 1, [])
    assert "--port" in outcome.errors[0]
