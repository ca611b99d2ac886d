"""What is asked of the engine and what comes back: records, and the checks of a prompt."""

from __future__ import annotations

import collections
import functools
import math
import numbers
import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict, cast

from llmrun.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llmrun.constraint import Constraint
    from llmrun.logprobs import TokenLogprobs
    from llmrun.lookup import PromptLookup
    from llmrun.sampler import Sampler, TokenHistory
    from llmrun.sequence import RunningSequence
    from llmrun.text_stream import TextStream
    from llmrun.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 256
MAX_DRAFTS = 16
_NO_LISTS = (bytes, bytearray, memoryview, Mapping)  # though one may go through them
Message = Mapping[str, Any]  # of a chat: "role" and "content"
Prompt = str | Sequence[int] | Sequence[Message]


class RequestOptions(TypedDict, total=False):
    """What may be asked of a request beside its prompt; what is not given is the artifact's default, or off.

    Attributes:
        max_tokens: tokens to sample at most; not given: 256, or what the context has room for; 0 with
            `prompt_logprobs`: the prompt alone.
        stop: a text, or several, that ends the answer and is not part of it.
        ignore_eos: go on after the model's end token.
        logprobs: report log-probabilities, of this many alternatives beside the sampled token.
        prompt_logprobs: the same for each token of the prompt; there before the first event.
        logit_bias: numbers to add to the logits of these ids; -inf: never.
        chat_template_kwargs: for a prompt that is messages: what else its template may ask for, by name.
        constraint: which tokens may come (structured output); the object is this request's alone.
        speculate: tokens to guess ahead at most (prompt look-up); the answer stays the same; not given: the engine's.
        reuse_prefix: False computes the whole prompt, even if the cache holds its beginning.
        is_continuation: the answer goes on after other text, so a space that it begins with is part of it; not given:
            for a prompt that is text, and with a constraint, which counts it.
        shown_tokens: tokens with another text in the answer than the tokenizer's: special ones, of which it has none.
        temperature, top_k, top_p, min_p, repeat_penalty, presence_penalty, frequency_penalty, seed: see `SamplingParams`.
    """

    max_tokens: int | None
    stop: str | Sequence[str] | None
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    logit_bias: Mapping[int, float] | None
    chat_template_kwargs: Mapping[str, Any] | None
    constraint: Constraint | None
    speculate: int | None
    reuse_prefix: bool
    is_continuation: bool | None
    shown_tokens: Mapping[int, str] | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repeat_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None


@dataclass(eq=False)
class Request:
    """A prompt on its way to a completion.

    `finish_reason` is None until it ends: "stop", "length", "cancelled", or "error" (then `error` says why).
    `logprobs` is what each token of `ids` had, `prompt_logprobs` what each prompt token had (the first: None); both
    None unless asked for.
    """

    sequence: RunningSequence
    prompt_ids: list[int]
    sampler: Sampler | None = None
    stream: TextStream | None = None
    end_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    history: TokenHistory | None = None  # for penalties
    lookup: PromptLookup | None = None  # for speculation
    num_top: int | None = None  # alternatives to report of each sampled token
    num_prompt_top: int | None = None  # and of each prompt token
    ids: list[int] = field(default_factory=list)
    text: str = ""
    num_generated: int = 0  # tokens sampled, the end token too
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    error: Exception | None = None
    events: collections.deque[Event] | None = None  # not yet taken, where somebody takes them one by one
    rows: list[NDArray[np.float32]] = field(default_factory=list)
    submitted_s: float = field(default_factory=time.perf_counter)
    started_s: float = 0.0  # its first step
    first_token_s: float = 0.0
    last_token_s: float = 0.0

    @functools.cached_property
    def num_candidates(self) -> int | None:
        """How many of a row's likeliest tokens say what follows and what is reported of it; None: the whole row."""
        if self.sampler is None or self.constraint is not None or self.sampler.num_candidates is None:
            return None
        return max(self.sampler.num_candidates, self.num_top or 0)

    @property
    def num_cached_prompt(self) -> int:
        """Prompt tokens that were not computed because an earlier request had left them in the cache."""
        return self.sequence.num_reused

    def completion(self, load_ms: float) -> Completion:
        """Return what a finished (or cancelled) request has become; `load_ms`: what the engine took to load."""
        prompt_s = self.first_token_s - self.submitted_s if self.first_token_s else 0.0
        timings = {
            "prompt_n": len(self.prompt_ids),
            "prompt_ms": round(prompt_s * 1e3, 3),
            "predicted_n": self.num_generated,
            "predicted_ms": round((self.last_token_s - self.first_token_s) * 1e3, 3),
            "load_ms": round(load_ms, 3),
        }
        text = None if self.stream is None else self.text
        reason = self.finish_reason or "stop"
        return Completion(text, self.prompt_ids, self.ids, reason, timings, self.logprobs, self.prompt_logprobs)


