"""The engine on one rank: how requests are batched and cut into steps does not change what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from llmrun import Engine
from llmrun.errors import NumericError, UsageError

Packed = Callable[..., Path]
PROMPTS = ["The king", "O", "To be, or not to be, that is the question", "War and peace"]
# float32 sums in another order, over logits of a few units; FORMAT's kernels add in blocks.
SAME_LOGITS = 2e-4


@pytest.fixture(scope="module")
def engine(packed_tiny: Packed) -> Iterator[Engine]:
    with Engine(packed_tiny(1, "f32"), max_num_seqs=3) as engine:
        yield engine


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
    np.testing.assert_allclose(engine.logits(ids, chunk=chunk), engine.logits(ids), atol=SAME_LOGITS, rtol=0)


def test_logits_of_a_batch_equal_each_alone(engine: Engine) -> None:
    batch = [[1, 7, 9], [1], list(range(3, 60))]
    for ids, logits in zip(batch, engine.logits_batch(batch), strict=True):
        assert logits.shape == (len(ids), engine.manifest.model.vocab_size)
        np.testing.assert_allclose(logits, engine.logits(ids), atol=SAME_LOGITS, rtol=0)


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
    assert engine.core._allocator.num_free == engine.core._allocator.num_blocks


def test_stop_texts_end_the_answer(engine: Engine) -> None:
    whole = engine.generate_batch(["The king"], max_tokens=12, temperature=0.0, ignore_eos=True)[0].text
    assert whole is not None
    stop = whole[5:8]
    (cut,) = engine.generate_batch(["The king"], max_tokens=12, temperature=0.0, ignore_eos=True, stop=[stop])
    assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_the_context_can_be_filled_exactly(engine: Engine) -> None:
    ids = [1] * (engine.max_seq_len - 3)
    (full,) = engine.generate_batch([ids], max_tokens=3, ignore_eos=True)
    assert len(full.ids) == 3
    with pytest.raises(UsageError, match="do not fit the context"):
        engine.generate_batch([ids], max_tokens=4)
    with pytest.raises(UsageError, match="fills the context"):
        engine.generate_batch([[1] * engine.max_seq_len])


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_prompt_is_refused(engine: Engine, prompt: str | list[int]) -> None:
    with pytest.raises(UsageError, match="empty"):
        list(engine.generate_ids(prompt))


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


def test_nothing_is_sampled_from_nan(packed_tiny: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrun import faults

    monkeypatch.setenv("LLMRUN_FAULT", "0:decode:nan")
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
