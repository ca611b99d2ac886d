"""MoEF32, MoEF16, MoEQ8, MoEQ4, MoEMXFP4 against float64 (FORMAT.md 5.16), and against the products that they are made of."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from helpers import TOLERANCES, Mixture, random_x, session
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmpack_ops import reference
from llmrun.job_options import ISAS

SCHEMES = ("f32", "f16", "q8", "q4")
QUANTIZED = ("q8", "q4", "mxfp4")
NORMS = pytest.mark.parametrize("norms", [False, True], ids=["", "norms"])
MOST_PAIRS = 256  # that are computed together (custom_ops/ort/moe.cpp), unless one expert has more


def random_logits(T: int, E: int) -> np.ndarray:
    return random_x(T, E, 5) * 2


def product_error(scheme: str, x: np.ndarray, weight: np.ndarray, group_size: int) -> np.ndarray:
    """How far a product of x may be from float64, as test_matmul.py says."""
    size = np.abs(x) @ np.abs(weight).T
    if scheme not in QUANTIZED:
        return TOLERANCES["matmul"] * size
    return reference.activation_quantization_bound(x, weight, group_size) + TOLERANCES["quantized_matmul"] * size


def expert_error(mixture: Mixture, e: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What expert e makes of x, and how far from it an operator may be."""
    (gate_up, down), scheme, group_size = (m.weight for m in mixture.expert(e)), mixture.scheme, mixture.group_size
    biases = mixture.stored_biases
    exact = reference.matmul(x, gate_up) + biases.get("gate_up_bias", np.zeros((mixture.A, 1)))[e]
    (gate, up), (of_gate, of_up) = (
        np.split(values, 2, axis=1) for values in (exact, product_error(scheme, x, gate_up, group_size))
    )
    act = reference.swiglu
    if mixture.clamp is not None:
        (alpha, limit), up = mixture.clamp, np.clip(up, -mixture.clamp[1], mixture.clamp[1]) + 1
        gate = np.minimum(gate, limit)
        act = partial(reference.clamped_swiglu, alpha=alpha, limit=limit)
    inner = act(exact)
    silu = np.abs(act(np.concatenate([gate, np.full_like(gate, mixture.clamp is None)], axis=1)))
    # silu's derivative is at most 1.1, at any alpha; to cut off makes no difference larger.
    most_silu, most_up = silu + 1.1 * of_gate, np.abs(up) + of_up
    of_inner = 1.1 * of_gate * most_up + silu * of_up + TOLERANCES["swiglu"] * most_silu * most_up
    of_down = of_inner @ np.abs(down).T + product_error(scheme, np.abs(inner) + of_inner, down, group_size)
    return reference.matmul(inner, down) + biases.get("down_bias", np.zeros((mixture.A, 1)))[e], of_down


def check(mixture: Mixture, x: np.ndarray, logits: np.ndarray, threads: int = 1) -> np.ndarray:
    """Run it and compare with float64; returns y."""
    (y,) = mixture.node(x, logits).run(threads)
    options: dict[str, Any] = {**mixture.routing, **mixture.stored_biases}
    exact = reference.moe(
        x,
        logits,
        mixture.gate_up.weight.reshape(mixture.A, 2 * mixture.F, mixture.H),
        mixture.down.weight.reshape(mixture.A, mixture.H, mixture.F),
        mixture.k,
        **options,
        clamp=mixture.clamp,
    )
    assert y.shape == exact.shape
    assert y.dtype == np.float32
    experts, weights = mixture.route(logits)
    bound = np.zeros_like(exact)
    for token, slot in np.ndindex(experts.shape):
        z, error = expert_error(mixture, int(experts[token, slot]), x[token : token + 1])
        bound[token] += weights[token, slot] * (error + TOLERANCES["routing"] * (np.abs(z) + error))[0]
    assert (np.abs(y - exact) <= bound).all()
    if not mixture.biases and mixture.clamp is None and mixture.scheme != "mxfp4":
        assert_as_products(mixture, x, logits, y)
    return y


def assert_as_products(mixture: Mixture, x: np.ndarray, logits: np.ndarray, y: np.ndarray) -> None:
    """The products with SwiGLU, and those of down, each compared with float64 elsewhere, give what is added up by weight.

    Nearer than `check`: what is rounded to 8 bits is the same on both sides.
    """
    expected, size = mixture.by_products(x, *mixture.route(logits))
    assert (np.abs(y - expected) <= TOLERANCES["routing"] * size).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@NORMS
