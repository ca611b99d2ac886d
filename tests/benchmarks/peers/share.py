"""Under mpirun: generate a few tokens, read the weights at full speed, and so on in turn; print how decoding compares.

mpirun -n 2 python share.py ARTIFACT THREADS MACHINE CORES [TURNS]

MACHINE: machine.c's program, which reads the mapped files with CORES threads and does nothing with them. Neighbours and clocks
change the bandwidth by the second, and in a virtual machine it differs from page to page (by 25 % between two places of one
artifact): compare the same memory at nearly the same time. Prints JSON of medians, shares and bytes/s: of reading with
prefetches {"share", "read_bytes_per_s"}, of a loop of loads without them {"share_loads", "loads_bytes_per_s"}, and of reading
that waits for the other threads as often as the ranks do in all-reduces {"share_meeting", "meeting_bytes_per_s"}.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmrun import Engine

TURNS, LEAST_TURN_S = 24, 0.25
MOST_TOKENS = 256
SETTLE_S = 0.005  # until the other ranks sleep


def endless(engine: Engine) -> Iterator[int]:
    """Generate with little context, over and over."""
    count = min(MOST_TOKENS, engine.max_seq_len - 1)
    while True:
        yield from engine.generate_ids([1], max_tokens=count, ignore_eos=True, temperature=0.0)


def read_shares(rates: Sequence[float], bytes_per_token: int, bandwidth: Sequence[float]) -> list[float]:
    """Return what turns of `rates` tokens/s read, of the mean of the bandwidths in bytes/s before and after each."""
    around = [(before + after) / 2 for before, after in itertools.pairwise(bandwidth)]
    return [rate * bytes_per_token / b for rate, b in zip(rates, around, strict=True)]


def num_meetings(num_layers: int, size: int) -> int:
    """Return how often the ranks of a job wait for each other in a step: two all-reduces a layer, and the logits."""
    return 2 * num_layers + 1 if size > 1 else 1


def main(path: str, threads: int, machine: str, num_cores: str, turns: int = TURNS) -> None:
    cores = os.sched_getaffinity(0)  # a rank keeps its threads on some of them
    with Engine(path, verify="size", threads=threads, is_mirroring=False) as engine:
        size = sum(entry.weight_bytes_per_token for entry in engine.manifest.ranks)
        if engine.rank > 0:
            engine.follow()
            return
        tokens = endless(engine)
        with subprocess.Popen(
            [machine, num_cores, "on-demand", *(Path(path) / entry.weights for entry in engine.manifest.ranks)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        ) as reader:
            assert reader.stdin is not None
            assert reader.stdout is not None

            pieces = num_meetings(engine.manifest.model.num_hidden_layers, engine.size)

            def read() -> tuple[float, float, float]:
                time.sleep(SETTLE_S)
                # Cores that slept wake slowly: the first pass, as the first token, does not count.
                reader.stdin.write(f"\n\nloads\n{pieces}\n")
                reader.stdin.flush()
                _, plain, loads, meeting = (float(reader.stdout.readline()) for _ in range(4))
                return plain, loads, meeting

            next(tokens)
            bandwidth, rates = [read()], []
            for _ in range(turns):
                next(tokens)
                count, began = 0, time.perf_counter()
                while (took := time.perf_counter() - began) < LEAST_TURN_S:
                    next(tokens)
                    count += 1
                rates.append(count / took)
                bandwidth.append(read())
            reader.stdin.close()
        plain, loads, meeting = zip(*bandwidth, strict=True)
        medians = {
            "share": read_shares(rates, size, plain),
            "share_loads": read_shares(rates, size, loads),
            "share_meeting": read_shares(rates, size, meeting),
            "read_bytes_per_s": plain,
            "loads_bytes_per_s": loads,
            "meeting_bytes_per_s": meeting,
        }
        print(json.dumps({name: statistics.median(values) for name, values in medians.items()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:5], *map(int, sys.argv[5:]))
