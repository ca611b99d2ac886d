"""The threads that loops of operators run on: how many, where, for how long, and their protocol under sanitizers."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import Projection, random_projection, random_x, session
from sanitized import run_sanitized

from operator_threads import cpu_seconds, operator_threads

HERE = Path(__file__).parent
CPU = HERE.parents[1] / "custom_ops/cpu"


@pytest.fixture(scope="module")
def projection() -> Projection:
    return random_projection("q4", 512, 1024)


# What threads other than the calling one did, of all processor time, with so many threads. ONNX Runtime has two of its own.
# By these clocks, not by getrusage, which divides into user and system time what it has sampled.
SHARES = """
import sys, time
from pathlib import Path
import helpers, onnxruntime
helpers.LIBRARY_PATH = Path(sys.argv[1])
projection = helpers.random_projection("q4", 512, 1024)
x = helpers.random_x(256, 1024)
for threads in sys.argv[2:]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(sys.argv[1])
    with helpers.operators_on(int(threads)):
        session = onnxruntime.InferenceSession(projection.node(x).model(), options, providers=["CPUExecutionProvider"])
    before = time.process_time(), time.thread_time()
    for _ in range(100):
        session.run(None, {"x": x})
    after = time.process_time(), time.thread_time()
    whole, own = (b - a for a, b in zip(before, after))
    print(1 - own / whole)