@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 17, 40])
def test_any_number_of_tokens(isa: str, scheme: str, T: int, norms: bool) -> None:
    check(Mixture(scheme, norms=norms), random_x(T, 64), random_logits(T, 6))


CLAMPS = {"swiglu": None, "clamped": (1.702, 7.0), "clamped_early": (0.7, 0.25)}


@pytest.mark.parametrize("scheme", [*SCHEMES, "mxfp4"])
@pytest.mark.parametrize(("biases", "clamp"), [(0, "clamped"), (1, "swiglu"), (2, "clamped"), (2, "clamped_early")])
@pytest.mark.parametrize("T", [1, 3, 20])
def test_biases_and_limits(isa: str, scheme: str, biases: int, clamp: str, T: int) -> None:
    """Of few tokens, whose gates and ups are two streams, of more, and of so many that weights are decoded first."""
    x, logits = random_x(T, 96), random_logits(T, 5)
    y = check(Mixture(scheme, 5, 2, 96, 64, biases=biases, clamp=CLAMPS[clamp]), x, logits)
    if biases:
        assert not np.array_equal(y, check(Mixture(scheme, 5, 2, 96, 64, clamp=CLAMPS[clamp]), x, logits))


@pytest.mark.parametrize("T", [1, 2, 5, 40])
def test_mxfp4_is_q8_of_the_same_numbers(isa: str, T: int) -> None:
    """To the same bits, as the integers and the scales are the same; of one rounding of activations."""
    mixture = Mixture("mxfp4", 6, 2, 160, 96, biases=2, clamp=(1.702, 7.0))
    node = mixture.node(random_x(T, 160), random_logits(T, 6))
    as_q8 = mixture.node(node.inputs["x"], node.inputs["router_logits"])
    as_q8.op = "MoEQ8"
    for name in ("gate_up", "down"):
        tiles = node.inputs[name]  # [tiles, K / 8, 16, 4]
        levels = reference.LEVELS["mxfp4"][np.stack([tiles & 15, tiles >> 4], axis=2)] + 128
        as_q8.inputs[name] = levels.astype(np.uint8).reshape(len(tiles), -1, 16, 4)
    np.testing.assert_array_equal(node.run()[0], as_q8.run()[0])


@pytest.mark.parametrize("scheme", ["f32", "mxfp4"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan], ids=["nan", "negative_nan"])
@pytest.mark.parametrize("feature", [3, 32 + 5], ids=["gate", "up"])
@pytest.mark.parametrize("T", [1, 3, 9])
def test_nan_is_not_cut_off(isa: str, scheme: str, bad: float, feature: int, T: int) -> None:
    """Of a gate alone, or of what is multiplied with it."""
    node = Mixture(scheme, biases=1, clamp=(1.702, 7.0)).node(random_x(T, 64), random_logits(T, 6))
    node.inputs["gate_up_bias"] = node.inputs["gate_up_bias"].copy()
    node.inputs["gate_up_bias"][:, feature] = bad
    assert np.isnan(node.run()[0]).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_token(isa: str, scheme: str) -> None:
    assert check(Mixture(scheme), random_x(0, 64), random_logits(0, 6)).shape == (0, 64)


@pytest.mark.parametrize("scheme", SCHEMES)
@NORMS
@pytest.mark.parametrize(
    ("E", "k"),
    [(1, 1), (7, 1), (5, 4), (5, 5), (40, 8)],
    ids=["one_expert", "one_of_them", "all_but_one", "all_of_them", "many"],
)
@pytest.mark.parametrize("T", [1, 9])
def test_any_number_of_experts(isa: str, scheme: str, E: int, k: int, T: int, norms: bool) -> None:
    check(Mixture(scheme, E, k, norms=norms), random_x(T, 64), random_logits(T, E))


@pytest.mark.parametrize(("k", "T"), [(1, 2), (40, 2), pytest.param(1024, 1, marks=pytest.mark.extended)])
def test_as_many_experts_as_there_may_be(library, k: int, T: int) -> None:
    check(Mixture("f16", 1024, k, 16, 16), random_x(T, 16), random_logits(T, 1024))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("T", [1, 3])
