"""MoE operators of a GPU's graph on the stand-in driver: what is launched, in which order, and what is refused."""

from __future__ import annotations

import checks
import pytest
import standin
from test_gpu_launcher import run  # noqa: F401

SIZES = {
    "num_experts": checks.EXPERTS.number,
    "num_experts_per_tok": checks.EXPERTS.chosen,
    "norm_topk_prob": 1,
    "intermediate_size": checks.EXPERTS.intermediate,
    "in_features": checks.EXPERTS.hidden,
    "out_features": checks.EXPERTS.hidden,
    "group_size": 64,
}


@pytest.fixture
def kernels(tmp_path):
    path = tmp_path / "cuda-sm_89.bin"
    standin.write_kernels(path, checks.extra_specs())
    return path


def test_it_is_right_for_few_tokens_and_for_many(run, kernels):  # noqa: F811
    assert run(kernels, "checks.experts()") == "0 \n"


def test_it_is_right_with_biases_and_a_limit(run, kernels):  # noqa: F811
    assert run(kernels, "checks.biased_experts()") == "0 \n"


def test_it_is_right_with_shared_experts_in_each_way_of_scoring(run, kernels):  # noqa: F811
    assert run(kernels, "checks.shared_experts()") == "0 \n"


# What is launched for how many tokens: pairs up to 8 and 64 for each of 6 experts have a variant of their own.
FEW = ["moe_route", "moe_gate_up_q4", "moe_down_q4"]
MANY = ["moe_route", "moe_sort", "moe_grouped_gate_up_q4", "moe_grouped_down_q4", "moe_combine"]
LAUNCHES = {0: [], 1: FEW, 2: FEW, 3: MANY, 16: MANY, 17: MANY, 128: MANY, 129: MANY}
CALL = """
    import numpy_kernels
    node = checks.ort.node("MoEQ4", name="moe", **{sizes})
    some = checks.device.allocate(1 << 22)
    checks.device.clear(some, 1 << 22)
    shapes_of = lambda rows: [(10, (rows, 256)), (1, (rows, 6)), *{stored}]
    def call(rows):
        given = [(kind, shape, some) for kind, shape in shapes_of(rows)]
        y = checks.device.allocate(1 << 20)
        checks.ort.call(node, given, [(10, (rows, 256), y)], checks.device.stream)
"""
STORED = [(2, (96, 32, 16, 4)), (10, (96, 4, 16)), (2, (96, 16, 16, 4)), (10, (96, 2, 16))]


def call(body: str, stored=STORED, **changes: float) -> str:
    return CALL.format(sizes={**SIZES, **changes}, stored=stored) + body


def test_what_is_launched_for_how_many_tokens(run, kernels):  # noqa: F811
    body = call("""
    launched = []
    for name in list(numpy_kernels.KERNELS):
        numpy_kernels.KERNELS[name] = lambda p, name=name: launched.append((name, p.get("block", 0), p["grid"][0]))
    for rows in (0, 1, 2, 3, 16, 17, 128, 129):
        launched.clear()
        call(rows)
        blocks = {block for name, block, _ in launched if block}
        grids = {grid for name, _, grid in launched if "grouped" in name}
        print([name for name, *_ in launched], *blocks, *grids, sep=";")""")
    lines = run(kernels, body).splitlines()[:-1]
    expected = []
    for rows, names in LAUNCHES.items():
        block = {0: 0, 1: 0, 2: 0, 3: 16, 16: 16, 17: 64, 128: 64, 129: 128}[rows]
        grid = f";{block};{-(-rows * 3 // block) + 6}" if block else ""
        expected.append(f"{names}{grid}")
    assert lines == expected