"""


def test_operators_run_on_as_many_threads_as_told(library_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SHARES, library_path, "1", "1", "1", "2", "0"],
        capture_output=True,
        text=True,
        check=True,
        cwd=HERE,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    *alone, together, of_onnx_runtime = map(float, run.stdout.split())
    assert min(alone) < 0.02  # the libraries that are imported have threads that do something now and then
    assert 0.05 < together < 0.95  # on a busy machine the caller does most by itself
    assert 0.05 < of_onnx_runtime < 0.95


def test_threads_end_with_their_session(library: ctypes.CDLL, projection: Projection) -> None:
    x = random_x(3, 1024)
    made = session(projection.node(x).model(), 3)
    assert sorted(operator_threads()) == ["llmpack-1", "llmpack-2"]
    made.run(None, {"x": x})
    del made
    assert operator_threads() == {}


def test_each_thread_but_the_caller_is_pinned_to_its_core(library: ctypes.CDLL, projection: Projection) -> None:
    own, model = os.sched_getaffinity(0), projection.node(random_x(1, 1024)).model()
    pinned = session(model, 2, (min(own), max(own)))
    assert os.sched_getaffinity(operator_threads()["llmpack-1"]) == {max(own)}
    assert os.sched_getaffinity(0) == own
    del pinned
    free = session(model, 2)
    assert os.sched_getaffinity(operator_threads()["llmpack-1"]) == own
    del free


@pytest.mark.parametrize(("has_cores", "most_s"), [(True, 0.02), (False, 0.0005)])
def test_between_loops_a_thread_soon_sleeps(
    library: ctypes.CDLL, projection: Projection, has_cores: bool, most_s: float
) -> None:
    """With a core of its own it spins for a millisecond at most, without one not at all."""
    x = random_x(64, 1024)
    own = sorted(os.sched_getaffinity(0))
    made = session(projection.node(x).model(), 2, (own[0], own[-1]) if has_cores else ())
    thread = operator_threads()["llmpack-1"]
    used = []
    for _ in range(20):
        made.run(None, {"x": x})
        before = cpu_seconds(thread)
        time.sleep(0.03)
        used.append(cpu_seconds(thread) - before)
    assert sorted(used)[10] < most_s


def test_signals_are_for_the_host_programs_threads(library: ctypes.CDLL, projection: Projection) -> None:
    made = session(projection.node(random_x(1, 1024)).model(), 2)
    status = Path(f"/proc/self/task/{operator_threads()['llmpack-1']}/status")
    until = time.monotonic() + 10
    blocked = everything = ~(1 << signal.SIGKILL - 1 | 1 << signal.SIGSTOP - 1) & (1 << 64) - 1
    while blocked == everything and time.monotonic() < until:  # the C library blocks all while it makes a thread
        blocked = int(next(line.split()[1] for line in status.read_text().splitlines() if line[:6] == "SigBlk"), 16)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        assert blocked >> (number - 1) & 1
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS):
        assert not blocked >> (number - 1) & 1
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    del made


# What a disk that fails does to mapped weights: their last eighth, which is in the last thread's part, is gone.
FAULT = """
import faulthandler, os, sys
from pathlib import Path
import helpers, numpy, onnxruntime
helpers.LIBRARY_PATH = Path(sys.argv[1])
faulthandler.enable()
x, node = helpers.random_x(1, 1024), helpers.random_projection("q4", 4096, 1024).node(helpers.random_x(1, 1024))
stored = node.inputs["weight"]
stored.tofile(sys.argv[2])
weight = numpy.memmap(sys.argv[2], stored.dtype, "r", shape=stored.shape)
node.initializers = ("scales",)
session = helpers.session(node.model(), int(sys.argv[3]))
binding = session.io_binding()
binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
binding.bind_input("weight", "cpu", 0, stored.dtype, stored.shape, weight.ctypes.data)
binding.bind_output("y")
session.run_with_iobinding(binding)
print("ran", flush=True)
os.truncate(sys.argv[2], stored.nbytes - 4096)  # one thread's alone: where two fault at once, no handler gets far
session.run_with_iobinding(binding)
"""


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="a sanitizer reports faults itself")
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_fault_in_any_thread_reaches_the_host_programs_handler(
    library_path: Path, tmp_path: Path, threads: int
) -> None:
    command = [sys.executable, "-c", FAULT, library_path, tmp_path / "weight", str(threads)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE, timeout=60)
    assert (run.returncode, run.stdout) == (-signal.SIGBUS, "ran\n"), run.stderr
    assert "Fatal Python error: Bus error" in run.stderr
    assert "most recent call first" in run.stderr


def test_two_callers_at_once_get_what_each_asked_for(library: ctypes.CDLL, projection: Projection) -> None:
    given = [random_x(8, 1024) + number for number in range(2)]
    made = session(projection.node(given[0]).model(), 2)
    expected = [made.run(None, {"x": x})[0] for x in given]
    wrong: list[int] = []

    def call(number: int) -> None:
        for _ in range(200):
            if not np.array_equal(made.run(None, {"x": given[number]})[0], expected[number]):
                wrong.append(number)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def test_fewer_than_no_thread_is_refused(library: ctypes.CDLL) -> None:
    assert library.llmpack_ops_use_threads(-1, None) == -1
    assert library.llmpack_ops_last_error() == b"llmpack_ops_use_threads: number is -1, expected 0 or more."


FORKED = """
import os, sys
from pathlib import Path
import helpers, numpy
helpers.LIBRARY_PATH = Path(sys.argv[1])
projection, x = helpers.random_projection("q4", 512, 1024), helpers.random_x(64, 1024)
session = helpers.session(projection.node(x).model(), 3)
(expected,) = session.run(None, {"x": x})
child = os.fork()
(y,) = session.run(None, {"x": x})
assert numpy.array_equal(y, expected)
del session
if child == 0:
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_computes_and_ends_without_the_other_threads(library_path: Path) -> None:
    command = [sys.executable, "-c", FORKED, library_path]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE, timeout=60)
    assert run.stdout == "7\n"


REFUSED = """
import resource, sys
from pathlib import Path
from llmrun.operators import load_library
library = load_library(sys.argv[1])
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (100 << 20),) * 2)  # a dozen stacks
assert library.llmpack_ops_use_threads(1000, None) == -1
print(library.llmpack_ops_last_error().decode())
names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
print([name for name in names if name.startswith("llmpack-")])
"""


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="a sanitizer's shadow memory does not fit the limit")
def test_a_thread_that_the_system_refuses_is_an_error(library_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", REFUSED, library_path], capture_output=True, text=True, check=True, cwd=HERE
    )
    message, left = run.stdout.splitlines()
    assert message.startswith("llmpack_ops_use_threads: thread ")
    assert " of 1000 cannot be started (Resource temporarily unavailable), expected the system to allow" in message
    assert left == "[]"


