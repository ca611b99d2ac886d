"""Which GPU kernels a mixture of experts needs (FORMAT.md 5.16, 8.4): its routing, and the products of its experts.

In: the shape of one rank's experts and how they are stored. Out: `KernelSpec`s, as `kernel_plan.py`. It compiles nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmpack.kernel_file import GridAxis
from llmpack.kernel_spec import BACKEND, FEATURES_PER_CHUNK, ONE, ROW, KernelSpec, clamp, power_of_two

MOST_ROWS = 16  # of the kernels that multiply where they unpack
# Of the kernels on the matrix units, by pairs of a token and an expert for each expert, at most (0: any number): pairs of a
# program; output features, input features, threads and stages of gate and up, and of down; input features of both on RDNA 3,
# whose matrix operands take twice the registers.
BLOCKS = {
    8: (16, (32, 128, 128, 3), (32, 128, 128, 4), 64),
    64: (64, (64, 64, 256, 3), (64, 64, 128, 3), 64),
    0: (128, (64, 64, 256, 3), (128, 64, 256, 3), 32),
}
SORT_BLOCK, COMBINE_BLOCK = 1024, 1024


@dataclass(frozen=True)
class Experts:
    """The experts of a layer on one rank: hidden_size, intermediate_size, how many there are, and how many a token gets.

    `has_down_bias` is the model's: of several ranks the first alone adds it. `has_limit`: SwiGLU is clamped. `num_shared`: how
    many there are beside those, which every token gets, too. `is_sigmoid`: of the router's scores, else softmax;
    `has_correction_bias`: they are chosen by their sum with it; `has_scaling_factor`: weights of those chosen have one that is
    not 1.
    """

    hidden: int
    intermediate: int
    number: int
    chosen: int
    has_gate_up_bias: bool = False
    has_down_bias: bool = False
    has_limit: bool = False
    num_shared: int = 0
    is_sigmoid: bool = False
    has_correction_bias: bool = False
    has_scaling_factor: bool = False

    @property
    def in_all(self) -> int:
        """How many experts there are, those that tokens share among them."""
        return self.number + self.num_shared

    @property
    def slots(self) -> int:
        """How many experts a token has, those that all share among them."""
        return self.chosen + self.num_shared

    @property
    def few_rows(self) -> int:
        """Up to how many tokens a pair reads its expert's weights alone: with more, most experts would be read again."""
        return clamp(self.in_all // self.slots, 1, MOST_ROWS)


def routing(shape: Experts, *, is_normed: bool) -> Iterator[KernelSpec]:
    """Plan the choice of experts, and for many tokens the order of pairs and the sum of each token's."""
    yield _route(shape, is_normed=is_normed)
    hidden, slots, in_all = shape.hidden, shape.slots, shape.in_all
    types = {"experts": "*i32", "pairs": "*i32", "blocks": "*i32", "num_pairs": "i32"}
    grid = (GridAxis(factor=in_all), ONE, ONE)
    for most, (block_m, *_) in BLOCKS.items():
        constants = {"num_experts": in_all, "max_rows": most * in_all, "block": block_m}
        constexprs: dict[str, int | str] = {"E": in_all, "BLOCK_M": block_m, "BLOCK": SORT_BLOCK}
        yield KernelSpec("moe_sort", constants, "moe.sort", constexprs, types, grid, 256)
    constants = {"in_features": hidden, "num_experts_per_tok": slots}
    constexprs = {"H": hidden, "CHOSEN": slots, "BLOCK": COMBINE_BLOCK}
    grid = (GridAxis(factor=-(-hidden // COMBINE_BLOCK)), ROW, ONE)
    yield KernelSpec("moe_combine", constants, "moe.combine", constexprs, {"z": "*fp16", "y": "*fp16"}, grid, 128)


def _route(shape: Experts, *, is_normed: bool) -> KernelSpec:
    number, chosen, shared = shape.number, shape.chosen, shape.num_shared
    block = max(32, power_of_two(number))
    constants = {"num_experts": number, "num_experts_per_tok": chosen, "norm_topk_prob": int(is_normed)}
    constexprs: dict[str, int | str] = {"E": number, "CHOSEN": chosen, "SHARED": shared, "IS_NORMED": int(is_normed)}
    constexprs |= {"BLOCK": block, "TOP": power_of_two(chosen), "IS_SIGMOID": int(shape.is_sigmoid)}
    constexprs |= {"HAS_CORRECTION": int(shape.has_correction_bias), "HAS_FACTOR": int(shape.has_scaling_factor)}
    if shared:
        constants["num_shared_experts"] = shared
    if shape.is_sigmoid:
        constants["sigmoid_scoring"] = 1
    types = {"logits": "*fp32"}
    if shape.has_correction_bias:
        constants["has_correction_bias"] = 1
        types["correction_bias"] = "*fp32"
    else:
        constexprs["correction_bias"] = 0
    types |= {"experts": "*i32", "routing": "*fp32"}
    if shape.has_scaling_factor:
        constants["has_scaling_factor"] = 1
        types["scaling_factor"] = "fp32"
    else:
        constexprs["scaling_factor"] = 0
    threads = clamp(block // 4, 32, 256)
    return KernelSpec("moe_route", constants, "routing.route", constexprs, types, (ROW, ONE, ONE), threads)


def products(shape: Experts, storage: str, group_size: int, shards: int = 1) -> Iterator[KernelSpec]:
    """Plan gate_up and down of experts stored as "f16", "q8", "q4" or "mxfp4" on any of the ranks; group_size 0: none."""
    yield from _gate_up(shape, storage, group_size)
    for has_bias in sorted({shape.has_down_bias, shape.has_down_bias and shards == 1}):
        yield from _down(shape, storage, group_size, has_bias=has_bias)


def _gate_up(shape: Experts, storage: str, group_size: int) -> Iterator[KernelSpec]:
    constants, constexprs, stored = _common(shape, storage, group_size, has_bias=shape.has_gate_up_bias)
    numbers: dict[str, str] = {}
    constexprs["HAS_LIMIT"] = int(shape.has_limit)
    if shape.has_limit:
        constants["has_limit"] = 1
        numbers = {"alpha": "fp32", "limit": "fp32"}
    else:
        constexprs |= {"alpha": 0, "limit": 0}
    features, rows_a_thread = _shares(storage)
    # A program for each pair and 16 output features: 16 bytes of weights a thread.
    chunks = min(256 * rows_a_thread // 16, power_of_two(shape.hidden // features))
    yield KernelSpec(
        f"moe_gate_up_{storage}",
        {**constants, "max_rows": shape.few_rows},
        "moe.gate_up_rows",
        {**constexprs, "CHUNKS": chunks},
        {"x": "*fp16", **stored, "experts": "*i32", "h": "*fp16", **numbers},
        (GridAxis("rows", factor=shape.slots), GridAxis(factor=shape.intermediate // 16), ONE),
        clamp(chunks * 16 // rows_a_thread, 32, 256),
    )
    types = {"pairs": "*i32", "blocks": "*i32", "x": "*fp16", **stored, "h": "*fp16", **numbers}
    yield from _grouped("gate_up", shape, constants, constexprs, types)


def _down(shape: Experts, storage: str, group_size: int, *, has_bias: bool) -> Iterator[KernelSpec]:
    constants, constexprs, stored = _common(shape, storage, group_size, has_bias=has_bias)
    features, rows_a_thread = _shares(storage)
    slots = min(8, power_of_two(shape.slots))
    # Few programs, one for each token and 16 output features, have more threads each, for as many bytes on their way.
    most_threads = 512 if shape.hidden <= 2048 else 256
    chunks = min(max(1, most_threads * rows_a_thread // 16 // slots), power_of_two(shape.intermediate // features))
    yield KernelSpec(
        f"moe_down_{storage}",
        {**constants, "max_rows": shape.few_rows},
        "moe.down_rows",
        {**constexprs, "SLOTS": slots, "CHUNKS": chunks},
        {"h": "*fp16", **stored, "experts": "*i32", "routing": "*fp32", "y": "*fp16"},
        (ROW, GridAxis(factor=shape.hidden // 16), ONE),
        clamp(slots * chunks * 16 // rows_a_thread, 32, most_threads),
    )
    types = {"pairs": "*i32", "blocks": "*i32", "routing": "*fp32", "h": "*fp16", **stored, "z": "*fp16"}
    constexprs = {name: value for name, value in constexprs.items() if name != "CHOSEN"}
    yield from _grouped("down", shape, constants, constexprs, types)


def _common(
    shape: Experts, storage: str, group_size: int, *, has_bias: bool
) -> tuple[dict[str, int], dict[str, int | str], dict[str, str]]:
    """Return constants, constexprs, and the types of what is stored; what a kernel lacks is 0 in its function."""
    hidden, intermediate, slots = shape.hidden, shape.intermediate, shape.slots
    constants = {"in_features": hidden, "intermediate_size": intermediate, "num_experts_per_tok": slots}
    constexprs: dict[str, int | str] = {"STORAGE": storage, "H": hidden, "F": intermediate, "GROUP": group_size}
    constexprs |= {"CHOSEN": slots, "BACKEND": BACKEND, "HAS_BIAS": int(has_bias)}
    stored = {"weight": "*fp16"}
    if storage == "f16":
        constexprs["scales"] = 0
    else:
        constants["group_size"] = group_size
        stored = {"weight": "*u8", "scales": "*fp16"}
    if has_bias:
        constants["has_bias"] = 1
        stored["bias"] = "*fp32"
    else:
        constexprs["bias"] = 0
    return constants, constexprs, stored


def _shares(storage: str) -> tuple[int, int]:
    """Return the input features, and the rows of a tile, that a thread multiplies together."""
    return FEATURES_PER_CHUNK.get(storage, 1), 8 if storage == "f16" else 4


def _grouped(
    part: str,
    shape: Experts,
    constants: dict[str, int],
    constexprs: dict[str, int | str],
    types: dict[str, str],
) -> Iterator[KernelSpec]:
    n, k = (shape.intermediate, shape.hidden) if part == "gate_up" else (shape.hidden, shape.intermediate)
    for most, (block_m, of_gate_up, of_down, narrow) in BLOCKS.items():
        block_n, block_k, threads, stages = of_gate_up if part == "gate_up" else of_down
        block_k = min(block_k, max(32, power_of_two(k)))
        yield KernelSpec(
            f"moe_grouped_{part}_{constexprs['STORAGE']}",
            {**constants, "max_rows": most * shape.in_all, "block": block_m},
            f"moe.{part}_blocks",
            {**constexprs, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k},
            types,
            (GridAxis("rows", block_m, plus="experts"), GridAxis(factor=-(-n // block_n)), ONE),
            threads,
            stages,
            {"gfx11": {"BLOCK_K": min(narrow, block_k)}},
        )
