"""A walk through a grammar: random tokens of those that it allows."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from llmrun.constraint import allowed_tokens
from llmrun.server.grammar import Grammars, TokenConstraint
from llmrun.tokenizer import Tokenizer


def walk(grammars: Grammars, tokenizer: Tokenizer, kind: str, source: Any, seed: int, most: int = 400) -> str | None:
    """Return the text of random allowed tokens; None: it did not end."""
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
            return tokenizer.decode(ids)
        ids.append(token_id)
        constraint.accept(token_id)
    return tokenizer.decode(ids) if constraint.is_done else None


def line_breaks_allowed(constraint: TokenConstraint, tokenizer: Tokenizer, begun: str) -> int:
    """Return how many line breaks, two at most, a grammar allows behind a text that it has begun with."""
    assert tokenizer.bos_token_id is not None
    newline = tokenizer.encode_segments([tokenizer.bos_token_id, "{\n"])[-1]
    ids: list[int] = []
    for token_id in tokenizer.encode_segments([tokenizer.bos_token_id, begun])[1:]:
        constraint.accept(token_id)
        ids.append(token_id)
    for count in range(2):
        if not allowed_tokens(constraint.mask(ids), tokenizer.vocab_size + 61)[newline]:
            return count
        constraint.accept(newline)
        ids.append(newline)
    return 2
