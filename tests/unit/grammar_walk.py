"""A walk through a grammar: random tokens of those that it allows."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmrun.constraint import allowed_tokens
from llmrun.server.grammar import Grammars, TokenConstraint
from llmrun.text_stream import TextStream
from llmrun.tokenizer import Tokenizer


def walk(
    grammars: Grammars,
    tokenizer: Tokenizer,
    kind: str,
    source: Any,
    seed: int,
    most: int = 400,
    shown: Mapping[int, str] | None = None,
) -> str | None:
    """Return the text of random allowed tokens, with that of `shown` ones; None: it did not end."""
    stream = TextStream(tokenizer, shown=shown)
    constraint = grammars.constraint(kind, source)
    rng = random.Random(seed)
    ids: list[int] = []
    vocab_size = tokenizer.vocab_size + 61
    while len(ids) < most and not constraint.is_done:
        allowed = np.flatnonzero(allowed_tokens(constraint.mask(ids), vocab_size)).tolist()
        assert allowed
        assert max(allowed) < tokenizer.vocab_size
        token_id = rng.choice(allowed)
        if token_id in tokenizer.eos_token_ids:
            return "".join(map(stream.push, ids)) + stream.finish()
        ids.append(token_id)
        constraint.accept(token_id)
    return "".join(map(stream.push, ids)) + stream.finish() if constraint.is_done else None


def line_breaks_allowed(
    constraint: TokenConstraint, tokenizer: Tokenizer, begun: str, special: Mapping[str, int] | None = None
) -> int:
    """Return how many line breaks, two at most, a grammar allows behind a text that it has begun with.

    The texts of `special` in it stand for their tokens.
    """
    assert tokenizer.bos_token_id is not None
    newline = tokenizer.encode_segments([tokenizer.bos_token_id, "{\n"])[-1]
    ids: list[int] = []
    pieces = re.split("(" + "|".join(map(re.escape, special)) + ")", begun) if special else [begun]
    segments = [(special or {}).get(piece, piece) for piece in pieces if piece]
    for token_id in tokenizer.encode_segments([tokenizer.bos_token_id, *segments])[1:]:
        constraint.accept(token_id)
        ids.append(token_id)
    for count in range(2):
        if not allowed_tokens(constraint.mask(ids), tokenizer.vocab_size + 61)[newline]:
            return count
        constraint.accept(newline)
        ids.append(newline)
    return 2