@dataclass(frozen=True, slots=True)
class Event:
    """What a step added to a request.

    Attributes:
        request: whose.
        token_id: None for the end token, and for an event that only ends the request.
        text: the text that is safe to show now; may be empty.
        logprobs: of the token, if the request asked (the end token's too).
        finish_reason: as in `Request`, on a request's last event; there is exactly one.
        error: why, if `finish_reason` is "error".
    """

    request: Request
    token_id: int | None
    text: str
    logprobs: TokenLogprobs | None = None
    finish_reason: str | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class Completion:
    """A finished request. `text` is None without a tokenizer; `ids` leaves the end token out; timings in milliseconds."""

    text: str | None
    prompt_ids: list[int]
    ids: list[int]
    finish_reason: str
    timings: dict[str, float]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the members that the command line prints."""
        return {name: getattr(self, name) for name in ("text", "prompt_ids", "ids", "finish_reason", "timings")}


def check_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Return token ids as a list.

    Raises:
        UsageError: one is not in the vocabulary; the graph would read beyond its table. Or it is no integer, or true or
        false, or they are bytes or the keys of something.
    """
    if isinstance(ids, _NO_LISTS):
        raise UsageError(f"token ids: found {type(ids).__name__}, expected a list of whole numbers.", code="E206")
    try:
        checked = [operator.index(i) for i in ids]
    except TypeError as error:
        raise UsageError(f"token ids: {error}.", code="E206") from None
    if any(isinstance(i, bool) for i in ids):
        raise UsageError("token ids: found a bool, expected whole numbers.", code="E206")
    if bad := [i for i in checked if not 0 <= i < vocab_size]:
        raise UsageError(f"token id {bad[0]} is not in the vocabulary of {vocab_size}.", code="E206")
    return checked


def check_prompt(
    prompt: Prompt,
    max_tokens: int | None,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    max_seq_len: int,
    packed_seq_len: int,
    *,
    least_tokens: int = 1,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[int], int]:
    """Return the prompt's ids, and how many tokens to sample at most.

    Args:
        prompt: a text, ids, or the messages of a chat.
        max_tokens: None: 256, or what there is room for.
        tokenizer: None: ids only.
        vocab_size: of the model.
        max_seq_len: positions of one sequence at most.
        packed_seq_len: what the user may raise that to.
        least_tokens: 0 where a request may be about its prompt alone.
        chat_template_kwargs: of messages; see `encode_chat`.

    Raises:
        UsageError: the prompt is no prompt, is empty, holds an id that is not in the vocabulary, or leaves no room.
    """
    if isinstance(prompt, _NO_LISTS) or not hasattr(prompt, "__getitem__"):
        found = type(prompt).__name__
        raise UsageError(f"prompt: found {found}, expected a text, token ids, or a list of messages.", code="E203")
    if len(prompt) > 0 and isinstance(prompt[0], str | Mapping):
        if tokenizer is None:
            raise UsageError("the artifact has no tokenizer: give token ids.", code="E205")
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt)
        else:
            from llmrun.chat import encode_chat  # brings the template engine, which nobody else needs

            messages = cast("Sequence[Message]", prompt)
            ids = encode_chat(tokenizer, messages, chat_template_kwargs=chat_template_kwargs)
    else:
        ids = check_ids(cast("Sequence[int]", prompt), vocab_size)
    if not ids:
        raise UsageError("the prompt is empty.", code="E203")
    room = max_seq_len - len(ids)
    if room < least_tokens:
        is_cut = max_seq_len < packed_seq_len
        longer = (
            f"give a larger --max-seq-len (at most {packed_seq_len})" if is_cut else "pack with a longer --max-seq-len"
        )
        raise UsageError(
            f"the prompt has {len(ids)} tokens and fills the context of {max_seq_len}. Shorten it, or {longer}.",
            code="E204",
        )
    wanted = min(DEFAULT_MAX_TOKENS, room) if max_tokens is None else max_tokens
    if not is_whole(wanted, least_tokens):
        raise UsageError(f"max-tokens {wanted!r}: expected a whole number from {least_tokens}.")
    if wanted > room:
        raise UsageError(
            f"the prompt has {len(ids)} tokens and max-tokens is {wanted}; together they do not fit the context of"
            f" {max_seq_len}. Use {room} or less, or shorten the prompt.",
            code="E210",
        )
    return ids, wanted


def check_speculate(speculate: int) -> int:
    """Return the number of tokens to guess ahead.

    Raises:
        UsageError: it is none.
    """
    if not is_whole(speculate, 0, MAX_DRAFTS):
        raise UsageError(f"speculate {speculate!r}: expected 0 (off) to {MAX_DRAFTS} tokens.")
    return speculate


def is_whole(value: object, least: int, most: float = math.inf) -> bool:
    """Tell whether a value is a whole number within bounds."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and least <= int(value) <= most
