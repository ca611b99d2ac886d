"""The engine behind a thread, and behind asyncio: every request ends once, whoever leaves and whatever fails."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmrun import AsyncEngine, Engine, EngineLoop, Event
from llmrun.core import Core
from llmrun.errors import InternalError, LlmpackError, NumericError, PeerError, ResourceError, UsageError

Packed = Callable[..., Path]
LONG: dict[str, Any] = {"max_tokens": 100, "temperature": 0.0, "ignore_eos": True}
SHORT: dict[str, Any] = {**LONG, "max_tokens": 12}
WAIT_S = 30.0


@pytest.fixture(scope="module")
def engine(packed_tiny: Packed) -> Iterator[Engine]:
    with Engine(packed_tiny(1, "f32"), max_num_seqs=3) as engine:
        yield engine


@pytest.fixture
def loop(engine: Engine) -> Iterator[EngineLoop]:
    with EngineLoop(engine) as loop:
        yield loop


def test_many_threads_get_what_each_gets_alone(engine: Engine) -> None:
    prompts = [[5 + i, 6, 7, *range(20 + i)] for i in range(8)]
    expected = [engine.complete(prompt, **SHORT).ids for prompt in prompts]
    results: dict[int, list[Event]] = {}
    with EngineLoop(engine) as loop:

        def run(i: int) -> None:
            events: list[Event] = []
            ticket = loop.submit(prompts[i], on_event=events.append, **SHORT)
            assert ticket.done.wait(WAIT_S)
            results[i] = events

        threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = loop.stats()
    assert len(results) == len(prompts)
    for i, events in results.items():
        assert [event.token_id for event in events] == expected[i]
        assert [event.finish_reason for event in events] == [None] * 11 + ["length"]
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)


def test_cancelling_takes_effect_within_a_step(loop: EngineLoop) -> None:
    events: list[Event] = []
    first = threading.Event()

    def on_event(event: Event) -> None:
        events.append(event)
        first.set()

    ticket = loop.submit([5, 6, 7], on_event=on_event, **LONG)
    assert first.wait(WAIT_S)
    loop.cancel(ticket)
    loop.cancel(ticket)
    count = len(events)
    assert ticket.done.wait(WAIT_S)
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + ["cancelled"]
    assert len(events) <= count + 2  # the step that was running, and the end
    loop.cancel(ticket)
    assert loop.drain(WAIT_S)
    assert loop.stats().kv_blocks_used == 0


def test_waiting_requests_can_be_cancelled(loop: EngineLoop) -> None:
    tickets = [loop.submit([5, 6, 7 + i], on_event=lambda _: None, **LONG) for i in range(6)]
    for ticket in reversed(tickets):
        loop.cancel(ticket)
    assert loop.drain(WAIT_S)
    assert {ticket.request.finish_reason for ticket in tickets} <= {"cancelled", "length"}
    assert tickets[5].request.ids == []


def test_a_callback_that_fails_ends_its_own_request(loop: EngineLoop) -> None:
    def fail(_event: Event) -> None:
        raise RuntimeError("gone")

    other: list[Event] = []
    failing = loop.submit([5, 6], on_event=fail, **LONG)
    staying = loop.submit([7, 8], on_event=other.append, **SHORT)
    assert failing.done.wait(WAIT_S)
    assert staying.done.wait(WAIT_S)
    assert other[-1].finish_reason == "length"
    assert failing.request.finish_reason == "cancelled"
    assert loop.failed is None


def test_a_callback_that_failed_is_not_called_again(loop: EngineLoop) -> None:
    calls: list[Event] = []

    def fail(event: Event) -> None:
        calls.append(event)
        if len(calls) == 4:
            raise RuntimeError("gone")

    # Every guess is right, so the fourth token comes in one step with others.
    ticket = loop.submit([5, 6], on_event=fail, **LONG, logit_bias={7: 1e3}, speculate=8)
    assert ticket.done.wait(WAIT_S)
    assert loop.drain(WAIT_S)
    assert (len(calls), loop.failed) == (4, None)


def test_bad_requests_are_refused_on_the_callers_thread(loop: EngineLoop) -> None:
    with pytest.raises(UsageError, match="empty"):
        loop.submit([], on_event=lambda _: None)
    assert loop.stats().waiting == 0


def test_draining_lets_open_requests_end_and_no_new_ones_begin(loop: EngineLoop) -> None:
    ticket = loop.submit([5, 6], on_event=lambda _: None, **LONG)
    assert not loop.drain(0)
    with pytest.raises(ResourceError, match="no more"):
        loop.submit([5, 6], on_event=lambda _: None, **SHORT)
    assert loop.drain(WAIT_S)
    assert ticket.request.finish_reason == "length"


def test_closing_cancels_what_is_open(engine: Engine) -> None:
    loop = EngineLoop(engine)
    events: list[Event] = []
    tickets = [loop.submit([5, 6 + i], on_event=events.append, **LONG) for i in range(5)]
    loop.close()
    assert all(ticket.is_done for ticket in tickets)
    assert sum(event.finish_reason is not None for event in events) == 5
    assert engine.stats().kv_blocks_used == 0
    assert (loop.stats().running, loop.stats().waiting, loop.stats().kv_blocks_used) == (0, 0, 0)
    with pytest.raises(ResourceError):
        loop.submit([5], on_event=events.append)


def test_a_callback_may_submit_and_close(engine: Engine) -> None:
    loop = EngineLoop(engine)
    waiting: list[int] = []
    later: list[Event] = []

    def on_event(event: Event) -> None:
        if event.finish_reason is None:
            loop.submit([7, 8], on_event=later.append, **LONG)
            waiting.append(loop.stats().waiting)
            loop.close()
            waiting.append(-1)

    ticket = loop.submit([5, 6], on_event=on_event, **LONG)
    assert ticket.done.wait(WAIT_S)
    loop.close()
    assert waiting == [1, -1]
    assert [event.finish_reason for event in later] == ["cancelled"]


def test_an_idle_loop_sleeps_and_wakes_at_once(loop: EngineLoop) -> None:
    loop.submit([5], on_event=lambda _: None, **SHORT).done.wait(WAIT_S)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05
    assert loop.submit([5], on_event=lambda _: None, **SHORT).done.wait(WAIT_S)


@pytest.mark.parametrize(
    "failure", [PeerError("rank 1 has ended"), InternalError("a step failed"), ValueError("a bug")]
)
def test_when_the_engine_fails_every_open_request_is_told(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    failures: list[BaseException] = []
    with EngineLoop(engine, on_failed=failures.append) as loop:
        events: list[Event] = []
        started = threading.Event()
        go = threading.Event()
        step = engine.core._job.run

        def run(plan: Any) -> Any:
            started.set()
            go.wait(WAIT_S)
            if engine.core.stats().steps % 1000 > limit:
                tickets.append(loop.submit([5, 99], on_event=events.append, **LONG))  # arrives meanwhile
                raise failure
            return step(plan)

        limit = engine.core.stats().steps % 1000 + 3
        monkeypatch.setattr(engine.core._job, "run", run)
        tickets = [loop.submit([5, 6 + i], on_event=events.append, **LONG) for i in range(5)]
        go.set()
        for ticket in tickets:
            assert ticket.done.wait(WAIT_S)
        last = [event for event in events if event.finish_reason is not None]
        assert [event.request for event in last] == [ticket.request for ticket in tickets]
        if isinstance(failure, LlmpackError):
            assert all(event.error is event.request.error is failure for event in last)
        else:
            assert all(str(event.error) == "the engine failed: a bug" for event in last)
        with pytest.raises(PeerError, match=f"has failed: {failure}"):
            loop.submit([5], on_event=events.append)
    assert failures == [loop.failed] == [failure]
    monkeypatch.undo()
    for ticket in tickets:
        engine.cancel(ticket.request)


def test_a_numeric_error_ends_its_request_only(packed_tiny: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(packed_tiny(1, "f32")) as engine, EngineLoop(engine) as loop:
        run = engine.core._job.run

        def spoil(plan: Any) -> Any:
            rows = run(plan)
            rows.logits[: int(plan.fields()["input_ids"][0] == 5)] = float("nan")
            return rows

        monkeypatch.setattr(engine.core._job, "run", spoil)
        bad = loop.submit([5], on_event=lambda _: None, **SHORT)
        assert bad.done.wait(WAIT_S)
        good = loop.submit([6], on_event=lambda _: None, **SHORT)
        assert good.done.wait(WAIT_S)
        assert isinstance(bad.request.error, NumericError)
        assert (good.request.finish_reason, len(good.request.ids)) == ("length", 12)


@pytest.fixture(scope="module")
def expected(packed_tiny: Packed) -> dict[str, str]:
    with Engine(packed_tiny(1, "f32")) as engine:
        return {text: engine.complete(text, **SHORT).text or "" for text in ("The king", "O", "War and peace")}


def test_tasks_share_an_engine(packed_tiny: Packed, expected: dict[str, str]) -> None:
    async def main() -> None:
        async with AsyncEngine(packed_tiny(1, "f32"), max_num_seqs=2) as engine:

            async def stream(text: str) -> str:
                return "".join([piece async for piece in engine.generate(text, **SHORT)])

            assert await asyncio.gather(*map(stream, expected)) == list(expected.values())
            completions = await engine.complete_batch(list(expected), **SHORT)
            assert [completion.text for completion in completions] == list(expected.values())
            assert engine.stats().generated_tokens >= 2 * 3 * 12

    asyncio.run(main())


def test_leaving_a_loop_cancels(packed_tiny: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Core.step
    # Slow enough for a busy machine to cancel in time.
    monkeypatch.setattr(Core, "step", lambda self: (time.sleep(0.005), step(self))[1])

    async def main() -> None:
        async with AsyncEngine(packed_tiny(1, "f32")) as engine:
            async with contextlib.aclosing(engine.generate("The king", **LONG)) as pieces:
                async for _ in pieces:
                    break
            task = asyncio.create_task(engine.complete("The king", **LONG))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async for _ in engine.generate("The king", **LONG):
                break  # nothing refers to the generator any more
            for _ in range(200):
                await asyncio.sleep(0.01)
                if (engine.stats().running, engine.stats().waiting) == (0, 0):
                    break
            assert (engine.stats().running, engine.stats().waiting) == (0, 0)
            assert engine.stats().generated_tokens < 100

    asyncio.run(main())


def test_errors_reach_the_task(packed_tiny: Packed) -> None:
    async def main() -> None:
        async with AsyncEngine(packed_tiny(1, "f32")) as engine:
            with pytest.raises(UsageError, match="empty"):
                await engine.complete("")
            with pytest.raises(UsageError, match="empty"):
                await engine.complete_batch(["The king", ""])
            with pytest.raises(LlmpackError, match="no such state"):
                await engine.complete("The king", constraint=Broken())  # type: ignore[typeddict-item]

    class Broken:
        is_done = False

        def mask(self, _tokens: object) -> None:
            raise InternalError("no such state")

    asyncio.run(main())


def test_a_chat_is_its_template(packed_demo: Packed) -> None:
    from llmrun.chat import encode_chat

    messages = [{"role": "user", "content": "Who is the prince?"}]
    with Engine(packed_demo(1, "f32")) as engine:
        assert engine.tokenizer is not None
        ids = encode_chat(engine.tokenizer, messages)
        assert "".join(engine.chat(messages, **SHORT)) == engine.complete(ids, **SHORT).text
        assert engine.complete(messages, **SHORT).prompt_ids == ids


def test_an_engine_that_nothing_refers_to_is_collected_with_its_thread(packed_tiny: Packed) -> None:
    before = threading.active_count()
    for _ in range(3):
        engine = AsyncEngine(packed_tiny(1, "f32"))
        asyncio.run(engine.complete("The king", **SHORT))
        session_was = weakref.ref(engine._engine.job.session)
        del engine
        gc.collect()
        until = time.monotonic() + 10  # the watchdog's thread ends at its next look
        while (session_was() is not None or threading.active_count() > before) and time.monotonic() < until:
            time.sleep(0.05)
        assert session_was() is None
        assert threading.active_count() <= before
