"""A real `llmrun serve` in a subprocess, and HTTP without a client library's kindness."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from mpi.harness import Outcome, RunningJob, llmrun_command

START_S = 60.0


class Served:
    """A server on a free loopback port; leaving the context ends it with SIGTERM, and `outcome` says how it ended."""

    def __init__(
        self,
        artifact: Path,
        *arguments: object,
        environment: dict[str, str] | None = None,
        key: str | None = None,
        launcher: list[str] | None = None,
    ) -> None:
        self.key = key
        self.outcome: Outcome | None = None
        command = [*(launcher or []), *llmrun_command("serve", artifact, "--port", 0, *arguments)]
        self.job = RunningJob(command, environment=environment)
        self.model = artifact.name

    def __enter__(self) -> Served:
        assert self.job.process.stderr is not None
        line = self.job.process.stderr.readline().decode()
        found = re.search(r"serving (\S+) on http://([^:]+):(\d+)", line)
        if found is None:
            rest = self.job.finish().stderr
            raise AssertionError(f"the server did not start: {line}{rest}")
        self.model, self.host, self.port = found[1], found[2], int(found[3])
        self.url = f"http://{self.host}:{self.port}"
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        if self.outcome is None:
            if kind is None and self.job.process.poll() is None:
                self.job.process.terminate()
                self.outcome = self.job.finish()
            else:
                self.job.kill()
                self.job.process.wait()

    def wait(self, deadline_s: float = 30) -> Outcome:
        """Wait for an end that something else causes."""
        self.outcome = self.job.finish(deadline_s)
        return self.outcome

    def connect(self, *, receive_buffer: int | None = None) -> socket.socket:
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(30)
        sock.connect((self.host, self.port))
        return sock

    def request(
        self, path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> Any:
        """Return a http.client response, not yet read."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        all_headers = {"Content-Type": "application/json"} if body is not None else {}
        if self.key is not None:
            all_headers["Authorization"] = f"Bearer {self.key}"
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(
            method or ("GET" if body is None else "POST"), path, data, {**all_headers, **(headers or {})}
        )
        return connection.getresponse()

    def ask(self, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        """Return status and JSON."""
        response = self.request(path, body, **options)
        return response.status, json.loads(response.read())

    def health(self) -> int:
        return self.request("/health").status

    def metrics(self) -> dict[str, float]:
        """Return the samples of /metrics, by name and labels."""
        text = self.request("/metrics").read().decode()
        return {name: float(value) for name, _, value in (r.rpartition(" ") for r in text.splitlines() if r[0] != "#")}

    def running(self) -> float:
        """Return how many sequences run or wait."""
        values = self.metrics()
        return sum(
            v for name, v in values.items() if name.startswith(("vllm:num_requests_running", "vllm:num_requests_w"))
        )

    def wait_until_idle(self, seconds: float = 10) -> None:
        until = time.monotonic() + seconds
        while self.running():
            assert time.monotonic() < until, "sequences still run"
            time.sleep(0.02)


def events(response: Any) -> Iterator[Any]:
    """Yield the data of a stream's events, "[DONE]" as text; checks the form of each."""
    for raw in response:
        line = raw.decode().rstrip("\n")
        if line and not line.startswith(":"):
            assert line.startswith("data: "), line
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def raw_post(path: str, body: bytes, *more: str) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
