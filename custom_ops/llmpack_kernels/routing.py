"""The experts of each token, and their weights (FORMAT.md 5.16, 8.4), by the router's logits.

What is none of the kernel's parameters (`correction_bias`, `scaling_factor`) is 0.
"""

import triton
import triton.language as tl

from llmpack_kernels.overlap import begin

LEAST_SUM = tl.constexpr(1e-20)  # that weights are divided by (FORMAT.md 5.16)


@triton.jit
def _odds(value, is_there, IS_SIGMOID: tl.constexpr):
    """Return sigmoid of the logits, or what they have to be divided by the sum of for their softmax."""
    odds = 1.0 / (1.0 + tl.exp(-value)) if IS_SIGMOID else tl.exp(value - tl.max(value, 0))
    return tl.where(is_there, odds, 0.0)


@triton.jit
def route(
    logits,
    correction_bias,
    experts,
    routing,
    scaling_factor,
    E: tl.constexpr,
    CHOSEN: tl.constexpr,
    SHARED: tl.constexpr,
    IS_NORMED: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    TOP: tl.constexpr,
):
    """Logits float32 [rows, E], correction_bias float32 [E] -> experts int32, routing float32 [rows, CHOSEN + SHARED].

    BLOCK >= E and TOP >= CHOSEN: powers of 2. Any row has CHOSEN experts, each below E, whatever its logits are, and then those
    from E on, of weight 1. NaN among the logits, or an infinity that is the largest, makes the weights of those chosen NaN.
    """
    begin()
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    is_there = expert < E
    value = tl.load(logits + row * E + expert, mask=is_there, other=float("-inf")) + 0.0  # -0 becomes 0
    order = value
    if HAS_CORRECTION:
        odds = _odds(value, is_there, IS_SIGMOID)
        if not IS_SIGMOID:
            odds /= tl.sum(odds, 0)
        order = odds + tl.load(correction_bias + expert, mask=is_there, other=0.0)
    bits = order.to(tl.int32, bitcast=True)
    bits ^= (bits >> 31) & 0x7FFFFFFF  # now they sort as the numbers do
    key = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - expert).to(tl.int64)  # of equal ones the lower expert's is larger
    key = tl.where(is_there, key, -0x7FFFFFFFFFFFFFFF)
    least = tl.sum(tl.where(tl.arange(0, TOP) == CHOSEN - 1, tl.topk(key, TOP), 0), 0)
    is_chosen = is_there & (key >= least)
    if not HAS_CORRECTION:
        odds = _odds(value, is_there, IS_SIGMOID)
    total = tl.sum(tl.where(is_chosen, odds, 0.0) if IS_NORMED else odds, 0)
    is_bad = tl.max((value != value).to(tl.int32), 0) > 0  # the largest of all may not be NaN though one of them is
    if IS_SIGMOID or HAS_CORRECTION:
        total = tl.maximum(total, LEAST_SUM) if IS_NORMED else 1.0
        is_bad |= tl.abs(tl.max(value, 0)) == float("inf")
    weight = tl.where(is_bad, float("nan"), odds / total)
    if HAS_FACTOR:
        weight *= scaling_factor
    place = row * (CHOSEN + SHARED) + tl.cumsum(is_chosen.to(tl.int32), 0) - 1
    tl.store(experts + place, expert, mask=is_chosen)
    tl.store(routing + place, weight, mask=is_chosen)
    for first in tl.static_range(0, SHARED, BLOCK):
        slot = first + expert
        place = row * (CHOSEN + SHARED) + CHOSEN + slot
        tl.store(experts + place, E + slot, mask=slot < SHARED)
        tl.store(routing + place, 1.0, mask=slot < SHARED)
