"""The programs that are compared, and how each gives a figure. Every method runs a process and returns one number.

All raise `Missing` where the program cannot give the figure.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.environment import HERE, Peers, call, say
from benchmarks.peers.report import Missing
from benchmarks.peers.shapes import Shape, write_checkpoint

DEMO = HERE.parents[1] / "checkpoints" / "demo"
BIN = Path(sys.executable).parent
_GENAI_BYTES_PER_PARAMETER = 8  # measured: the builder takes 8.2 GB for 1.1 billion


@dataclass(frozen=True)
class Cost:
    """What a program took."""

    seconds: float
    peak_bytes: int


class Program:
    """One program with one model, ready to run."""

    def prompt(self, length: int) -> float:
        """Return tokens/s of a prompt."""
        raise NotImplementedError

    def generate(self, steps: int, depth: int = 0, batch: int = 1) -> float:
        """Return tokens/s of all sequences of a batch."""
        raise NotImplementedError

    def first_token(self) -> float:
        """Return seconds from the start of the process to the first token on its standard output."""
        raise NotImplementedError


class Llmpack(Program):
    """An artifact, on as many ranks as it was packed for."""

    def __init__(self, artifact: Path, ranks: int, threads: int) -> None:
        self.artifact, self.ranks, self.threads = artifact, ranks, threads

    def command(self, *arguments: object) -> list[object]:
        """Return a command line of llmrun on the ranks."""
        launcher = [BIN / "mpirun", "-n", self.ranks] if self.ranks > 1 else []
        return [*launcher, BIN / "llmrun", *arguments, "--threads", self.threads]

    def prompt(self, length: int) -> float:
        return self._bench("-p", length, "-n", 0)

    def generate(self, steps: int, depth: int = 0, batch: int = 1) -> float:
        return self._bench("-p", 0, "-n", steps, "-d", depth, "-b", batch)

    def first_token(self) -> float:
        return first_output(self.command("generate", self.artifact, "--ids", "-p", "[1]", "-n", 1))

    def read_shares(self, machine: Sequence[object]) -> dict[str, float]:
        """Return the weight bytes that decoding reads a second, of what `machine` reads in turn with it: share.py."""
        launcher = [BIN / "mpirun", "-n", self.ranks] if self.ranks > 1 else []
        text = call([*launcher, sys.executable, HERE / "share.py", self.artifact, self.threads, *machine])
        return json.loads(text)

    def resident_bytes(self, shape: Shape) -> float:
        """Return what the largest rank has resident beside the mapped weights and the KV cache of its sequence.

        Everything else counts: interpreter, libraries, ONNX Runtime, buffers, memory that the ranks share.
        """
        tokens = 64
        command = self.command(
            "generate", self.artifact, "--ids", "-p", "[1]", "-n", tokens + 900, "--ignore-eos", "--temperature", 0
        )
        process = _start(command)
        assert process.stdout is not None
        try:
            read = b""
            while read.count(b" ") < tokens:
                if not (data := process.stdout.read1(4096)):
                    raise Missing("llmrun generate ended early")
                read += data
            pids = [pid for pid in (process.pid, *_descendants(process.pid)) if _maps_weights(pid)]
            if len(pids) != self.ranks:
                raise Missing(f"{len(pids)} processes map weights, expected {self.ranks}")
            return max(resident_beside(Path(f"/proc/{pid}/smaps").read_text()) for pid in pids) - (
                tokens * shape.kv_bytes_per_position / self.ranks
            )
        finally:
            _kill(process)

    def idle_share(self) -> float:
        """Return the share of a core that a waiting rank takes."""
        return float(call([BIN / "mpirun", "-n", self.ranks, sys.executable, HERE / "idle.py", self.artifact]))

    def _bench(self, *arguments: object) -> float:
        text = call(self.command("bench", self.artifact, *arguments, "-r", 1, "--verify", "off", "--json"))
        return json.loads(text)[0]["avg_ts"]


class LlamaCpp(Program):
    """A GGUF, in a process that has nothing but llama.cpp's C library."""

    def __init__(self, driver: Path, model: Path, threads: int) -> None:
        self.driver, self.model, self.threads = driver, model, threads

    def prompt(self, length: int) -> float:
        return float(call([self.driver, "prompt", self.model, self.threads, length]))

    def generate(self, steps: int, depth: int = 0, batch: int = 1) -> float:
        return float(call([self.driver, "generate", self.model, self.threads, steps, depth, batch]))

    def first_token(self) -> float:
        return first_output([self.driver, "first", self.model, self.threads])


