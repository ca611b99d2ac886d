"""moe_*: experts chosen, pairs sorted, products of experts and their sums against float64 (FORMAT.md 5.16, 8.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from helpers import quantized_projection, random_projection
from interpreter import launch

from llmpack import moe_plan
from llmpack.kernel_spec import KernelSpec
from llmpack_ops import reference

STORAGES = ("q4", "mxfp4", "q8", "f16")
HALF = 2.0**-11  # rounding of a result, and of a weight on the matrix units, to float16
SMALLEST_HALF = 2.0**-25  # half of the last place of the smallest float16
# float32 sums of some hundred terms, relative to the sum of their sizes.
SUM = 3e-7


@dataclass
class Layer:
    """Experts with random weights: what is stored, and what the reference multiplies with."""

    shape: moe_plan.Experts
    storage: str
    group_size: int = 32
    clamp: tuple[float, float] | None = None  # alpha and limit

    def __post_init__(self) -> None:
        s = self.shape
        parts = [
            random_projection(self.storage, s.in_all * n, k, self.group_size, seed)
            for seed, (n, k) in enumerate([(2 * s.intermediate, s.hidden), (s.hidden, s.intermediate)])
        ]
        self.gate_up = parts[0].weight.reshape(s.in_all, 2 * s.intermediate, s.hidden)
        self.down = parts[1].weight.reshape(s.in_all, s.hidden, s.intermediate)
        self.rounding = 0 if self.storage == "f16" else HALF  # of weights, where the matrix units multiply
        rng = np.random.default_rng(s.number)
        self.gate_up_bias = rng.standard_normal((s.in_all, 2 * s.intermediate)).astype(np.float32) * s.has_gate_up_bias
        self.down_bias = 2 * rng.standard_normal((s.in_all, s.hidden)).astype(np.float32) * s.has_down_bias
        self.inputs_of_gate_up = {
            **parts[0].initializers,
            **({"bias": self.gate_up_bias} if s.has_gate_up_bias else {}),
        }
        self.inputs_of_down = {**parts[1].initializers, **({"bias": self.down_bias} if s.has_down_bias else {})}
        if self.clamp is not None:
            self.inputs_of_gate_up |= dict(zip(("alpha", "limit"), self.clamp, strict=True))

    def spec(self, op: str, most: int | None = None, *, is_normed: bool = True) -> KernelSpec:
        """`most`: the variant for so many pairs for each expert."""
        specs = [*moe_plan.routing(self.shape, is_normed=is_normed)]
        specs += moe_plan.products(self.shape, self.storage, 0 if self.storage == "f16" else self.group_size)
        return next(
            s for s in specs if s.op in (op, f"{op}_{self.storage}")
            and (most is None or s.constants["max_rows"] == most * self.shape.in_all)
        )  # fmt: skip

    def x(self, rows: int, factor: float = 1) -> np.ndarray:
        """Numbers for which gate and up are about `factor`."""
        x = factor * np.random.default_rng([rows, self.shape.hidden]).standard_normal((rows, self.shape.hidden))
        return (x / np.sqrt((self.gate_up**2).sum(2).mean())).astype(np.float16)

    def activations(self, pairs: int) -> np.ndarray:
        x = np.random.default_rng([pairs, self.shape.intermediate]).standard_normal((pairs, self.shape.intermediate))
        return (x / np.sqrt((self.down**2).sum(2).mean())).astype(np.float16)


def layer(
    storage: str = "q4",
    hidden: int = 64,
    intermediate: int = 32,
    number: int = 5,
    chosen: int = 2,
    group_size: int = 32,
    *,
    biases: tuple[bool, bool] = (False, False),
    clamp: tuple[float, float] | None = None,
    **others: Any,
) -> Layer:
    """`others`: members of `moe_plan.Experts`."""
    shape = moe_plan.Experts(hidden, intermediate, number, chosen, *biases, has_limit=clamp is not None, **others)
    return Layer(shape, storage, group_size, clamp)


def choose(rows: int, shape: moe_plan.Experts, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    logits = np.random.default_rng([seed, rows, shape.number]).standard_normal((rows, shape.number))
    experts, weights = reference.route(logits, shape.chosen, norm_topk_prob=True)
    return experts.astype(np.int32), weights.astype(np.float32)


def run_route(
    logits: np.ndarray, chosen: int, *, is_normed: bool, given: dict[str, Any] | None = None, **others: Any
) -> tuple[np.ndarray, np.ndarray]:
    """`given`: what the kernel takes beside the logits; `others`: members of `moe_plan.Experts`."""
    rows, number = logits.shape
    shape = moe_plan.Experts(16, 16, number, chosen, **others)
    spec = next(s for s in moe_plan.routing(shape, is_normed=is_normed) if s.op == "moe_route")
    experts, routing = np.full((rows + 1, shape.slots), -7, np.int32), np.full((rows + 1, shape.slots), 7, np.float32)
    launch(spec, logits=logits.astype(np.float32), experts=experts, routing=routing, **(given or {}))
    assert (experts[rows] == -7).all()
    assert (routing[rows] == 7).all()
    return experts[:rows], routing[:rows]


@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize(("number", "chosen"), [(1, 1), (8, 2), (8, 8), (60, 4), (128, 8), (40, 1), (520, 40)], ids=str)
def test_routing(number: int, chosen: int, is_normed: bool) -> None:
    logits = (np.random.default_rng([number, chosen]).standard_normal((3, number)) * 4).astype(np.float32)
    experts, routing = run_route(logits, chosen, is_normed=is_normed)
    expected, weights = reference.route(logits, chosen, norm_topk_prob=is_normed)
    np.testing.assert_array_equal(experts, expected)
    np.testing.assert_allclose(routing, weights, rtol=3e-6)


def test_of_equal_logits_the_lower_expert_is_chosen() -> None:
    logits = np.zeros((4, 20))
    logits[1, ::2] = -0.0  # no less than 0
    logits[2, [3, 7, 11, 19]] = 5
    logits[3] = -1e30
    experts, routing = run_route(logits, 3, is_normed=True)
    assert experts.tolist() == [[0, 1, 2], [0, 1, 2], [3, 7, 11], [0, 1, 2]]
    np.testing.assert_allclose(routing, 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("is_normed", [False, True])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_a_row_with_nan_has_experts_and_weights_of_nan(bad: float, is_normed: bool) -> None:
    """Its neighbours do not know of it; -inf is a number, of an expert that has no share."""
    logits = np.random.default_rng(0).standard_normal((4, 20)).astype(np.float32)
    logits[1, 13] = bad
    logits[2] = bad
    logits[3, :18] = -np.inf
    experts, routing = run_route(logits, 3, is_normed=is_normed)
    assert ((experts >= 0) & (experts < 20)).all()
    assert (np.diff(experts, axis=1) > 0).all(), "one of them twice"
    assert np.isnan(routing[1:3]).all()
    expected, weights = reference.route(logits[[0, 3]], 3, norm_topk_prob=is_normed)
    np.testing.assert_array_equal(experts[[0, 3]], expected)
    np.testing.assert_allclose(routing[[0, 3]], weights, rtol=3e-6)


def run_sort(experts: np.ndarray, number: int, most: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return pairs, blocks and pairs of a block."""
    spec = layer(number=number).spec("moe_sort", most)
    block_m, count = int(spec.constexprs["BLOCK_M"]), experts.size
    pairs, blocks = np.full(count + 1, -7, np.int32), np.full((-(-count // block_m) + number + 1, 3), -7, np.int32)
    launch(spec, experts=experts.reshape(-1), pairs=pairs, blocks=blocks, num_pairs=count)
    assert pairs[-1] == -7
    assert (blocks[-1] == -7).all()
    assert (blocks[:-1] >= 0).all(), "a block that nobody wrote"
    return pairs[:-1], blocks[:-1], block_m


KINDS_OF_CHOICE = ("any", "all to the first", "all to the last", "none to some", "a block each")


def choices(kind: str, count: int, number: int) -> np.ndarray:
    experts = np.random.default_rng([count, number]).integers(0, number, count)
    if kind == "none to some":
        experts = experts // 2 * 2
    elif kind == "a block each":
        experts = np.arange(count) // 16 % number
    elif kind.startswith("all"):
        experts[:] = 0 if kind.endswith("first") else number - 1
    return experts.astype(np.int32)


@pytest.mark.parametrize("most", moe_plan.BLOCKS)
@pytest.mark.parametrize("kind", KINDS_OF_CHOICE)
@pytest.mark.parametrize(("count", "number"), [(1, 1), (1, 7), (16, 5), (80, 5), (129, 3), (2500, 3)], ids=str)
def test_pairs_are_sorted_and_each_is_in_one_block(count: int, number: int, kind: str, most: int) -> None:
    experts = choices(kind, count, number)
    pairs, blocks, block_m = run_sort(experts, number, most)
    np.testing.assert_array_equal(pairs, np.argsort(experts, kind="stable"))
    places = [(expert, place) for expert, first, end in blocks for place in range(first, min(first + block_m, end))]
    assert [place for _, place in places] == list(range(count))
    assert [expert for expert, _ in places] == sorted(experts)


def check_gate_up(own: Layer, h: np.ndarray, x: np.ndarray, experts: np.ndarray, weight_rounding: float) -> None:
    """`x` and `experts` of each row of `h`."""
    gate_up, bias = own.gate_up[experts], own.gate_up_bias[experts].astype(np.float64)  # [pairs, 2 F, H], [pairs, 2 F]
    sums = np.einsum("pnk,pk->pn", gate_up, x.astype(np.float64)) + bias
    sizes = np.einsum("pnk,pk->pn", np.abs(gate_up), np.abs(x.astype(np.float64)))
    errors = (SUM + weight_rounding) * sizes + SUM * np.abs(bias)
    width = own.shape.intermediate
    # g / (1 + exp(-alpha g)) changes by at most 1.2 times what g does; cut off, neither g nor the other factor by more.
    if own.clamp is None:
        gate, other, exact = sums[:, :width], sums[:, width:], reference.swiglu(sums)
        silu = gate / (1 + np.exp(-gate))
    else:
        alpha, limit = own.clamp
        gate, other = np.minimum(sums[:, :width], limit), np.clip(sums[:, width:], -limit, limit) + 1
        silu, exact = gate / (1 + np.exp(-alpha * gate)), reference.clamped_swiglu(sums, alpha, limit)
    bound = 1.2 * errors[:, :width] * (np.abs(other) + errors[:, width:]) + np.abs(silu) * errors[:, width:]
    assert (np.abs(h - exact) <= bound + (HALF + 2 * SUM) * np.abs(exact) + SMALLEST_HALF).all()


def check_gate_up_rows(own: Layer, rows: int, backend: str = "cuda", factor: float = 1) -> None:
    x, (experts, _) = own.x(rows, factor), choose(rows, own.shape)
    h = np.full((rows * own.shape.chosen + 1, own.shape.intermediate), 7, np.float16)
    launch(own.spec("moe_gate_up"), backend, x=x, **own.inputs_of_gate_up, experts=experts, h=h)
    check_gate_up(own, h[:-1], np.repeat(x, own.shape.chosen, 0), experts.reshape(-1), 0)
    assert (h[-1] == 7).all()


def check_down_rows(own: Layer, rows: int, backend: str = "cuda") -> None:
    experts, routing = choose(rows, own.shape)
    h = own.activations(experts.size)
    y = np.full((rows + 1, own.shape.hidden), 7, np.float16)
    h_rows = h.reshape(rows, own.shape.chosen, -1)
    launch(own.spec("moe_down"), backend, h=h_rows, **own.inputs_of_down, experts=experts, routing=routing, y=y)
    down, shares = own.down[experts], routing.astype(np.float64)
    bias = own.down_bias[experts].astype(np.float64)
    exact = np.einsum("rc,rcnk,rck->rn", shares, down, h_rows.astype(np.float64)) + np.einsum(
        "rc,rcn->rn", shares, bias
    )
    size = np.einsum("rc,rcnk,rck->rn", shares, np.abs(down), np.abs(h_rows.astype(np.float64)))
    size += np.einsum("rc,rcn->rn", shares, np.abs(bias))
    assert (np.abs(y[:-1] - exact) <= SUM * size + HALF * np.abs(exact) + SMALLEST_HALF).all()
    assert (y[-1] == 7).all()


# One expert; all chosen; k = 1; numbers that are no power of two, and more chosen than are read at a time.
SHAPES = {
    "one expert": (1, 1),
    "all chosen": (4, 4),
    "one chosen": (6, 1),
    "three of seven": (7, 3),
    "ten of eleven": (11, 10),
}


@pytest.mark.parametrize("name", SHAPES)
def test_few_tokens(name: str) -> None:
    number, chosen = SHAPES[name]
    own = layer("f16", number=number, chosen=chosen)
    check_gate_up_rows(own, 3)
    check_down_rows(own, 3)


@pytest.mark.parametrize("storage", STORAGES)
def test_few_tokens_in_each_vendors_spelling(storage: str, backend: str) -> None:
    own = layer(storage)
    check_gate_up_rows(own, 2, backend)
    check_down_rows(own, 2, backend)


CASES_OF_GROUPS = [
    *(("q4", 64), ("mxfp4", 32), ("q8", 32), ("f16", 32)),
    *(pytest.param("q4", group_size, marks=pytest.mark.extended) for group_size in (32, 128)),
]


@pytest.mark.parametrize(("storage", "group_size"), CASES_OF_GROUPS)
def test_few_tokens_of_features_that_fill_no_turn(storage: str, group_size: int) -> None:
    """The last turn of each loop is not for all threads."""
    many = 512 + group_size
    check_gate_up_rows(layer(storage, many, group_size, number=3, chosen=1, group_size=group_size), 1)
    check_down_rows(layer(storage, group_size, many, number=3, group_size=group_size), 1)


def check_blocks(own: Layer, experts: np.ndarray, most: int, backend: str = "cuda", factor: float = 1) -> None:
    """Both grouped products of the pairs with these experts [rows, chosen]."""
    rows, shape = len(experts), own.shape
    x, count = own.x(rows, factor), experts.size
    pairs, blocks, _ = run_sort(experts, shape.number, most)
    h = np.full((count + 1, shape.intermediate), 7, np.float16)
    table = {"pairs": pairs, "blocks": blocks, "num_experts": shape.number}
    launch(own.spec("moe_grouped_gate_up", most), backend, **table, x=x, **own.inputs_of_gate_up, h=h)
    of_pair = experts.reshape(-1)
    check_gate_up(own, h[:-1], x[pairs // shape.chosen], of_pair[pairs], own.rounding)
    assert (h[-1] == 7).all()

    h, z = own.activations(count), np.full((count + 1, shape.hidden), 7, np.float16)
    routing = np.random.default_rng(count).uniform(0.01, 1, experts.shape).astype(np.float32)
    launch(own.spec("moe_grouped_down", most), backend, **table, routing=routing, h=h, **own.inputs_of_down, z=z)
    down, shares = own.down[of_pair], routing.reshape(-1, 1).astype(np.float64)
    in_order = h[np.argsort(pairs)].astype(np.float64)
    bias = own.down_bias[of_pair].astype(np.float64)
    exact = shares * (np.einsum("pnk,pk->pn", down, in_order) + bias)
    size = shares * (np.einsum("pnk,pk->pn", np.abs(down), np.abs(in_order)) + np.abs(bias))
    assert (np.abs(z[:-1] - exact) <= (SUM + own.rounding) * size + (HALF + SUM) * np.abs(exact) + SMALLEST_HALF).all()
    assert (z[-1] == 7).all()


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("most", [8, 64, pytest.param(0, marks=pytest.mark.extended)])
def test_many_tokens_in_each_vendors_spelling(storage: str, most: int, backend: str) -> None:
    own = layer(storage, number=3)
    check_blocks(own, choose(20, own.shape)[0], most, backend)


@pytest.mark.parametrize("kind", KINDS_OF_CHOICE)
@pytest.mark.parametrize("most", moe_plan.BLOCKS)
def test_experts_without_a_token_and_with_all_of_them(kind: str, most: int) -> None:
    own = layer("f16", number=6, chosen=1)
    check_blocks(own, choices(kind, 130, 6).reshape(-1, 1), most)


@pytest.mark.parametrize(
    "most", [8, pytest.param(64, marks=pytest.mark.extended), pytest.param(0, marks=pytest.mark.extended)]
)
@pytest.mark.parametrize(("storage", "group_size"), CASES_OF_GROUPS)
def test_many_tokens_of_features_that_fill_no_block(storage: str, group_size: int, most: int) -> None:
    """Input and output features that none of the tilings divides, where the groups allow it."""
    odd = {32: (160, 96), 64: (192, 64), 128: (128, 384)}[group_size]
    own = layer(storage, *odd, number=2, group_size=group_size)
    check_blocks(own, choose(5, own.shape)[0], most)


@pytest.mark.parametrize("most", [None, 8, 64])
def test_every_code_of_mxfp4_is_exact(most: int | None, backend: str) -> None:
    """Each code alone, in every place of a word: h is a unit vector, and y its level to the last bit."""
    shape = moe_plan.Experts(hidden=32, intermediate=32, number=1, chosen=1)
    codes = np.stack([np.roll(np.arange(32) % 16, i) for i in range(32)]).astype(np.uint8)
    projection = quantized_projection("mxfp4", codes, np.ones((32, 1), np.float16))
    op = "moe_down_mxfp4" if most is None else "moe_grouped_down_mxfp4"
    specs = moe_plan.products(shape, "mxfp4", 32)
    spec = next(s for s in specs if s.op == op and most in (None, s.constants["max_rows"]))
    h, y, experts = np.eye(32, dtype=np.float16), np.zeros((32, 32), np.float16), np.zeros((32, 1), np.int32)
    routing = np.ones((32, 1), np.float32)
    if most is None:
        launch(spec, backend, h=h, **projection.initializers, experts=experts, routing=routing, y=y)
    else:
        pairs, blocks, _ = run_sort(experts, 1, most)
        table = {"pairs": pairs, "blocks": blocks, "num_experts": 1}
        launch(spec, backend, **table, h=h, **projection.initializers, routing=routing, z=y)
    np.testing.assert_array_equal(y.T, projection.weight)


def test_one_token_may_go_as_many_do() -> None:
    own = layer()
    check_blocks(own, choose(1, own.shape)[0], 8)


@pytest.mark.parametrize("hidden", [32, 1056])
def test_the_sum_of_a_tokens_experts(hidden: int) -> None:
    own = layer(hidden=hidden, chosen=3)
    z = np.random.default_rng(0).standard_normal((4, 3, hidden)).astype(np.float16)
    z[1, :2], z[2, 1, 5] = 60000, np.nan
    y = np.full((5, hidden), 7, np.float16)
    launch(own.spec("moe_combine"), z=z, y=y)
    exact = z.astype(np.float64).sum(axis=1)
    assert (y[1] == 65504).all()
    np.testing.assert_allclose(y[[0, 3]], exact[[0, 3]], rtol=HALF + SUM, atol=1e-6)
    assert np.isnan(y[2]).tolist() == np.isnan(exact[2]).tolist()
    assert (y[4] == 7).all()


def run(
    own: Layer, x: np.ndarray, logits: np.ndarray, most: int | None, backend: str = "cuda", **given: Any
) -> np.ndarray:
    """The whole operator as the launcher does it; `most` None: as for few tokens; `given`: what its routing takes, too."""
    rows, slots = len(x), own.shape.slots
    experts, routing = np.zeros((rows, slots), np.int32), np.zeros((rows, slots), np.float32)
    launch(own.spec("moe_route"), backend, logits=logits, experts=experts, routing=routing, **given)
    y, h = np.zeros_like(x), np.zeros((rows, slots, own.shape.intermediate), np.float16)
    if most is None:
        launch(own.spec("moe_gate_up"), backend, x=x, **own.inputs_of_gate_up, experts=experts, h=h)
        launch(own.spec("moe_down"), backend, h=h, **own.inputs_of_down, experts=experts, routing=routing, y=y)
        return y
    pairs, blocks, _ = run_sort(experts, own.shape.in_all, most)
    h, z = h.reshape(rows * slots, -1), np.zeros((rows, slots, own.shape.hidden), np.float16)
    table = {"pairs": pairs, "blocks": blocks, "num_experts": own.shape.in_all}
    launch(own.spec("moe_grouped_gate_up", most), backend, **table, x=x, **own.inputs_of_gate_up, h=h)
    launch(own.spec("moe_grouped_down", most), backend, **table, routing=routing, h=h, **own.inputs_of_down, z=z)
    launch(own.spec("moe_combine"), backend, z=z, y=y)
    return y


@pytest.mark.parametrize(("storage", "backend"), [("q4", "cuda"), ("f16", "cuda"), ("f16", "hip")])
@pytest.mark.parametrize("most", [None, 8, 0, pytest.param(64, marks=pytest.mark.extended)])
def test_the_whole_operator(storage: str, most: int | None, backend: str) -> None:
    """A row whose logits hold a NaN is NaN, as is one whose x does; the others are right; sums end at the largest float16."""
    own = layer(storage, chosen=3)
    x = own.x(7)
    logits = np.random.default_rng(3).standard_normal((7, own.shape.number)).astype(np.float32)
    logits[2, 1], x[4, 5] = np.nan, np.nan
    x[6], logits[6, 1] = x[6] * 160, 60  # one expert has it all: no term of its sum ends before the sum
    y = run(own, x, logits, most, backend)
    assert np.isnan(y[[2, 4]]).all()
    rest = [0, 1, 3, 5, 6]
    exact = reference.moe(x[rest], logits[rest], own.gate_up, own.down, 3, norm_topk_prob=True)
    assert np.abs(exact[-1]).max() > 70000
    for found, expected in zip(y[rest], np.clip(exact, -65504, 65504), strict=True):
        np.testing.assert_allclose(found, expected, atol=4 * HALF * np.abs(expected).max())
