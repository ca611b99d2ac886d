"""Keep a server busy for minutes with everything that clients do, and see that its memory and descriptors stay flat.

    python tests/benchmarks/soak_server.py ARTIFACT [--minutes 10]

Clients stream, wait, leave in the middle, constrain, send nonsense and long prompts; every 5 s `/metrics` is read. The
first fifth of the time is for caches to fill. Then the median of the last fifth must not be more than 8 MB and 4
descriptors above that of the second fifth. Prints one JSON object; exit code 1 if something grew, failed or was answered
with 500.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from typing import Any

NUM_CLIENTS = 6
SAMPLE_S = 5.0
MAX_GROWTH_BYTES = 8 << 20
MAX_MORE_FILES = 4


class Soak:
    """The clients' loop and what they saw."""

    def __init__(self, port: int, seconds: float) -> None:
        self.port, self.until = port, time.monotonic() + seconds
        self.statuses: dict[str, int] = {}
        self._lock = threading.Lock()

    def client(self, seed: int) -> None:
        """Send one request after the other."""
        rng = random.Random(seed)
        while time.monotonic() < self.until:
            kind = rng.choice(("stream", "whole", "leave", "json", "nonsense", "long", "tokenize", "echo"))
            try:
                seen = self._one(kind, rng)
            except OSError as error:
                seen = type(error).__name__
            with self._lock:
                self.statuses[seen] = self.statuses.get(seen, 0) + 1

    def _one(self, kind: str, rng: random.Random) -> str:
        prompt = " ".join(
            rng.choice(("king", "queen", "evening", "house", "ü", "123")) for _ in range(rng.randint(1, 60))
        )
        body: Any = {"prompt": prompt, "max_tokens": rng.randint(1, 60), "temperature": 1, "seed": rng.randint(0, 9)}
        path = "/v1/completions"
        if kind in ("stream", "leave"):
            body["stream"] = True
        elif kind == "json":
            values = [f"{rng.randint(0, 200)}" for _ in range(3)]  # more schemas than are remembered
            schema = {
                "type": "object",
                "properties": {"a": {"enum": values}},
                "required": ["a"],
                "additionalProperties": False,
            }
            body["structured_outputs"] = {"json": schema}
        elif kind == "nonsense":
            body = rng.choice(
                ([], {"prompt": -1}, {"prompt": "a", "n": 99}, {"prompt": "a", "structured_outputs": {"regex": "("}})
            )
        elif kind == "long":
            body["prompt"] = prompt * 3
        elif kind == "tokenize":
            path = "/tokenize"
        elif kind == "echo":
            body |= {"echo": True, "logprobs": 5, "max_tokens": 1}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if kind == "leave":
                response.read(300)
            else:
                response.read()
            return str(response.status)
        finally:
            connection.close()

    def numbers(self) -> tuple[float, float, float]:
        """Return resident bytes, open descriptors and tokens generated so far."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        names = ("process_resident_memory_bytes", "process_open_fds", r"vllm:generation_tokens_total\{.*\}")
        found = [re.search(rf"^{name} (\S+)$", text, re.MULTILINE) for name in names]
        resident, files, tokens = (float(match[1]) if match else 0.0 for match in found)
        return resident, files, tokens


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--minutes", type=float, default=10)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "llmrun", "serve", arguments.artifact, "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        line = server.stderr.readline()
        found = re.search(r":(\d+)$", line.strip())
        if found is None:
            print(line + server.stderr.read(), file=sys.stderr)
            return 1
        soak = Soak(int(found[1]), arguments.minutes * 60)
        threads = [threading.Thread(target=soak.client, args=(seed,)) for seed in range(NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        samples = []
        while any(thread.is_alive() for thread in threads):
            samples.append(soak.numbers())
            time.sleep(SAMPLE_S)
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    fifth = max(1, len(samples) // 5)
    before, after = samples[fifth : 2 * fifth], samples[-fifth:]
    resident = [statistics.median(sample[0] for sample in part) for part in (before, after)]
    files = [statistics.median(sample[1] for sample in part) for part in (before, after)]
    result = {
        "minutes": arguments.minutes,
        "requests": sum(soak.statuses.values()),
        "seen": dict(sorted(soak.statuses.items())),
        "tokens": samples[-1][2],
        "resident_mb": [round(value / 2**20, 1) for value in resident],
        "open_files": files,
        "exit_code": code,
    }
    print(json.dumps(result))
    has_grown = resident[1] - resident[0] > MAX_GROWTH_BYTES or files[1] - files[0] > MAX_MORE_FILES
    has_failed = code != 0 or any(seen not in ("200", "400") for seen in soak.statuses)
    return int(has_grown or has_failed)


if __name__ == "__main__":
    sys.exit(main())
