"""float16 on the host (gpu/half.h), by which an all-reduce passes the CPU, against numpy's."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import subnormals_flushed

ROOT = Path(__file__).parents[2]
CODE = """
#include <cstddef>
#include "gpu/half.h"
extern "C" void to_floats(const uint16_t* halves, float* floats, size_t n) {
    for (size_t i = 0; i < n; i++) floats[i] = llmpack::gpu::half_to_float(halves[i]);
}
extern "C" void to_halves(const float* floats, uint16_t* halves, size_t n) {
    for (size_t i = 0; i < n; i++) halves[i] = llmpack::gpu::float_to_half(floats[i]);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("half") / "libhalf.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", f"-I{ROOT / 'custom_ops'}"]
    subprocess.run(["g++", *flags, "-x", "c++", "-", "-o", path], input=CODE, text=True, check=True)
    return ctypes.CDLL(str(path))


@pytest.mark.parametrize("is_flushed", [False, True])
def test_every_half_passes_unchanged(library: ctypes.CDLL, is_flushed: bool) -> None:
    if is_flushed and platform.machine() != "x86_64":
        pytest.skip("sets MXCSR")
    halves = np.arange(65536, dtype=np.uint16)
    floats, back = np.empty(65536, np.float32), np.empty(65536, np.uint16)
    with subnormals_flushed() if is_flushed else contextlib.nullcontext():
        library.to_floats(halves.ctypes, floats.ctypes, ctypes.c_size_t(65536))
        library.to_halves(floats.ctypes, back.ctypes, ctypes.c_size_t(65536))
    expected = halves.view(np.float16)
    np.testing.assert_array_equal(floats, expected.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(floats), np.signbit(expected))
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(back[finite], halves[finite])
