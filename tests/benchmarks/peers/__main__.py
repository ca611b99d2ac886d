"""Compare llmpack with llama.cpp and onnxruntime-genai on this machine, and print one table.

    make bench [ARGS="--shapes 110m,tinyllama-1.1b --rounds 5 --json OUT.json"]

The programs run in turn in every round (A B C A B C ...), each figure in a process of its own with a warm-up that is not
timed, so that other load on the machine meets all alike. A figure is the median of its rounds, with the range. Ratios are of
medians, and above 1 means that llmpack is better. A figure that cannot be taken is printed as missing, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers import programs, report
from benchmarks.peers.environment import (
    GENAI,
    HERE,
    LLAMA_CPP_PYTHON,
    Peers,
    build_peers,
    call,
    compile_c,
    machine_facts,
    say,
)
from benchmarks.peers.programs import Cost, GenAi, LlamaCpp, Llmpack, Program
from benchmarks.peers.report import OURS, PEERS, Figure, Missing, Row
from benchmarks.peers.shapes import SHAPES

ROOT = HERE.parents[2]
THREADS = 2  # of every program, ranks times threads
STEPS, BATCH = 32, 8
NEAR, FAR = 100, 2000
PACK_ROUNDS = 3  # at most
PARTS = ("pack", "decode", "prefill", "depth", "batch", "start", "own", "all-reduce")


def arguments_of(typed: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="Compare llmpack with its peers on this machine.")
    default = "110m,tinyllama-1.1b"
    parser.add_argument(
        "--shapes", default=default, help=f"of {','.join(SHAPES)} (default {default}; llama-2-7b needs 45 GB of disk)"
    )
    parser.add_argument(
        "--parts",
        default=",".join(PARTS),
        help=f"of {','.join(PARTS)} (all). Without pack, models of an earlier run are taken as they are",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of every program (5)")
    parser.add_argument(
        "--no-peers", action="store_true", help="llmpack alone: nothing is installed or compiled for peers"
    )
    parser.add_argument("--work", type=Path, default=ROOT / ".build" / "bench", help="where models are kept")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers", help="where the peers are built")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every sample")
    arguments = parser.parse_args(typed)
    arguments.shapes = arguments.shapes.split(",")
    if unknown := [name for name in arguments.shapes if name not in SHAPES]:
        parser.error(f"--shapes: no shape {', '.join(unknown)}. There are {', '.join(SHAPES)}.")
    arguments.parts = arguments.parts.split(",")
    if unknown := [name for name in arguments.parts if name not in PARTS]:
        parser.error(f"--parts: no part {', '.join(unknown)}. There are {', '.join(PARTS)}.")
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: expected 1 or more.")
    return arguments


def in_turn(row: Row, ways: dict[str, Callable[[], float]], rounds: int) -> Row:
    """Take a row's figures: every way once, then every way again. A way that fails is not tried again."""
    say(f"{row.shape}: {row.what}")
    row.figures = {name: Figure() for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            if row.figures[name].reason:
                continue
            try:
                row.figures[name].add(way())
            except Missing as error:
                row.figures[name].reason = str(error)
    return row


def take_reasons(row: Row, *others: Row) -> None:
    """Let rows that were filled along with another say why they are empty, as that one does."""
    for other in others:
        for name, figure in other.figures.items():
            if not figure.samples:
                figure.reason = row.figures[name].reason


class Machine:
    """What the memory and the cores of this machine give, sampled all along."""

    def __init__(self, folder: Path) -> None:
        self.bandwidth = Figure()
        self.int8 = Figure()
        self.instruction = ""
        try:
            self._program = compile_c("machine.c", folder / "machine")
        except Missing as error:
            self.bandwidth.reason = self.int8.reason = str(error)

    def sample(self) -> float:
        """Measure once more; return the read bandwidth in bytes/s.

        Raises:
            Missing: it cannot be measured here.
        """
        if self.bandwidth.reason:
            raise Missing(self.bandwidth.reason)
        facts = json.loads(call([self._program, THREADS]))
        self.bandwidth.add(facts["read_bytes_per_s"])
        self.instruction = facts["int8_instruction"]
        if facts["int8_ops_per_s"] is None:
            self.int8.reason = self.instruction
        else:
            self.int8.add(facts["int8_ops_per_s"])
        return facts["read_bytes_per_s"]

    def on_demand(self) -> list[object]:
        """Return the program that reads files whenever it is asked, and its threads.

        Raises:
            Missing: it cannot be measured here.
        """
        if self.bandwidth.reason:
            raise Missing(self.bandwidth.reason)
        return [self._program, THREADS]

    def rows(self) -> list[Row]:
        gb = Figure([value / 1e9 for value in self.bandwidth.samples], self.bandwidth.reason)
        gops = Figure([value / 1e9 for value in self.int8.samples], self.int8.reason)
        return [
            Row("machine", f"read bandwidth, {THREADS} threads", "GB/s", {OURS[0]: gb}),
            Row("machine", f"8-bit dot products, {self.instruction}", "Gop/s", {OURS[0]: gops}),
        ]


class Comparison:
    """All figures of one shape."""

    def __init__(self, name: str, arguments: argparse.Namespace, peers: Peers | None, machine: Machine) -> None:
        self.name, self.shape = name, SHAPES[name]
        self.rounds: int = arguments.rounds
        self.parts: list[str] = arguments.parts
        self.peers, self.machine = peers, machine
        self.folder = arguments.work / name
        self.rows: list[Row] = []
        self.made: Row | None = None  # what packing and converting took, if this run did it

    def run(self) -> list[Row]:
        """Pack, convert, measure."""
        try:
            source = programs.checkpoint(self.shape, self.folder / "checkpoint")
        except Missing as error:
            return [Row(self.name, "everything", "", {OURS[0]: Figure(reason=str(error))})]
        if "pack" in self.parts or not self._is_made():
            self._make(source)
        ways = self._programs()
        if "decode" in self.parts:
            goal = "1.2 x llama.cpp" if self.name == "110m" else "1.10 x llama.cpp, 1.45 x genai"
            self._row("decode", ways, lambda p: p.generate(STEPS), goal)
            self._weights_read(ways)
        if "prefill" in self.parts:
            for length in (256, 512):
                self._row(f"prefill of {length}", ways, lambda p, n=length: p.prompt(n), "2 x both")
        if "depth" in self.parts:
            self._depth(ways)
        if "batch" in self.parts:
            self._row(f"decode of {BATCH} sequences", ways, lambda p: p.generate(STEPS, 0, BATCH), "1.5 x llama.cpp")
        if "start" in self.parts:
            self._row("start to first token", ways, lambda p: p.first_token(), "<= llama.cpp", unit="s")
        if "own" in self.parts:
            self._own(ways)
        return self.rows

    def _is_made(self) -> bool:
        """Whether an earlier run left every model."""
        names = ["tp2", "tp1"] if self.peers is None else ["tp2", "tp1", "q4_0.gguf", "genai"]
        return all((self.folder / name).exists() for name in names)

    def _make(self, source: Path) -> None:
        """Pack and convert in turn: the models, and what making them takes."""
        costs: dict[str, list[Cost]] = {}

        def keep(name: str, make: Callable[[], Cost]) -> Callable[[], float]:
            def way() -> float:
                cost = make()
                costs.setdefault(name, []).append(cost)
                return cost.seconds

            return way

        ways = {
            OURS[0]: keep(OURS[0], lambda: programs.pack(source, self.folder / "tp2", 2)),
            OURS[1]: keep(OURS[1], lambda: programs.pack(source, self.folder / "tp1", 1)),
        }
        if (peers := self.peers) is not None:
            gguf, genai = self.folder / "q4_0.gguf", self.folder / "genai"
            ways[PEERS[0]] = keep(PEERS[0], lambda: programs.to_gguf(peers, source, gguf, THREADS))
            ways[PEERS[1]] = keep(PEERS[1], lambda: programs.build_genai(peers, self.shape, source, genai))
        row = Row(self.name, "pack, from checkpoint to verified model", "s", is_speed=False, goal="<= llama.cpp")
        self.rows.append(in_turn(row, ways, min(self.rounds, PACK_ROUNDS)))
        self.made = row
        peak = Row(self.name, "its peak resident memory", "MB", is_speed=False, goal="<= 600")
        for name, figure in row.figures.items():
            peak.figures[name] = Figure([cost.peak_bytes / 1e6 for cost in costs.get(name, [])], figure.reason)
        self.rows.append(peak)

    def _programs(self) -> dict[str, Program | str]:
        """Return what can run; a text says why something cannot."""
        ways: dict[str, Program | str] = {
            OURS[0]: Llmpack(self.folder / "tp2", 2, 1),
            OURS[1]: Llmpack(self.folder / "tp1", 1, 2),
        }
        if (peers := self.peers) is not None:
            driver = peers.llama_cpp
            ways[PEERS[0]] = driver if isinstance(driver, str) else LlamaCpp(driver, self.folder / "q4_0.gguf", THREADS)
            ways[PEERS[1]] = GenAi(peers.python, self.folder / "genai", THREADS)
        for name, figure in self.made.figures.items() if self.made else ():
            if figure.reason:
                ways[name] = figure.reason
        return ways

    def _take(self, row: Row, ways: dict[str, Program | str], measure: Callable[[Program], float]) -> Row:
        def way_of(program: Program | str) -> Callable[[], float]:
            def way() -> float:
                if isinstance(program, str):
                    raise Missing(program)
                return measure(program)

            return way

        calls = {name: way_of(program) for name, program in ways.items()}
        return in_turn(row, calls, self.rounds)

    def _row(
        self,
        what: str,
        ways: dict[str, Program | str],
        measure: Callable[[Program], float],
        goal: str,
        *,
        unit: str = "tokens/s",
    ) -> Row:
        row = Row(self.name, what, unit, is_speed=unit == "tokens/s", goal=goal)
        self.rows.append(self._take(row, ways, measure))
        return row

    def _weights_read(self, ways: dict[str, Program | str]) -> None:
        """Weight bytes that decoding reads, of what plain reading of the same pages reaches in turn with it."""
        row = Row(self.name, "weight bytes read in decode, of plain reading of them", "", goal=">= 0.95")
        loads_row = Row(self.name, "the same, of reading without prefetches", "", goal=">= 0.95")
        loads_row.figures = {name: Figure() for name in OURS}
        # One rank waits for nobody.
        meeting_row = Row(self.name, "the same, of reading whose threads wait for each other as often", "")
        meeting_row.figures = {OURS[0]: Figure()}

        def share(name: str) -> float:
            program = ways[name]
            if isinstance(program, str):
                raise Missing(program)
            assert isinstance(program, Llmpack)
            shares = program.read_shares(self.machine.on_demand())
            loads_row.figures[name].add(shares["share_loads"])
            if name in meeting_row.figures:
                meeting_row.figures[name].add(shares["share_meeting"])
            return shares["share"]

        in_turn(row, {name: lambda name=name: share(name) for name in OURS}, self.rounds)
        take_reasons(row, loads_row, meeting_row)
        self.rows += [row, loads_row, meeting_row]

    def _depth(self, ways: dict[str, Program | str]) -> None:
        """Decode with little and with much context, one right after the other, so that both meet the same machine."""
        far = min(FAR, self.shape.max_position_embeddings - STEPS - 8)
        kv_bytes = (far - NEAR) * self.shape.kv_bytes_per_position
        near_row = Row(self.name, f"decode at context {NEAR}", "tokens/s")
        far_row = Row(self.name, f"decode at context {far}", "tokens/s")
        row = Row(self.name, f"step at context {far} over {NEAR}, KV bytes' own time subtracted", "", is_speed=False)
        row.goal = "<= 1.10"
        for either in (near_row, far_row):
            either.figures = {name: Figure() for name in ways}

        def both(name: str, program: Program | str) -> float:
            if isinstance(program, str):
                raise Missing(program)
            before = 0.0 if self.machine.bandwidth.reason else self.machine.sample()
            near, deep = program.generate(STEPS, NEAR), program.generate(STEPS, far)
            near_row.figures[name].add(near)
            far_row.figures[name].add(deep)
            return max(report.depth_cost(near, deep, kv_bytes, (before + self.machine.sample()) / 2), 0.0)

        calls = {name: lambda name=name, program=program: both(name, program) for name, program in ways.items()}
        in_turn(row, calls, self.rounds)
        take_reasons(row, near_row, far_row)
        self.rows += [near_row, far_row]
        self.rows.append(row)

    def _own(self, ways: dict[str, Program | str]) -> None:
        """What only llmpack promises."""
        own = {name: ways[name] for name in OURS}
        shape = self.shape

        def resident(program: Program) -> float:
            assert isinstance(program, Llmpack)
            return program.resident_bytes(shape) / 1e6

        def idle(program: Program) -> float:
            assert isinstance(program, Llmpack)
            return program.idle_share() * 100

        row = Row(self.name, "resident memory of a rank beside weights and KV cache", "MB", is_speed=False)
        row.goal = "<= 150"
        self.rows.append(self._take(row, own, resident))
        row = Row(self.name, "idle rank, of a core", "%", is_speed=False, goal="< 2")
        self.rows.append(self._take(row, {OURS[0]: own[OURS[0]]}, idle))


def collectives(rounds: int) -> list[Row]:
    """Two ranks' all-reduce, ours and the MPI library's in turn (bench_allreduce.py takes its own rounds)."""
    say("all-reduce")
    sizes = (8192, 16384)
    rows = [Row("all-reduce", f"{size // 1024} KB, 2 ranks", "us", is_speed=False, goal="<= 5") for size in sizes]
    script = HERE.parent / "bench_allreduce.py"
    try:
        from llmrun.library import find_library

        arguments = [find_library(), "--rounds", rounds * 4, "--json", "--sizes", *sizes]
        text = call([programs.BIN / "mpirun", "-n", 2, sys.executable, script, *arguments])
        results = json.loads(text)["us"]
    except Missing as error:
        for row in rows:
            row.figures[OURS[0]] = Figure(reason=str(error))
        return rows
    for row, size in zip(rows, sizes, strict=True):
        ours, theirs = results[str(size)]["shared memory"]["median"], results[str(size)]["MPI_Allreduce"]["median"]
        row.figures[OURS[0]] = Figure([ours])
        row.goal += f", and MPI_Allreduce's {theirs:.1f} ({theirs / ours:.2f} x)"
    return rows


def main() -> None:
    arguments = arguments_of()
    facts = machine_facts()
    arguments.work.mkdir(parents=True, exist_ok=True)
    peers = None if arguments.no_peers else build_peers(arguments.peers.absolute(), int(str(facts["cores"])))
    machine = Machine(arguments.work)
    machine.sample()
    rows: list[Row] = []
    for name in arguments.shapes:
        rows += Comparison(name, arguments, peers, machine).run()
    if "all-reduce" in arguments.parts:
        rows += collectives(arguments.rounds)
    rows = machine.rows() + rows
    if arguments.no_peers:
        versions = "without peers"
    else:
        versions = f"llama.cpp of {LLAMA_CPP_PYTHON}, {', '.join(p for p in GENAI if 'onnxruntime' in p)}"
    head = ", ".join(f"{key} {value}" for key, value in facts.items())
    print(f"{head}\n{versions}; {arguments.rounds} rounds; median (range); x: times better than\n")
    print(report.format_table(rows), end="")
    if os.getloadavg()[0] > THREADS + 1:  # ours, and a little
        print(f"\nThe load average is {os.getloadavg()[0]:.1f}: other work ran too, which is hardest on what spins.")
    if arguments.json is not None:
        written = {"machine": facts, "versions": versions, "rounds": arguments.rounds, "rows": report.as_json(rows)}
        arguments.json.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()
