"""Cache blocks: nobody writes what another reads, none is lost, and what was computed is found again."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from llmrun.errors import ResourceError
from llmrun.kv_cache import BlockPool

BLOCK_SIZE = 2


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, share, grow, publish and leave; a model of each block's content says what may be found."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(9, BLOCK_SIZE, b"model")
        self.held: dict[int, list[int]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.keys: dict[int, list[bytes]] = {}
        self.content: dict[int, tuple[int, ...]] = {}  # block -> all tokens up to its end, as last written
        self.private: dict[int, set[int]] = {}  # blocks that the sequence may still write
        self.count = 0

    @rule(target=sequences, tokens=st.lists(st.integers(0, 1), min_size=2, max_size=8))
    def begin(self, tokens: list[int]) -> int:
        """Take what is known of a prefix, and new blocks for the rest, as far as there are any."""
        keys: list[bytes] = []
        self.pool.extend_keys(keys, tokens, len(tokens) // BLOCK_SIZE)
        found = self.pool.find(keys)
        for i, block in enumerate(found):
            assert self.content[block] == tuple(tokens[: (i + 1) * BLOCK_SIZE]), "found somebody else's tokens"
        num_new = len(keys) - len(found)
        name = self.count = self.count + 1
        self.held[name], self.tokens[name], self.keys[name], self.private[name] = [], tokens, keys, set()
        free = self.pool.num_free
        if num_new + self.pool.num_idle(found) > free:
            return name
        idle = self.pool.num_idle(found)
        self.pool.share(found)
        new = self.pool.allocate(num_new)
        assert self.pool.num_free == free - idle - num_new
        everybodys = {block for blocks in self.held.values() for block in blocks}
        assert not set(new) & (everybodys | set(found)), "a block that somebody holds was given away"
        for block in new:
            self.content.pop(block, None)
        self.held[name] = found + new
        self.private[name] = set(new)
        return name

    @rule(name=sequences, count=st.integers(0, 4))
    def compute(self, name: int, count: int) -> None:
        """Write some blocks' positions, and publish them."""
        for i, block in list(enumerate(self.held[name]))[:count]:
            if block in self.private[name]:
                self.content[block] = tuple(self.tokens[name][: (i + 1) * BLOCK_SIZE])
                self.pool.publish(block, self.keys[name][i])
                self.private[name].discard(block)

    @rule(name=sequences, is_sound=st.booleans())
    def leave(self, name: int, is_sound: bool) -> None:
        if not is_sound:
            self.pool.unpublish(self.held[name])
            assert not set(self.pool.find(self.keys[name])) & set(self.held[name])
        self.pool.release(self.held[name])
        self.held[name], self.private[name] = [], set()

    @invariant()
    def counts_are_those_of_the_holders(self) -> None:
        holders = [sum(block in blocks for blocks in self.held.values()) for block in range(9)]
        assert self.pool._holders == holders
        assert self.pool.num_free == holders.count(0)

    @invariant()
    def what_may_be_written_is_ones_own(self) -> None:
        for name, private in self.private.items():
            for block in private:
                assert self.pool._holders[block] == 1
                assert not any(block in blocks for other, blocks in self.held.items() if other != name)

    @invariant()
    def nothing_is_found_that_was_overwritten(self) -> None:
        for keys, tokens in zip(self.keys.values(), self.tokens.values(), strict=True):
            for i, block in enumerate(self.pool.find(keys)):
                assert self.content[block] == tuple(tokens[: (i + 1) * BLOCK_SIZE])


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30)


def publish_all(pool: BlockPool, tokens: list[int]) -> tuple[list[int], list[bytes]]:
    keys: list[bytes] = []
    pool.extend_keys(keys, tokens, len(tokens) // pool.block_size)
    blocks = pool.allocate(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    return blocks, keys


def test_the_least_recently_used_leaves_and_of_a_prefix_its_end() -> None:
    pool = BlockPool(4, 2)
    old, old_keys = publish_all(pool, [1, 1, 1, 1])
    new, new_keys = publish_all(pool, [2, 2, 2, 2])
    pool.release(old)
    pool.release(new)
    pool.share(pool.find(old_keys))  # used again: now the other is older
    pool.release(old)
    pool.allocate(1)
    assert (pool.find(old_keys), pool.find(new_keys)) == (old, new[:1])


def test_memory_never_used_comes_before_what_is_remembered() -> None:
    pool = BlockPool(4, 2)
    blocks, keys = publish_all(pool, [1, 1])
    pool.release(blocks)
    assert pool.allocate(3) == [1, 2, 3]
    assert pool.find(keys) == blocks


def test_a_key_depends_on_all_tokens_before() -> None:
    pool = BlockPool(4, 2)
    keys: list[list[bytes]] = [[], []]
    pool.extend_keys(keys[0], [1, 2, 3, 4], 2)
    pool.extend_keys(keys[1], [1, 9, 3, 4], 2)
    assert keys[0][1] != keys[1][1]


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_last_block_may_be_partly_used(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(8, 4).blocks_for(num_tokens) == num_blocks


def test_too_many_blocks_are_refused_and_nothing_is_taken() -> None:
    pool = BlockPool(2, 4)
    with pytest.raises(ResourceError, match="3 blocks needed, 2 of 2 free"):
        pool.allocate(3)
    assert pool.num_free == 2


@pytest.mark.parametrize("blocks", [[0, 0], [5], [99], [-1]])
def test_giving_back_what_is_not_held_is_a_bug(blocks: list[int]) -> None:
    pool = BlockPool(8, 4)
    pool.allocate(1)
    with pytest.raises(ValueError, match="not all held"):
        pool.release(blocks)


def test_what_nobody_holds_is_not_published_and_what_is_not_published_is_not_shared() -> None:
    pool = BlockPool(8, 4)
    with pytest.raises(ValueError, match="nobody's"):
        pool.publish(3, b"key")
    (block,) = pool.allocate(1)
    with pytest.raises(ValueError, match="not published"):
        pool.share([block])
