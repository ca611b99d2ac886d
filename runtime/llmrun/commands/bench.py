"""Measure prompt and generation speed, in llama-bench's form; with --profile, where the time of a step goes.

The column roofline says how near generation comes to what reading a step's weights once would take: weight_bytes_per_token
of all ranks, over the read bandwidth that the ranks reach together (each sums a large array with its own threads, all at the
same time; best of several).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import math
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmrun.commands import common
from llmrun.errors import ResourceError, UsageError
from llmrun.memory import available_bytes
from llmrun.peers import local_ranks
from llmrun.profile import Profile

if TYPE_CHECKING:
    from llmrun.engine import Engine
    from llmrun.failstop import Signals

DEFAULT_PROMPT, DEFAULT_GEN = 512, 128
_BANDWIDTH_BYTES = 256 << 20  # per rank, at most: far beyond any cache
_LEAST_BANDWIDTH_BYTES = 32 << 20  # what a cache may hold says nothing of the memory
_BANDWIDTH_REPEATS = 7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    common.add_artifact(parser)
    prompt, gen = f"{DEFAULT_PROMPT}, or what fits", f"{DEFAULT_GEN}, or what fits"
    parser.add_argument("-p", "--n-prompt", type=int, metavar="N", help=f"prompt tokens ({prompt})")
    parser.add_argument("-n", "--n-gen", type=int, metavar="N", help=f"generated tokens ({gen})")
    parser.add_argument(
        "-d", "--depth", type=int, default=0, metavar="N", help="tokens in the cache when generating (0)"
    )
    parser.add_argument("-b", "--batch", type=int, default=1, metavar="N", help="sequences at the same time (1)")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="times each is measured (5)")
    parser.add_argument("--profile", action="store_true", help="also tell where the time of rank 0's steps goes")
    common.add_engine_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print a line, or a JSON object, for each of the two tests."""
    lengths = (arguments.n_prompt or 0, arguments.n_gen or 0, arguments.depth)
    if min(arguments.repetitions, arguments.batch) < 1 or min(lengths) < 0:
        raise UsageError("-r and -b: expected 1 or more, -p, -n and -d: 0 or more.")
    command = _Bench(arguments)
    return common.run_on_ranks(
        arguments,
        common.RankWork(command.measure, command.prepare, command.measure_bandwidth, max_num_seqs=arguments.batch),
    )


@dataclass(frozen=True)
class Load:
    """What one test runs: `batch` prompts of `n_prompt` tokens, or `n_gen` steps after `depth` tokens in each of `batch`."""

    n_prompt: int
    n_gen: int
    depth: int
    batch: int

    @property
    def longest(self) -> int:
        """Positions that a sequence needs at most."""
        return self.n_prompt + 1 if self.n_prompt else max(self.depth, 1) + self.max_tokens

    @property
    def max_tokens(self) -> int:
        """Tokens of a sequence: those measured, and those sampled until the last prompt of the batch is in the cache."""
        from llmrun.step_budget import DEFAULT_MIXED_BUDGET, DEFAULT_TOKEN_BUDGET

        if self.n_prompt:
            return 1
        if self.depth == 0:
            return self.n_gen

        # Once the first sequence generates, the prompts of the others share what a step then takes of prompts.
        budget = DEFAULT_TOKEN_BUDGET if self.batch == 1 else DEFAULT_MIXED_BUDGET
        return self.n_gen + 1 + math.ceil(self.batch * self.depth / budget)

    @property
    def num_tokens(self) -> int:
        """Tokens whose speed is measured."""
        return self.batch * (self.n_prompt or self.n_gen)


