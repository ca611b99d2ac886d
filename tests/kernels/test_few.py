"""few.matmul_q4: the interpreter runs no Gluon, so the PTX that it compiles to is run here (ptx.py), every program and thread.

On a GPU: `make test-gpu`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers import layout_q4
from ptx import Machine

from llmpack import kernels
from llmpack.kernel_plan import ROWS_OF_Q4, KernelSpec, product
from llmpack_ops.reference import LEVELS

X, WEIGHT, SCALES, Y = (i << 30 for i in range(1, 5))  # addresses
# out_features, in_features, group_size, y_bits, max_rows; warps, tiles and depth other than the plan's
SHAPES = {
    "small": ((16, 64, 64, 16, 8), {}),
    "less than a warp's unit each": ((24, 64, 32, 16, 8), {"threads": 128}),
    "a tile twice, the last turn not for all": ((40, 352, 32, 16, 8), {"threads": 128, "TILES": 2, "DEPTH": 2}),
    "more than one turn each time around": ((32, 1792, 64, 32, 8), {"threads": 64, "TILES": 1, "DEPTH": 3}),
    "groups of two units": ((64, 896, 128, 16, 8), {"threads": 64, "TILES": 4, "DEPTH": 2}),
    "one turn after the loop": ((32, 640, 64, 16, 16), {"threads": 64, "TILES": 2, "DEPTH": 2}),
    "16 tokens": ((64, 1024, 64, 16, 16), {"threads": 512, "TILES": 2, "DEPTH": 1}),
}


def spec_of(shape: tuple[int, int, int, int, int], changes: dict[str, int]) -> KernelSpec:
    n, k, group_size, y_bits, max_rows = shape
    own = product("q4", n, k, group_size, y_bits, max_rows).of("sm_80")
    threads = changes.get("threads", own.threads)
    constexprs = {name: changes.get(name, value) for name, value in own.constexprs.items()}
    tiles = -(-n // 16)
    grid = (dataclasses.replace(own.grid[0], factor=-(-tiles // int(constexprs["TILES"]))), *own.grid[1:])
    return dataclasses.replace(own, threads=threads, constexprs=constexprs, grid=grid)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, kernels.Kernel]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMPACK_CACHE", str(tmp_path_factory.mktemp("few")))
        file = kernels.build([spec_of(*shape) for shape in SHAPES.values()], ["sm_80"])[kernels.PTX_TARGET]
    return dict(zip(SHAPES, file.kernels, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_every_program_gives_its_sums(compiled: dict[str, kernels.Kernel], name: str) -> None:
    (n, k, group_size, y_bits, max_rows), _ = SHAPES[name]
    kernel = compiled[name]
    rng = np.random.default_rng(0)
    padded = -(-n // 16) * 16
    q = np.full((padded, k), 8, np.uint8)
    q[:n] = rng.integers(0, 16, (n, k))
    scales = rng.uniform(-0.05, 0.05, (padded, k // group_size)).astype(np.float16)
    tiled = np.ascontiguousarray(scales.reshape(padded // 16, 16, -1).transpose(0, 2, 1))
    weight = LEVELS["q4"][q].astype(np.float64) * np.repeat(scales.astype(np.float64), group_size, 1)
    for rows in {1, max_rows, max(1, max_rows - 3)}:
        x = rng.standard_normal((rows, k)).astype(np.float16)
        if rows > 1:
            x[-1, k // 2] = np.nan
        x[0, :64] *= 12000  # sums beyond float16
        y = np.zeros((rows, n), f"f{y_bits // 8}")
        memory = {X: x, WEIGHT: layout_q4(q), SCALES: tiled, Y: y}
        machine = Machine(kernel.code.decode(), kernel.num_warps * 32, memory, kernel.shared_bytes)
        for program in range(kernel.grid[0].factor):
            machine.run(program, [X, WEIGHT, SCALES, Y, rows, 0, 0])
        exact = (x.astype(np.float64) @ weight.T)[:, :n]
        if y_bits == 16:
            assert np.abs(exact[0]).max() > 65504
            exact = np.clip(exact, -65504, 65504)
        # NaN of a token is NaN of all its sums, and of no other's.
        relative, absolute = (2**-11, 0) if y_bits == 16 else (0, 2**-20 * np.nanmax(np.abs(x) @ np.abs(weight).T))
        np.testing.assert_allclose(y, exact.astype(y.dtype), rtol=2 * relative, atol=absolute + 2**-10)


def test_nvidia_s_chips_have_it_instead() -> None:
    for max_rows in (8, 16):
        spec = product("q4", 4096, 11008, 64, 16, max_rows)
        for chip in kernels.CUDA_TARGETS:
            own = spec.of(chip)
            assert own is not None
            assert own.function == "few.matmul_q4"
            assert own.constexprs["TOKENS"] == max_rows
            assert (own.op, own.constants, own.types) == (spec.op, spec.constants, spec.types)
    for chip in kernels.ROCM_TARGETS:
        assert [product("q4", 4096, 11008, 64, 16, rows).of(chip) is None for rows in ROWS_OF_Q4] == [
            rows == 8 for rows in ROWS_OF_Q4
        ]
    for rows in (1, 4):
        assert product("q4", 4096, 11008, 64, 16, rows).of("sm_120") is None, "eight rows serve them"
        assert product("q6", 4096, 11008, 64, 16, rows).instead == {}
    assert "few" not in product("q4", 4096, 11008, 64, 16, 64).of("sm_80").function
    small = product("q4", 24, 32, 32, 16, 8).of("sm_80")
    assert (small.threads, small.constexprs["TILES"], small.constexprs["DEPTH"]) == (32, 1, 1)