def test_an_expert_of_one_tile(isa: str, scheme: str, T: int) -> None:
    """Of one group, where weights are in groups: two tiles at least."""
    size = 32 if scheme in QUANTIZED else 16
    check(Mixture(scheme, H=size, F=size), random_x(T, size), random_logits(T, 6))


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("T", [1, 20])
def test_group_sizes(isa: str, scheme: str, group_size: int, T: int) -> None:
    check(Mixture(scheme, 3, 2, 256, 128, group_size), random_x(T, 256), random_logits(T, 3))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("T", [1, 2, 9])
def test_ranges_long_enough_for_two_streams(isa: str, scheme: str, T: int) -> None:
    check(Mixture(scheme, 4, 2, 160, 64), random_x(T, 160), random_logits(T, 4))


@NORMS
def test_of_equal_logits_the_lower_experts_are_chosen(isa: str, norms: bool) -> None:
    logits = np.array(
        [
            [1, 1, 1, 1, 1, 1],
            [0, 2, 1, 2, 1, 2],
            [-0.0, 0, -0.0, 0, 0, 0],
            [5, -1, -1, -1, -1, -1],
            [0, 1e-45, 0, 0, 0, 0],
        ],
        np.float32,
    )
    mixture, x = Mixture("f32", norms=norms), random_x(len(logits), 64)
    np.testing.assert_array_equal(mixture.route(logits)[0], [[0, 1], [1, 3], [0, 1], [0, 1], [0, 1]])
    check(mixture, x, logits)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("expert", [0, 3, 5], ids=["first", "middle", "last"])