def test_what_is_captured_runs_again_with_other_experts(run, kernels):  # noqa: F811
    """Shapes alone decide what is launched: a graph's next run may choose other experts."""
    body = f"""import helpers
    from llmpack_ops import reference
    projections = [helpers.random_projection("q4", 6 * n, k, 64) for n, k in ((256, 256), (256, 128))]
    gate_up, down = (p.weight.reshape(6, -1, p.weight.shape[1]) for p in projections)
    node = checks.ort.node("MoEQ4", **{SIZES})
    for rows in (2, 20):
        kinds = [(10, (rows, 256)), (1, (rows, 6)), *{STORED}]
        stored = [array for p in projections for array in p.initializers.values()]
        x = (checks.rng.standard_normal((rows, 256)) / np.sqrt((gate_up**2).sum(2).mean())).astype(np.float16)
        first, second = (checks.rng.standard_normal((rows, 6)).astype(np.float32) for _ in range(2))
        given = [(kind, shape, checks.device.put(a)) for (kind, shape), a in zip(kinds, [x, first, *stored])]
        y = checks.device.allocate(rows * 512)
        again = checks.device.capture(
            lambda: checks.ort.call(node, given, [(10, (rows, 256), y)], checks.device.stream))
        for logits in (first, second, first):
            checks.device.write(given[1][2], logits)
            again()
            checks.device.synchronize()
            expected = reference.moe(x, logits, gate_up, down, 3, norm_topk_prob=True)
            checks.close_to(checks.device.read(y, (rows, 256), np.float16), expected, "moe", "again")
        print("right")"""
    assert run(kernels, body) == "right\nright\n0 \n"


