"""The engine on one rank: how requests are batched and cut into steps does not change what comes out."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_prompts import PROMPTS

from llmrun import Engine
from llmrun.errors import InternalError, NumericError, ResourceError, UsageError

Packed = Callable[..., Path]


def test_text_streams_and_adds_up(engine: Engine) -> None:
    pieces = list(engine.generate("The king", max_tokens=12, temperature=0.0, ignore_eos=True))
    assert len(pieces) > 1
    assert (
        "".join(pieces) == engine.generate_batch(["The king"], max_tokens=12, temperature=0.0, ignore_eos=True)[0].text
    )


def test_a_batch_equals_each_alone(engine: Engine) -> None:
    options = {"max_tokens": 16, "temperature": 0.0, "ignore_eos": True}
    together = engine.generate_batch(PROMPTS, **options)  # four requests, three at a time
    for prompt, completion in zip(PROMPTS, together, strict=True):
        assert completion.ids == list(engine.generate_ids(prompt, **options))
        assert (completion.finish_reason, len(completion.ids)) == ("length", 16)


@pytest.mark.parametrize("chunk", [1, 3, 16, 100])
def test_prefill_in_chunks_equals_prefill_in_one(engine: Engine, chunk: int) -> None:
    ids = [(37 * i + 5) % engine.manifest.model.vocab_size for i in range(40)]
    np.testing.assert_array_equal(engine.logits(ids, chunk=chunk), engine.logits(ids))


def test_logits_of_a_batch_equal_each_alone(engine: Engine) -> None:
    batch = [[1, 7, 9], [1], list(range(3, 60))]
    for ids, logits in zip(batch, engine.logits_batch(batch), strict=True):
        assert logits.shape == (len(ids), engine.manifest.model.vocab_size)
        np.testing.assert_array_equal(logits, engine.logits(ids))


def test_greedy_takes_the_highest_logit(engine: Engine) -> None:
    ids = [1, 44, 55]
    (token,) = engine.generate_ids(ids, max_tokens=1, temperature=0.0, ignore_eos=True)
    assert token == engine.logits(ids)[-1].argmax()


def test_the_packagers_example_agrees(engine: Engine) -> None:
    difference, tolerance = engine.selfcheck()
    assert difference <= tolerance


def test_leaving_a_generator_early_frees_its_blocks(engine: Engine) -> None:
    for _ in range(40):
        pieces = engine.generate("The king", max_tokens=100, ignore_eos=True)
        next(pieces)
        pieces.close()
    assert engine.core._pool.num_free == engine.core._pool.num_blocks


def test_stop_texts_end_the_answer(engine: Engine) -> None:
    whole = engine.generate_batch(["The king"], max_tokens=12, temperature=0.0, ignore_eos=True)[0].text
    assert whole is not None
    text = whole[5:8]
    for stop, expected in (
        ([text], (whole[: whole.index(text)], "stop")),
        (text, (whole[: whole.index(text)], "stop")),  # not a list of its characters
        (None, (whole, "length")),
    ):
        (cut,) = engine.generate_batch(["The king"], max_tokens=12, temperature=0.0, ignore_eos=True, stop=stop)
        assert (cut.text, cut.finish_reason) == expected


def test_the_context_can_be_filled_exactly(engine: Engine) -> None:
    ids = [1] * (engine.max_seq_len - 3)
    (full,) = engine.generate_batch([ids], max_tokens=3, ignore_eos=True)
    assert len(full.ids) == 3
    with pytest.raises(UsageError, match="do not fit the context"):
        engine.generate_batch([ids], max_tokens=4)
    with pytest.raises(UsageError, match="fills the context"):
        engine.generate_batch([[1] * engine.max_seq_len])


def test_whoever_cut_the_context_is_told_how_long_it_may_be(packed_tiny: Packed) -> None:
    with Engine(packed_tiny(1), max_seq_len=20) as engine:
        packed = engine.manifest.max_seq_len
        with pytest.raises(UsageError, match=rf"context of 20\. .*or give a larger --max-seq-len \(at most {packed}\)"):
            engine.complete([1] * 20)
    with Engine(packed_tiny(1)) as engine, pytest.raises(UsageError, match="or pack with a longer --max-seq-len"):
        engine.complete([1] * packed)


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(engine: Engine, prompt: str | list[int]) -> None:
    with pytest.raises(UsageError, match="empty"):
        list(engine.generate_ids(prompt))


@pytest.mark.parametrize("odd", [1.5, "1", None, np.float32(1)])
def test_ids_that_are_no_integers_are_refused(engine: Engine, odd: Any) -> None:
    with pytest.raises(UsageError, match="integer"):
        list(engine.generate_ids([1, odd], max_tokens=1))


@pytest.mark.parametrize(
    ("prompt", "code", "words"),
    [
        (b"hello", "E203", "found bytes"),
        (bytearray(b"hello"), "E203", "found bytearray"),
        ({"role": "user", "content": "hello"}, "E203", "found dict"),
        ({1: 2}, "E203", "found dict"),
        (None, "E203", "found NoneType"),
        (7, "E203", "found int"),
        ({1, 2}, "E203", "found set"),
        ([True], "E206", "found a bool"),
        ([1, False], "E206", "found a bool"),
        ([b"a"], "E206", "'bytes' object cannot be interpreted as an integer"),
    ],
)
def test_what_is_no_prompt_is_refused(prompt: Any, code: str, words: str, engine: Engine) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        engine.complete(prompt, max_tokens=1)
    assert caught.value.code == code


@pytest.mark.parametrize("ids", [b"hello", {1: 2}, [True], None])
def test_logits_of_no_ids_are_refused(ids: Any, engine: Engine) -> None:
    with pytest.raises(UsageError) as caught:
        engine.logits(ids)
    assert caught.value.code == "E206"


@pytest.mark.parametrize("path", [None, 7, []])
def test_an_artifact_that_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(UsageError, match="expected the path of a directory"):
        Engine(path)


def test_ids_outside_the_vocabulary_are_refused(engine: Engine) -> None:
    for bad in (-1, engine.manifest.model.vocab_size):
        with pytest.raises(UsageError, match="vocabulary"):
            engine.logits([1, bad])


def test_an_end_token_ends_without_being_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = list(engine.generate_ids("The king", max_tokens=6, temperature=0.0, ignore_eos=True))
    import dataclasses

    monkeypatch.setattr(engine.core, "manifest", dataclasses.replace(engine.manifest, eos_token_ids=(ids[3],)))
    (completion,) = engine.generate_batch(["The king"], max_tokens=6, temperature=0.0)
    assert (completion.ids, completion.finish_reason) == (ids[: ids.index(ids[3])], "stop")


def test_as_many_sequences_run_together_as_were_asked_for(packed_tiny: Packed) -> None:
    """More than a step has tokens otherwise."""
    with Engine(packed_tiny(1, "f32"), max_num_seqs=520, max_seq_len=32) as engine:
        options: Any = {"max_tokens": 2, "temperature": 0.0, "ignore_eos": True, "reuse_prefix": False}
        requests = [engine.submit([3 + i % 5], **options) for i in range(520)]
        assert [len(engine.step()) for _ in range(2)] == [520, 520]
        assert [request.ids for request in requests] == [requests[i % 5].ids for i in range(520)]
        assert engine.complete([3], **options).ids == requests[0].ids


def test_nothing_is_sampled_from_nan(packed_tiny: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrun import faults

    monkeypatch.setattr(faults, "_wanted", lambda: "0:decode:nan")
    monkeypatch.setattr(faults, "_fired", False)
    with Engine(packed_tiny(1, "f32")) as engine:
        ids = engine.generate_ids("The king", max_tokens=9, ignore_eos=True)
        next(ids)
        with pytest.raises(NumericError):
            next(ids)


def test_defaults_are_the_artifacts(engine: Engine) -> None:
    assert engine.sampling_params() == engine.sampling_params(**vars(engine.manifest.generation))
    assert engine.sampling_params(top_k=7, top_p=None).top_k == 7


def test_untouched_cache_takes_no_memory(packed_tiny: Packed) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    with Engine(packed_tiny(1, "f32"), max_num_seqs=8) as small:
        list(small.generate_ids([1, 2], max_tokens=2))
        before = resident_bytes()
        spec = small.manifest.kv_cache
        num_seqs = (200 << 20) // (spec.bytes_per_token * small.max_seq_len)
        with Engine(packed_tiny(1, "f32"), max_num_seqs=num_seqs) as large:
            list(large.generate_ids([1, 2], max_tokens=2))
            assert resident_bytes() - before < 60 << 20


def test_generators_may_take_turns(engine: Engine) -> None:
    options: dict[str, Any] = {"max_tokens": 10, "temperature": 0.0, "ignore_eos": True}
    first, second = engine.generate_ids(PROMPTS[0], **options), engine.generate_ids(PROMPTS[2], **options)
    pairs = list(zip(first, second, strict=True))
    assert [a for a, _ in pairs] == engine.complete(PROMPTS[0], **options).ids
    assert [b for _, b in pairs] == engine.complete(PROMPTS[2], **options).ids


@pytest.mark.parametrize("kind", ["complete", "step"])
def test_a_half_read_generator_misses_nothing_that_others_compute(engine: Engine, kind: str) -> None:
    options: dict[str, Any] = {"max_tokens": 10, "temperature": 0.0, "ignore_eos": True}
    generator = engine.generate_ids(PROMPTS[0], **options)
    ids = [next(generator)]
    if kind == "complete":
        engine.complete(PROMPTS[2], max_tokens=20, temperature=0.0, ignore_eos=True)
    else:
        engine.step()
    assert [*ids, *generator] == engine.complete(PROMPTS[0], **options).ids


def test_an_error_of_a_half_read_generator_is_raised_there(engine: Engine) -> None:
    class Failing:
        is_done = False

        def mask(self, tokens: Any) -> Any:
            if len(tokens) > 1:
                raise ValueError("mine")
            return np.full((engine.manifest.model.vocab_size + 31) // 32, -1, np.int32)

        def accept(self, token_id: int) -> None:
            pass

    options: dict[str, Any] = {"max_tokens": 10, "temperature": 0.0, "ignore_eos": True}
    generator = engine.generate_ids(PROMPTS[0], constraint=Failing(), **options)
    next(generator)
    assert len(engine.complete(PROMPTS[2], **options).ids) == 10
    with pytest.raises(InternalError, match="mine"):
        list(generator)


def test_bad_numbers_are_refused_before_any_work(engine: Engine, packed_tiny: Packed) -> None:
    with pytest.raises(UsageError, match="chunk -3"):
        engine.logits([1, 2], chunk=-3)
    with pytest.raises(UsageError, match="speculate 99"):
        Engine(packed_tiny(1, "f32"), speculate=99)


def test_numbers_that_leave_nothing_are_the_callers_fault(engine: Engine) -> None:
    every_id = range(engine.manifest.model.vocab_size)
    options: list[dict[str, Any]] = [{"logit_bias": dict.fromkeys(every_id, -math.inf)}, {"repeat_penalty": 1e-39}]
    for given in options:
        with pytest.raises(UsageError, match="after logit_bias and penalties"):
            engine.complete([1, 2, *every_id[:100]], temperature=0, **given)


def test_threads_take_turns(engine: Engine) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
    expected = {prompt: engine.complete(prompt, **options).ids for prompt in PROMPTS}

    def ask(i: int) -> tuple[str, list[int]]:
        prompt = PROMPTS[i % len(PROMPTS)]
        if i % 3 == 0:
            return prompt, [*engine.generate_ids(prompt, **options)]
        return prompt, engine.complete(prompt, **options).ids

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(ask, range(40)))
    assert all(ids == expected[prompt] for prompt, ids in found)
    assert engine.stats().kv_blocks_used == 0


def test_a_generator_that_is_collected_in_a_step_harms_no_other(engine: Engine) -> None:
    options: dict[str, Any] = {"max_tokens": 10, "temperature": 0.0, "ignore_eos": True}
    generators: list[Any] = []

    class Collecting:  # a constraint runs amid a step
        is_done = False

        def mask(self, _tokens: Any) -> Any:
            if len(generators) == 2:
                del generators[1]
            return np.full((engine.manifest.model.vocab_size + 31) // 32, -1, np.int32)

        def accept(self, token_id: int) -> None:
            pass

    generators.append(engine.generate_ids(PROMPTS[0], constraint=Collecting(), **options))
    ids = [next(generators[0])]
    other = engine.generate_ids(PROMPTS[2], **options)
    next(other)
    generators.append(other)
    del other
    ids += generators[0]
    assert len(generators) == 1
    assert ids == engine.complete(PROMPTS[0], **options).ids
    assert engine.stats().kv_blocks_used == 0


def test_an_interrupt_that_the_caller_handles_breaks_nothing(packed_tiny: Packed) -> None:
    program = """
