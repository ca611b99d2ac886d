"""`make bench-server`: `llmrun serve` beside llama.cpp's server, the same weights, threads and requests; one table of ratios.

Each round starts every server in turn, alone, and lets 1, 4, 8 and 16 clients ask it (`bench_server.py`: each streams one
greedy completion after the other, with prompts of token ids that share nothing). Sequences that fit together: as many as
there are clients at most, of the same context, for both. Everything else is each server's default. A round's tokens/s
count the time from the first request to the last answer, prompts included.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import bench_server
from benchmarks.peers import programs, report
from benchmarks.peers.environment import HERE, LLAMA_CPP_PYTHON, Peers, build_server_peers, machine_facts, say
from benchmarks.peers.programs import Cost
from benchmarks.peers.report import OURS, PEERS, Figure, Missing, Row
from benchmarks.peers.shapes import SHAPES
from benchmarks.peers.vocabulary import with_vocabulary

ROOT = HERE.parents[2]
THREADS = 2
CONTEXT = 512  # positions of a sequence, prompt and answer
START_S = 300.0
NAMES = (*OURS, PEERS[0])


def arguments_of(typed: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-server", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="tinyllama-1.1b", choices=sorted(SHAPES), help="(tinyllama-1.1b)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every server (5)")
    parser.add_argument("--clients", default="1,4,8,16", help="(1,4,8,16)")
    parser.add_argument("--requests", type=int, default=3, help="of each client, one after the other (3)")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (64)")
    parser.add_argument("--prompt-ids", type=int, default=128, help="of each prompt (128)")
    parser.add_argument("--no-peers", action="store_true", help="llmrun alone: nothing is compiled")
    parser.add_argument("--work", type=Path, default=ROOT / ".build" / "bench", help="where models are kept")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers", help="where llama.cpp is built")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every sample")
    arguments = parser.parse_args(typed)
    arguments.clients = [int(number) for number in arguments.clients.split(",")]
    if min(arguments.rounds, arguments.requests, arguments.tokens, arguments.prompt_ids, *arguments.clients) < 1:
        parser.error("--rounds, --clients, --requests, --tokens and --prompt-ids: expected 1 or more.")
    if arguments.prompt_ids + arguments.tokens > CONTEXT:
        parser.error(f"--prompt-ids and --tokens: expected at most {CONTEXT} together.")
    return arguments


def main() -> None:
    arguments = arguments_of()
    facts = machine_facts()
    peers = None if arguments.no_peers else build_server_peers(arguments.peers.absolute(), int(str(facts["cores"])))
    commands = _commands(arguments, peers)
    rows = measure(arguments, commands)
    versions = "without peers" if peers is None else f"llama.cpp of {LLAMA_CPP_PYTHON}"
    what = (
        f"{arguments.rounds} rounds; each client {arguments.requests} requests of {arguments.prompt_ids} prompt tokens"
        f" and {arguments.tokens} of answer; median (range); x: times better than"
    )
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"{versions}; {what}\n\n{report.format_table(rows, NAMES)}", end="")
    if arguments.json is not None:
        written = {"machine": facts, "versions": versions, "conditions": what, "rows": report.as_json(rows)}
        arguments.json.write_text(json.dumps(written, indent=1))


def _commands(arguments: argparse.Namespace, peers: Peers | None) -> dict[str, Sequence[object] | str]:
    """Make the models; return each server's command line, without its port, or why there is none."""
    shape, folder = SHAPES[arguments.shape], arguments.work / arguments.shape
    source = with_vocabulary(programs.checkpoint(shape, folder / "checkpoint"), folder / "checkpoint-with-vocabulary")
    sequences = max(arguments.clients)
    commands: dict[str, Sequence[object] | str] = {}
    for name, ranks, threads in ((OURS[0], 2, 1), (OURS[1], 1, 2)):
        artifact = folder / f"served-tp{ranks}"
        if not (artifact / "manifest.json").exists():
            say(f"packing {artifact}")
            programs.pack(source, artifact, ranks)
        limits = ["--max-num-seqs", sequences, "--max-seq-len", CONTEXT, "--threads", threads]
        commands[name] = [programs.BIN / "llmrun", "serve", artifact, *limits]
    if peers is None:
        return commands
    if isinstance(peers.server, str):
        return {**commands, PEERS[0]: peers.server}
    gguf = folder / "served-q4_0.gguf"
    try:
        if not gguf.exists():
            say(f"converting {gguf}")
            partial = gguf.with_name(gguf.name + ".partial")
            cost: Cost = programs.to_gguf(peers, source, partial, THREADS)
            partial.rename(gguf)
            say(f"converted in {cost.seconds:.1f} s")
    except Missing as error:
        return {**commands, PEERS[0]: str(error)}
    limits = ["-np", sequences, "-c", sequences * CONTEXT, "-t", THREADS]
    return {**commands, PEERS[0]: [peers.server, "-m", gguf, *limits, "--offline"]}


