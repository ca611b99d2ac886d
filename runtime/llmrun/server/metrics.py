"""Numbers for Prometheus, under vLLM's names, in its text format 0.0.4. Written here: 100 lines against a dependency."""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Sequence
from pathlib import Path

LATENCY_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
)
REQUEST_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Histogram:
    """Counts observations in buckets; used by one thread."""

    def __init__(self, buckets: Sequence[float]) -> None:
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        at = next((i for i, bound in enumerate(self._buckets) if value <= bound), len(self._buckets))
        self._counts[at] += 1
        self._sum += value

    def lines(self, name: str, labels: str) -> list[str]:
        """Return the samples."""
        total, lines = 0, []
        for bound, count in zip((*self._buckets, "+Inf"), self._counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}",{labels}}} {total}')
        return [*lines, f"{name}_sum{{{labels}}} {self._sum!r}", f"{name}_count{{{labels}}} {total}"]


class Metrics:
    """The server's numbers. `observe` and `finished` are called on the server's thread; `text` too."""

    def __init__(self, model_name: str, prefix: str) -> None:
        """`prefix`: vllm, so that dashboards made for it work, or another name."""
        self._prefix, self._labels = prefix, f'model_name="{_escape(model_name)}"'
        self._finished: dict[str, int] = dict.fromkeys(("stop", "length", "abort", "error"), 0)
        self._responses: dict[int, int] = {}
        self._histograms = {
            "time_to_first_token_seconds": (Histogram(LATENCY_BUCKETS), "Seconds from the request to its first token."),
            "inter_token_latency_seconds": (Histogram(LATENCY_BUCKETS), "Seconds between two tokens of a sequence."),
            "e2e_request_latency_seconds": (Histogram(REQUEST_BUCKETS), "Seconds from the request to its last token."),
            "request_queue_time_seconds": (Histogram(REQUEST_BUCKETS), "Seconds from the request to its first step."),
            "request_prefill_time_seconds": (Histogram(REQUEST_BUCKETS), "Seconds from its first step to a token."),
            "request_decode_time_seconds": (Histogram(REQUEST_BUCKETS), "Seconds from the first token to the last."),
            "request_prompt_tokens": (Histogram(TOKEN_BUCKETS), "Tokens of a prompt."),
            "request_generation_tokens": (Histogram(TOKEN_BUCKETS), "Tokens of an answer."),
        }

    def observe(self, name: str, value: float) -> None:
        """Count a value of a histogram."""
        self._histograms[name][0].observe(value)

    def finished(self, reason: str) -> None:
        """Count a sequence that ended: stop, length, abort (the client left) or error."""
        self._finished[reason] += 1

    def responded(self, status: int) -> None:
        """Count a response."""
        self._responses[status] = self._responses.get(status, 0) + 1

    def text(self, gauges: dict[str, tuple[float, str]], counters: dict[str, tuple[float, str]]) -> str:
        """Return everything; `gauges` and `counters` (name to value and help) are the engine's of now."""
        lines: list[str] = []

        def family(name: str, kind: str, text: str, samples: list[str]) -> None:
            lines.extend([f"# HELP {name} {text}", f"# TYPE {name} {kind}", *samples])

        for kind, values in (("gauge", gauges), ("counter", counters)):
            for name, (value, text) in values.items():
                full = f"{self._prefix}:{name}"
                family(full, kind, text, [f"{full}{{{self._labels}}} {value!r}"])
        name = f"{self._prefix}:request_success_total"
        samples = [f'{name}{{finished_reason="{reason}",{self._labels}}} {n}' for reason, n in self._finished.items()]
        family(name, "counter", "Sequences that ended, by reason.", samples)
        for short, (histogram, text) in self._histograms.items():
            full = f"{self._prefix}:{short}"
            family(full, "histogram", text, histogram.lines(full, self._labels))
        samples = [
            f'llmrun:http_responses_total{{status="{status}"}} {n}' for status, n in sorted(self._responses.items())
        ]
        family("llmrun:http_responses_total", "counter", "Responses, by status.", samples)
        for name, kind, value, text in process_numbers():
            family(name, kind, text, [f"{name} {value!r}"])
        return "\n".join(lines) + "\n"


def process_numbers() -> list[tuple[str, str, float, str]]:
    """Return what Prometheus' clients report of every process: name, kind, value, help."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return [
        ("process_cpu_seconds_total", "counter", usage.ru_utime + usage.ru_stime, "CPU seconds used."),
        ("process_resident_memory_bytes", "gauge", float(pages * os.sysconf("SC_PAGE_SIZE")), "Resident memory."),
        ("process_open_fds", "gauge", float(len(os.listdir("/proc/self/fd")) - 1), "Open file descriptors."),
        ("process_max_fds", "gauge", float(resource.getrlimit(resource.RLIMIT_NOFILE)[0]), "Limit of descriptors."),
        ("process_threads", "gauge", float(threading.active_count()), "Python threads."),
        ("process_start_time_seconds", "gauge", _STARTED, "When the process began, in Unix time."),
    ]


_STARTED = time.time()


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
