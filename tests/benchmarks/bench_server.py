"""Throughput and time to first token of any OpenAI-compatible server, with 1, 4, 8 and 16 clients.

    python tests/benchmarks/bench_server.py http://127.0.0.1:8000/v1 [--model NAME] [--clients 1,4,8,16] [--json]

Each client streams one completion after the other, with prompts that share nothing, greedy, of the same number of tokens
(`ignore_eos`, which llama.cpp's server, vLLM and llmrun know). Tokens are counted by the server (`usage`); a chunk is
taken for a token where there is none. Start each server alone on the machine, with the same weights and the same number of
threads; give llama.cpp's `-np 16` and llmrun `--max-num-seqs 16`. One round before the clock starts warms up.
`make bench-server` does all that, with llama.cpp's server beside ours.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import sys
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from typing import Any

WORDS = (
    *("king", "queen", "evening", "house", "river", "stone", "garden", "winter"),
    *("letter", "horse", "window", "bread", "mountain", "sister", "morning", "road"),
)


@dataclass
class Round:
    """What the clients of one round measured, in seconds and tokens."""

    first_token_s: list[float] = field(default_factory=list)
    between_tokens_s: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0


class Target:
    """A server."""

    def __init__(self, url: str, model: str | None, key: str | None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise SystemExit(f"{url}: expected http://HOST:PORT/v1")
        self._place = (parts.hostname, parts.port or 80)
        self._path = parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        connection = http.client.HTTPConnection(*self._place, timeout=600)
        connection.request("GET", f"{self._path}/models", headers=self._headers)
        return json.loads(connection.getresponse().read())["data"][0]["id"]

    def complete(self, prompt: str | list[int], num_tokens: int, into: Round) -> None:
        """Stream one completion and add what it measured."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        connection = http.client.HTTPConnection(*self._place, timeout=600)
        started = last = time.perf_counter()
        connection.request("POST", f"{self._path}/completions", json.dumps(body).encode(), self._headers)
        response = connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"status {response.status}: {response.read()[:500]!r}")
        chunks, usage = 0, None
        for line in response:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event: dict[str, Any] = json.loads(line[6:])
            usage = event.get("usage") or usage
            if not any(choice.get("text") for choice in event.get("choices", [])):
                continue
            now = time.perf_counter()
            if chunks == 0:
                into.first_token_s.append(now - started)
            else:
                into.between_tokens_s.append(now - last)
            last = now
            chunks += 1
        connection.close()
        into.tokens += usage["completion_tokens"] if usage else chunks
        into.prompt_tokens += usage["prompt_tokens"] if usage else 0


def some_ids(rng: random.Random, length: int) -> list[int]:
    """Return a prompt of token ids of ordinary pieces, that every vocabulary of Llama's has."""
    return [1, *(rng.randrange(300, 3000) for _ in range(length - 1))]


def measure(target: Target, num_clients: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one round; return its figures."""
    results = [Round() for _ in range(num_clients)]

    def client(index: int) -> None:
        rng = random.Random(f"{arguments.seed} {num_clients} {index}")
        for _ in range(arguments.requests):
            if arguments.prompt_ids:
                prompt = some_ids(rng, arguments.prompt_ids)
            else:
                prompt = " ".join(rng.choice(WORDS) for _ in range(arguments.prompt_words))
            target.complete(prompt, arguments.tokens, results[index])

    threads = [threading.Thread(target=client, args=(index,)) for index in range(num_clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    first = sorted(s for result in results for s in result.first_token_s)
    between = sorted(s for result in results for s in result.between_tokens_s)
    tokens = sum(result.tokens for result in results)
    return {
        "clients": num_clients,
        "tokens_per_s": tokens / seconds,
        "ttft_median_ms": statistics.median(first) * 1e3,
        "ttft_p95_ms": first[int(0.95 * (len(first) - 1))] * 1e3,
        "between_tokens_median_ms": statistics.median(between) * 1e3 if between else None,
        "tokens": tokens,
        "prompt_tokens": sum(result.prompt_tokens for result in results),
        "seconds": seconds,
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--model")
    parser.add_argument("--key")
    parser.add_argument("--clients", default="1,4,8,16")
    parser.add_argument("--requests", type=int, default=3, help="of each client, one after the other (3)")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (64)")
    parser.add_argument("--prompt-words", type=int, default=100, help="of each prompt (100)")
    parser.add_argument("--prompt-ids", type=int, default=0, help="send token ids instead, so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    target = Target(arguments.url, arguments.model, arguments.key)
    target.complete("warm up", 8, Round())
    rows = [measure(target, int(number), arguments) for number in arguments.clients.split(",")]
    if arguments.json:
        print(json.dumps(rows))
        return 0
    print("| clients | tokens/s | first token, median ms | p95 ms | between tokens, median ms |\n|---|---|---|---|---|")
    for row in rows:
        values = (row["tokens_per_s"], row["ttft_median_ms"], row["ttft_p95_ms"], row["between_tokens_median_ms"] or 0)
        print(f"| {row['clients']} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
