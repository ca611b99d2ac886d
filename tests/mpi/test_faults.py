"""Ranks that fail, at each point of their life: the whole job ends, with the right code, one line, and no wrong text."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Outcome, RunningJob, llmrun_command, mpirun_command, run_alone, run_ranks, script_command

from llmrun import launcher

Packed = Callable[..., Path]
ARGUMENTS = ("-p", "The king", "-n", 12, "--temperature", 0, "--ignore-eos")
WATCHDOG_S = 1.5
WATCHED = {"LLMRUN_WATCHDOG_S": str(WATCHDOG_S)}
SCRIPT = "import sys\nfrom llmrun import Engine\nEngine(sys.argv[1])\n"
ENDS_WITHIN_S = 12.0  # start, watchdog, and what the launcher needs to end the rest
EXIT_CODES = {"raise": 1, "exit": 1, "vanish": 6, "kill": 6, "stop": 6, "nan": 7}
CASES = [
    (rank, point, kind)
    for point in ("load", "prefill", "decode", "idle")
    for kind in EXIT_CODES
    for rank in (0, 1)
    if (kind != "nan" or point == "decode") and (point != "idle" or rank == 1)  # rank 0 never idles
]


@pytest.fixture(scope="session")
def golden(packed_tiny: Packed) -> str:
    return run_alone(packed_tiny(2, "f32"), *ARGUMENTS).stdout


def faulty(path: Path, fault: str, run: Callable[..., Outcome], watchdog_s: float = WATCHDOG_S) -> Outcome:
    return run(path, *ARGUMENTS, environment={"LLMRUN_FAULT": fault, "LLMRUN_WATCHDOG_S": str(watchdog_s)})


def codes_of_mpirun(code: int) -> set[int]:
    """Return what a user's own mpirun may report when a rank leaves with `code` (llmrun as the launcher: only that)."""
    # MPICH's: llmrun.launcher says why. Open MPI's may wait for ever, until it is killed: failstop.take_along.
    return {code, 9 if launcher.library_family() == launcher.MPICH else -signal.SIGKILL}


@pytest.mark.parametrize(("rank", "point", "kind"), CASES)
def test_a_faulty_rank_ends_the_job(rank: int, point: str, kind: str, packed_tiny: Packed, golden: str) -> None:
    outcome = faulty(packed_tiny(2, "f32"), f"{rank}:{point}:{kind}", run_alone)
    assert outcome.code == EXIT_CODES[kind], outcome
    assert golden.startswith(outcome.stdout)
    assert outcome.stdout != golden
    assert outcome.stderr.splitlines() == outcome.errors
    assert len(outcome.errors) == 1
    assert outcome.leftovers == []
    assert outcome.seconds < ENDS_WITHIN_S
    if kind in ("raise", "exit", "stop"):
        assert f"rank {rank}" in outcome.errors[0]


@pytest.mark.parametrize(("rank", "point", "kind"), [case for case in CASES if case[2] in ("raise", "stop", "nan")])
def test_a_faulty_rank_ends_a_job_of_the_users_mpirun(rank: int, point: str, kind: str, packed_tiny: Packed) -> None:
    outcome = faulty(packed_tiny(2, "f32"), f"{rank}:{point}:{kind}", lambda *a, **k: run_ranks(2, *a, **k))
    assert outcome.code in codes_of_mpirun(EXIT_CODES[kind]), outcome
    assert len(outcome.errors) == 1
    assert outcome.leftovers == []


@pytest.mark.parametrize(("rank", "start"), [(0, "llmrun"), (1, "mpirun")])
def test_a_rank_stopped_before_it_joins_the_others_is_named(rank: int, start: str, packed_tiny: Packed) -> None:
    """Before MPI is initialised; the others wait inside MPI_Init."""
    command = [*(mpirun_command(2) if start == "mpirun" else []), *llmrun_command(packed_tiny(2, "f32"), *ARGUMENTS)]
    job = RunningJob(command, environment=WATCHED)
    pid = job.rank_pid(rank)
    os.kill(pid, signal.SIGSTOP)
    outcome = job.finish()
    assert outcome.code in (codes_of_mpirun(6) if start == "mpirun" else {6})
    assert (outcome.stdout, outcome.leftovers) == ("", [])
    assert len(outcome.errors) == 1
    assert f"rank {rank} (pid {pid}) is stopped" in outcome.errors[0]


