"""Tokens from the rows of logits of one request, as far as its guesses were right."""

from __future__ import annotations

from collections.abc import Sequence

from llmrun.constraint import allowed_tokens
from llmrun.logprobs import TokenLogprobs, likeliest_logprobs, token_logprobs
from llmrun.requests import Request
from llmrun.rows import Rows


def sample_rows(
    request: Request, drafts: Sequence[int], rows: Rows, *, is_by_likeliest: bool
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """Sample a token from each row, as long as the rows before it were computed from the very tokens sampled.

    So the tokens are those that would have been sampled one by one, random numbers included.

    Args:
        request: whose; its sampler, history, constraint and lookup move on.
        drafts: tokens that were guessed.
        rows: logits after the last token, and after each draft.
        is_by_likeliest: whether the likeliest tokens that a step names are enough.
    Returns:
        the tokens, at least one, and what is reported of each.
    """
    assert request.sampler is not None
    sampled: list[int] = []
    constraint, allowed = request.constraint, None
    likeliest = rows.likeliest if is_by_likeliest else None
    first_ids = rows.first_ids if likeliest is None and request.num_candidates == 1 else None
    for i, draft in enumerate([*drafts, None]):
        if likeliest is not None:
            token_id = request.sampler.choose(likeliest.logits[i], likeliest.ids[i])
        elif first_ids is not None:
            token_id = first_ids[i]
        else:
            row = rows.logits[i]
            if constraint is not None:
                allowed = allowed_tokens(constraint.mask(request.ids + sampled), len(row))
            token_id = request.sampler.sample(row, request.history or (), allowed)
        sampled.append(token_id)
        is_over = token_id != draft or token_id in request.end_ids
        if request.history is not None:
            request.history.append(token_id)
        if constraint is not None and token_id not in request.end_ids:
            constraint.accept(token_id)
            is_over = is_over or constraint.is_done
        if is_over:
            break
    scored: list[TokenLogprobs | None] = [None] * len(sampled)
    if request.num_top is not None:
        if likeliest is not None:
            scored = [*likeliest_logprobs(likeliest, sampled, request.num_top)]
        else:
            scored = [*token_logprobs(rows.logits[: len(sampled)], sampled, request.num_top)]
    if request.lookup is not None:
        request.lookup.learn(len(drafts), len(sampled) - 1)
    return sampled, scored
