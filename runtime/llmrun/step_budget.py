"""How many tokens a step may have: what the scheduler plans with, and what a GPU's memory is laid out for."""

from __future__ import annotations

DEFAULT_TOKEN_BUDGET = 512
# Beside decoding sequences, which wait for the whole step: as few as cost no speed (tests/benchmarks/LOG.md).
DEFAULT_MIXED_BUDGET = 64


def most_tokens(token_budget: int, max_num_seqs: int) -> int:
    """Return how many tokens a step has at most: one for each of several sequences, and one to spare for a prompt."""
    return max(token_budget, max_num_seqs + (max_num_seqs > 1))
