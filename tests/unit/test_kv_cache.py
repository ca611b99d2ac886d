"""Cache blocks: nobody gets another's, and none is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrun.errors import ResourceError
from llmrun.kv_cache import BlockAllocator


@given(st.lists(st.tuples(st.integers(1, 40), st.booleans()), max_size=60))
def test_blocks_in_use_are_distinct_and_all_come_back(steps: list[tuple[int, bool]]) -> None:
    allocator = BlockAllocator(16, 4)
    owned: list[list[int]] = []
    for num_tokens, gives_back in steps:
        if gives_back and owned:
            allocator.release(owned.pop(0))
        elif allocator.blocks_for(num_tokens) <= allocator.num_free:
            owned.append(allocator.allocate(num_tokens))
        used = [block for blocks in owned for block in blocks]
        assert len(set(used)) == len(used)
        assert allocator.num_free + len(used) == 16
    for blocks in owned:
        allocator.release(blocks)
    assert sorted(allocator.allocate(64)) == list(range(16))


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_last_block_may_be_partly_used(num_tokens: int, num_blocks: int) -> None:
    assert len(BlockAllocator(8, 4).allocate(num_tokens)) == num_blocks


def test_too_many_blocks_are_refused_and_nothing_is_taken() -> None:
    allocator = BlockAllocator(2, 4)
    with pytest.raises(ResourceError, match="3 blocks needed for 9 tokens, 2 of 2 free"):
        allocator.allocate(9)
    assert allocator.num_free == 2


@pytest.mark.parametrize("blocks", [[0, 0], [5], [99]])
def test_giving_back_what_is_not_owned_is_a_bug(blocks: list[int]) -> None:
    allocator = BlockAllocator(8, 4)
    allocator.allocate(4)
    with pytest.raises(ValueError, match="not all owned"):
        allocator.release(blocks)


def test_lowest_blocks_come_first() -> None:
    allocator = BlockAllocator(8, 4)
    first, second = allocator.allocate(4), allocator.allocate(4)
    allocator.release(first)
    assert (second, allocator.allocate(4)) == ([1], [0])