@pytest.mark.parametrize("threads", [1, 2])
def test_all_tokens_on_one_expert(isa: str, scheme: str, expert: int, threads: int) -> None:
    """More than are computed together else; of the other experts most have no token."""
    T = MOST_PAIRS + 9
    logits = random_logits(T, 6)
    logits[:, expert] += 100
    check(Mixture(scheme, k=1, H=32), random_x(T, 32), logits, threads)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("T", [MOST_PAIRS // 2, MOST_PAIRS // 2 + 1])
def test_one_expert_or_two_are_all_that_is_computed_together(isa: str, scheme: str, T: int) -> None:
    check(Mixture(scheme, 2, 2, 32), random_x(T, 32), random_logits(T, 2))


@pytest.mark.parametrize("scheme", ["f32", "q4", *(pytest.param(s, marks=pytest.mark.extended) for s in ("f16", "q8"))])
def test_tokens_of_an_expert_are_shared_out(library, scheme: str) -> None:
    """Enough of them, and of their features, that loops over them are cut into ranges: alike whatever the instruction set."""
    logits = random_logits(150, 2)
    logits[:, 1] += 2
    check(Mixture(scheme, 2, 1, 1024, 512, 64), random_x(150, 1024), logits, threads=3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_in_several_groups(isa: str, scheme: str) -> None:
    check(Mixture(scheme, 24, 12, 32), random_x(60, 32), random_logits(60, 24))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("T", [1, 3, 70])
def test_threads_give_the_same_bits(isa: str, scheme: str, T: int) -> None:
    node = Mixture(scheme, 9, 4, 256, 96).node(random_x(T, 256), random_logits(T, 9))
    (one,), *more = (node.run(threads) for threads in (1, 2, 3))
    for (others,) in more:
        np.testing.assert_array_equal(one, others)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_token_does_not_depend_on_the_others(isa: str, scheme: str) -> None:
    mixture, x, logits = Mixture(scheme, 4, 2), random_x(40, 64), random_logits(40, 4)
    (together,) = mixture.node(x, logits).run()
    for some in (*(slice(t, t + 1) for t in range(0, 40, 7)), slice(3, 5), slice(5, 16)):
        np.testing.assert_array_equal(mixture.node(x[some], logits[some]).run()[0], together[some])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf], ids=["nan", "negative_nan", "inf"])
@pytest.mark.parametrize("T", [1, 9])
def test_nan_in_x_reaches_every_output_of_its_token(isa: str, scheme: str, bad: float, T: int) -> None:
    mixture, x, logits = Mixture(scheme), random_x(T, 64), random_logits(T, 6)
    (clean,) = mixture.node(x, logits).run()
    x[T // 2, 33] = bad
    (y,) = mixture.node(x, logits).run()
    assert not np.isfinite(y[T // 2]).any()
    np.testing.assert_array_equal(np.delete(y, T // 2, 0), np.delete(clean, T // 2, 0))


@pytest.mark.parametrize(
    "bad",
    [[np.nan], [-np.nan], [np.nan] * 6, [np.inf], [np.inf, np.inf], [-np.inf] * 6, [np.inf, -np.inf, np.nan]],
    ids=["nan", "negative_nan", "all_nan", "inf", "two_inf", "all_minus_inf", "each"],
)
@NORMS
@pytest.mark.parametrize("T", [1, 9])
def test_logits_without_a_softmax_give_nan(isa: str, bad: list[float], norms: bool, T: int) -> None:
    """Those beside them stay as they are."""
    mixture, x, logits = Mixture("q4", norms=norms), random_x(T, 64), random_logits(T, 6)
    (clean,) = mixture.node(x, logits).run()
    for places in (slice(0, len(bad)), slice(6 - len(bad), 6)):
        wrong = logits.copy()
        wrong[T // 2, places] = bad
        (y,) = mixture.node(x, wrong).run()
        assert np.isnan(y[T // 2]).all()
        np.testing.assert_array_equal(np.delete(y, T // 2, 0), np.delete(clean, T // 2, 0))


@NORMS
def test_no_token_has_a_softmax(isa: str, norms: bool) -> None:
    (y,) = Mixture("q8", norms=norms).node(random_x(5, 64), np.full((5, 6), np.nan, np.float32)).run()
    assert np.isnan(y).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@NORMS
def test_minus_infinity_forbids_an_expert(isa: str, scheme: str, norms: bool) -> None:
    """It is chosen where there are not enough others, and adds nothing."""
    logits = np.full((4, 6), -np.inf, np.float32)
    logits[0, 2] = logits[1, 5] = logits[2, 0] = 3
    logits[3, 1:3] = 1, -1000
    check(Mixture(scheme, norms=norms), random_x(4, 64), logits)


@pytest.mark.parametrize("size", [3e38, 1e4, 1e-30, 1e-45, 0], ids=str)
@NORMS
def test_tiny_and_huge_logits(isa: str, size: float, norms: bool) -> None:
    logits = (np.sign(random_logits(5, 6)) * np.float32(size)).astype(np.float32)
    check(Mixture("f32", norms=norms), random_x(5, 64), logits)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("T", [1, 2, 5, 9])
def test_both_ways_of_asking_for_weights(isa: str, weight_fetches, scheme: str, T: int) -> None:
    x, logits = random_x(T, 192), random_logits(T, 4)
    through, past = (check(Mixture(scheme, 4, 2, 192, 64), x, logits) for _ in weight_fetches)
    np.testing.assert_array_equal(through, past)


def test_one_session_takes_any_number_of_tokens(library) -> None:
    """What is kept between calls is of no step."""
    mixture = Mixture("q4", 8, 3)
    full = mixture.node(random_x(1, 64), random_logits(1, 8))
    made = session(full.model(any_shape=True), threads=2)
    for T in (1, 300, 2, 0, 40, 1):
        x, logits = random_x(T, 64), random_logits(T, 8)
        (y,) = made.run(None, {"x": x, "router_logits": logits})
        np.testing.assert_array_equal(y, mixture.node(x, logits).run()[0])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scheme=st.sampled_from(SCHEMES),
    T=st.integers(1, 20),
    experts=st.integers(1, 12).flatmap(lambda E: st.tuples(st.just(E), st.integers(1, E))),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    group_size=st.sampled_from([32, 64]),
    spread=st.sampled_from([0.0, 1.0, 20.0]),
    norms=st.booleans(),
    shared=st.integers(0, 2),
    scores=st.tuples(st.booleans(), st.booleans(), st.sampled_from([1.0, 2.5])),
    threads=st.integers(1, 3),
)
def test_any_shape(
    isa: str,
    scheme: str,
    T: int,
    experts: tuple[int, int],
    sizes: tuple[int, int],
    group_size: int,
    spread: float,
    norms: bool,
    shared: int,
    scores: tuple[bool, bool, float],
    threads: int,
) -> None:
    unit = group_size if scheme in QUANTIZED else 16
    H, F = (size * unit for size in sizes)
    E, k = experts
    check(
        Mixture(scheme, E, k, H, F, group_size, norms, 0, None, shared, *scores),
        random_x(T, H),
        (random_x(T, E, 5) * np.float32(spread)).astype(np.float32),
        threads,
    )