class _Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._bytes_per_s: float | None = None
        self._num_prompts = 0
        self._tests: list[Load] = []

    def prepare(self, engine: Engine) -> None:
        """Choose lengths that were not given; refuse what cannot be measured: those beyond the context, a GPU's profile."""
        if self._arguments.profile and engine.job.placement.provider != "cpu":
            raise UsageError(
                "--profile: it times the CPU's operators; on a GPU they run after they return. Use --provider cpu."
            )
        arguments, room = self._arguments, engine.max_seq_len
        n_prompt, n_gen = arguments.n_prompt, arguments.n_gen
        if n_prompt is None:
            n_prompt = min(DEFAULT_PROMPT, room - 1)
        if n_gen is None:
            n_gen = min(DEFAULT_GEN, max(1, room - Load(0, 0, arguments.depth, arguments.batch).longest))
        tests = [Load(n_prompt, 0, 0, arguments.batch), Load(0, n_gen, arguments.depth, arguments.batch)]
        self._tests = [test for test in tests if test.num_tokens]
        longest = max((test.longest for test in self._tests), default=0)
        if longest > engine.max_seq_len:
            raise UsageError(
                f"-p, -n and -d: {longest} tokens do not fit the context of {engine.max_seq_len}.", code="E204"
            )

    def measure_bandwidth(self, engine: Engine) -> None:
        """Read memory on all ranks at once, if there is enough: the sum of their speeds, at the time the slowest was done."""
        import numpy as np

        num_threads = engine.job.num_threads
        sharers = len(local_ranks(engine.job.comm.peers, engine.rank))
        own = min(_BANDWIDTH_BYTES, available_bytes() // (2 * sharers))  # a small box, or container, has less
        num_bytes = min(status["bytes"] for status in engine.job.comm.agree({"bytes": own}))
        if num_bytes < _LEAST_BANDWIDTH_BYTES:
            return
        parts = np.array_split(np.ones(num_bytes // 4, np.float32), num_threads)
        best_s = math.inf
        with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
            for _ in range(_BANDWIDTH_REPEATS):
                engine.job.comm.agree({})
                started = time.perf_counter()
                list(pool.map(lambda part: np.dot(part, part), parts))
                times = engine.job.comm.agree({"s": time.perf_counter() - started})
                best_s = min(best_s, max(status["s"] for status in times))
        self._bytes_per_s = engine.size * num_bytes / best_s

    def measure(self, engine: Engine, _signals: Signals) -> int:
        """Run the two tests."""
        results = [self._test(engine, test) for test in self._tests]
        if self._arguments.json:
            common.write_json(results)
        else:
            common.write(_table(results))
            for result in results:
                if "profile" in result:
                    common.write(_profile_table(result))
        return 0

    def _test(self, engine: Engine, load: Load) -> dict[str, Any]:
        runs = [self._run(engine, load) for _ in range(self._arguments.repetitions + 1)][1:]
        samples = [load.num_tokens / seconds for seconds, _ in runs]
        average = statistics.fmean(samples)
        weight_bytes = sum(entry.weight_bytes_per_token for entry in engine.manifest.ranks)
        steps_per_s = average / load.batch
        is_cpu = engine.job.placement.provider == "cpu"  # whose memory's bandwidth is measured
        result = {
            "model": self._arguments.artifact,
            "quantization": engine.manifest.quantization["scheme"],
            "weight_bytes": sum(entry.weight_bytes for entry in engine.manifest.ranks),
            "backend": engine.job.placement.provider,
            "isa": engine.job.isa,
            "ranks": engine.size,
            "n_threads": engine.job.num_threads,
            "n_prompt": load.n_prompt,
            "n_gen": load.n_gen,
            "n_depth": load.depth,
            "n_seqs": load.batch,
            "avg_ts": average,
            "stddev_ts": statistics.stdev(samples) if len(samples) > 1 else 0.0,
            "samples_ts": samples,
            "weight_bytes_per_token": weight_bytes,
            "read_bytes_per_s": self._bytes_per_s,
            "roofline_fraction": (
                steps_per_s * weight_bytes / self._bytes_per_s
                if load.n_gen and is_cpu and self._bytes_per_s is not None
                else None
            ),
        }
        if self._arguments.profile:
            result["profile"] = self._profile(engine, load)
        return result

    def _profile(self, engine: Engine, load: Load) -> dict[str, Any]:
        """Run the test once more, and return the milliseconds of a step by place."""
        profile = Profile(engine)
        seconds, steps = self._run(engine, load, profile)
        return {
            "steps": steps,
            "step_ms": seconds / steps * 1e3,
            "rows": [
                {
                    "op": row.op,
                    "role": row.role,
                    "calls": row.calls / steps,
                    "ms": row.seconds / steps * 1e3,
                    "share": row.seconds / seconds,
                }
                for row in profile.stop(seconds)
            ],
        }

    def _run(self, engine: Engine, load: Load, profile: Profile | None = None) -> tuple[float, int]:
        """Run a test once; return the seconds that it took, and its steps."""
        requests = [
            engine.submit(
                self._prompt(engine, load.n_prompt or load.depth or 1),
                max_tokens=load.max_tokens,
                ignore_eos=True,
                temperature=0.0,
                reuse_prefix=False,
                speculate=0,
            )
            for _ in range(load.batch)
        ]
        while load.n_gen and load.depth and not all(request.ids for request in requests):
            engine.step()
        if profile is not None:
            profile.start()
        steps = 0
        started = time.perf_counter()
        while steps < load.n_gen if load.n_gen else any(request.finish_reason is None for request in requests):
            events = engine.step()
            steps += 1
            if load.n_gen and len(events) != load.batch:
                raise ResourceError(
                    f"-b {load.batch}: the KV cache's memory holds {len(events)} sequences at a time. Use a smaller -b, or"
                    " a shorter --max-seq-len.",
                    code="E502",
                )
        seconds = time.perf_counter() - started
        for request in requests:
            engine.cancel(request)
        return seconds, steps

    def _prompt(self, engine: Engine, length: int) -> list[int]:
        """Return ids that no other prompt of this run begins with."""
        self._num_prompts += 1
        vocab_size = engine.manifest.model.vocab_size
        return [(7919 * i + 31 * self._num_prompts) % vocab_size for i in range(length)]


def _table(results: list[dict[str, Any]]) -> str:
    rows = [("model", "quant", "size", "ranks", "threads", "test", "t/s", "roofline")]
    for result in results:
        fraction = result["roofline_fraction"]
        rows.append(
            (
                str(result["model"]).rstrip("/").rpartition("/")[2],
                result["quantization"],
                f"{result['weight_bytes'] / 2**20:.2f} MiB",
                str(result["ranks"]),
                str(result["n_threads"]),
                _name(result),
                f"{result['avg_ts']:.2f} ± {result['stddev_ts']:.2f}",
                "" if fraction is None else f"{fraction:.2f}",
            )
        )
    return _lines(rows)


def _name(result: dict[str, Any]) -> str:
    """Name a test as llama-bench does: pp512, tg128 @ d2000; with the number of sequences if there are several."""
    name = f"pp{result['n_prompt']}" if result["n_prompt"] else f"tg{result['n_gen']}"
    name += f" @ d{result['n_depth']}" if result["n_depth"] else ""
    return name + (f" x {result['n_seqs']}" if result["n_seqs"] > 1 else "")


def _profile_table(result: dict[str, Any]) -> str:
    profile = result["profile"]
    rows = [(_name(result), "place", "calls/step", "ms/step", "share")]
    rows += [
        (row["op"], row["role"], f"{row['calls']:g}", f"{row['ms']:.3f}", f"{100 * row['share']:.1f} %")
        for row in profile["rows"]
    ]
    rows.append(("a step of rank 0", f"mean of {profile['steps']}", "", f"{profile['step_ms']:.3f}", "100.0 %"))
    return "\n" + _lines(rows)


def _lines(rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table; the first row is its head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"
