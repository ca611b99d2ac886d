"""Speculation without a second model: guess that what came before comes again (prompt look-up decoding).

A sequence that ends with some n tokens, and held the same n before, may go on as it did then (Saxena 2023,
https://github.com/apoorvumang/prompt-lookup-decoding). The guesses run along with the sequence's own token, and what
the model would have sampled decides how many of them stay, so guesses change the time that an answer takes and nothing
else. Guesses cost time where they are wrong, so their number follows how many were right of late.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST_MATCH = 4
SHORTEST_MATCH = 2  # single tokens recur everywhere, and are followed by anything


class PromptLookup:
    """The guesses of one sequence."""

    def __init__(self, max_drafts: int) -> None:
        """`max_drafts`: tokens guessed at once, at most."""
        self._max_drafts = self._num_drafts = max_drafts
        self._after: dict[tuple[int, ...], int] = {}  # the last tokens before a place -> the latest such place
        self._num_seen = 0

    def propose(self, tokens: Sequence[int], limit: int) -> list[int]:
        """Return up to `limit` tokens that may follow `tokens`, which have only grown since the last call."""
        for end in range(max(self._num_seen, SHORTEST_MATCH), len(tokens)):
            for length in range(SHORTEST_MATCH, min(LONGEST_MATCH, end) + 1):
                self._after[tuple(tokens[end - length : end])] = end
        self._num_seen = len(tokens)  # the place after the last token is entered when something follows it
        for length in range(min(LONGEST_MATCH, len(tokens)), SHORTEST_MATCH - 1, -1):
            place = self._after.get(tuple(tokens[len(tokens) - length :]))
            if place is not None:
                return list(tokens[place : place + min(limit, self._num_drafts)])
        return []

    def learn(self, num_drafts: int, num_right: int) -> None:
        """Take note of how many guesses were right: twice as many next time if all were, else one more than were."""
        if num_drafts:
            wanted = 2 * num_right if num_right == num_drafts else num_right + 1
            self._num_drafts = min(max(wanted, 1), self._max_drafts)