def test_a_rank_that_never_joins_is_not_waited_for_for_ever(packed_tiny: Packed, tmp_path: Path) -> None:
    script = (
        "import os, sys, time\nfrom llmrun import Engine, watchdog\nwatchdog.LOAD_S = 2\n"
        "if '1' in (os.environ.get('PMI_RANK'), os.environ.get('OMPI_COMM_WORLD_RANK')): time.sleep(50)\nEngine(sys.argv[1])\n"
    )
    command = script_command(script, tmp_path, packed_tiny(2, "f32"))
    outcome = RunningJob(command, environment=WATCHED).finish(45)
    assert outcome.code in codes_of_mpirun(6)
    assert "rank 0 is stuck: no progress in waiting for all ranks to start" in outcome.errors[0]
    assert outcome.leftovers == []


@pytest.mark.parametrize("rank", [0, 1])
def test_of_ranks_that_load_the_stuck_one_is_named(rank: int, packed_tiny: Packed, tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom llmrun import Engine, job, watchdog\nwatchdog.LOAD_S = 2\nload = job.Job._load\n"
        f"job.Job._load = lambda self: time.sleep(50) if self.rank == {rank} else load(self)\nEngine(sys.argv[1])\n"
    )
    command = script_command(script, tmp_path, packed_tiny(2, "f32"))
    outcome = RunningJob(command, environment=WATCHED).finish(30)
    assert len(outcome.errors) == 1
    assert f"rank {rank} is stuck: no progress in loading" in outcome.errors[0]
    assert outcome.leftovers == []


def test_the_shell_around_mpirun_is_none_of_its_ranks(packed_tiny: Packed, tmp_path: Path) -> None:
    """`srun --pty sh` makes it rank 0 of one, and whoever ends a job before it has begun kills its ranks."""
    command = script_command(SCRIPT, tmp_path, packed_tiny(2, "f32"))
    environment = {**WATCHED, "PMI_RANK": "0", "PMI_SIZE": "1", "MPI4PY_LIBMPI": "/none"}
    job = RunningJob(["sh", "-c", '"$@" >&2; sleep 4; echo alive', "sh", *command], environment=environment)
    outcome = job.finish()
    assert (outcome.code, outcome.stdout, outcome.leftovers) == (0, "alive\n", [])
    assert "E411" in outcome.errors[0]