import sys, signal, threading, time, os
from llmrun import Engine
with Engine(sys.argv[1]) as engine:
    expected = engine.complete([1, 2], max_tokens=20, ignore_eos=True, temperature=0).ids
    for _ in range(5):
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        try:
            while True:
                engine.complete([1, 2, 3], max_tokens=100, ignore_eos=True)
        except KeyboardInterrupt:
            pass
        assert engine.stats().kv_blocks_used == 0
        if len(sys.argv) > 2:
            assert engine.complete([1, 2], max_tokens=20, ignore_eos=True, temperature=0).ids == expected
print("went on")
"""
    for goes_on in ([], ["and goes on"]):
        command = [sys.executable, "-c", program, str(packed_tiny(1, "f32")), *goes_on]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


def test_an_engine_that_nothing_refers_to_is_collected(packed_tiny: Packed) -> None:
    engine = Engine(packed_tiny(1, "f32"))
    engine.complete([1, 2], max_tokens=3)
    engine_was, session_was = weakref.ref(engine), weakref.ref(engine.job.session)
    del engine
    gc.collect()
    until = time.monotonic() + 10  # the watchdog's thread ends at its next look
    while session_was() is not None and time.monotonic() < until:
        time.sleep(0.05)
        gc.collect()
    assert (engine_was(), session_was()) == (None, None)


def test_each_engine_has_the_instruction_set_it_was_asked_for(packed_tiny: Packed) -> None:
    path = packed_tiny(1, "q4")
    with Engine(path) as best, Engine(path, isa="portable") as portable, Engine(path) as again:
        assert (best.job.isa, portable.job.isa) == (again.job.isa, "portable")
        logits = [e.logits([1, 2, 3, 4])[-1] for e in (best, portable, again)]
        with Engine(path, isa="portable") as other:
            assert np.array_equal(other.logits([1, 2, 3, 4])[-1], logits[1])
            assert np.array_equal(best.logits([1, 2, 3, 4])[-1], logits[0])
        assert np.array_equal(logits[0], logits[2])
        assert best.job.isa == "portable" or not np.array_equal(logits[0], logits[1])


def test_a_forked_child_leaves_the_job_to_its_parent(engine: Engine) -> None:
    child = os.fork()
    if child == 0:
        engine.close()  # as Python does at its end
        os._exit(int(engine._closed))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_one_cancelled_request_leaves_the_others_alone(engine: Engine) -> None:
    options: dict[str, Any] = {"max_tokens": 10, "temperature": 0.0, "ignore_eos": True}
    leaving, staying = engine.submit(PROMPTS[0], **options), engine.submit(PROMPTS[2], **options)
    engine.step()
    engine.cancel(leaving)
    while staying.finish_reason is None:
        engine.step()
    assert (leaving.finish_reason, staying.ids) == ("cancelled", engine.complete(PROMPTS[2], **options).ids)


def test_the_cache_can_be_given_its_size(packed_tiny: Packed) -> None:
    with Engine(packed_tiny(1, "f32"), kv_cache_mb=3) as engine:
        spec = engine.manifest.kv_cache
        assert engine.stats().kv_blocks_total == (3 << 20) // (spec.block_size * spec.bytes_per_token)
        with pytest.raises(ResourceError, match=r"holds 48 positions, and one sequence has up to 128") as refused:
            engine.job._num_blocks(3, is_exact=True)
        assert refused.value.exit_code == 5
    with pytest.raises(ResourceError, match=r"MiB are free .*--kv-cache-mb asks for \d+ MiB"):
        Engine(packed_tiny(1, "f32"), kv_cache_mb=1 << 30)