# A gated product of many tokens works in memory besides its inputs and y. Where all but that fits the limit, whichever
# thread asks for it, the product is an error; it is right as soon as there is memory.
SHORT = """
import resource, sys
from pathlib import Path
import helpers, numpy, onnxruntime
helpers.LIBRARY_PATH = Path(sys.argv[1])
threads, tokens = int(sys.argv[2]), 200_000
projection, x = helpers.random_projection("q4", 128, 32), helpers.random_x(tokens, 32)
node = helpers.Node("MatMulQ4SwiGLU", {"x": x, **projection.initializers}, ("y",), ("weight", "scales"), projection.attributes)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.enable_cpu_mem_arena = 2 if threads == 0 else 1, False
options.log_severity_level = 4
options.register_custom_ops_library(sys.argv[1])
with helpers.operators_on(threads):
    session = onnxruntime.InferenceSession(node.model(any_shape=True), options, providers=["CPUExecutionProvider"])
session.run(None, {"x": x[:2]})
pages = int(Path("/proc/self/statm").read_text().split()[0])
y, quantized, scratch = tokens * 64 * 4, tokens * (32 + 4 + 4), tokens * 32 * 4
limit = pages * resource.getpagesize() + y + quantized + scratch // 2
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
try:
    session.run(None, {"x": x})
except onnxruntime.capi.onnxruntime_pybind11_state.Fail as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
(y,) = session.run(None, {"x": x})
for first in 0, tokens // 2, tokens - 2:  # two tokens need none of that memory
    assert numpy.array_equal(y[first : first + 2], session.run(None, {"x": x[first : first + 2]})[0])
"""


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="a sanitizer's shadow memory does not fit the limit")
@pytest.mark.parametrize("threads", [0, 1, 2, 3])
def test_too_little_memory_for_a_loop_is_an_error(library_path: Path, threads: int) -> None:
    command = [sys.executable, "-c", SHORT, library_path, str(threads)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE, timeout=60)
    assert run.returncode == 0, run.stderr
    assert re.search(
        r"MatMulQ4SwiGLU 'the_node': \d+ bytes to work in cannot be had, expected memory for them\.", run.stdout
    )


THROWS = """
import ctypes, sys
import numpy, onnxruntime
from onnx import helper
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[2])
options.register_custom_ops_library(sys.argv[1])
ctypes.CDLL(sys.argv[1]).probe_use_threads(int(sys.argv[3]))
graph = helper.make_graph(
    [helper.make_node("Throws", ["x"], ["y"], domain="test.probe")],
    "throws",
    [helper.make_tensor_value_info("x", 1, (1,))],
    [helper.make_tensor_value_info("y", 1, (1,))],
)
opsets = [helper.make_opsetid("", 21), helper.make_opsetid("test.probe", 1)]
model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
print("made", flush=True)
try:
    session.run(None, {"x": numpy.zeros(1, numpy.float32)})
except Exception as error:
    print("caught", error)
"""


@pytest.mark.parametrize(("of_onnx_runtime", "threads"), [(1, 0), (2, 0), (1, 1), (1, 2)])
def test_a_loop_that_throws_ends_the_process_at_once(probe: Path, of_onnx_runtime: int, threads: int) -> None:
    """Else the other threads would go on in the loop of a caller that has left it."""
    command = [sys.executable, "-c", THROWS, probe, str(of_onnx_runtime), str(threads)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (run.returncode, run.stdout) == (-signal.SIGABRT, "made\n"), run.stderr
    assert "thrown in a loop" in run.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_protocol_under_a_sanitizer(tmp_path: Path, sanitizer: str) -> None:
    """Teams of 1 to 8 threads with and without spinning, slow items, sleeping threads, and two callers."""
    sources = [HERE / "threads_stress.cpp", CPU / "threads.cpp", CPU / "waiting.cpp"]
    assert "all ran once" in run_sanitized(tmp_path / "stress", sanitizer, sources)
