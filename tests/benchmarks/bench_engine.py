"""What the engine adds to the graph: overhead of a step, the token budget of mixed steps, the gain of guessing ahead.

    python tests/benchmarks/bench_engine.py overhead|budget|guess|cost ARTIFACT

Times are CPU seconds of the one thread that computes, so that other work on the machine falsifies them less. Figures and
their meaning: LOG.md.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from time import thread_time
from typing import Any

import numpy as np

from llmrun import Engine
from llmrun.core import Core

HELDOUT = Path(__file__).parents[1] / "checkpoints" / "heldout.txt"
CODE = """def area(shape):
    if shape.kind == "circle":
        return 3.14159 * shape.radius * shape.radius
    if shape.kind == "square":
        return shape.side * shape.side
    if shape.kind == "rectangle":
        return shape.width * shape.height
    raise ValueError(shape.kind)
"""


def core_of(engine: Engine, **options: Any) -> Core:
    return Core(engine.job, engine.tokenizer, max_seq_len=engine.max_seq_len, max_num_seqs=16, **options)


def ids(engine: Engine, count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, engine.manifest.model.vocab_size, count).tolist()


def overhead(engine: Engine) -> None:
    """Time of a decode step outside of ONNX Runtime."""
    session = engine.job._session
    assert session is not None
    inner = session._session
    spent = [0.0]

    class Timed:
        def run_with_iobinding(self, *arguments: Any) -> None:
            started = thread_time()
            inner.run_with_iobinding(*arguments)
            spent[0] += thread_time() - started

        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

    session._session = Timed()
    for options in ({"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.95, "repeat_penalty": 1.1, "seed": 1}):
        for batch in (1, 8, 16):
            core = core_of(engine)
            for i in range(batch):
                core.enqueue(core.prepare(ids(engine, 40, i), max_tokens=300, ignore_eos=True, **options))
            while core._scheduler.plan()[0].num_tokens != batch:
                core.step()
            outside, inside = [], []
            for _ in range(200):
                spent[0] = 0.0
                started = thread_time()
                core.step()
                outside.append(thread_time() - started - spent[0])
                inside.append(spent[0])
            us = [f"{statistics.median(times) * 1e6:8.0f}" for times in (outside, inside)]
            print(f"temperature {options['temperature']}, batch {batch:2}: outside {us[0]} us, ONNX Runtime {us[1]} us")
            for request in list(core._requests.values()):
                core.cancel(request)


def budget(engine: Engine) -> None:
    """Four sequences decode, a prompt of 512 tokens comes: how long it takes, and how long the others wait for a token."""
    for mixed_budget in map(int, sys.argv[3:] or (16, 32, 64, 128, 256, 512)):
        core = core_of(engine)
        core._scheduler.mixed_budget = mixed_budget
        for i in range(4):
            core.enqueue(core.prepare(ids(engine, 8, i), max_tokens=200, ignore_eos=True, temperature=0.0))
        for _ in range(5):
            core.step()
        prompt = core.prepare(ids(engine, 512, 99), max_tokens=1, ignore_eos=True, temperature=0.0)
        core.enqueue(prompt)
        started, steps = thread_time(), []
        while prompt.finish_reason is None:
            before = thread_time()
            core.step()
            steps.append(thread_time() - before)
        total = thread_time() - started
        print(
            f"budget {mixed_budget:3}: first token {total:6.3f} s, {512 / total:6.1f} tokens/s, step {max(steps):6.3f} s"
        )
        for request in list(core._requests.values()):
            core.cancel(request)


def guess(engine: Engine) -> None:
    """Tokens per step and tokens per second with and without guesses."""
    text = HELDOUT.read_text()[:800]
    prompts = {
        "summarizing": f"{text}\n\nIn short: ",
        "code editing": f"{CODE}\n# The same with math.pi:\n{CODE[:60]}",
        "story": "In the evening the prince",
    }
    for name, prompt in prompts.items():
        expected: list[int] = []
        for num_drafts in (0, 2, 4, 8):
            best, stats = float("inf"), None
            for _ in range(3):
                core = core_of(engine, speculate=num_drafts)
                request = core.prepare(prompt, max_tokens=128, ignore_eos=True, temperature=0.0)
                core.enqueue(request)
                while not request.ids:
                    core.step()
                started, before = thread_time(), core.stats()
                while request.finish_reason is None:
                    core.step()
                if (seconds := thread_time() - started) < best:
                    best, stats = seconds, core.stats()
                expected = expected or request.ids
                assert request.ids == expected, "guesses changed the answer"
            assert stats is not None
            steps = stats.steps - before.steps
            share = stats.accepted_tokens / stats.draft_tokens if stats.draft_tokens else 0.0
            print(
                f"{name:12} guesses {num_drafts}: {127 / best:7.1f} tokens/s, {127 / steps:5.2f} tokens/step,"
                f" {stats.draft_tokens:4} guessed, {share:4.0%} right"
            )


def cost(engine: Engine) -> None:
    """Time of a step of one sequence by its number of tokens: how many must be right for guesses to pay."""
    core = core_of(engine)
    alone = 0.0
    for num_drafts in (0, 1, 2, 3, 4, 6, 8):
        request = core.prepare(ids(engine, 100, num_drafts), max_tokens=400, ignore_eos=True, temperature=0.0)
        core.enqueue(request)
        core._propose = lambda _sequence, limit, n=num_drafts: [7] * min(n, limit)  # type: ignore[method-assign]
        times = []
        for _ in range(15):
            before = thread_time()
            core.step()
            times.append(thread_time() - before)
        core.cancel(request)
        step_s = statistics.median(times[1:])
        alone = alone or step_s
        print(f"{1 + num_drafts} tokens: {step_s * 1e3:7.2f} ms, {step_s / alone:5.2f} of one")


if __name__ == "__main__":
    with Engine(sys.argv[2], max_num_seqs=16, verify="off", threads=1) as loaded:
        {"overhead": overhead, "budget": budget, "guess": guess, "cost": cost}[sys.argv[1]](loaded)
