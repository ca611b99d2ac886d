"""A rank's signals, and the exceptions that nobody catches on it, without MPI: what ends the process, with which code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmrun import launcher

# A thread reads signals: what a signal does without ending the program is waited for, and so is the end.
PROGRAM = """
import os, signal, sys, threading, time
from llmrun import failstop
signals = failstop.Signals()
signals.install()
def send(number, wait=lambda: time.sleep(20)):
    print(number.name, flush=True)
    os.kill(os.getpid(), number)
    wait()
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != launcher.LAUNCH_VARIABLE}
    command = [sys.executable, "-c", PROGRAM + program]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=60, check=False)


def test_the_first_ctrl_c_stops_an_answer_and_the_second_the_program() -> None:
    outcome = run("""
for _ in range(2):
    with signals.answering():
        print(signals.stop_answer.is_set())
        send(signal.SIGINT, signals.stop_answer.wait)
with signals.answering():
    send(signal.SIGINT, signals.stop_answer.wait)
    send(signal.SIGINT)
print("not reached")
""")
    assert outcome.stdout.split() == [*(["False", "SIGINT"] * 2), "SIGINT", "SIGINT"]
    assert (outcome.returncode, outcome.stderr) == (130, "")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_what_ends_the_program_between_two_answers(name: str, code: int) -> None:
    outcome = run(f"with signals.answering(): pass\nsend(signal.{name})\nprint('not reached')")
    assert (outcome.returncode, outcome.stdout, outcome.stderr) == (code, f"{name}\n", "")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_an_answer_is_stopped_by_ctrl_c_alone(name: str, code: int) -> None:
    outcome = run(f"with signals.answering(): send(signal.{name})\nprint('not reached')")
    assert (outcome.returncode, outcome.stdout) == (code, f"{name}\n")


def test_the_launching_llmrun_knows_whom_to_interrupt_while_there_is_an_answer(tmp_path: Path) -> None:
    note = tmp_path / "answering"
    program = f"""
with signals.answering():
    print(open({str(note)!r}).read() == str(os.getpid()))
print(os.path.exists({str(note)!r}))
"""
    assert run(program, **{launcher.LAUNCH_VARIABLE: str(tmp_path)}).stdout.split() == ["True", "False"]


def test_other_ranks_leave_signals_to_rank_0_but_a_hangup() -> None:
    outcome = run("""
signals.ignore()
for number in (signal.SIGINT, signal.SIGTERM):
    send(number, lambda: time.sleep(0.3))
send(signal.SIGHUP)
""")
    assert (outcome.returncode, outcome.stdout.split()) == (129, ["SIGINT", "SIGTERM", "SIGHUP"])


@pytest.mark.parametrize("inside", [True, False])
def test_a_server_drains_at_the_first_signal_and_ends_at_the_second(inside: bool) -> None:
    """And once it has drained, each is the end."""
    outcome = run(f"""
drained = threading.Event()
with signals.draining(drained.set, 5):
    if {inside}:
        send(signal.SIGTERM, drained.wait)
        send(signal.SIGINT)
send(signal.SIGINT)
""")
    assert outcome.stdout.split() == (["SIGTERM", "SIGINT"] if inside else ["SIGINT"])
    assert outcome.returncode == 130


def test_rank_0_that_outlived_the_job_says_so() -> None:
    outcome = run("signal.signal(signal.SIGUSR1, lambda *_: None)\nsend(signal.SIGUSR1)\nprint('not reached')")
    assert (outcome.returncode, outcome.stdout) == (6, "SIGUSR1\n")
    assert outcome.stderr.startswith("llmrun: error[E602]: another rank")


@pytest.mark.parametrize(("given", "code"), [(6, 6), (0, 1)])
def test_what_was_asked_for_is_done_before_leaving_whatever_of_it_fails(given: int, code: int, tmp_path: Path) -> None:
    """And the launching llmrun knows the code; with 0 an mpirun would let the other ranks wait."""
    program = f"""
failstop.before_leaving(lambda code: print("first", code, flush=True))
failstop.before_leaving(lambda code: 1 / 0)
failstop.before_leaving(lambda code: print("last", code, flush=True))
failstop.leave({given})
"""
    outcome = run(program, **{launcher.LAUNCH_VARIABLE: str(tmp_path)})
    assert (outcome.returncode, outcome.stdout) == (code, f"last {code}\nfirst {code}\n")
    assert (tmp_path / "exit-code").read_text() == str(code)


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        ("ValueError('odd')", 1, "rank 1: "),
        ("PeerError('rank 0 has ended')", 6, "rank 0 has ended"),
        ("KeyboardInterrupt", 130, ""),
    ],
)
@pytest.mark.parametrize("keep_traceback", [True, False])
def test_an_exception_that_nobody_catches_ends_the_job(
    raised: str, code: int, words: str, keep_traceback: bool
) -> None:
    outcome = run(f"""
from llmrun.errors import PeerError
failstop.install_hooks(1, 2, keep_traceback={keep_traceback})
failstop.before_leaving(lambda code: print("leaves", code, flush=True))
raise {raised}
""")
    assert (outcome.returncode, outcome.stdout) == (code, f"leaves {code}\n")
    is_bug = raised.startswith("ValueError")
    assert ("Traceback" in outcome.stderr) == (is_bug and keep_traceback)
    if not (is_bug and keep_traceback):
        assert words in outcome.stderr
        assert len(outcome.stderr.splitlines()) == bool(words)


@pytest.mark.parametrize(("raised", "code"), [("ValueError('odd')", 1), ("SystemExit(3)", 0)])
def test_an_exception_of_a_thread_ends_the_job_and_its_own_exit_does_not(raised: str, code: int) -> None:
    outcome = run(f"""
failstop.install_hooks(0, 1, keep_traceback=False)
def work():
    raise {raised}
thread = threading.Thread(target=work)
thread.start()
thread.join()
print("goes on")
""")
    assert (outcome.returncode, outcome.stdout) == (code, "" if code else "goes on\n")
    assert "rank" not in outcome.stderr
