"""Which GPU kernels a model needs: one `KernelSpec` per operation and variant, for the model's own shapes (FORMAT.md 8.4).

In: the architecture, one rank's weights, the number of ranks. Out: pure data, for any target: functions of `llmpack_kernels` by
name, their compile-time constants, the types of their parameters, and grids. It compiles and imports no kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from llmpack import moe_plan
from llmpack.kernel_file import GridAxis
from llmpack.kernel_spec import BACKEND, FEATURES_PER_CHUNK, ONE, ROW, KernelSpec, clamp, power_of_two
from llmpack.rope import query_growth
from llmpack.weights import RankWeight, heads_per_rank
from llmrun.artifact import IncompatibleError, ModelConfig

# Rows that a variant of a product serves; 0: any number. Up to 4 rows the weights are multiplied where they are unpacked,
# beyond that on the matrix units; q4 on NVIDIA's chips always on these, up to 8 and up to 16 rows by `_for_few`.
ROWS, ROWS_OF_Q4 = (1, 4, 16, 64, 0), (1, 4, 8, 16, 64, 0)
# `_for_few`, by max_rows: (at so many tiles or more, tiles of a program, its threads, units asked for ahead).
FEW = {
    8: ((640, 2, 256, 2), (300, 1, 256, 4), (0, 1, 512, 2)),
    16: ((0, 2, 128, 2),),
}
# `_on_hopper`: tokens, output features, threads, stages. With few output features half as many programs fill no chip.
HOPPER, HOPPER_WIDE, HOPPER_WIDE_FROM = (128, 128, 256, 6), (256, 128, 256, 6), 8192
TOP_K = 64  # likeliest tokens that a step gives beside the logits
TOP_K_CHUNK = 2048  # columns that one program chooses them from, at most
ONE_SHOT_ROWS = 32  # rows of the one-shot all-reduce, a program each: all run at once on every target
_BETA, _ORIGINAL = "llama_4_scaling_beta", "original_positions"
ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}


def plan_kernels(config: ModelConfig, weights: list[RankWeight], shards: int, block_size: int) -> list[KernelSpec]:
    """Return every kernel that one rank needs; all ranks need the same.

    Args:
        config: the architecture.
        weights: all weights of any rank.
        shards: number of ranks.
        block_size: tokens in one block of the KV cache.

    Raises:
        IncompatibleError: weights are stored as float32, for which there are no GPU kernels.
    """
    if any(w.storage == "f32" for w in weights if w.row.role in ("linear", "head")):
        raise IncompatibleError("--quant f32 has no GPU kernels: choose --targets cpu, or --quant f16, q8 or q4.")
    table = next(w for w in weights if w.row.role == "embedding")
    specs = [*_products(weights), embedding(table.storage, table.num_columns, table.group_size or 0)]
    specs += norms(config.hidden_size, has_post_norms=config.has_post_norms)
    if config.has_dense_layers:
        specs.append(gated(ACTIVATIONS[config.activation], config.intermediate_size // shards))
    if config.num_experts is not None:
        specs += _experts(config, weights, shards)
    if config.has_qk_norm:
        specs.append(qk_norm(*heads_per_rank(config, shards), config.head_dim))
    heads = heads_per_rank(config, shards)
    has_growth = query_growth(config) is not None
    specs += attention(*heads, config.head_dim, block_size, has_sinks=config.has_sinks, has_growth=has_growth)
    specs += sampling(next(w for w in weights if w.row.role == "head").num_rows)
    if shards > 1:
        specs += collectives(config.hidden_size, shards, has_post_norms=config.has_post_norms)
    return specs


def _experts(config: ModelConfig, weights: list[RankWeight], shards: int) -> Iterator[KernelSpec]:
    storage, group_size = next((w.storage, w.group_size or 0) for w in weights if w.row.role == "experts")
    intermediate, number = (config.moe_intermediate_size or 0) // shards, config.num_experts or 0
    shape = moe_plan.Experts(
        config.hidden_size,
        intermediate,
        number,
        config.num_experts_per_tok or 0,
        has_gate_up_bias=config.has_expert_biases,
        has_down_bias=config.has_expert_biases,
        has_limit=config.swiglu_limit is not None,
        num_shared=config.num_shared_experts or 0,
        is_sigmoid=config.sigmoid_scoring,
        has_correction_bias=config.has_correction_bias,
        has_scaling_factor=config.routed_scaling_factor != 1,
    )
    yield from moe_plan.routing(shape, is_normed=config.norm_topk_prob)
    yield from moe_plan.products(shape, storage, group_size, shards)


def _products(weights: list[RankWeight]) -> Iterator[KernelSpec]:
    matrices = {
        (w.storage, w.num_rows, w.num_columns, w.group_size or 0, 16 if w.row.role == "linear" else 32)
        for w in weights
        if w.row.role in ("linear", "head", "router")
    }
    for storage, out_features, in_features, group_size, y_bits in sorted(matrices):
        for max_rows in ROWS_OF_Q4 if storage == "q4" else ROWS:
            yield product(storage, out_features, in_features, group_size, y_bits, max_rows)


def product(storage: str, n: int, k: int, group_size: int, y_bits: int, max_rows: int) -> KernelSpec:
    """Plan a matrix of n output and k input features, for up to `max_rows` tokens; group_size 0: none."""
    constants = {"in_features": k, "out_features": n, "y_bits": y_bits, "max_rows": max_rows}
    constexprs: dict[str, int | str] = {"K": k, "N": n}
    is_f16 = storage == "f16"
    weight = {"weight": "*fp16"} if is_f16 else {"weight": "*u8", "scales": "*fp16"}
    types = {"x": "*fp16", **weight, "y": f"*fp{y_bits}", "num_rows": "i32"}
    if not is_f16:
        constants["group_size"] = group_size
        constexprs |= {"STORAGE": storage, "GROUP": group_size, "BACKEND": BACKEND}
    name = "matmul_f16" if is_f16 else "matmul"
    if 0 < max_rows <= 4:
        # 16 bytes a thread: four words, or eight float16, of the 16 rows of a tile.
        chunks, share = (128, 8) if is_f16 else (64, 4)
        chunks = min(chunks, power_of_two(k // FEATURES_PER_CHUNK.get(storage, 1)))
        constexprs |= {"ROWS": max_rows, "CHUNKS": chunks}
        grid = (GridAxis(factor=-(-n // 16)), ONE, ONE)
        threads = clamp(chunks * 16 // share, 32, 256)
        spec = KernelSpec(f"matmul_{storage}", constants, f"matmul.{name}_rows", constexprs, types, grid, threads)
        if storage == "q4":
            spec.instead["sm_"] = None
        return spec
    block_m, block_n, block_k, threads, stages = {
        16: (16, 32, 128, 128, 4),
        64: (64, 64, 64, 128, 3),
        0: (128, 128, 64, 256, 3),
    }[16 if max_rows == 8 else max_rows]
    constexprs |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": min(block_k, max(32, power_of_two(k)))}
    grid = (GridAxis("rows", block_m), GridAxis(factor=-(-n // block_n)), ONE)
    # With 128 input features at a time sm_120 needs a stack for q6.
    chips = {"sm_120": {"BLOCK_K": min(64, int(constexprs["BLOCK_K"]))}} if (storage, max_rows) == ("q6", 16) else {}
    function = f"matmul.{name}_blocks"
    spec = KernelSpec(f"matmul_{storage}", constants, function, constexprs, types, grid, threads, stages, chips)
    if storage == "q4" and max_rows == 0 and group_size % 64 == 0:
        spec.instead["sm_90"] = _on_hopper(spec, n)
    elif storage == "q4" and max_rows in FEW:
        spec.instead["sm_"] = _for_few(spec, n, k, group_size)
    if max_rows == 8:
        spec.instead["gfx"] = None
    return spec


def _for_few(spec: KernelSpec, n: int, k: int, group_size: int) -> KernelSpec:
    """Tiles of a program of `few.matmul_q4`, its threads, and how many of its units a warp asks for ahead."""
    max_rows = spec.constants["max_rows"]
    tiles_in_all, units = -(-n // 16), k // min(group_size, 64)
    tiles, threads, depth = next(own for least, *own in FEW[max_rows] if tiles_in_all >= least)
    tiles = min(tiles, 1 << tiles_in_all.bit_length() - 1)
    threads = min(threads, 32 << units.bit_length() - 1)
    depth = min(depth, -(-units * 32 // threads))
    constexprs: dict[str, int | str] = {"K": k, "N": n, "GROUP": group_size, "TOKENS": max_rows}
    constexprs |= {"TILES": tiles, "DEPTH": depth}
    grid = (GridAxis(factor=-(-tiles_in_all // tiles)), ONE, ONE)
    own = {"function": "few.matmul_q4", "constexprs": constexprs, "grid": grid, "threads": threads}
    return dataclasses.replace(spec, **own, chips={}, instead={})


def _on_hopper(spec: KernelSpec, n: int) -> KernelSpec:
    """Tokens, output features, threads and stages of `hopper.matmul_q4`; accumulators take half or more of the registers."""
    block_m, block_n, threads, stages = HOPPER_WIDE if n >= HOPPER_WIDE_FROM else HOPPER
    constexprs = {name: v for name, v in spec.constexprs.items() if name not in ("STORAGE", "BACKEND")}
    constexprs |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 64, "STAGES": stages}
    grid = (GridAxis("rows", block_m), GridAxis(factor=-(-n // block_n)), ONE)
    own = {"function": "hopper.matmul_q4", "constexprs": constexprs, "grid": grid, "threads": threads}
    return dataclasses.replace(spec, **own, chips={}, instead={})


def embedding(storage: str, hidden: int, group_size: int) -> KernelSpec:
    """Plan rows of the embedding."""
    if storage == "f16":
        types = {"ids": "*i32", "weight": "*fp16", "y": "*fp32"}
        constexprs: dict[str, int | str] = {"H": hidden, "BLOCK": power_of_two(hidden)}
        function, constants = "elementwise.embed_f16", {"in_features": hidden}
    else:
        types = {"ids": "*i32", "weight": "*u8", "scales": "*fp16", "y": "*fp32"}
        chunks = power_of_two(hidden // FEATURES_PER_CHUNK[storage])
        constexprs = {"STORAGE": storage, "H": hidden, "GROUP": group_size, "CHUNKS": chunks}
        function, constants = "elementwise.embed_tiles", {"in_features": hidden, "group_size": group_size}
    return KernelSpec(f"embed_{storage}", constants, function, constexprs, types, (ROW, ONE, ONE), 128)


def _adding_norm(*, has_post_norms: bool) -> tuple[str, dict[str, str]]:
    """Return the norm of the residual stream with what is added to it: its name, and the types of its operands."""
    normed = {"x_weight": "*fp32"} if has_post_norms else {}
    types = {"x": "*fp16", **normed, "residual": "*fp32", "weight": "*fp32", "y": "*fp16"}
    return "norm_add_rms_norm" if has_post_norms else "add_rms_norm", types


def norms(hidden: int, *, has_post_norms: bool) -> Iterator[KernelSpec]:
    """Plan norms of hidden_size: of the embedding's rows, and of every sum after that."""
    constexprs: dict[str, int | str] = {"H": hidden, "BLOCK": power_of_two(hidden)}
    threads = clamp(power_of_two(hidden) // 16, 64, 512)
    grid, constants = (ROW, ONE, ONE), {"in_features": hidden}
    types = {"x": "*fp32", "weight": "*fp32", "y": "*fp16", "epsilon": "fp32"}
    yield KernelSpec("rms_norm", constants, "elementwise.rms_norm", constexprs, types, grid, threads)
    name, types = _adding_norm(has_post_norms=has_post_norms)
    types["epsilon"] = "fp32"
    yield KernelSpec(name, constants, f"elementwise.{name}", constexprs, types, grid, threads)


def gated(op: str, intermediate: int) -> KernelSpec:
    """Plan swiglu or geglu of intermediate_size per rank."""
    grid = (GridAxis(factor=-(-intermediate // 1024)), ROW, ONE)
    constants, types = {"in_features": intermediate}, {"gate_up": "*fp16", "y": "*fp16"}
    return KernelSpec(op, constants, f"elementwise.{op}", {"F": intermediate, "BLOCK": 1024}, types, grid, 128)


def qk_norm(heads: int, kv_heads: int, d: int) -> KernelSpec:
    """Plan the norms of heads per rank and head_dim d."""
    constants = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": d}
    constexprs: dict[str, int | str] = {"HEADS": heads, "KV_HEADS": kv_heads, "D": d, "BLOCK": power_of_two(d)}
    types = {"qkv": "*fp16", "q_weight": "*fp32", "k_weight": "*fp32", "y": "*fp16", "epsilon": "fp32"}
    grid = (ROW, GridAxis(factor=heads + 2 * kv_heads), ONE)
    return KernelSpec("qk_norm", constants, "elementwise.qk_norm", constexprs, types, grid, 32)


def attention(
    heads: int, kv_heads: int, d: int, block_size: int, *, has_sinks: bool = False, has_growth: bool = False
) -> Iterator[KernelSpec]:
    """Plan cache writes and attention of heads per rank and head_dim d.

    `has_sinks`: with an input `sinks`; `has_growth`: queries are multiplied by more the later they stand.
    """
    half, width = max(16, power_of_two(d // 2)), max(16, power_of_two(d))
    shape: dict[str, int | str] = {"HEADS": heads, "KV_HEADS": kv_heads, "D": d, "HALF": half}
    constants = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": d}
    types = {"qkv": "*fp16", "cos_sin": "*fp32", "key_cache": "*fp16", "value_cache": "*fp16", "slot_mapping": "*i32"}
    grid = (ROW, GridAxis(factor=kv_heads), ONE)
    yield KernelSpec("cache_write", constants, "attention.cache_write", shape, types, grid, 32)

    sequences = {"query_start": "*i32", "seq_lens": "*i32", "block_table": "*i32", "table_stride": "i32"}
    types = {name: type for name, type in types.items() if name != "slot_mapping"} | sequences
    constants = {**constants, "block_size": block_size}
    block_m, block_n = 64, 32  # more keys in a step spill on sm_80 and sm_120
    # Matrix operands take more registers there, on RDNA 3 twice as many.
    chips = {"gfx": {"stages": 1}}
    narrow = {**chips, "gfx11": {"BLOCK_N": 16}}
    numbers = {"scale": "fp32", "window": "i32"}
    # Kernels for sinks, or for growth, have a constant and parameters more; of the others these are none of the kernel's.
    grown, growth = ({"has_growth": 1}, {_BETA: "fp32", _ORIGINAL: "i32"}) if has_growth else ({}, {})
    growing: dict[str, int | str] = {"HAS_GROWTH": int(has_growth), **({} if has_growth else {_BETA: 0, _ORIGINAL: 0})}
    constexprs = {**shape, "WIDTH": width, "BLOCK_SIZE": block_size, **growing}
    own, sinks = ({"has_sinks": 1}, {"sinks": "*fp32"}) if has_sinks else ({}, {})
    sinking: dict[str, int | str] = {"HAS_SINKS": int(has_sinks), **({} if has_sinks else {"sinks": 0})}
    yield KernelSpec(
        "attention",
        {**constants, **own, **grown},
        "attention.attention",
        {**constexprs, "BLOCK_M": block_m, "BLOCK_N": block_n, **sinking},
        {"out": "*fp16", **types, "num_sequences": "i32", **numbers, **sinks, **growth},
        (GridAxis("rows", block_m, plus="sequences"), GridAxis(factor=heads), ONE),
        128 if width <= 128 else 256,  # else they spill on NVIDIA's chips and on RDNA 4
        stages=3,
        chips=narrow,
    )
    yield KernelSpec(
        "attention_split",
        {**constants, **grown},
        "attention.attention_split",
        {**constexprs, "GROUP": max(16, power_of_two(heads // kv_heads)), "BLOCK_N": block_n},
        {"partial": "*fp32", **types, "num_splits": "i32", **numbers, **growth},
        (GridAxis("sequences"), GridAxis(factor=kv_heads), GridAxis("splits")),
        128,
        stages=3,
        chips=chips,
    )
    yield KernelSpec(
        "attention_combine",
        {"num_heads": heads, "head_dim": d, **own},
        "attention.attention_combine",
        {"HEADS": heads, "D": d, "WIDTH": width, **sinking},
        {"out": "*fp16", "partial": "*fp32", "num_splits": "i32", **sinks},
        (ROW, GridAxis(factor=heads), ONE),
        clamp(width, 32, 128),
    )


def sampling(columns: int) -> Iterator[KernelSpec]:
    """Plan the choice of the likeliest tokens of one rank's columns of the logits."""
    chunk = min(TOP_K_CHUNK, max(TOP_K, power_of_two(columns)))
    parts = -(-columns // chunk)
    constants = {"in_features": columns, "k": TOP_K, "chunk": chunk}
    types = {"logits": "*fp32", "keys": "*i64", "sums": "*fp32", "first_id": "i32", "num_columns": "i32"}
    constexprs: dict[str, int | str] = {"C": columns, "K": TOP_K, "CHUNK": chunk}
    grid = (GridAxis(factor=parts), ROW, ONE)
    yield KernelSpec("top_k_first", constants, "sampling.top_k_first", constexprs, types, grid, 256)
    types = {"keys": "*i64", "sums": "*fp32", "top": "*i64"}
    block = power_of_two(parts * TOP_K)
    constexprs = {"PARTS": parts, "PARTS_BLOCK": power_of_two(parts), "K": TOP_K}
    # More than 16 candidates of a thread spill on CDNA.
    threads = clamp(block // 4, 32, clamp(block // 16, 256, 1024))
    yield KernelSpec("top_k_last", constants, "sampling.top_k_last", constexprs, types, (ROW, ONE, ONE), threads)


def collectives(hidden: int, shards: int, *, has_post_norms: bool) -> Iterator[KernelSpec]:
    """Plan the one-shot collectives."""
    constants = {"in_features": hidden, "ranks": shards, "max_rows": ONE_SHOT_ROWS}
    meeting = {"buffers": "*i64", "flags": "*i64", "epochs": "*i32", "rank": "i32"}
    constexprs: dict[str, int | str] = {"H": hidden, "BLOCK": power_of_two(hidden), "RANKS": shards}
    constexprs |= {"MAX_ROWS": ONE_SHOT_ROWS, "DRAIN": 0}
    # Addresses come from memory: where the compiler would make buffers of them, it would loop over the lanes.
    chips = {"gfx": {"buffer_ops": 0}, "gfx9": {"DRAIN": 1}}
    threads = clamp(power_of_two(hidden) // 8, 64, 1024)
    grid = (ROW, ONE, ONE)
    norm, types = _adding_norm(has_post_norms=has_post_norms)
    name, types = f"all_reduce_{norm}", {**types, **meeting, "epsilon": "fp32"}
    yield KernelSpec(name, constants, f"collectives.{name}", constexprs, types, grid, threads, chips=chips)
    types = {"x": "*fp16", "y": "*fp16", **meeting}
    yield KernelSpec("all_reduce", constants, "collectives.all_reduce", constexprs, types, grid, threads, chips=chips)
