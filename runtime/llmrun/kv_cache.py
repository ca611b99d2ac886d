"""Blocks of the KV cache: who holds which, and which still hold a prefix that a later sequence can share.

Knows numbers only; the memory itself belongs to the session. A block holds `block_size` consecutive positions of a
sequence, in every layer (paging as in vLLM, Kwon et al. 2023, section 4). Once all its positions are computed, a block
never changes, and is published under a key made of its tokens and all tokens before it: a sequence that begins with the
same tokens holds the same block. A published block that nobody holds is free, but keeps its content until it is needed,
the least recently used first.
"""

from __future__ import annotations

import collections
import hashlib
import heapq
from collections.abc import Sequence

import numpy as np

from llmrun.errors import ResourceError

Key = bytes


class BlockPool:
    """All blocks of the cache."""

    def __init__(self, num_blocks: int, block_size: int, identity: bytes = b"") -> None:
        """`num_blocks` blocks of `block_size` positions each; `identity`: of what computes keys and values, the model."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks} blocks of {block_size} positions")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._root = hashlib.sha256(identity).digest()
        self._holders = [0] * num_blocks
        self._blank = list(range(num_blocks))  # a heap, so that memory never used is never touched
        # Published blocks that nobody holds, least recently used first.
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._block_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._blank) + len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    def extend_keys(self, keys: list[Key], tokens: Sequence[int], num_blocks: int) -> None:
        """Append the keys of the blocks of `tokens` that `keys` lacks, up to `num_blocks` (all of them full)."""
        size = self.block_size
        for i in range(len(keys), num_blocks):
            content = np.asarray(tokens[i * size : (i + 1) * size], np.int32).tobytes()
            keys.append(hashlib.sha256((keys[-1] if keys else self._root) + content).digest())

    def find(self, keys: Sequence[Key]) -> list[int]:
        """Return the blocks of the longest known beginning of `keys`; takes nothing."""
        blocks: list[int] = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            blocks.append(block)
        return blocks

    def num_idle(self, blocks: Sequence[int]) -> int:
        """Return how many of the blocks nobody holds: taking those makes that many fewer free."""
        return sum(self._holders[block] == 0 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Hold published blocks, with whoever holds them already."""
        for block in blocks:
            if block not in self._key_of:
                raise ValueError(f"block {block} is not published")
            self._idle.pop(block, None)
            self._holders[block] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks whose content nobody needs: never used ones first, then the least recently used.

        Raises:
            ResourceError: there are not so many; nothing is taken.
        """
        if num_blocks > self.num_free:
            raise ResourceError(
                f"KV cache: {num_blocks} blocks needed, {self.num_free} of {self.num_blocks} free.", code="E502"
            )
        blocks: list[int] = []
        for _ in range(num_blocks):
            if self._blank:
                block = heapq.heappop(self._blank)
            else:
                block, _ = self._idle.popitem(last=False)
                self._forget(block)
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: Key) -> None:
        """Let others find a block that its holder will never write again; of two equal ones the first is found."""
        if self._holders[block] < 1:
            raise ValueError(f"block {block} is nobody's")
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Stop holding blocks, given in order of position; one that is not held is a bug."""
        if len(set(blocks)) != len(blocks) or not all(0 <= b < self.num_blocks and self._holders[b] for b in blocks):
            raise ValueError(f"blocks {list(blocks)} are not all held")
        for block in reversed(blocks):  # so that of a prefix the end leaves first: without it the beginning is of use
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    heapq.heappush(self._blank, block)

    def unpublish(self, blocks: Sequence[int]) -> None:
        """Let nobody find these blocks any more: what they hold is not to be trusted."""
        for block in blocks:
            if block in self._key_of:
                self._forget(block)
                if block in self._idle:
                    del self._idle[block]
                    heapq.heappush(self._blank, block)

    def _forget(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)]
