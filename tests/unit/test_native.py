"""The library packs the very bits of the numpy version, on every instruction set, and multiplies what it packed."""

import _ctypes
import ctypes
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpack import layout, native
from llmpack.quantize import quantize_mxfp4, quantize_q4, quantize_q6, quantize_q8
from llmpack_ops import reference
from llmrun.errors import IncompatibleError
from llmrun.job_options import ISAS


def isas():
    library = native.library()
    library.llmpack_ops_set_isa.argtypes = [ctypes.c_char_p]
    library.llmpack_ops_isa.restype = ctypes.c_char_p
    found, best = [], library.llmpack_ops_isa()
    for name in ISAS:
        if library.llmpack_ops_set_isa(name.encode()) == 0:
            found.append(name)
    library.llmpack_ops_set_isa(best)
    return found


class EmulatedLibrary:
    """The two packing functions of an emulated machine's library, called as ctypes calls them."""

    def __init__(self, emulator):
        self._emulator = emulator

    def llmpack_ops_pack_rows(self, reference):
        a = reference._obj
        source = ((a.num_rows - 1) * a.row_stride + a.num_columns) * (4 if a.source_type == 0 else 2)
        bits = {0: 32, 1: 16, 3: 8, 4: 4, 5: 6, 6: 4}[a.storage]
        cells = a.num_tiles * 16 * a.num_columns * bits // 8
        scales = a.num_tiles * 16 * a.num_columns // a.group_size * 2 if a.scales else 0
        numbers = [a.source_type, a.storage, a.group_size, a.num_rows, a.num_columns, a.row_stride, a.num_tiles]
        arrays = [(a.rows, source), (a.candidates, 4 * a.num_candidates), (a.weight, cells), (a.scales, scales)]
        contents = [ctypes.string_at(address, size) if size > 0 else b"" for address, size in arrays]
        code, weight, made_scales = self._emulator.pack(numbers, contents)
        ctypes.memmove(a.weight, weight, len(weight))
        if made_scales:
            ctypes.memmove(a.scales, made_scales, len(made_scales))
        return code

    def llmpack_ops_packed_product(self, reference):
        a = reference._obj
        bits = {0: 32, 1: 16, 3: 8, 4: 4, 5: 6, 6: 4}[a.storage]
        cells = a.num_tiles * 16 * a.num_columns * bits // 8
        scales = a.num_tiles * 16 * a.num_columns // a.group_size * 2 if a.scales else 0
        arrays = [(a.weight, cells), (a.scales, scales), (a.x, a.num_columns * native.VECTORS * 8)]
        contents = [ctypes.string_at(address, size) if size else b"" for address, size in arrays]
        code, y = self._emulator.product([a.storage, a.group_size, a.num_tiles, a.num_columns], contents)
        ctypes.memmove(a.y, y, len(y))
        return code


# On aarch64 one compiled version serves every instruction set.
@pytest.fixture(params=[*isas(), "aarch64"])
def isa(request, monkeypatch):
    """Run a test once for each instruction set of this machine, and on an emulated aarch64."""
    if request.param == "aarch64":
        emulated = EmulatedLibrary(request.getfixturevalue("emulator"))
        monkeypatch.setattr(native, "library", lambda: emulated)
        yield request.param
        return
    library = native.library()
    best = library.llmpack_ops_isa()
    assert library.llmpack_ops_set_isa(request.param.encode()) == 0
    yield request.param
    library.llmpack_ops_set_isa(best)


UNTILE = {
    "q8": layout.untile_rows,
    "q6": layout.untile_six_bits,
    "q4": layout.untile_nibbles,
    "mxfp4": layout.untile_nibbles,
}
STORAGES = ("q4", "mxfp4", "q6", "q8", "f16", "f32")


