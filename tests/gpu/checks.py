"""Every operator on the device against numpy float64: inputs to the device, the operator through mini_ort, outputs back.

Also on the stand-in, where it shows that this program is right. Tolerances are relative to the largest number of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import helpers
import numpy as np
import shapes
from device import Device
from executor import MiniOrt

from llmpack import moe_plan
from llmpack.kernel_spec import KernelSpec
from llmpack.weights import Quantization, plan_rank
from llmpack_ops import reference
from llmrun.manifest import ModelConfig

ELEMENT = {np.dtype(d): i for d, i in ((np.float32, 1), (np.uint8, 2), (np.int32, 6), (np.int64, 7), (np.float16, 10))}
EXPERTS, EXPERTS_STORED = moe_plan.Experts(256, 128, 6, 3), (("q4", 64), ("q8", 32), ("f16", 0))
# Those of gpt-oss: biases, of which the ranks but the first have gate_up's alone, and a clamped SwiGLU.
BIASED, BIASED_STORED, CLAMP = (
    moe_plan.Experts(288, 96, 6, 3, True, True, True),
    (("mxfp4", 32), ("f16", 0)),
    (1.702, 7.0),
)
# Those of GLM-4.5 and of ERNIE 4.5: experts that all tokens share, and others that are chosen by a bias, too. Products are told
# apart by what a token has in all: one kernel file holds no two mixtures that are alike in it.
SHARING = (
    moe_plan.Experts(256, 128, 9, 4, num_shared=1, is_sigmoid=True, has_correction_bias=True, has_scaling_factor=True),
    moe_plan.Experts(256, 128, 7, 2, num_shared=2, has_correction_bias=True),
)
FACTOR = 2.5
N, K, VOCABULARY = 256, 512, 512
SINKING = (64, 8, 64)  # heads, KV heads and head_dim of gpt-oss
# float16 results are rounded once (2^-11), and their terms are sums in float32; scores pass through exponentials.
# An expert's activations are rounded before, and so is its share of a sum.
TOLERANCES = {"matmul": 2e-3, "moe": 4e-3, "norm": 2e-3, "gated": 2e-3, "attention": 4e-3, "exact": 0.0}


def extra_specs() -> list[KernelSpec]:
    """The kernels of the operators checked: those of the tiny model, in every storage, and what no Llama has."""
    from llmpack.kernel_plan import attention, gated, norms, plan_kernels, qk_norm

    config = shapes.config_of("dry")
    found = []
    for quantization in (Quantization("q4", 64), Quantization("q8", 32), Quantization("f16", 64)):
        found += plan_kernels(config, plan_rank(config, quantization, 1, 0), 1, shapes.BLOCK_SIZE)
    heads = config.num_attention_heads, config.num_key_value_heads
    found += [qk_norm(*heads, config.head_dim), gated("geglu", config.intermediate_size)]
    for storage, group_size in EXPERTS_STORED:
        found += moe_plan.products(EXPERTS, storage, group_size)
    for storage, group_size in BIASED_STORED:
        found += moe_plan.products(BIASED, storage, group_size, shards=2)
    for shape in SHARING:
        found += moe_plan.products(shape, "q4", 64)
    for shape in (EXPERTS, BIASED, *SHARING):
        found += [spec for is_normed in (False, True) for spec in moe_plan.routing(shape, is_normed=is_normed)]
    found += norms(config.hidden_size, has_post_norms=True)
    found += attention(*SINKING, shapes.BLOCK_SIZE, has_sinks=True)
    found += attention(*heads, config.head_dim, shapes.BLOCK_SIZE, has_growth=True)
    return list({(spec.op, *sorted(spec.constants.items())): spec for spec in found}.values())


def check_operators(bench: Any, ort: MiniOrt, device: Device) -> None:
    checks = Checks(ort, device, bench.models[0])
    for name in (
        "products",
        "real_products",
        "norms",
        "post_norms",
        "qk_norm",
        "gated",
        "embeddings",
        "attention",
        "real_attention",
        "sinks",
        "growing_queries",
        "top_k",
        "experts",
        "biased_experts",
        "shared_experts",
    ):
        error = getattr(checks, name)()
        bench.results[f"operators/{name}"] = error
        bench.row(f"operators: {name}", f"{error:.1e}", "of the largest number, against float64")


class Checks:
    def __init__(self, ort: MiniOrt, device: Device, real: str = "dry") -> None:
        """`real`: the published shape that some checks take beside the tiny one."""
        self.ort, self.device, self.real = ort, device, real
        self.rng = np.random.default_rng(0)
        self.config = shapes.config_of("dry")

    def run(
        self,
        node: Any,
        inputs: Sequence[np.ndarray | None],
        outputs: list[tuple[tuple[int, ...], Any]],
        shared: dict[int, int] | None = None,
    ) -> list[np.ndarray]:
        """Run a node; None: an input that is missing; `shared`: output -> input whose memory it has."""
        given = [None if a is None else (ELEMENT[a.dtype], a.shape, self.device.put(a)) for a in inputs]
        made = []
        for i, (shape, dtype) in enumerate(outputs):
            num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            owner = given[shared[i]] if shared and i in shared else None
            address = owner[2] if owner is not None else self.device.allocate(num_bytes)
            made.append((ELEMENT[np.dtype(dtype)], shape, address))
        self.ort.call(node, given, made, self.device.stream)
        self.device.synchronize()
        results = [self.device.read(t[2], shape, dtype) for t, (shape, dtype) in zip(made, outputs, strict=True)]
        there = [(t, a.dtype) for t, a in zip(given, inputs, strict=True) if t is not None and a is not None]
        self.caches = [self.device.read(t[2], t[1], dtype) for t, dtype in there]
        for address in {t[2] for t in (*(t for t, _ in there), *made)}:
            self.device.free(address)
        return results

    def close_to(self, found: np.ndarray, expected: np.ndarray, kind: str, what: str) -> float:
        error = float(np.abs(found.astype(np.float64) - expected).max() / max(np.abs(expected).max(), 1e-30))
        if not error <= TOLERANCES[kind]:
            raise AssertionError(f"{what}: {error:.2e} of the largest number, expected at most {TOLERANCES[kind]:.0e}")
        return error

    def products(self) -> float:
        """Every storage, every variant of rows, both types of y."""
        worst = 0.0
        hidden = self.config.hidden_size
        cases = [
            ("q4", 64, 512, ""),
            ("q8", 32, 512, ""),
            ("f16", 0, 512, ""),
            ("q6", 128, 512, "F32"),
            ("q8", 32, 512, "F32"),
        ]
        for scheme, group, _, suffix in cases:
            n = self.config.vocab_size if suffix else 2 * self.config.intermediate_size
            projection = helpers.random_projection(scheme, n, hidden, group or 32)
            attributes = {"in_features": hidden, **projection.attributes}
            node = self.ort.node(f"MatMul{scheme.upper()}{suffix}", **attributes)
            for rows in (1, 2, 4, 5, 16, 33, 64, 65, 130):
                x = self.rng.standard_normal((rows, hidden)).astype(np.float16)
                dtype = np.float32 if suffix else np.float16
                (y,) = self.run(node, [x, *projection.initializers.values()], [((rows, n), dtype)])
                worst = max(worst, self.product(y, x, projection, f"MatMul {scheme}, {rows} rows"))
        return worst

    def real_products(self) -> float:
        """A published model's widest and deepest matrices: what is masked, split and staged there."""
        worst = 0.0
        matrices = shapes.products(self.real, 1).values()
        for n, k in {max(matrices), max(matrices, key=lambda matrix: matrix[1])}:
            projection = helpers.random_projection("q4", n, k, 64)
            node = self.ort.node("MatMulQ4", in_features=k, **projection.attributes)
            for rows in (1, 2, 5, 8, 13, 16, 64, 130):
                x = self.rng.standard_normal((rows, k)).astype(np.float16) / 8
                (y,) = self.run(node, [x, *projection.initializers.values()], [((rows, n), np.float16)])
                worst = max(worst, self.product(y, x, projection, f"MatMulQ4 of {n} x {k}, {rows} rows"))
        return worst

    def product(self, y: np.ndarray, x: np.ndarray, projection: helpers.Projection, what: str) -> float:
        return self.close_to(y, reference.matmul(x, projection.weight), "matmul", what)

    def norms(self) -> float:
        worst, hidden = 0.0, self.config.hidden_size
        weight = self.rng.standard_normal(hidden).astype(np.float32)
        first = self.ort.node("RMSNormF16", epsilon=1e-5, in_features=hidden)
        added = self.ort.node("AddRMSNorm", epsilon=1e-5, in_features=hidden)
        for rows in (1, 7):
            x = self.rng.standard_normal((rows, hidden)).astype(np.float32)
            (y,) = self.run(first, [x, weight], [((rows, hidden), np.float16)])
            worst = max(worst, self.close_to(y, reference.rms_norm(x, weight, 1e-5), "norm", "RMSNorm"))
            for shared in ({}, {1: 1}):  # with the residual's memory apart, and the same
                outputs = [((rows, hidden), np.float16), ((rows, hidden), np.float32)]
                y, total = self.run(added, [x.astype(np.float16), x * 3, weight], outputs, shared)
                expected = reference.add_rms_norm(x.astype(np.float16), x * 3, weight, 1e-5)
                worst = max(
                    worst,
                    *(self.close_to(f, e, "norm", "AddRMSNorm") for f, e in zip((y, total), expected, strict=True)),
                )
        return worst

    def post_norms(self) -> float:
        """What is added to the residual stream is normalised first, by weights far from those of the sum."""
        worst, hidden = 0.0, self.config.hidden_size
        x_weight, weight = (self.rng.standard_normal(hidden).astype(np.float32) * scale for scale in (5, 1))
        node = self.ort.node("RMSNormAddRMSNorm", epsilon=1e-5, in_features=hidden)
        for rows, shared in ((1, {}), (7, {}), (7, {1: 2})):  # with the residual's memory apart, and the same
            x = self.rng.standard_normal((rows, hidden)).astype(np.float16) * 9
            residual = self.rng.standard_normal((rows, hidden)).astype(np.float32)
            outputs = [((rows, hidden), np.float16), ((rows, hidden), np.float32)]
            found = self.run(node, [x, x_weight, residual, weight], outputs, shared)
            expected = reference.rms_norm_add_rms_norm(x, x_weight, residual, weight, 1e-5)
            pairs = zip(found, expected, strict=True)
            worst = max(worst, *(self.close_to(f, e, "norm", "RMSNormAddRMSNorm") for f, e in pairs))
        return worst

    def qk_norm(self) -> float:
        dim = self.config.head_dim
        sizes = {"num_heads": self.config.num_attention_heads, "num_kv_heads": self.config.num_key_value_heads}
        x = self.rng.standard_normal((5, (sizes["num_heads"] + 2 * sizes["num_kv_heads"]) * dim)).astype(np.float16) * 9
        q, k = self.rng.standard_normal((2, dim)).astype(np.float32)
        node = self.ort.node("QKNorm", **sizes, head_dim=dim, epsilon=1e-5)
        expected = reference.qk_norm(x, q, k, **sizes, epsilon=1e-5)
        found = [self.run(node, [x, q, k], [(x.shape, np.float16)], shared)[0] for shared in ({}, {0: 0})]
        return max(
            self.close_to(y, expected, "norm", "QKNorm") for y in found
        )  # with the memory of qkv apart, and its own

    def gated(self) -> float:
        worst, width = 0.0, self.config.intermediate_size
        x = self.rng.standard_normal((5, 2 * width)).astype(np.float16) * 3
        x[0, :8] = [-65504, -100, -20, -8, 0, 8, 100, 65504]  # gates whose exponentials overflow
        x[0, width : width + 8] = 0.25
        for op, truth in (("SwiGLU", reference.swiglu), ("GeGLU", reference.geglu)):
            (y,) = self.run(self.ort.node(op, in_features=width), [x], [((5, width), np.float16)])
            far, near = y[0, :8], np.delete(y.ravel(), range(8))  # the large ones would hide errors of the others
            expected = truth(x)
            worst = max(worst, self.close_to(near, np.delete(expected.ravel(), range(8)), "gated", op))
            self.close_to(far, expected[0, :8], "gated", f"{op} of large numbers")
        return worst

    def embeddings(self) -> float:
        worst, hidden, n = 0.0, self.config.hidden_size, self.config.vocab_size
        ids = np.array([0, 5, n - 1, 5], np.int32)
        for scheme, group in (("q6", 128), ("q8", 32)):
            table = helpers.random_projection(scheme, n, hidden, group)
            node = self.ort.node(f"Embedding{scheme.upper()}", in_features=hidden, num_embeddings=n, group_size=group)
            (y,) = self.run(node, [ids, *table.initializers.values()], [((4, hidden), np.float32)])
            worst = max(
                worst,
                self.close_to(
                    y, reference.embedding(ids, table.weight).astype(np.float32), "exact", f"Embedding {scheme}"
                ),
            )
        plain = self.rng.standard_normal((n, hidden)).astype(np.float16)
        (y,) = self.run(self.ort.node("EmbeddingF16", in_features=hidden), [ids, plain], [((4, hidden), np.float32)])
        return max(worst, self.close_to(y, plain[ids].astype(np.float64), "exact", "Embedding f16"))

    def attention(self) -> float:
        """Prefill, decode and mixed steps; blocks in any order; a token without a slot; windows below and above a block."""
        steps = ([20], [20]), ([1], [150]), ([1, 1, 1], [1, 40, 70]), ([1, 9, 1], [33, 20, 5]), ([70], [100])
        return max(self._attention(self.config, steps, window) for window in (shapes.NO_WINDOW, 1, 19, 64))

    def real_attention(self) -> float:
        """The same with a published model's heads, over lengths that several programs share."""
        steps = ([1], [1]), ([1], [777]), ([1, 1, 1], [513, 40, 600]), ([130], [390]), ([1, 33], [700, 33])
        return max(self._attention(shapes.config_of(self.real), steps, window) for window in (shapes.NO_WINDOW, 512))

    def sinks(self) -> float:
        """The same with a score of each head more, which takes from nothing to nearly all."""
        heads, kv_heads, dim = SINKING
        sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim}
        config = dataclasses.replace(self.config, **sizes)
        steps = ([20], [20]), ([1], [300]), ([1, 1, 1], [1, 40, 70]), ([1, 9], [150, 20])
        return max(self._attention(config, steps, window, has_sinks=True) for window in (shapes.NO_WINDOW, 128))

    def growing_queries(self) -> float:
        """The same with queries that are multiplied by more the later they stand."""
        growth = {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 20}
        steps = ([70], [100]), ([1], [150]), ([1, 1, 1], [20, 21, 70]), ([1, 9], [21, 25])
        return self._attention(self.config, steps, shapes.NO_WINDOW, growth=growth)

    def _attention(
        self,
        config: ModelConfig,
        steps: Iterable[tuple[list[int], list[int]]],
        window: int,
        *,
        has_sinks: bool = False,
        growth: dict[str, Any] | None = None,
    ) -> float:
        size = shapes.BLOCK_SIZE
        heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        numbers = {"num_heads": heads, "num_kv_heads": kv, "scale": dim**-0.5, "window": window, **(growth or {})}
        sinks = [np.linspace(-2, 7, heads).astype(np.float32)] if has_sinks else []
        node = self.ort.node("PagedAttention", num_inputs=8 + len(sinks), head_dim=dim, block_size=size, **numbers)
        worst = 0.0
        for queries, lengths in steps:
            tokens, blocks = sum(queries), -(-max(lengths) // size) + 2
            table = self.rng.permutation(len(queries) * blocks).reshape(-1, blocks).astype(np.int32)
            slots = [
                table[b][p // size] * size + p % size
                for b, (q, n) in enumerate(zip(queries, lengths, strict=True))
                for p in range(n - q, n)
            ]
            caches = [
                self.rng.standard_normal((len(queries) * blocks, size, kv, dim)).astype(np.float16) for _ in range(2)
            ]
            angles = self.rng.uniform(0, 6, (tokens, dim // 2))
            given = [
                self.rng.standard_normal((tokens, (heads + 2 * kv) * dim)).astype(np.float16),
                np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32),
                *caches,
                np.array(slots, np.int32),
                np.cumsum([0, *queries]).astype(np.int32),
                np.array(lengths, np.int32),
                table,
                *sinks,
            ]
            (out,) = self.run(node, given, [((tokens, heads * dim), np.float16)])
            expected, keys, values = reference.paged_attention(*given, **numbers)  # type: ignore[misc]
            what = f"PagedAttention of {queries} over {lengths}, window {window}"
            worst = max(worst, self.close_to(out, expected, "attention", what))
            self.close_to(self.caches[2], keys.astype(np.float64), "attention", "key_cache")
            self.close_to(self.caches[3], values.astype(np.float64), "exact", "value_cache")
        return worst

    def top_k(self) -> float:
        """The likeliest of a rank's columns, the last of which are no tokens; a NaN shows in the sum."""
        from llmrun.rows import merge_candidates

        columns, first_id = self.config.vocab_size, 1000
        known = columns - 3
        logits = self.rng.standard_normal((3, columns)).astype(np.float32)
        logits[1, 7] = logits[1, 300] = 9.0  # equal: the lower id comes first
        logits[:, known:] = 99.0
        logits[2, 5] = np.nan
        node = self.ort.node("TopK", in_features=columns, k=64, first_id=first_id, vocab_size=first_id + known)
        (top,) = self.run(node, [logits], [((3, 65), np.int64)])
        found, logits = merge_candidates([top], first_id + known), logits[:, :known]
        order = np.argsort(-logits[:2], axis=1, kind="stable")[:, :64]
        if not (found.ids[:2] == order + first_id).all():
            raise AssertionError("TopK: other ids than numpy's")
        if not np.isnan(found.weight_sums[2]):
            raise AssertionError("TopK: a NaN among the logits does not show")
        sums = np.exp(logits[:2].astype(np.float64) - logits[:2].max(axis=1, keepdims=True)).sum(axis=1)
        self.close_to(found.weight_sums[:2], sums, "norm", "TopK: sums")
        values = np.take_along_axis(logits[:2], order, 1).astype(np.float64)
        return self.close_to(found.logits[:2], values, "exact", "TopK")

    def experts(self) -> float:
        """Every storage; few tokens and many, up to the largest blocks; all of them to the same experts; logits with a NaN."""
        return max(self._experts(EXPERTS, storage, group_size, 0) for storage, group_size in EXPERTS_STORED)

    def biased_experts(self) -> float:
        """The same with a limit, which some of the sums are beyond, and both biases, or gate_up's."""
        return max(self._experts(BIASED, *stored, biases) for stored in BIASED_STORED for biases in (1, 2))

    def shared_experts(self) -> float:
        """The same with experts that all tokens share, in each way of scoring; the biases in front of the last are missing."""
        return max(self._experts(shape, "q4", 64, 0) for shape in SHARING)

    def _experts(self, shape: moe_plan.Experts, storage: str, group_size: int, num_biases: int) -> float:
        number, hidden, width, chosen = shape.in_all, shape.hidden, shape.intermediate, shape.chosen
        parts = [
            helpers.random_projection(storage, number * n, k, group_size or 32)
            for n, k in ((2 * width, hidden), (hidden, width))
        ]
        gate_up, down = (part.weight.reshape(number, -1, part.weight.shape[1]) for part in parts)
        sizes = {"num_experts": shape.number, "num_experts_per_tok": chosen, "intermediate_size": width}
        sizes |= {"in_features": hidden, "out_features": hidden, **({"group_size": group_size} if group_size else {})}
        stored = [array for part in parts for array in part.initializers.values()]
        biases = [
            3 * self.rng.standard_normal((number, n)).astype(np.float32) for n in (2 * width, hidden)[:num_biases]
        ]
        attributes: dict[str, float] = dict(sizes)
        truth: dict[str, Any] = dict(zip(("gate_up_bias", "down_bias"), biases, strict=False))
        if shape.has_limit:
            attributes |= zip(("swiglu_alpha", "swiglu_limit"), CLAMP, strict=True)
            truth["clamp"] = CLAMP
        given, missing = [*stored, *biases], range(0)
        if shape.num_shared:
            attributes["num_shared_experts"] = shape.num_shared
        if shape.is_sigmoid:
            attributes["sigmoid_scoring"] = truth["sigmoid_scoring"] = 1
        if shape.has_scaling_factor:
            attributes["routed_scaling_factor"] = truth["routed_scaling_factor"] = FACTOR
        if shape.has_correction_bias:
            correction = (self.rng.standard_normal(shape.number) / 4).astype(np.float32)
            truth["e_score_correction_bias"] = correction
            missing = range(2 + len(given), 4 + len(stored))
            given += [*(None for _ in missing), correction]
        worst = 0.0
        for is_normed in (False, True):
            attributes["norm_topk_prob"] = int(is_normed)
            node = self.ort.node(f"MoE{storage.upper()}", num_inputs=2 + len(given), missing=missing, **attributes)
            for rows in (1, 2, 3, 16, 17, 100, 200):
                x = self.rng.standard_normal((rows, hidden)) / np.sqrt((gate_up**2).sum(2).mean())
                logits = self.rng.standard_normal((rows, shape.number)).astype(np.float32)
                if rows == 17:
                    logits[:, -chosen:] += 100  # to the same experts, all of them
                if rows > 2:
                    logits[1, 0] = np.nan
                x = x.astype(np.float16)
                (y,) = self.run(node, [x, logits, *given], [((rows, hidden), np.float16)])
                bad = np.isnan(logits).any(axis=1)
                if not (np.isnan(y) == bad[:, None]).all():
                    raise AssertionError(f"MoE {storage}, {rows} rows: a row is NaN if, and only if, its logits are")
                own, sent = x[~bad], logits[~bad]
                expected = reference.moe(own, sent, gate_up, down, chosen, norm_topk_prob=is_normed, **truth)
                worst = max(worst, self.close_to(y[~bad], expected, "moe", f"MoE {storage}, {rows} rows"))
        return worst
