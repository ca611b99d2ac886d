"""The engine in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stats:
    """The engine in numbers, at one moment; counts are since the start.

    Attributes:
        running, waiting: requests.
        kv_blocks_used, kv_blocks_total: blocks that requests hold (those that only remember a prefix are free), of all.
        prefix_hits, prefix_queries: prompt tokens found in the cache, of those looked for.
        prompt_tokens, generated_tokens: of all requests.
        draft_tokens, accepted_tokens: proposed by speculation, and found right.
        preemptions: requests that lost their blocks and are computed again.
        steps: steps run; last_step_s: seconds that the last one took.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_hits: int = 0
    prefix_queries: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    last_step_s: float = 0.0