REFUSED = [
    ({"num_experts_per_tok": 7}, "attribute num_experts_per_tok is 7, expected at most num_experts (6)"),
    ({"num_experts": 1025}, "attribute num_experts is 1025, expected at most 1024"),
    ({"norm_topk_prob": 2}, "attribute norm_topk_prob is 2, expected 0 or 1"),
    ({"num_shared_experts": 1019}, "attribute num_shared_experts is 1019, expected 0 to 1024 less num_experts (6)"),
    ({"num_shared_experts": -1}, "attribute num_shared_experts is -1, expected 0 to 1024 less num_experts (6)"),
    ({"sigmoid_scoring": 2}, "attribute sigmoid_scoring is 2, expected 0 or 1"),
    ({"routed_scaling_factor": 0.0}, "attribute routed_scaling_factor is 0.000000, expected a number above 0"),
    ({"routed_scaling_factor": 1e39}, "attribute routed_scaling_factor is inf, expected a number above 0"),
    ({"routed_scaling_factor": 2.0}, "has no moe_route with "),
    ({"sigmoid_scoring": 1}, "has no moe_route with "),
    ({"out_features": 320}, "attribute out_features is 320, expected in_features (256)"),
    ({"intermediate_size": 96}, "attribute intermediate_size is 96, expected a multiple of 16 and of group_size (64)"),
    ({"in_features": 288, "out_features": 288}, "in_features is 288, expected a multiple of 16 and of group_size (64)"),
    ({"intermediate_size": 64}, "has no moe_gate_up_q4 with "),
    ({"num_experts": 7}, "has no moe_route with "),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "expected"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_sizes_that_do_not_fit_are_refused(run, kernels, changes, expected):  # noqa: F811
    said = run(kernels, call("", **changes))
    assert "MoEQ4 'moe': " in said
    assert expected in said


@pytest.mark.parametrize(
    ("index", "name"), [*enumerate(["x", "router_logits", "gate_up", "gate_up_scales", "down", "down_scales"])]
)
def test_tensors_of_another_size_are_named(run, kernels, index, name):  # noqa: F811
    """A kernel would read beyond their ends."""
    wrong = f"""
    right = shapes_of
    def shapes_of(rows):
        found = right(rows)
        kind, shape = found[{index}]
        found[{index}] = kind, (shape[0] - {int(index > 1)}, *shape[1:-1], shape[-1] - {int(index < 2)})
        return found
    call(1)"""
    assert f"MoEQ4 'moe': input {name} has shape [" in run(kernels, call(wrong))


def test_more_tokens_than_the_workspace_is_for_are_refused(run, kernels):  # noqa: F811
    assert "MoEQ4 'moe': x has 513 tokens, expected at most 512" in run(kernels, call("\n    call(513)"))


BIASED = """
    sizes = {{"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": 1, "intermediate_size": 96}}
    sizes |= {{"in_features": 288, "out_features": 288, "group_size": {group_size}, **{attributes}}}
    node = checks.ort.node("MoEMXFP4", name="moe", num_inputs={num_inputs}, **sizes)
    some = checks.device.allocate(1 << 22)
    shapes = [(10, (1, 288)), (1, (1, 6)), (2, (72, 36, 16, 4)), (10, (72, 9, 16)), (2, (108, 12, 16, 4)), (10, (108, 3, 16))]
    shapes += {biases}
    checks.ort.call(node, [(*shape, some) for shape in shapes], [(10, (1, 288), some)], checks.device.stream)
"""
CLAMP = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
RIGHT = [(1, (6, 192)), (1, (6, 288))]
BIASED_REFUSED = [
    (CLAMP, [(1, (6, 96)), (1, (6, 288))], 32, "input gate_up_bias has shape [6, 96], expected [6, 192] = [num_experts + num"),
    (CLAMP, [(1, (6, 192)), (1, (5, 288))], 32, "input down_bias has shape [5, 288], expected [6, 288] = [num_experts + num"),
    (CLAMP, [(10, (6, 192)), (1, (6, 288))], 32, "input gate_up_bias is of float16, expected float32"),
    ({"swiglu_limit": 7.0}, RIGHT, 32, "one of the attributes swiglu_alpha and swiglu_limit is missing, expected both or"),
    ({"swiglu_alpha": 1.0}, RIGHT, 32, "one of the attributes swiglu_alpha and swiglu_limit is missing, expected both or"),
    ({**CLAMP, "swiglu_limit": -1.0}, RIGHT, 32, "attribute swiglu_limit is -1.000000, expected at least 0"),
    ({}, RIGHT, 32, "has no moe_gate_up_mxfp4 with "),
    (CLAMP, [], 32, "has no moe_gate_up_mxfp4 with "),
    (CLAMP, RIGHT, 64, "in_features is 288, expected a multiple of 16 and of group_size (64)"),
]  # fmt: skip


@pytest.mark.parametrize(("attributes", "biases", "group_size", "expected"), BIASED_REFUSED)
def test_biases_and_limits_that_do_not_fit_are_refused(run, kernels, attributes, biases, group_size, expected):  # noqa: F811
    num_inputs = 6 + len(biases)
    said = run(
        kernels, BIASED.format(attributes=attributes, biases=biases, group_size=group_size, num_inputs=num_inputs)
    )
    assert "MoEMXFP4 'moe': " in said
    assert expected in said


# With one that all tokens share, and an input without a name before the last.
SHARED = """
    sizes = {sizes} | dict(num_experts=7, num_experts_per_tok=2, num_shared_experts=2, norm_topk_prob=0)
    node = checks.ort.node("MoEQ4", name="moe", num_inputs=9, missing={missing}, **sizes)
    some = checks.device.allocate(1 << 22)
    shapes = [(10, (1, 256)), (1, (1, 7)), (2, (144, 32, 16, 4)), (10, (144, 4, 16))]
    shapes += [(2, ({down}, 16, 16, 4)), (10, (144, 2, 16))]
    given = [*((*shape, some) for shape in shapes), None, None, ({kind}, ({experts},), some)]
    checks.ort.call(node, given, [(10, (1, 256), some)], checks.device.stream)
"""
SHARED_REFUSED = {
    "weights of those chosen alone": ({"down": 112}, "input down has shape [112, 16, 16, 4], expected [144, 16, 16, 4] = "),
    "a bias of those shared, too": ({"experts": 9}, "input e_score_correction_bias has shape [9], expected [7] = [num_exp"),
    "a bias in float16": ({"kind": 10}, "input e_score_correction_bias is of float16, expected float32"),
    "a bias that has a name and is none": ({"missing": (7,)}, "has no moe_gate_up_q4 with "),
}  # fmt: skip


@pytest.mark.parametrize("kind", SHARED_REFUSED)
def test_shared_experts_that_do_not_fit_are_refused(run, kernels, kind):  # noqa: F811
    changes, expected = SHARED_REFUSED[kind]
    right = {"sizes": SIZES, "missing": (6, 7), "down": 144, "kind": 1, "experts": 7}
    said = run(kernels, SHARED.format(**{**right, **changes}))
    assert "MoEQ4 'moe': " in said
    assert expected in said