class GenAi(Program):
    """A model folder of onnxruntime-genai, driven from Python."""

    def __init__(self, python: Path, folder: Path, threads: int) -> None:
        self.command = [python, HERE / "genai.py"]
        self.folder, self.threads = folder, threads

    def prompt(self, length: int) -> float:
        return float(call([*self.command, "prompt", self.folder, self.threads, length]))

    def generate(self, steps: int, depth: int = 0, batch: int = 1) -> float:
        return float(call([*self.command, "generate", self.folder, self.threads, steps, depth, batch]))

    def first_token(self) -> float:
        return first_output([*self.command, "first", self.folder, self.threads])


# Making models. Each returns what it took; the model stays.


def checkpoint(shape: Shape, folder: Path) -> Path:
    """Write the random checkpoint if it is not there."""
    if not (folder / "config.json").exists():
        say(f"writing {folder}")
        need = 2 * shape.num_parameters
        folder.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder.parent).free < 3 * need:
            raise Missing(f"{3 * need / 1e9:.0f} GB of disk are needed in {folder.parent}")
        # In a process of its own: a child's peak memory begins with what its parent holds, so this one stays small.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(write_checkpoint, shape, folder).result()
    return folder


def pack(source: Path, target: Path, ranks: int) -> Cost:
    """Pack and verify, as a user does."""
    return measured([[BIN / "pack", source, "-o", target, "--shards", ranks, "--quant", "q4", "--force", "--json"]])


def to_gguf(peers: Peers, source: Path, target: Path, threads: int) -> Cost:
    """Convert to F16, quantize to Q4_0; the F16 file goes."""
    half = target.with_name(target.name + ".f16")
    convert = [_need(peers.converter), HERE / "convert.py", source, half]
    quantize = [_need(peers.llama_cpp), "quantize", half, target, threads]
    try:
        return measured([convert, quantize])
    finally:
        half.unlink(missing_ok=True)


def build_genai(peers: Peers, shape: Shape, source: Path, target: Path) -> Cost:
    """Run onnxruntime-genai's builder; it wants tokenizer files, and takes the demo model's."""
    python = _need(peers.genai)
    need, free = _GENAI_BYTES_PER_PARAMETER * shape.num_parameters, _available_bytes()
    if free < need:
        raise Missing(
            f"onnxruntime-genai's builder needs about {need / 1e9:.0f} GB of memory, {free / 1e9:.0f} are free"
        )
    shutil.rmtree(target, ignore_errors=True)
    folder = target.with_name(target.name + "-source")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in [*source.iterdir(), DEMO / "tokenizer.model", DEMO / "tokenizer_config.json"]:
        (folder / path.name).symlink_to(path.resolve())
    options = ["--extra_options", "int4_block_size=32", "int4_accuracy_level=4"]
    module = [python, "-m", "onnxruntime_genai.models.builder"]
    return measured([[*module, "-i", folder, "-o", target, "-p", "int4", "-e", "cpu", "-c", folder, *options]])


def measured(commands: Sequence[Sequence[object]]) -> Cost:
    """Run programs one after the other; return their time together, and the peak of the largest."""
    began = time.perf_counter()
    peaks = []
    for command in commands:
        process = _start(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert process.stderr is not None
        errors = process.stderr.read().decode(errors="replace")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stderr.close()
        if process.returncode != 0:
            last = (errors.strip().splitlines() or ["no output"])[-1]
            raise Missing(f"{Path(str(command[0])).name}: exit code {process.returncode}: {last}")
        peaks.append(usage.ru_maxrss * 1024)
    return Cost(time.perf_counter() - began, max(peaks))


def first_output(command: Sequence[object]) -> float:
    """Return the seconds from starting a program to the first byte that it writes."""
    began = time.perf_counter()
    process = _start(command)
    assert process.stdout is not None
    data = process.stdout.read(1)
    seconds = time.perf_counter() - began
    process.stdout.read()
    process.stdout.close()
    if process.wait() != 0 or not data:
        raise Missing(f"{' '.join(str(word) for word in command[:5])}: exit code {process.returncode}")
    return seconds


def resident_beside(smaps: str) -> int:
    """Return the resident bytes of a process, from its /proc/PID/smaps, without mappings of weights.bin."""
    total, counts = 0, True
    for line in smaps.splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):  # a mapping: addresses, permissions, offset, device, inode, path
            counts = not line.endswith("/weights.bin")
        elif name == "Rss:" and counts:
            total += int(rest[0]) * 1024
    return total


def _need(part: Path | str) -> Path:
    if isinstance(part, str):
        raise Missing(part)
    return part


def _start(
    command: Sequence[object], stdout: int = subprocess.PIPE, stderr: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    words = [str(word) for word in command]
    try:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True)
    except OSError as error:
        raise Missing(f"{words[0]}: {error.strerror}") from None


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    for pid in (*_descendants(process.pid), process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if process.stdout is not None:
        process.stdout.close()
    process.wait()


def _descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [found for child in map(int, children) for found in (child, *_descendants(child))]


def _maps_weights(pid: int) -> bool:
    try:
        return "/weights.bin" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