def empty_tiles(num_rows, num_columns, storage, group_size):
    """Tiles full of something that must be overwritten."""
    tiles = -(-num_rows // 16)
    shape, dtype = {
        "f32": ((tiles, num_columns, 16), np.float32),
        "f16": ((tiles, num_columns, 16), np.float16),
        "q8": ((tiles, num_columns // 4, 16, 4), np.uint8),
        "q6": ((tiles, num_columns // 16, 3, 16, 4), np.uint8),
        "q4": ((tiles, num_columns // 8, 16, 4), np.uint8),
        "mxfp4": ((tiles, num_columns // 8, 16, 4), np.uint8),
    }[storage]
    scales = np.full((tiles, num_columns // group_size, 16), 77, np.float16) if storage in UNTILE else None
    return np.full(shape, 77, dtype), scales


def pack_with_numpy(values, storage, group_size):
    """Rows of float32 -> tiles and scales, by quantize.py and layout.py."""
    if storage in ("f32", "f16"):
        return layout.tile_rows(values.astype({"f32": np.float32, "f16": np.float16}[storage])), None
    if storage == "q8":
        quantized, scales = quantize_q8(values, group_size)
        return layout.tile_rows(quantized, 4, 128), layout.tile_rows(scales)
    if storage == "q6":
        quantized, scales = quantize_q6(values, group_size)
        return layout.tile_six_bits(quantized), layout.tile_rows(scales)
    if storage == "mxfp4":
        quantized, scales = quantize_mxfp4(values, group_size)
        return layout.tile_nibbles(quantized, 0), layout.tile_rows(scales)
    quantized, scales = quantize_q4(values, group_size)
    return layout.tile_nibbles(quantized), layout.tile_rows(scales)


def as_source(values, dtype):
    """Float32 values -> (rows as a checkpoint has them, the same as float32)."""
    if dtype == "bf16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32)
    rows = values.astype({"f32": np.float32, "f16": np.float16}[dtype])
    return rows, rows.astype(np.float32)


def assert_same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[a.itemsize]
    assert np.array_equal(a.view(unsigned), b.view(unsigned))


def hard_values(seed, num_rows, num_columns, kind):
    """Random, large, small (float32 and float16 subnormals), mixed, halves of steps, signed zeros, and single powers of two."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((num_rows, num_columns))
    exponent = rng.integers(-24, 4, (num_rows, num_columns))
    values = {
        "random": normal * 0.02,
        "large": normal * 9e3,
        "tiny": normal * 2.0**-20,
        "subnormal": normal * 2.0**-135,
        "mixed": normal * 2.0**exponent,
        "ties": rng.integers(-16, 17, (num_rows, num_columns)) / 2,
        "zeros": np.where(rng.random((num_rows, num_columns)) < 0.5, 0.0, -0.0),
        "rows": normal * 2.0 ** rng.integers(-26, 10, (num_rows, 1)),
        # Every step that is tried is exact, and some groups are just as large as those that are not searched.
        "single": np.where(np.arange(num_columns) % 32 == seed % 32, 2.0 ** rng.integers(-24, -16, normal.shape), 0.0),
    }[kind]
    return values.astype(np.float32)


KINDS = ("random", "large", "tiny", "subnormal", "mixed", "ties", "zeros", "rows", "single")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_the_bits_of_the_numpy_version(isa, storage, dtype):
    @settings(max_examples=40, deadline=None)
    @given(
        seed=st.integers(0, 1 << 20),
        num_rows=st.sampled_from([1, 15, 16, 17, 40]),
        num_groups=st.integers(1, 3),
        group_size=st.sampled_from([32, 64, 128]),
        kind=st.sampled_from(KINDS),
    )
    def check(seed, num_rows, num_groups, group_size, kind):
        rows, values = as_source(hard_values(seed, num_rows, num_groups * group_size, kind), dtype)
        weight, scales = empty_tiles(num_rows, values.shape[1], storage, group_size)
        native.pack_rows(rows, storage, group_size, weight, scales, is_bfloat16=dtype == "bf16")
        expected, expected_scales = pack_with_numpy(values, storage, group_size)
        assert_same_bits(weight, expected)
        if scales is not None:
            assert_same_bits(scales, expected_scales)

    check()


def test_every_float16_is_read_and_written_as_numpy_does(isa):
    bits = np.arange(1 << 16, dtype=np.uint16)
    halves = bits[np.isfinite(bits.view(np.float16))].view(np.float16).reshape(-1, 64)
    weight, _ = empty_tiles(len(halves), 64, "f32", 64)
    native.pack_rows(halves, "f32", 64, weight)
    assert_same_bits(weight, layout.tile_rows(halves.astype(np.float32)))
    # Each float16 and the floats around the middle between it and the next: rounding to nearest even.
    middles = ((halves[:, :-1].astype(np.float32) + halves[:, 1:].astype(np.float32)) / 2).ravel()
    floats = np.concatenate([middles, np.nextafter(middles, np.float32(9)), np.nextafter(middles, np.float32(-9))])
    floats = floats[: len(floats) // 64 * 64].reshape(-1, 64)
    weight, _ = empty_tiles(len(floats), 64, "f16", 64)
    native.pack_rows(floats, "f16", 64, weight)
    assert_same_bits(weight, layout.tile_rows(floats.astype(np.float16)))


@pytest.mark.parametrize("num_rows", [1, 2, 20])
@pytest.mark.parametrize("storage", STORAGES)
def test_columns_of_wider_rows(isa, storage, num_rows):
    wide = hard_values(3, num_rows, 256, "random").astype(np.float16)
    weight, scales = empty_tiles(num_rows, 96, storage, 32)
    native.pack_rows(wide[:, 64:160], storage, 32, weight, scales)
    expected, expected_scales = pack_with_numpy(wide[:, 64:160].astype(np.float32), storage, 32)
    assert_same_bits(weight, expected)
    if scales is not None:
        assert_same_bits(scales, expected_scales)


@pytest.mark.parametrize("storage", ["f16", "f32"])
@pytest.mark.parametrize("num_columns", [1, 7, 33, 131])
def test_odd_widths_of_what_is_not_quantized(isa, storage, num_columns):
    values = hard_values(4, 18, num_columns, "random")
    weight, _ = empty_tiles(18, num_columns, storage, 32)
    native.pack_rows(values, storage, 32, weight)
    assert_same_bits(weight, pack_with_numpy(values, storage, 32)[0])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_what_is_not_finite_is_refused(isa, storage, value, dtype):
    values = hard_values(5, 17, 64, "random")
    values[16, 40] = value
    weight, scales = empty_tiles(17, 64, storage, 32)
    rows, _ = as_source(values, dtype)
    with pytest.raises(native.NotFiniteError):
        native.pack_rows(rows, storage, 32, weight, scales, is_bfloat16=dtype == "bf16")


@pytest.mark.parametrize(
    ("storage", "value"),
    [("q4", 1e9), ("q4", 530e3), ("q6", 530e3), ("q8", 9e6), ("mxfp4", 530e3), ("f16", 65520.0), ("f16", -1e9)],
)
def test_what_float16_cannot_hold_is_refused(isa, storage, value):
    values = np.zeros((17, 64), np.float32)
    values[16, 63] = value
    weight, scales = empty_tiles(17, 64, storage, 32)
    with pytest.raises(OverflowError, match=f"a {'value' if storage == 'f16' else 'scale'} is beyond float16's range"):
        native.pack_rows(values, storage, 32, weight, scales)


@pytest.mark.parametrize("storage", STORAGES)
def test_product_is_that_of_the_numpy_reference_and_the_same_bits_everywhere(storage):
    values = hard_values(6, 40, 256, "random")
    weight, scales = empty_tiles(40, 256, storage, 64)
    native.pack_rows(values, storage, 64, weight, scales)
    x = np.random.default_rng(7).standard_normal((256, native.VECTORS))
    if storage in ("f32", "f16"):
        logical = layout.untile_rows(weight, 48)
    else:
        logical = reference.dequantize(UNTILE[storage](weight, 48), layout.untile_rows(scales, 48), storage)
    library = native.library()
    best, products = library.llmpack_ops_isa(), []
    for name in isas():
        library.llmpack_ops_set_isa(name.encode())
        products.append(native.packed_product(weight, scales, storage, 64, x))
    library.llmpack_ops_set_isa(best)
    bound = 1e-14 * (np.abs(logical).astype(np.float64) @ np.abs(x))
    assert (np.abs(products[0] - reference.matmul(x.T, logical).T) <= bound).all()
    assert all(np.array_equal(products[0].view(np.uint64), y.view(np.uint64)) for y in products)


@pytest.mark.parametrize("storage", STORAGES)
def test_product_has_the_same_bits_on_aarch64(emulator, storage):
    weight, scales = empty_tiles(40, 256, storage, 64)
    native.pack_rows(hard_values(6, 40, 256, "random"), storage, 64, weight, scales)
    x = np.random.default_rng(7).standard_normal((256, native.VECTORS))
    here = native.packed_product(weight, scales, storage, 64, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: EmulatedLibrary(emulator))
        there = native.packed_product(weight, scales, storage, 64, x)
    assert np.array_equal(here.view(np.uint64), there.view(np.uint64))


def test_arguments_that_do_not_fit_are_refused():
    values = np.zeros((16, 64), np.float32)
    weight, scales = empty_tiles(16, 64, "q4", 32)
    for bad in (
        lambda: native.pack_rows(values[:, :32], "q4", 32, weight, scales),
        lambda: native.pack_rows(values.T, "q4", 32, weight, scales),
        lambda: native.pack_rows(np.zeros((64, 64), np.float32)[:16].T.copy().T, "q4", 32, weight, scales),
        lambda: native.pack_rows(values, "q8", 32, weight, scales),
        lambda: native.pack_rows(values.astype(np.uint16), "q4", 32, weight, scales),
        lambda: native.pack_rows(values, "q4", 32, weight, scales, is_bfloat16=True),
        lambda: native.pack_rows(values, "q4", 32, weight, np.zeros((1, 16, 2), np.float16).transpose(0, 2, 1)),
        lambda: native.packed_product(weight, scales, "q4", 32, np.zeros((32, native.VECTORS))),
        lambda: native.packed_product(weight, scales, "q4", 32, np.zeros((64, 3))),
    ):
        with pytest.raises(TypeError):
            bad()


@pytest.mark.parametrize(
    "change",
    [
        {"struct_size": ctypes.sizeof(native._Rows) - 8}, {"source_type": 3}, {"source_type": 9}, {"storage": 2},
        {"storage": 9}, {"group_size": 0}, {"group_size": 8}, {"group_size": 48},
        {"group_size": 24, "num_columns": 48}, {"group_size": 256, "num_columns": 256},
        {"num_rows": -1}, {"num_rows": 17}, {"num_columns": 0}, {"num_columns": 1 << 60}, {"row_stride": 63},
        {"num_tiles": -1, "num_rows": 0}, {"num_tiles": 1 << 60}, {"rows": None}, {"candidates": None},
        {"num_candidates": 0}, {"weight": None}, {"scales": None},
    ],
)  # fmt: skip
def test_what_the_header_does_not_allow_is_refused(change):
    values, candidates = np.zeros((17, 256), np.float32), np.full(1, -64, np.float32)
    weight, scales = empty_tiles(16, 256, "q4", 32)
    pointers = {"rows": values, "candidates": candidates, "weight": weight, "scales": scales}
    sound = {
        "struct_size": ctypes.sizeof(native._Rows), "source_type": 0, "storage": 4, "group_size": 32, "num_rows": 16,
        "num_columns": 64, "row_stride": 256, "num_tiles": 1, "num_candidates": 1,
        **{name: array.ctypes.data for name, array in pointers.items()},
    }  # fmt: skip
    library = native.library()
    assert library.llmpack_ops_pack_rows(ctypes.byref(native._Rows(**sound))) == 0
    assert library.llmpack_ops_pack_rows(ctypes.byref(native._Rows(**{**sound, **change}))) == -1
    x = np.zeros((256, native.VECTORS))
    y = np.zeros((16, native.VECTORS))
    product = {name: sound[name] for name in ("storage", "group_size", "num_tiles", "num_columns", "weight", "scales")}
    product |= {"struct_size": ctypes.sizeof(native._Product), "x": x.ctypes.data, "y": y.ctypes.data}
    assert library.llmpack_ops_packed_product(ctypes.byref(native._Product(**product))) == 0
    changes = {name: value for name, value in change.items() if name in product}
    for changed in ({"x": None}, {"y": None}, *([changes] if changes else ())):
        assert library.llmpack_ops_packed_product(ctypes.byref(native._Product(**{**product, **changed}))) == -1
    assert library.llmpack_ops_pack_rows(None) == library.llmpack_ops_packed_product(None) == -1


def test_a_library_that_is_none_or_lacks_these_functions_is_named(monkeypatch, tmp_path):
    (tmp_path / "empty.so").write_bytes(b"")
    for path in (tmp_path / "empty.so", Path(_ctypes.__file__)):
        monkeypatch.setattr(native, "find_library", lambda path=path: path)
        with pytest.raises(IncompatibleError, match=rf"{path}: .* Install llmpack again\."):
            native.library.__wrapped__()
