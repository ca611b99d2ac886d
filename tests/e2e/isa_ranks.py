"""Runs on every rank: load an artifact where rank 1's machine has fewer instruction sets, print which one is used.

usage: isa_ranks.py ARTIFACT
"""

import sys

from mpi4py import MPI

from llmrun import Engine
from llmrun.operators import Operators


def main() -> None:
    if MPI.COMM_WORLD.rank == 1:
        Operators.isas = property(lambda _: ["portable"])
    with Engine(sys.argv[1], verify="size") as engine:
        everyone = engine.job.comm.agree({"isa": engine.job.isa})
        if engine.rank == 0:
            print(*(status["isa"] for status in everyone))


if __name__ == "__main__":
    main()
