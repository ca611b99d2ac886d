"""What is particular to aarch64, under emulation; the `isa` fixture runs the tests of every operator there too."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from helpers import random_projection, random_x

from emulated.emulator import BUILD, WITHOUT, EmulatedError, Emulator
from llmpack_ops import reference


def test_the_best_instruction_set_is_chosen(emulator: Emulator) -> None:
    with pytest.raises(EmulatedError, match=r"sse9 is not .*, expected one of: neon, portable"):
        emulator.set_isa("sse9")
    fresh = Emulator()
    assert fresh.isa() == "neon"
    fresh.close()


def test_a_machine_without_dot_products_takes_the_portable_path(emulator: Emulator) -> None:
    old = Emulator(WITHOUT)
    try:
        assert old.isa() == "portable"
        with pytest.raises(EmulatedError, match=r"neon is not an instruction set of this machine, .* one of: portable"):
            old.set_isa("neon")
        # No instruction in the portable kernels or around them is newer than this machine.
        projection, x = random_projection("q4", 40, 128), random_x(5, 128)
        inputs = {"x": x, **projection.initializers}
        (y,) = old.run("MatMulQ4", inputs, 1, projection.attributes, threads=2)
        bound = reference.activation_quantization_bound(x, projection.weight, 32)
        assert (np.abs(y - reference.matmul(x, projection.weight)) <= bound * 1.001).all()
    finally:
        old.close()


def test_only_the_neon_kernels_have_dot_products(emulator: Emulator) -> None:
    """An object of the portable path that used one would end on older machines."""

    def dot_products(kernels: str) -> int:
        objects = sorted((BUILD / f"CMakeFiles/{kernels}.dir").rglob("*.o"))
        assert objects
        command = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", *objects]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.count("\tsdot\t")

    assert dot_products("kernels_neon") > 0
    assert dot_products("kernels_portable") == dot_products("llmpack_ops") == dot_products("packer_portable") == 0


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("count", [1, 2048, 100_003])
@pytest.mark.parametrize("shares_memory", [True, False], ids=["shared_memory", "mpi"])
def test_collectives_between_processes(emulator: Emulator, size: int, count: int, shares_memory: bool) -> None:
    if not shares_memory and count > 2048:
        pytest.skip("the stand-in for MPI moves at most 64 KB")
    x = np.stack([random_x(1, count, seed)[0] for seed in range(size)])
    sums, gathered = emulator.ranks(x, shares_memory=shares_memory)
    expected = reference.all_reduce(list(x))
    for rank in range(size):
        np.testing.assert_array_equal(sums[rank], expected)
        np.testing.assert_array_equal(gathered[rank], x.ravel())
