"""What a request may ask for beside its prompt, on one rank: log-probabilities, constraints, biases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_prompts import PROMPTS

from llmrun import Engine
from llmrun.errors import LlmpackError, UsageError

Packed = Callable[..., Path]


@pytest.mark.parametrize("speculate", [0, 8])
def test_a_constraint_that_ends_amid_right_guesses_keeps_them(engine: Engine, speculate: int) -> None:
    class Fixed:
        """The same three tokens, again and again: look-up guesses them."""

        def __init__(self, most: int) -> None:
            self.accepted, self.most = 0, most

        @property
        def is_done(self) -> bool:
            return self.accepted == self.most

        def mask(self, tokens: Any) -> Any:
            bits = np.zeros(engine.manifest.model.vocab_size, np.uint8)
            bits[5 + len(tokens) % 3] = 1
            return np.packbits(np.pad(bits, (0, -len(bits) % 32)), bitorder="little").view(np.int32)

        def accept(self, token_id: int) -> None:
            self.accepted += 1

    before = engine.stats().accepted_tokens
    for most in range(20, 30):
        done = engine.complete([3, 4], constraint=Fixed(most), speculate=speculate, max_tokens=60)
        assert (done.ids, done.finish_reason) == ([5 + i % 3 for i in range(most)], "stop")
    assert (engine.stats().accepted_tokens > before) is (speculate > 0)


def test_log_probabilities_are_those_of_the_logits(engine: Engine) -> None:
    prompt = engine.tokenizer.encode(PROMPTS[2]) if engine.tokenizer else []
    done = engine.complete(prompt, max_tokens=5, temperature=0.0, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    rows = engine.logits([*prompt, *done.ids]).astype(np.float64)
    expected = (
        rows - np.log(np.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True)) - rows.max(1, keepdims=True)
    )
    assert done.logprobs is not None
    assert done.prompt_logprobs is not None
    assert done.prompt_logprobs[0] is None
    scored = [*done.prompt_logprobs[1:], *done.logprobs]
    for at, (entry, num_top) in enumerate(zip(scored, [2] * (len(prompt) - 1) + [3] * 5, strict=True)):
        assert entry is not None
        assert entry.token_id == [*prompt, *done.ids][at + 1]
        assert entry.logprob == pytest.approx(expected[at, entry.token_id], abs=1e-9)
        likeliest = np.argsort(-expected[at], kind="stable")[:num_top]
        assert [i for i, _ in entry.top] == list(likeliest)
        assert [p for _, p in entry.top] == pytest.approx(list(expected[at, likeliest]), abs=1e-9)


def test_a_prompt_alone_can_be_scored(engine: Engine) -> None:
    done = engine.complete([5, 6, 7], max_tokens=0, prompt_logprobs=0)
    assert (done.ids, done.finish_reason, len(done.prompt_logprobs or [])) == ([], "length", 3)
    with pytest.raises(UsageError, match="max-tokens 0"):
        engine.complete([5, 6, 7], max_tokens=0)


class EveryOther:
    """Allows only ids of one parity, the other one at the next token; done after four."""

    def __init__(self, vocab_size: int, kind: type) -> None:
        self.vocab_size, self.kind, self.accepted = vocab_size, kind, []

    def mask(self, tokens: Sequence[int]) -> np.ndarray:
        assert list(tokens) == self.accepted
        allowed = np.arange(self.vocab_size) % 2 == len(tokens) % 2
        if self.kind is bool:
            return allowed
        bits = np.packbits(allowed, bitorder="little")
        return np.concatenate([bits, np.zeros(-len(bits) % 4, np.uint8)]).view(self.kind)

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)

    @property
    def is_done(self) -> bool:
        return len(self.accepted) == 4


def test_wrong_guesses_beside_a_constraint_change_nothing(engine: Engine) -> None:
    class Few:
        """Few tokens may come, in any order: what came before comes again, and goes on otherwise."""

        is_done = False

        def mask(self, tokens: Sequence[int]) -> np.ndarray:
            return np.isin(np.arange(engine.manifest.model.vocab_size), [3, 4, 5])

        def accept(self, token_id: int) -> None:
            pass

    options: dict[str, Any] = {"max_tokens": 40, "temperature": 2.0, "seed": 1, "ignore_eos": True}
    expected = engine.complete([3, 4, 5], **options, constraint=Few(), speculate=0).ids
    before = engine.stats()
    assert engine.complete([3, 4, 5], **options, constraint=Few(), speculate=8).ids == expected
    after = engine.stats()
    assert after.draft_tokens - before.draft_tokens > after.accepted_tokens - before.accepted_tokens


def test_nothing_is_asked_of_a_constraint_after_the_end_token(engine: Engine) -> None:
    (end,) = engine.manifest.eos_token_ids
    answer = [3, 4, end]

    class Ends:
        is_done = False

        def mask(self, tokens: Sequence[int]) -> np.ndarray:
            return np.arange(engine.manifest.model.vocab_size) == answer[len(tokens)]

        def accept(self, token_id: int) -> None:
            assert token_id != end

    for speculate in (0, 8):  # with guesses, the end is guessed and right, and so is what followed it
        done = engine.complete(answer * 3, constraint=Ends(), speculate=speculate, max_tokens=60)
        assert (done.ids, done.finish_reason) == ([3, 4], "stop")


@pytest.mark.parametrize("speculate", [0, 8])
def test_penalties_count_what_has_been_generated(engine: Engine, speculate: int) -> None:
    bias = {7: 20.0, 8: 19.5, 9: 19.0}  # of tokens that come again and again
    options: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0, "logit_bias": bias, "speculate": speculate}
    expected: list[int] = []
    while len(expected) < 24:
        logits = engine.logits([3, 4, 5, *expected])[-1].astype(np.float64)
        logits[[*bias]] += [*bias.values()]
        counts = np.bincount(expected, minlength=len(logits))
        expected.append(int((logits - 0.75 * counts - 0.5 * (counts > 0)).argmax()))
    penalties = {"frequency_penalty": 0.75, "presence_penalty": 0.5}
    assert engine.complete([3, 4, 5], **options, **penalties).ids == expected
    assert engine.complete([3, 4, 5], **options).ids != expected


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int32, np.uint32])
@pytest.mark.parametrize("speculate", [0, 4])
def test_a_constraint_decides_what_may_come(engine: Engine, kind: type, speculate: int) -> None:
    vocab_size = engine.manifest.model.vocab_size
    logits = engine.logits([5, 6, 7])[-1]
    constraint = EveryOther(vocab_size, kind)
    options: dict[str, Any] = {"max_tokens": 9, "temperature": 0.0, "ignore_eos": True, "speculate": speculate}
    done = engine.complete([5, 6, 7], constraint=constraint, **options)
    assert done.ids == constraint.accepted
    assert [i % 2 for i in done.ids] == [0, 1, 0, 1]
    assert done.finish_reason == "stop"
    assert done.ids[0] == 2 * int(logits[::2].argmax())


def test_a_constraint_that_fails_ends_its_own_request_only(engine: Engine) -> None:
    class Broken(EveryOther):
        def accept(self, token_id: int) -> None:
            raise RuntimeError("no such state")

    broken = Broken(engine.manifest.model.vocab_size, bool)
    failing = engine.submit(PROMPTS[0], constraint=broken, temperature=0.0)
    other = engine.submit(PROMPTS[2], max_tokens=5, temperature=0.0, ignore_eos=True)
    with pytest.raises(LlmpackError, match="no such state"):
        engine.step()
    while other.finish_reason is None:
        engine.step()
    assert (failing.finish_reason, other.finish_reason) == ("error", "length")
    assert engine.stats().kv_blocks_used == 0


def test_biased_ids_come_always_or_never(engine: Engine) -> None:
    options: dict[str, Any] = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}
    first = engine.complete(PROMPTS[0], **options).ids[0]
    assert engine.complete(PROMPTS[0], logit_bias={first: -math.inf}, **options).ids[0] != first
    assert set(engine.complete(PROMPTS[0], logit_bias={77: 1e4}, **options).ids) == {77}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": math.nan}, "max-tokens nan"),
        ({"max_tokens": 2.5}, "max-tokens 2.5"),
        ({"logprobs": -1}, "logprobs -1"),
        ({"prompt_logprobs": 10**9}, "prompt_logprobs"),
        ({"logit_bias": {10**9: 1.0}}, "vocabulary"),
        ({"logit_bias": {5: math.nan}}, "logit_bias of 5"),
        ({"logit_bias": {5: 1e39}}, "logit_bias of 5"),
        ({"logprobs": 2.0}, "logprobs 2.0"),
        ({"speculate": 99}, "speculate 99"),
        ({"top_q": 1}, "no parameter 'top_q'"),
        ({"frequency_penalty": 3.0}, "frequency_penalty"),
    ],
)
def test_bad_options_are_refused_by_name(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        engine.submit([1, 2], **options)
    assert engine.stats().waiting == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads 0"),
        ({"threads": "2"}, "threads '2'"),
        ({"max_seq_len": 2.5}, "max-seq-len 2.5"),
        ({"max_num_seqs": True}, "max-num-seqs True"),
        ({"kv_cache_mb": 0.5}, "kv-cache-mb 0.5"),
        ({"verify": "twice"}, "verify 'twice'"),
    ],
)
def test_bad_options_of_an_engine_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Engine("anywhere", **options)
