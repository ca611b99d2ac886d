"""Measure prompt and generation speed, in llama-bench's form.

The roofline of generation is reading a step's weights once: weight_bytes_per_token of all ranks, over the read
bandwidth that the ranks reach together (each sums a large array with its own threads, all at the same time; best of
several).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import math
import statistics
import time
from typing import TYPE_CHECKING, Any

from llmrun.commands import common
from llmrun.errors import UsageError

if TYPE_CHECKING:
    from llmrun.engine import Engine
    from llmrun.failstop import Signals

_BANDWIDTH_BYTES = 256 << 20  # per rank: far beyond any cache
_BANDWIDTH_REPEATS = 7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    common.add_artifact(parser)
    parser.add_argument("-p", "--n-prompt", type=int, default=512, metavar="N", help="prompt tokens (512)")
    parser.add_argument("-n", "--n-gen", type=int, default=128, metavar="N", help="generated tokens (128)")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="times each is measured (5)")
    common.add_engine_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print a line, or a JSON object, for each of the two tests."""
    if arguments.repetitions < 1 or min(arguments.n_prompt, arguments.n_gen) < 0:
        raise UsageError("-r: expected 1 or more, -p and -n: 0 or more.")
    command = _Bench(arguments)
    return common.run_on_ranks(arguments, common.RankWork(command.measure, command.prepare, command.measure_bandwidth))


class _Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._bytes_per_s = 0.0

    def prepare(self, engine: Engine) -> None:
        """Refuse lengths that the context does not hold."""
        longest = max(self._arguments.n_prompt, self._arguments.n_gen) + 1
        if longest > engine.max_seq_len:
            raise UsageError(
                f"-p and -n: {longest} tokens do not fit the context of {engine.max_seq_len}.", code="E204"
            )

    def measure_bandwidth(self, engine: Engine) -> None:
        """Read memory on all ranks at once; the sum of their speeds, at the time the slowest was done."""
        import numpy as np

        num_threads = engine.job.num_threads
        parts = np.array_split(np.ones(_BANDWIDTH_BYTES // 4, np.float32), num_threads)
        best_s = math.inf
        with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
            for _ in range(_BANDWIDTH_REPEATS):
                engine.job.comm.agree({})
                started = time.perf_counter()
                list(pool.map(lambda part: np.dot(part, part), parts))
                times = engine.job.comm.agree({"s": time.perf_counter() - started})
                best_s = min(best_s, max(status["s"] for status in times))
        self._bytes_per_s = engine.size * _BANDWIDTH_BYTES / best_s

    def measure(self, engine: Engine, _signals: Signals) -> int:
        """Run the two tests."""
        arguments = self._arguments
        tests = [(arguments.n_prompt, 0), (0, arguments.n_gen)]
        results = [self._test(engine, *test) for test in tests if test != (0, 0)]
        if arguments.json:
            common.write_json(results)
        else:
            common.write(_table(results))
        return 0

    def _test(self, engine: Engine, n_prompt: int, n_gen: int) -> dict[str, Any]:
        samples = [_tokens_per_s(engine, n_prompt, n_gen) for _ in range(self._arguments.repetitions + 1)][1:]
        average = statistics.fmean(samples)
        weight_bytes = sum(entry.weight_bytes_per_token for entry in engine.manifest.ranks)
        return {
            "model": self._arguments.artifact,
            "quantization": engine.manifest.quantization["scheme"],
            "weight_bytes": sum(entry.weight_bytes for entry in engine.manifest.ranks),
            "backend": "cpu",
            "isa": engine.job.isa,
            "ranks": engine.size,
            "n_threads": engine.job.num_threads,
            "n_prompt": n_prompt,
            "n_gen": n_gen,
            "avg_ts": average,
            "stddev_ts": statistics.stdev(samples) if len(samples) > 1 else 0.0,
            "samples_ts": samples,
            "weight_bytes_per_token": weight_bytes,
            "read_bytes_per_s": self._bytes_per_s,
            "roofline_fraction": average * weight_bytes / self._bytes_per_s if n_gen else None,
        }


def _tokens_per_s(engine: Engine, n_prompt: int, n_gen: int) -> float:
    """Run one prompt, or generate after one token, and return tokens per second."""
    vocab_size = engine.manifest.model.vocab_size
    prompt = [(7919 * i + 1) % vocab_size for i in range(max(n_prompt, 1))]
    started = time.perf_counter()
    request = engine.submit(prompt, max_tokens=max(n_gen, 1), ignore_eos=True, temperature=0.0, reuse_prefix=False)
    while request.finish_reason is None:
        engine.step()
    return (n_prompt or n_gen) / (time.perf_counter() - started)


def _table(results: list[dict[str, Any]]) -> str:
    rows = [("model", "quant", "size", "ranks", "threads", "test", "t/s", "roofline")]
    for result in results:
        test = f"pp{result['n_prompt']}" if result["n_prompt"] else f"tg{result['n_gen']}"
        fraction = result["roofline_fraction"]
        rows.append(
            (
                str(result["model"]).rstrip("/").rpartition("/")[2],
                result["quantization"],
                f"{result['weight_bytes'] / 2**20:.2f} MiB",
                str(result["ranks"]),
                str(result["n_threads"]),
                test,
                f"{result['avg_ts']:.2f} ± {result['stddev_ts']:.2f}",
                "" if fraction is None else f"{fraction:.2f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"
