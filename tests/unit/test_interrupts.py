"""Ctrl-C that the caller handles, and the end of the program, at the worst instants of a step: nothing is lost or left."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmrun import Engine, core, scheduler, session
from llmrun.sequence import RunningSequence

Packed = Callable[..., Path]
# A function of a step, in which the signal arrives when it is called for the n-th time, before it does its part.
INSTANTS = {
    "sampled and not recorded": (core.Core, "_take_token", 4),
    "blocks taken and not held": (RunningSequence, "set_blocks", 1),
    "recorded in the cache": (scheduler.Scheduler, "advance", 3),
    "binding a step": (session.RankSession, "_value_of", 1),
}


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Arrange for one Ctrl-C at an instant."""

    def arrange(instant: str) -> None:
        owner, name, count = INSTANTS[instant]
        real, calls = getattr(owner, name), 0

        def interrupted(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                signal.raise_signal(signal.SIGINT)
            return real(*arguments, **named)

        monkeypatch.setattr(owner, name, interrupted)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield arrange
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("instant", INSTANTS)
def test_an_interrupted_call_disturbs_no_other(engine: Engine, instant: str, interrupt: Callable[[str], None]) -> None:
    options = {"max_tokens": 20, "temperature": 0.8, "seed": 2, "ignore_eos": True}
    expected = engine.complete("The king", **options)
    other = engine.generate_ids("The king", **options)
    ids = [next(other)]
    interrupt(instant)
    with pytest.raises(KeyboardInterrupt):
        engine.complete(list(range(3, 60)), max_tokens=20, ignore_eos=True)
    assert [*ids, *other] == expected.ids
    assert engine.stats().kv_blocks_used == 0
    assert engine.complete("The king", **options).ids == expected.ids


@pytest.mark.parametrize("instant", ["blocks taken and not held", "binding a step"])
def test_interrupted_logits_leave_the_engine_as_it_was(
    engine: Engine, instant: str, interrupt: Callable[[str], None]
) -> None:
    expected = engine.complete("The king", max_tokens=5, temperature=0)
    interrupt(instant)
    with pytest.raises(KeyboardInterrupt):
        engine.logits(list(range(3, 60)), chunk=7)
    assert engine.stats().kv_blocks_used == 0
    assert engine.complete("The king", max_tokens=5, temperature=0).ids == expected.ids


def test_a_step_whose_memory_was_refused_does_not_spoil_the_next(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.complete("The king", max_tokens=5, temperature=0)
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> None:
            raise MemoryError

        patch.setattr(session.RankSession, "_value_of", refuse)
        with pytest.raises(MemoryError):
            engine.complete([1, 2, 3, 4], max_tokens=5)
    assert engine.complete("The king", max_tokens=5, temperature=0).ids == expected.ids


def test_a_thread_that_generates_does_not_abort_the_program_that_ends(packed_tiny: Packed) -> None:
    program = """
import sys, threading, time
from llmrun import Engine
from llmrun.errors import UsageError
def generate():
    try:
        while True: engine.complete([1, 2], max_tokens=50, ignore_eos=True)
    except UsageError as error:
        print(error)
with Engine(sys.argv[1]) as engine:
    threading.Thread(target=generate, daemon=True).start()
    time.sleep(0.2)
"""
    for _ in range(4):
        command = [sys.executable, "-c", program, str(packed_tiny(1, "f32"))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")
