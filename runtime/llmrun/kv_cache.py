"""Blocks of the KV cache: which are free, and which belong to which sequence.

Knows numbers only; the memory itself belongs to the session. A block holds `block_size` consecutive positions of one
sequence, in every layer (paging as in vLLM, Kwon et al. 2023, section 4). A block has one owner; sharing of prefixes
would add a count here.
"""

from __future__ import annotations

import heapq

from llmrun.errors import ResourceError


class BlockAllocator:
    """Hands out cache blocks, lowest number first, so that memory never used is never touched."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """`num_blocks` blocks of `block_size` positions each."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks} blocks of {block_size} positions")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks))  # a heap

    @property
    def num_free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_tokens: int) -> list[int]:
        """Take the blocks for a sequence of up to `num_tokens` positions, in order of position.

        Raises:
            ResourceError: there are not so many free blocks.
        """
        needed = self.blocks_for(num_tokens)
        if needed > len(self._free):
            raise ResourceError(
                f"KV cache: {needed} blocks needed for {num_tokens} tokens, {len(self._free)} of {self.num_blocks} free.",
                code="E502",
            )
        return [heapq.heappop(self._free) for _ in range(needed)]

    def release(self, blocks: list[int]) -> None:
        """Give blocks back; a block that is free already is a bug."""
        given = set(blocks)
        if len(given) != len(blocks) or given & set(self._free) or not given <= set(range(self.num_blocks)):
            raise ValueError(f"blocks {blocks} are not all owned")
        for block in blocks:
            heapq.heappush(self._free, block)
