"""hopper.matmul_q4: the interpreter runs no Gluon, so what is written by hand in it, its assembly, is run here, lane by lane.

The rest is checked by compiling (test_compile.py), and on a GPU (`make test-gpu`).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import layout_q4

from llmpack import kernel_plan, kernels
from llmpack_kernels import hopper
from llmpack_kernels.decode import KEPT
from llmpack_ops.reference import LEVELS

MASK = 0xFFFFFFFF


def _prmt(low: int, high: int, selector: int) -> int:
    pool = [(word >> 8 * i) & 255 for word in (low, high) for i in range(4)]
    result = 0
    for i in range(4):
        nibble = (selector >> 4 * i) & 15
        byte = pool[nibble & 7]
        result |= ((byte >> 7) * 255 if nibble & 8 else byte) << 8 * i
    return result


def _lop3(a: int, b: int, c: int, table: int) -> int:
    result = 0
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result & MASK


def _halves(word: int) -> np.ndarray:
    return np.array([word], np.uint32).view(np.float16)


def _word(halves: np.ndarray) -> int:
    return int(halves.view(np.uint32)[0])


OPERATIONS = {
    "mov.b32": lambda a: a, "mov.u32": lambda a: a, "prmt.b32": _prmt, "lop3.b32": _lop3,
    "shr.u32": lambda a, b: a >> b, "shl.b32": lambda a, b: a << b, "sub.u32": lambda a, b: a - b,
    "add.u32": lambda a, b: a + b, "add.s32": lambda a, b: a + b, "mad.lo.s32": lambda a, b, c: a * b + c,
    "and.b32": lambda a, b: a & b, "xor.b32": lambda a, b: a ^ b,
    "sub.f16x2": lambda a, b: _word(_halves(a) - _halves(b)), "mul.f16x2": lambda a, b: _word(_halves(a) * _halves(b)),
}  # fmt: skip


def run(assembly: str, **given: int) -> dict[str, int]:
    """Run PTX without branches; `given`: operands by name, "o" for "$"."""
    values = {name.replace("o", "$", 1): value for name, value in given.items() if name != "lane"}
    values["%laneid"] = given.get("lane", 0)
    for instruction in re.sub("[{}]", "", assembly).split(";"):
        operation, _, operands = instruction.strip().partition(" ")
        if operation in ("", ".reg"):
            continue
        target, *sources = (operand.strip() for operand in operands.split(","))
        numbers = [values[s] if s in values else int(s, 0) for s in sources]
        values[target] = OPERATIONS[operation](*numbers) & MASK
    return values


def test_every_lane_unpacks_its_input_features() -> None:
    rng = np.random.default_rng(0)
    for lane in range(32):
        q = rng.integers(0, 16, (16, 64)).astype(np.uint8)
        words = layout_q4(q).view(np.uint32).reshape(8, 16)  # chunk, row
        scale = np.float16(rng.uniform(-0.1, 0.1))
        lasting = {
            16: run(hopper.BYTES.value, lane=lane)["$0"],
            24: run(hopper.NIBBLES.value, lane=lane)["$0"],
            **{
                32 + 8 * i: run(KEPT.value, lane=lane, o1=2048, o2=value.value & MASK)["$0"]
                for i, value in enumerate((hopper.LOW, hopper.HIGH, hopper.EVEN, hopper.ODD))
            },
        }
        for row in range(16):
            for first in (0, 4):
                operands = {f"o{4 + 2 * c}": int(words[first + c, row]) for c in range(4)}
                operands |= {f"o{n}": value for n, value in lasting.items()}
                found = run(hopper.UNPACK.value, o12=_word(np.array([scale, scale])), **operands)
                for c in range(4):
                    k = 8 * (first + c) + 2 * (lane % 4)
                    exact = LEVELS["q4"][q[row, k : k + 2]].astype(np.float64) * np.float64(scale)
                    np.testing.assert_array_equal(_halves(found[f"${c}"]), exact.astype(np.float16))


@pytest.mark.slow
def test_compiling_it_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMPACK_CACHE", str(tmp_path))
    kernels.build([kernel_plan.product("q4", 128, 128, 64, 16, 0)], ["sm_90"])
    assert capfd.readouterr() == ("", "")


def test_it_stands_in_on_its_chip_only_where_a_group_fills_its_blocks() -> None:
    spec = kernel_plan.product("q4", 4096, 4096, 64, 16, 0)
    assert list(spec.instead) == ["sm_90"]
    own = spec.instead["sm_90"]
    assert (own.op, own.constants, own.types) == (spec.op, spec.constants, spec.types)
    assert own.function == "hopper.matmul_q4"
    assert kernel_plan.product("q4", 4096, 4096, 32, 16, 0).instead == {}
    assert kernel_plan.product("q8", 4096, 4096, 64, 16, 0).instead == {}
    assert kernel_plan.product("q4", 4096, 4096, 64, 16, 64).instead == {}
