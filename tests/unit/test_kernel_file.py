"""The kernel file as FORMAT.md 8.2 lays it out, read here a second time by offsets; targets by name."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from llmpack import kernels
from llmpack.kernel_file import GridAxis, Kernel, KernelFile, Parameter, from_bytes, to_bytes
from llmrun.artifact import IncompatibleError, IntegrityError, UsageError

KERNEL = Kernel(
    op="matmul_q4",
    constants={"out_features": 48, "in_features": 64},
    function="matmul_rows",
    code=b"\x7fELF code",
    num_warps=4,
    shared_bytes=512,
    grid=(GridAxis("rows", 64, 2, "sequences"), GridAxis(factor=3), GridAxis("splits")),
    parameters=(Parameter("x", "*fp16", 8, 16), Parameter("num_rows", "i32", 4)),
    registers=40,
)
FILE = KernelFile("cuda", "sm_89", "cubin", 32, (KERNEL,))


def test_every_field_is_where_the_format_says() -> None:
    data = to_bytes(FILE)
    assert data[:8] == b"LLMPKGPU"
    assert struct.unpack_from("<IIII", data, 8) == (1, 1, 2, 2)
    assert data[24:40] == b"cuda".ljust(16, b"\0")
    assert data[40:56] == b"sm_89".ljust(16, b"\0")
    assert struct.unpack_from("<II", data, 56) == (1, 32)
    record = data[64 : 64 + 224]
    assert record[:32] == b"matmul_q4".ljust(32, b"\0")
    assert record[32:96] == b"matmul_rows".ljust(64, b"\0")
    offset, size = struct.unpack_from("<QQ", record, 96)
    assert offset % 64 == 0
    assert data[offset : offset + size] == KERNEL.code
    assert struct.unpack_from("<6I", record, 112) == (4, 512, 1, 0, 0, 0)
    assert struct.unpack_from("<4I", record, 136) == (0, 2, 0, 2)
    assert struct.unpack_from("<12I", record, 152) == (1, 64, 2, 2, 0, 1, 3, 0, 3, 1, 1, 0)
    assert struct.unpack_from("<6I", record, 200) == (40, 0, 0, 0, 0, 0)
    constants = data[288 : 288 + 64]
    assert constants[:24] == b"in_features".ljust(24, b"\0")
    assert struct.unpack_from("<q", constants, 24) == (64,)
    parameters = data[352 : 352 + 96]
    assert parameters[48:72] == b"num_rows".ljust(24, b"\0")
    assert parameters[:40] == b"x".ljust(24, b"\0") + b"*fp16".ljust(16, b"\0")
    assert struct.unpack_from("<II", parameters, 40) == (8, 16)


def test_reading_gives_what_was_written() -> None:
    assert from_bytes(to_bytes(FILE), "f") == FILE


@pytest.mark.parametrize(("cooperative", "waits", "flags"), [(True, False, 1), (False, True, 2), (True, True, 3)])
def test_flags_of_a_launch(cooperative: bool, waits: bool, flags: int) -> None:
    kernel = dataclasses.replace(KERNEL, cooperative=cooperative, waits=waits)
    file = dataclasses.replace(FILE, kernels=(kernel,))
    data = to_bytes(file)
    assert struct.unpack_from("<I", data, 64 + 124) == (flags,)
    assert from_bytes(data, "f") == file


def test_equal_code_is_stored_once() -> None:
    two = KernelFile("cuda", "sm_89", "cubin", 32, (KERNEL, Kernel(**{**vars(KERNEL), "op": "matmul_q6"})))
    assert to_bytes(two).count(KERNEL.code) == 1


@pytest.mark.parametrize("size", [0, 8, 63, 64, 300, 400])
def test_a_file_cut_short_is_refused(size: int) -> None:
    with pytest.raises(IntegrityError, match=r"f: not a kernel file"):
        from_bytes(to_bytes(FILE)[:size], "f")


def test_a_name_that_does_not_fit_is_our_error() -> None:
    with pytest.raises(ValueError, match="longer than 31"):
        to_bytes(KernelFile("cuda", "sm_89", "cubin", 32, (Kernel(**{**vars(KERNEL), "op": "m" * 32}),)))


def test_targets_come_once_in_order_and_with_the_cpu() -> None:
    assert kernels.parse_targets(["gfx1100", "sm_89", "cuda"]) == ("cpu", *kernels.CUDA_TARGETS, "gfx1100")
    assert kernels.parse_targets(["all"]) == ("cpu", *kernels.GPU_TARGETS)
    assert kernels.parse_targets(["cpu"]) == ("cpu",)


def test_an_unknown_target_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(
        UsageError, match=r"--targets sm_88: unknown; choose from cpu, sm_80, .*gfx1201, cuda, rocm, all"
    ):
        kernels.parse_targets(["sm_88"])


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "triton_version", lambda: None)
    with pytest.raises(IncompatibleError, match=r"pip install 'llmpack\[kernels\]'"):
        kernels.check_compiler()
