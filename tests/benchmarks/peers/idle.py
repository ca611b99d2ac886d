"""Under mpirun: load an artifact, generate, then let every rank wait; print the share of a core that a rank above 0 takes.

mpirun -n 2 python idle.py ARTIFACT
"""

from __future__ import annotations

import os
import sys
import time

from llmrun import Engine
from llmrun.peers import read_process_stat

SETTLE_S, MEASURE_S = 2.0, 5.0


def cpu_seconds(pid: int) -> float:
    stat = read_process_stat(pid)
    if stat is None:
        raise ProcessLookupError(pid)
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")  # user and system


def main(path: str) -> None:
    with Engine(path, verify="size") as engine:
        list(engine.generate_ids([1], max_tokens=8, ignore_eos=True, temperature=0.0))
        if engine.rank == 0:
            pid = engine.job.comm.peers[-1].pid
            time.sleep(SETTLE_S)
            before = cpu_seconds(pid)
            time.sleep(MEASURE_S)
            print((cpu_seconds(pid) - before) / MEASURE_S, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
