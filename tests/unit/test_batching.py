"""Whatever runs beside a request, and however often it loses its blocks, it gets the very bits that it gets alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmrun import Engine
from llmrun.core import Core
from llmrun.requests import Request

Packed = Callable[..., Path]
BLOCK_SIZE = 16
NUM_SEQS = 4
NARROW = (3, 4, 5)  # a random model that may only say these repeats itself, so guesses are right now and then


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes and, if it does, when it leaves early."""

    step: int
    prompt: tuple[int, ...]
    max_tokens: int
    leaves_after: int | None
    speculate: int
    is_scored: bool
    temperature: float
    is_narrow: bool = True


@pytest.fixture(scope="module", params=["f32", "q4"])
def engine(request: pytest.FixtureRequest, packed_tiny: Packed) -> Iterator[Engine]:
    with Engine(packed_tiny(1, request.param), max_num_seqs=NUM_SEQS) as engine:
        yield engine


def new_core(engine: Engine, num_blocks: int, **options: Any) -> Core:
    return Core(engine.job, engine.tokenizer, max_seq_len=128, max_num_seqs=NUM_SEQS, num_blocks=num_blocks, **options)


def enqueue(core: Core, arrival: Arrival) -> Request:
    request = core.prepare(
        arrival.prompt,
        max_tokens=arrival.max_tokens,
        ignore_eos=True,
        temperature=arrival.temperature,
        seed=7,
        logprobs=1,
        prompt_logprobs=1 if arrival.is_scored else None,
        speculate=arrival.speculate,
        logit_bias=dict.fromkeys(NARROW, 50.0) if arrival.is_narrow else None,
    )
    core.enqueue(request)
    return request


def result(request: Request) -> tuple[Any, ...]:
    return request.ids, request.logprobs, request.prompt_logprobs, request.text


_alone: dict[tuple[int, Any], Request] = {}


def alone(engine: Engine, arrival: Arrival) -> Request:
    """The same request with the engine for itself: no batch, no chunks, no shared blocks, no guesses."""
    lonely = replace(arrival, step=0, leaves_after=None, speculate=0)
    key = (id(engine), lonely)
    if key not in _alone:
        core = new_core(engine, engine.job.num_blocks)
        request = enqueue(core, lonely)
        while core.has_work:
            core.step()
        _alone[key] = request
    return _alone[key]


# Few stems and few tails, so that prefixes are often shared; a tail of one token that repeats invites guesses.
STEMS = [(), tuple(range(3, 40)), tuple(range(3, 19)), tuple([5, 6, 7, 8] * 9)]
arrivals = st.builds(
    Arrival,
    step=st.integers(0, 12),
    prompt=st.builds(
        lambda stem, tail: (*stem, *tail), st.sampled_from(STEMS), st.lists(st.integers(3, 6), min_size=1, max_size=20)
    ),
    max_tokens=st.integers(1, 40),
    leaves_after=st.one_of(st.none(), st.integers(0, 25)),
    speculate=st.sampled_from([0, 0, 1, 5]),
    is_scored=st.booleans(),
    temperature=st.sampled_from([0.0, 0.0, 0.9]),
    is_narrow=st.booleans(),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(arrivals, min_size=1, max_size=9), st.integers(7, 16), st.integers(5, 60))
def test_bits_do_not_depend_on_company(
    engine: Engine, expected: list[Arrival], num_blocks: int, mixed_budget: int
) -> None:
    core = new_core(engine, num_blocks)
    core._scheduler.mixed_budget = mixed_budget
    waiting = sorted(expected, key=lambda arrival: arrival.step)
    open_: list[tuple[Arrival, Request, int]] = []
    done: list[tuple[Arrival, Request]] = []
    step = 0
    while waiting or open_:
        while waiting and waiting[0].step <= step:
            arrival = waiting.pop(0)
            open_.append((arrival, enqueue(core, arrival), step))
        for arrival, request, since in open_:
            if arrival.leaves_after is not None and step - since >= arrival.leaves_after:
                core.cancel(request)
        if core.has_work:
            ends = [event.request for event in core.step() if event.finish_reason is not None]
            assert len(set(ends)) == len(ends)
        done += [(arrival, request) for arrival, request, _ in open_ if request.finish_reason is not None]
        open_ = [entry for entry in open_ if entry[1].finish_reason is None]
        step += 1
        assert step < 5000
    for arrival, request in done:
        want = alone(engine, arrival)
        if request.finish_reason == "length":
            assert result(request) == result(want)
        else:
            assert request.finish_reason == "cancelled"
            assert request.ids == want.ids[: len(request.ids)]
            assert request.logprobs == (want.logprobs or [])[: len(request.ids)]
    assert core.stats().kv_blocks_used == 0


def test_the_random_arrivals_meet_what_they_are_to_test(engine: Engine) -> None:
    """Preemption, shared blocks and right guesses all happen in a pool and with prompts like those above."""
    core = new_core(engine, 8)
    expected = [Arrival(0, (*STEMS[1], 3 + i), 40, None, 5, False, 0.0) for i in range(4)]
    requests = [enqueue(core, arrival) for arrival in expected]
    while core.has_work:
        core.step()
    stats = core.stats()
    assert min(stats.preemptions, stats.prefix_hits, stats.draft_tokens, stats.accepted_tokens) > 0
    for arrival, request in zip(expected, requests, strict=True):
        assert result(request) == result(alone(engine, arrival))