@pytest.mark.parametrize("first", ["stopped", "late"])
def test_a_rank_that_leaves_before_mpi_knows_it_leaves_no_rank_behind(
    first: str, packed_tiny: Packed, tmp_path: Path
) -> None:
    """MPICH's launcher takes such a rank for one that has done its work, and waits for the other."""
    rank_0 = {"stopped": "os.kill(os.getpid(), signal.SIGSTOP)", "late": "time.sleep(50)"}[first]
    script = (
        "import os, signal, sys, time\nfrom llmrun import Engine, comm, watchdog\nwatchdog.LOAD_S = 4\n"
        "rank = os.environ.get('PMI_RANK') or os.environ.get('OMPI_COMM_WORLD_RANK')\n"
        f"if rank == '0': {rank_0}\ncomm.connect = lambda: time.sleep(50)\nEngine(sys.argv[1])\n"
    )
    command = script_command(script, tmp_path, packed_tiny(2, "f32"))
    outcome = RunningJob(command, environment=WATCHED).finish(20)
    expected = {"stopped": "is stopped", "late": "rank 1 is stuck: no progress in waiting for all ranks to start"}
    assert expected[first] in outcome.errors[0]
    assert outcome.code != 0
    assert outcome.leftovers == []


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("start", ["llmrun", "script"])
def test_a_rank_that_cannot_load_mpi_is_not_waited_for(
    rank: int, start: str, packed_tiny: Packed, tmp_path: Path
) -> None:
    """As on a host whose environment lacks something; the other rank waits inside MPI_Init."""
    path, command = packed_tiny(2, "f32"), mpirun_command(2)
    program = {
        "llmrun": llmrun_command(path, *ARGUMENTS),
        "script": script_command(SCRIPT, tmp_path, path)[len(command) :],
    }[start]
    one = [*command[: command.index("-n")], "-n", "1", *command[command.index("-n") + 2 :]]
    broken = ["env", "MPI4PY_LIBMPI=/nonexistent/libmpi.so", *program]
    first, second = (broken, program) if rank == 0 else (program, broken)
    outcome = RunningJob([*one, *first, ":", "-n", "1", *second]).finish(20)
    assert outcome.code != 0
    assert len(outcome.errors) == 1
    assert "E411" in outcome.errors[0]
    assert "MPI cannot be loaded" in outcome.errors[0]
    assert ("rank 1" in outcome.errors[0]) == (rank == 1 and start == "llmrun")
    assert outcome.leftovers == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_stopped_while_it_leaves_is_named(rank: int, packed_tiny: Packed, tmp_path: Path) -> None:
    """The others wait for it when they leave MPI, after their last step."""
    script = (
        "import os, signal, sys\nfrom llmrun import Engine\nwith Engine(sys.argv[1]) as engine:\n    engine.logits([1])\n"
        f"if engine.rank == {rank}: os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    command = script_command(script, tmp_path, packed_tiny(2, "f32"))
    outcome = RunningJob(command, environment=WATCHED).finish(30)
    assert outcome.code in codes_of_mpirun(6)
    assert len(outcome.errors) == 1
    assert f"rank {rank} (pid " in outcome.errors[0]
    assert "is stopped" in outcome.errors[0]
    assert outcome.leftovers == []


@pytest.mark.parametrize("kind", ["kill", "vanish"])
def test_a_lost_rank_under_the_users_mpirun_leaves_nothing(kind: str, packed_tiny: Packed, golden: str) -> None:
    """The code is the launcher's: MPICH gives 9, and even 0 for a rank that vanishes with 0."""
    outcome = faulty(packed_tiny(2, "f32"), f"1:decode:{kind}", lambda *a, **k: run_ranks(2, *a, **k))
    assert outcome.leftovers == []
    assert golden not in outcome.stdout
    if (kind, launcher.library_family()) != ("vanish", launcher.MPICH):
        assert outcome.code != 0


@pytest.mark.parametrize("point", ["load", "prefill", "decode", "idle"])
def test_a_slow_rank_is_waited_for(point: str, packed_tiny: Packed, golden: str) -> None:
    outcome = faulty(packed_tiny(2, "f32"), f"1:{point}:slow", run_alone, watchdog_s=20)
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, golden, "")


def test_a_rank_that_computes_for_ever_is_ended(packed_tiny: Packed) -> None:
    outcome = faulty(packed_tiny(2, "f32"), "1:decode:slow", run_alone)  # 3 s, twice the deadline
    assert outcome.code == 6
    assert "rank 1 is stuck: no progress in decode step" in outcome.errors[0]


def test_of_four_ranks_the_stopped_one_is_named(packed_tiny: Packed) -> None:
    outcome = faulty(packed_tiny(4, "f32"), "2:decode:stop", run_alone)
    assert (outcome.code, outcome.leftovers) == (6, [])
    (error,) = outcome.errors  # of the three ranks that see it
    assert "rank 2" in error


LONG = ("-p", "a", "-n", 100, "--ignore-eos")


