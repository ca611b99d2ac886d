"""One-shot all-reduces over memory that every rank can read (FORMAT.md 8.5): pinned host memory, or peers' device memory.

Each rank writes what it has into its own region, once; releases a flag with the number of the step; waits for the others'
flags; reads. Two halves of the region take turns, so one flag per row is all the synchronization: a rank that writes half h at
step e has seen every other rank's flag of step e - 1, and so knows that it is done with that half, read at step e - 2.
The flags count up for ever and are compared by difference: nothing is ever reset, and 2^31 steps do not matter.

Shared memory sees plain loads and stores only. An atomic read-modify-write of host memory or of a peer's is none where the
links have no PCIe atomics (CUDA: hostNativeAtomicSupported, cudaDevP2PAttrNativeAtomicSupported): a rank that waits with one
could write an old flag back over a new one. What orders a rank's data before its flag is an atomic on its own device memory.

The next kernels' programs may wait beside those that wait here (`overlap`): they take places only once each of these has one.

Loads of others' data and flags are volatile: a line that an earlier step left in a cache must not serve them.
"""

import triton
import triton.language as tl

from llmpack_kernels.decode import INTERPRETED
from llmpack_kernels.elementwise import normalise, normed
from llmpack_kernels.matmul import saturate
from llmpack_kernels.overlap import begin

FLAG_STRIDE = tl.constexpr(32)  # int32: one flag for every 128 bytes, so that ranks do not share lines


@triton.jit
def _region(table, rank, pointer):
    """Return rank's entry of `table` int64 [ranks] as an address of the element type of `pointer`; regions are aligned."""
    return tl.multiple_of(tl.load(table + rank).to(pointer.dtype), 16)


@triton.jit
def _announce(flags, epochs, rank, row, written, DRAIN: tl.constexpr):
    """Release the next epoch to all ranks, after everything that this program has written; `written` is any tensor of it.

    One thread releases: its fence is cumulative over what the barrier has ordered before it, and the flag's value comes from
    the fencing operation, so it cannot be stored earlier. On CDNA a barrier does not wait for the other waves' stores, and the
    fence only for its own: there each wave waits for its stores first.
    """
    if DRAIN and not INTERPRETED:
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\n\tv_mov_b32 $0, $1", "=v,v,~{memory}", [tl.arange(0, written.shape[0])], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    tl.debug_barrier()
    before = tl.atomic_add(epochs + row, 1, sem="acq_rel", scope="sys")
    tl.store(_region(flags, rank, epochs) + row * FLAG_STRIDE, before + 1, cache_modifier=".wt")


@triton.jit
def _await(flags, rank, row, epoch, like):
    """Wait until a rank has released `epoch` or a later one."""
    flag = _region(flags, rank, like) + row * FLAG_STRIDE
    while tl.load(flag, volatile=True) - epoch < 0:
        pass


@triton.jit
def _sum(x, buffers, flags, epochs, rank, row, start, inside, column,
         H: tl.constexpr, RANKS: tl.constexpr, MAX_ROWS: tl.constexpr, DRAIN: tl.constexpr):  # fmt: skip
    """Return the sum of all ranks' row, in rank order, float32 [BLOCK]."""
    epoch = tl.load(epochs + row) + 1
    half = ((epoch & 1) * MAX_ROWS + row).to(tl.int64) * H
    own = tl.load(x + start + column, mask=inside, other=0.0)
    tl.store(_region(buffers, rank, x) + half + column, own, mask=inside)
    _announce(flags, epochs, rank, row, own, DRAIN)
    total = own.to(tl.float32) * 0.0
    for other in tl.static_range(RANKS):
        _await(flags, other, row, epoch, epochs)
        tl.debug_barrier()
        part = tl.load(_region(buffers, other, x) + half + column, mask=inside, other=0.0, volatile=True)
        total += part.to(tl.float32)
    return total


@triton.jit
def all_reduce_add_rms_norm(
    x,
    residual,
    weight,
    y,
    buffers,
    flags,
    epochs,
    rank,
    epsilon,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    DRAIN: tl.constexpr,
):
    """Residual += sum of the ranks' x, y = norm(residual): x float16 [rows, H]; a program per row."""
    begin()
    row = tl.program_id(0)
    start = row.to(tl.int64) * H
    column = tl.arange(0, BLOCK)
    inside = column < H
    value = tl.load(residual + start + column, mask=inside, other=0.0)
    w = tl.load(weight + column, mask=inside, other=0.0)
    value += _sum(x, buffers, flags, epochs, rank, row, start, inside, column, H, RANKS, MAX_ROWS, DRAIN)
    tl.store(residual + start + column, value, mask=inside)
    normalise(value, w, y + start, epsilon, H, BLOCK)


@triton.jit
def all_reduce_norm_add_rms_norm(
    x,
    x_weight,
    residual,
    weight,
    y,
    buffers,
    flags,
    epochs,
    rank,
    epsilon,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    DRAIN: tl.constexpr,
):
    """Do the same with the norm of that sum, by x_weight, in its place."""
    begin()
    row = tl.program_id(0)
    start = row.to(tl.int64) * H
    column = tl.arange(0, BLOCK)
    inside = column < H
    value = tl.load(residual + start + column, mask=inside, other=0.0)
    x_w = tl.load(x_weight + column, mask=inside, other=0.0)
    w = tl.load(weight + column, mask=inside, other=0.0)
    total = _sum(x, buffers, flags, epochs, rank, row, start, inside, column, H, RANKS, MAX_ROWS, DRAIN)
    value += normed(total, x_w, epsilon, H)
    tl.store(residual + start + column, value, mask=inside)
    normalise(value, w, y + start, epsilon, H, BLOCK)


@triton.jit
def all_reduce(
    x,
    y,
    buffers,
    flags,
    epochs,
    rank,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    DRAIN: tl.constexpr,
):
    """Y = sum of the ranks' x, float16 [rows, H], rounded once; y may be x."""
    begin()
    row = tl.program_id(0)
    start = row.to(tl.int64) * H
    column = tl.arange(0, BLOCK)
    inside = column < H
    total = _sum(x, buffers, flags, epochs, rank, row, start, inside, column, H, RANKS, MAX_ROWS, DRAIN)
    tl.store(y + start + column, saturate(total, y), mask=inside)