def measure(arguments: argparse.Namespace, commands: dict[str, Sequence[object] | str]) -> list[Row]:
    """Let the clients ask every server in turn, round after round. A server that fails is not tried again."""
    what = {"tokens_per_s": ("tokens/s", True), "ttft_median_ms": ("first token, ms", False)}
    what["ttft_p95_ms"] = ("first token, 95th percentile, ms", False)
    rows = {
        (key, number): Row(
            arguments.shape,
            f"{number} client{'s' * (number > 1)}: {text}",
            "",
            {name: Figure() for name in commands},
            is_speed=is_speed,
            goal=_goal(key, number),
        )
        for key, (text, is_speed) in what.items()
        for number in arguments.clients
    }
    failed: dict[str, str] = {name: text for name, text in commands.items() if isinstance(text, str)}
    for turn in range(arguments.rounds):
        for name, command in commands.items():
            if name in failed or isinstance(command, str):
                continue
            say(f"round {turn + 1}: {name}")
            try:
                results = _ask(command, arguments, turn)
            except (Missing, OSError, SystemExit) as error:
                failed[name] = str(error)
                continue
            for result in results:
                for key in what:
                    rows[key, result["clients"]].figures[name].add(result[key])
    for name, reason in failed.items():
        for row in rows.values():
            row.figures[name] = Figure(reason=reason)
    return list(rows.values())


def _goal(key: str, number: int) -> str:
    if key == "tokens_per_s":
        return "1.3 x llama.cpp" if number == 8 else ""
    return "<= llama.cpp" if key == "ttft_median_ms" else ""


def _ask(command: Sequence[object], arguments: argparse.Namespace, turn: int) -> list[dict[str, Any]]:
    """Return the figures of one server's turn, one entry for each number of clients."""
    with _running(command) as port:
        target = bench_server.Target(f"http://127.0.0.1:{port}/v1", None, None)
        rng = random.Random(turn)
        options = argparse.Namespace(
            requests=arguments.requests, tokens=arguments.tokens, prompt_ids=arguments.prompt_ids, seed=turn
        )
        target.complete(bench_server.some_ids(rng, arguments.prompt_ids), 8, bench_server.Round())
        results = []
        for number in arguments.clients:
            result = bench_server.measure(target, number, options)
            expected = number * arguments.requests
            got = (result["tokens"], result["prompt_tokens"])
            if got != (expected * arguments.tokens, expected * arguments.prompt_ids):
                raise Missing(f"{number} clients: {got[0]} tokens and {got[1]} prompt tokens, not the same work")
            results.append(result)
        return results


@contextlib.contextmanager
def _running(command: Sequence[object]) -> Iterator[int]:
    """Start a server, wait until it answers, and end it; gives its port.

    Raises:
        Missing: it does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [str(word) for word in [*command, "--host", "127.0.0.1", "--port", port]]
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"bench-server-{port}.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, start_new_session=True
        )
    try:
        until = time.monotonic() + START_S
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() > until:
                last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
                raise Missing(f"{Path(words[0]).name} does not answer: {last[:300]}")
            time.sleep(0.1)
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.unlink()


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