def shared_files(job: RunningJob) -> set[Path]:
    """Return what the job's processes have mapped by name of shared memory, which outlives processes.

    What is new there may as well be of a rank that another test beside this one has killed while it started.
    """
    found = set()
    for pid in job.processes():
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            found |= {Path(line.split(maxsplit=5)[5]) for line in lines if "/dev/shm/" in line}
    return {path for path in found if path.exists()}  # most have no name any more


SLOW = {"LLMRUN_FAULT": "0:decode:slow"}  # so that there is time to send a signal


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_signal_ends_it_quickly_and_quietly(
    number: signal.Signals, code: int, shards: int, packed_tiny: Packed
) -> None:
    job = RunningJob(llmrun_command(packed_tiny(shards, "f32"), *LONG), environment=SLOW)
    job.wait_for_output()
    shared = shared_files(job)
    sent = time.monotonic()
    job.process.send_signal(number)
    outcome = job.finish()
    assert (outcome.code, outcome.stderr, outcome.leftovers) == (code, "", [])
    assert time.monotonic() - sent < 5
    assert [path for path in shared if path.exists()] == []


@pytest.mark.parametrize("shards", [1, 2])
def test_a_hangup_that_is_ignored_from_the_start_stays_ignored(shards: int, packed_tiny: Packed, golden: str) -> None:
    """As `nohup llmrun` has it."""
    command = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *llmrun_command(packed_tiny(shards, "f32"), *ARGUMENTS)]
    job = RunningJob(command, environment=SLOW)
    job.wait_for_output()
    job.process.send_signal(signal.SIGHUP)
    outcome = job.finish()
    assert (outcome.code, outcome.stderr, outcome.leftovers) == (0, "", [])
    assert outcome.stdout == golden[1:]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_users_mpirun_leaves_nothing(number: signal.Signals, packed_tiny: Packed) -> None:
    job = RunningJob([*mpirun_command(2), *llmrun_command(packed_tiny(2, "f32"), *LONG)], environment=SLOW)
    job.wait_for_output()
    shared = shared_files(job)
    job.process.send_signal(number)
    outcome = job.finish()
    assert outcome.code != 0
    assert outcome.leftovers == []
    assert [path for path in shared if path.exists()] == []
    assert "Traceback" not in outcome.stderr


def test_killing_the_launching_llmrun_leaves_nothing(packed_tiny: Packed) -> None:
    job = RunningJob(llmrun_command(packed_tiny(2, "f32"), *LONG), environment=SLOW)
    job.rank_pid(1)
    job.process.kill()
    assert job.finish().leftovers == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_from_outside_is_reported(rank: int, packed_tiny: Packed) -> None:
    job = RunningJob(llmrun_command(packed_tiny(2, "f32"), *LONG), environment=SLOW)
    pid = job.rank_pid(rank)
    job.wait_for_output()
    os.kill(pid, signal.SIGKILL)
    outcome = job.finish()
    assert (outcome.code, len(outcome.errors), outcome.leftovers) == (6, 1, [])
    assert "SIGKILL" in outcome.errors[0]


def test_ctrl_c_stops_an_answer_of_a_chat_and_nothing_else(packed_tiny: Packed, tmp_path: Path) -> None:
    command = llmrun_command("chat", packed_tiny(2, "f32"), "-n", 40, "--ignore-eos", "--json")
    job = RunningJob(command, environment={**SLOW, "TMPDIR": str(tmp_path)}, stdin="")
    try:
        assert job.process.stdin is not None
        job.process.stdin.write(b"one\n")
        job.process.stdin.flush()
        until = time.monotonic() + 30
        while not list(tmp_path.glob("llmrun-*/answering")) and time.monotonic() < until:
            time.sleep(0.05)
        job.process.send_signal(signal.SIGINT)
        job.process.stdin.write(b"two\n")
        outcome = job.finish()
    finally:
        job.kill()
    assert (outcome.code, outcome.stderr) == (0, "")
    first, second = (json.loads(line)["ids"] for line in outcome.stdout.splitlines())
    assert len(first) < len(second) == 40
