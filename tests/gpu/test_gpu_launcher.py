"""The launcher's refusals, one sentence each, and its care for code and memory, on the stand-in driver."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import checks
import pytest
import shapes
import standin

from llmpack.kernel_file import Parameter, from_bytes, to_bytes

CODE = """
import sys, numpy as np, box, shapes, standin
from checks import Checks, extra_specs
from device import Device
from executor import MiniOrt
operators, mini, kernels = sys.argv[1:4]
library = box.load_operators(operators)
try:
    box.open_gpu(library, kernels)
    specs = [*shapes.specs_of(shapes.config_of("dry")), *extra_specs()]
    driver = standin.serve_launches(specs, waiting={waiting})
    checks = Checks(MiniOrt(mini, operators), Device())
    {body}
    print(driver.standin_violations(), driver.standin_report().decode())
except RuntimeError as error:
    print(error)
"""
NORM = 'print("%.1e" % checks.norms())'


@pytest.fixture
def run(standins: Path, operators: Path, tmp_path: Path):
    def run(
        kernels: Path, body: str = "pass", folder: Path = standins, waiting: tuple[str, ...] = (), **settings: object
    ) -> str:
        code = CODE.format(body=body, waiting=waiting)
        done = standin.run(folder, code, operators, standins / "libmini_ort.so", kernels, **settings)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def specs():
    return shapes.specs_of(shapes.config_of("dry"))


@pytest.fixture
def kernels(tmp_path: Path, specs) -> Path:
    path = tmp_path / "cuda-sm_89.bin"
    standin.write_kernels(path, specs)
    return path


def test_no_driver(run, kernels, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "libcuda.so.1").write_text("no library")
    said = run(kernels, folder=tmp_path / "broken")
    assert "no NVIDIA driver (" in said
    assert "install the NVIDIA driver, or use --provider cpu." in said


def test_a_driver_that_is_too_old(run, kernels):
    assert "libcuda.so.1 supports CUDA 11.4, expected CUDA 12.0 or later" in run(kernels, version=11040)


def test_code_for_another_chip(run, kernels):
    said = run(kernels, chip="sm_120")
    assert (
        "holds code for sm_89, and GPU 0 (stand-in 0) is sm_120, which does not run it: copy the artifact again" in said
    )


def test_code_that_is_too_new_for_the_driver(run, kernels):
    said = run(kernels, refuses=1)
    assert (
        "from " + str(kernels) + ": the driver says 'stand-in error 209' (error 209): install a newer driver." in said
    )


def test_code_for_another_vendor(run, specs, tmp_path):
    standin.write_kernels(tmp_path / "k.bin", specs, "gfx1100")
    assert "holds code for gfx1100" in run(tmp_path / "k.bin")


def test_code_of_an_older_chip_of_the_same_family_runs(run, specs, tmp_path):
    standin.write_kernels(tmp_path / "k.bin", specs, "sm_86")
    assert run(tmp_path / "k.bin", NORM).endswith("0 \n")


def test_only_the_ampere_family_runs_the_code_of_an_older_chip(run, specs, tmp_path):
    standin.write_kernels(tmp_path / "k.bin", specs, "sm_120")
    assert "holds code for sm_120, and GPU 0 (stand-in 0) is sm_121" in run(tmp_path / "k.bin", chip="sm_121")


def test_no_such_gpu(run, kernels):
    assert "no NVIDIA GPU: libcuda.so.1 is installed and finds none; use --provider cpu." in run(kernels, devices=0)


def test_code_is_loaded_once_for_all_nodes(run, kernels):
    body = """
    before = driver.standin_count(2)  # what is loaded to see whether the driver takes it
    nodes = [checks.ort.node("SwiGLU", in_features=512) for _ in range(5)]
    print("loads", driver.standin_count(2) - before)"""
    assert "loads 1\n0 \n" in run(kernels, body)


def test_shared_memory_beyond_48_kb_is_asked_for(run, specs, tmp_path):
    standin.write_kernels(tmp_path / "k.bin", specs, shared_bytes=90000)
    assert run(tmp_path / "k.bin", NORM).endswith("0 \n")


def test_more_shared_memory_than_the_chip_has(run, specs, tmp_path):
    standin.write_kernels(tmp_path / "k.bin", specs, shared_bytes=200000)
    assert "asking for 200000 bytes of shared memory: the driver says" in run(tmp_path / "k.bin", NORM)


def test_a_model_without_its_kernel(run, kernels):
    said = run(kernels, 'checks.ort.node("SwiGLU", name="/mlp/act", in_features=96)')
    assert "SwiGLU '/mlp/act': " in said
    assert "has no swiglu with in_features 96: it belongs to another model; copy the artifact again." in said


def test_a_parameter_that_nobody_knows(run, specs, tmp_path):
    changed = [dataclasses.replace(s, types={**s.types, "surprise": "*fp16"}) if s.op == "swiglu" else s for s in specs]
    standin.write_kernels(tmp_path / "k.bin", changed)
    assert "has the parameter surprise (*fp16), which this release does not know" in run(
        tmp_path / "k.bin", 'checks.ort.node("SwiGLU", in_features=512)'
    )


def test_an_argument_that_breaks_a_divisor(run, kernels):
    body = """
    node = checks.ort.node("SwiGLU", in_features=512)
    x, y = checks.device.allocate(4096), checks.device.allocate(4096)
    checks.ort.call(node, [(10, (1, 1024), x + 8)], [(10, (1, 512), y)], checks.device.stream)"""
    assert "swiglu: gate_up is " in (said := run(kernels, body))
    assert "expected a multiple of 16" in said


def test_a_wrong_shape_is_named(run, kernels):
    body = """
    node = checks.ort.node("SwiGLU", name="act", in_features=512)
    x, y = checks.device.allocate(4096), checks.device.allocate(4096)
    checks.ort.call(node, [(10, (1, 512), x)], [(10, (1, 512), y)], checks.device.stream)"""
    assert "SwiGLU 'act': input gate_up has shape [1, 512], expected [any, 1024]" in run(kernels, body)


# What is stored of a matrix of another size than the attributes say, which a kernel would read beyond its end.
STORED = [
    ("MatMulF16", "matmul_f16", "weight", (1, 256, 16)),
    ("MatMulQ4", "matmul_q4", "weight", (1, 32, 16, 4)),
    ("MatMulQ4", "matmul_q4", "scales", (1, 4, 16)),
    ("EmbeddingQ6", "embed_q6", "weight", (1, 16, 3, 16, 4)),
    ("EmbeddingQ6", "embed_q6", "scales", (1, 2, 16)),
]


@pytest.mark.parametrize(("op", "kernel", "named", "wrong"), STORED, ids=[f"{case[0]}-{case[2]}" for case in STORED])
def test_weights_of_another_size_are_named(run, kernels, specs, op, kernel, named, wrong):
    specs = [*specs, *checks.extra_specs()]
    standin.write_kernels(kernels, specs)
    sizes = next(s.constants for s in specs if s.op == kernel and s.constants.get("y_bits") != 32)
    k, group = sizes["in_features"], sizes.get("group_size", 1)
    n = sizes.get("out_features", 320)
    tiles = -(-n // 16)
    right = {
        "matmul_f16": {"weight": (10, (tiles, k, 16))},
        "matmul_q4": {"weight": (2, (tiles, k // 8, 16, 4)), "scales": (10, (tiles, k // group, 16))},
        "embed_q6": {"weight": (2, (tiles, k // 16, 3, 16, 4)), "scales": (10, (tiles, k // group, 16))},
    }[kernel]
    other = {**right, named: (right[named][0], wrong)}
    x, y = ((6, (1,)), (1, (1, k))) if kernel == "embed_q6" else ((10, (1, k)), (10, (1, n)))
    attributes = {"in_features": k, "out_features": n, "num_embeddings": n, "group_size": group}
    body = f"""
    node = checks.ort.node("{op}", name="it", **{attributes})
    for given in {[[x, *right.values(), y], [x, *other.values(), y]]}:
        *inputs, y = [(kind, shape, checks.device.put(np.zeros(1 << 20, np.uint8))) for kind, shape in given]
        checks.ort.call(node, inputs, [y], checks.device.stream)
        checks.device.synchronize()
        print("right")"""
    first, second, *_ = run(kernels, body).splitlines()
    assert first == "right"
    assert f"{op} 'it': input {named} has shape {list(wrong)}, expected {list(right[named][1])}" in second


@pytest.mark.parametrize(("index", "name"), [(2, "key_cache"), (3, "value_cache")])
def test_a_cache_that_is_an_initializer_is_refused(run, kernels, index, name):
    spec = next(spec for spec in shapes.specs_of(shapes.config_of("dry")) if spec.op == "attention")
    sizes = {key: spec.constants[key] for key in ("num_heads", "num_kv_heads", "head_dim", "block_size")}
    body = f'checks.ort.node("PagedAttention", name="a", scale=1.0, window=9, constant_input={index}, **{sizes})'
    expected = f"PagedAttention 'a': input {name} is an initializer, expected an input of the graph"
    assert expected in run(kernels, body)


def test_what_finds_no_memory_leaves_none_that_is_gone(run, kernels):
    """Operators share memory to compute in; it is freed before more is asked for."""
    body = """
    checks.attention()
    hogs = []
    for size in 1 << 20, 1 << 16:
        try:
            while True:
                hogs.append(checks.device.allocate(size))
        except RuntimeError:
            pass
    try:
        checks.ort.node("TopK", in_features=512, k=64, first_id=0, vocab_size=512)
    except RuntimeError as error:
        print(error)
    for hog in hogs:
        checks.device.free(hog)
    checks.attention()  # right, or it raises
    print("right")"""
    first, *others = run(kernels, body, bytes=1 << 25).splitlines()
    assert first.startswith("TopK: allocating ")
    assert others == ["right", "0 "]


def test_attention_of_no_sequence(run, kernels):
    """A step's shapes may all be zero: no kernel is launched, and nothing is divided by the number of sequences."""
    spec = next(spec for spec in shapes.specs_of(shapes.config_of("dry")) if spec.op == "attention")
    sizes = {key: spec.constants[key] for key in ("num_heads", "num_kv_heads", "head_dim", "block_size")}
    heads, kv, dim, size = sizes.values()
    body = f"""
    node = checks.ort.node("PagedAttention", scale=1.0, window=9, **{sizes})
    cache, some = (10, (2, {size}, {kv}, {dim})), checks.device.allocate(1 << 16)
    floats = (10, (0, {(heads + 2 * kv) * dim})), (1, (0, {dim})), cache, cache
    tables = (6, (0,)), (6, (1,)), (6, (0,)), (6, (0, 3))
    before = driver.standin_count(1)
    given = [(kind, shape, some) for kind, shape in (*floats, *tables)]
    checks.ort.call(node, given, [(10, (0, {heads * dim}), some)], checks.device.stream)
    print("launches", driver.standin_count(1) - before)"""
    assert run(kernels, body) == "launches 0\n0 \n"


@pytest.mark.parametrize(("window", "splits"), [(shapes.NO_WINDOW, 2), (65, 2), (64, 1), (1, 1)])
def test_as_many_programs_as_the_window_is_worth(run, kernels, window, splits):
    """Of 64 positions each, two of them at most here; without a window the positions of the whole table count."""
    body = f"""
    import numpy_kernels
    attend = numpy_kernels.attention_split
    numpy_kernels.KERNELS["attention_split"] = lambda p: (print(p["num_splits"]), attend(p))
    checks._attention(checks.config, [([1], [576])], {window})"""
    assert run(kernels, body) == f"{splits}\n0 \n"


@pytest.mark.parametrize(("window", "expected"), [(0, "a positive number"), (1 << 31, "at most 2147483647")])
def test_a_window_that_is_no_size_is_refused(run, kernels, window, expected):
    spec = next(spec for spec in shapes.specs_of(shapes.config_of("dry")) if spec.op == "attention")
    body = f'checks.ort.node("PagedAttention", name="a", scale=1.0, window={window}, **{spec.constants})'
    assert f"PagedAttention 'a': attribute window is {window}, expected {expected}" in run(kernels, body)


@pytest.mark.parametrize("chunk", [0, -1, 1 << 31, (1 << 63) - 1])
def test_a_constant_that_is_no_size_is_refused(run, kernels, chunk):
    """Columns are divided by this one."""
    data = bytearray(kernels.read_bytes())
    struct.pack_into("<q", data, data.index(b"chunk\0") + 24, chunk)
    kernels.write_bytes(data)
    if chunk == 0:
        expected = "TopK: top_k_first has no chunk above 0: the kernel file is damaged, copy the artifact again."
    else:
        expected = f" has chunk {chunk}, expected 0 to 2147483647; copy the artifact again"
    assert expected in run(kernels, "checks.top_k()")


@pytest.mark.parametrize("what", ["constants", "parameters"])
def test_more_constants_or_parameters_than_a_kernel_takes_are_refused(run, kernels, what):
    """Kernels may share such records: a small file whose every kernel has all of them would fill the memory."""
    many = {"constants": {f"c{i}": i for i in range(65)}, "parameters": (Parameter("x", "i32", 4),) * 65}
    file = from_bytes(kernels.read_bytes(), "f")
    changed = dataclasses.replace(file.kernels[0], **{what: many[what]})
    kernels.write_bytes(to_bytes(dataclasses.replace(file, kernels=(changed, *file.kernels[1:]))))
    expected = f"not a kernel file that this launcher reads: {changed.function} has 65 {what}, expected at most 64"
    assert expected in run(kernels)


# A norm and SwiGLU at once, then three times in a graph: launches in all, and those that were early.
TWO = """
    norm, swiglu = checks.ort.node("RMSNormF16", in_features=256, epsilon=1e-5), checks.ort.node("SwiGLU", in_features=512)
    x, w, y = (checks.device.allocate(4096) for _ in range(3))
    def both():
        checks.ort.call(norm, [(1, (1, 256), x), (1, (256,), w)], [(10, (1, 256), y)], checks.device.stream)
        checks.ort.call(swiglu, [(10, (1, 1024), x)], [(10, (1, 512), y)], checks.device.stream)
    both()
    again = checks.device.capture(both)
    for _ in range(3):
        again()
    print("launches", driver.standin_count(1), "early", driver.standin_count(7))"""
BOTH = ("rms_norm", "swiglu")


@pytest.mark.parametrize(("waiting", "early"), [(BOTH, 8), (("swiglu",), 4), ((), 0)])
def test_only_kernels_that_wait_by_themselves_are_launched_early(run, specs, tmp_path, waiting, early):
    """FORMAT 8.6. The stand-in refuses such a launch of any other."""
    standin.write_kernels(tmp_path / "k.bin", specs, "sm_90", waiting=waiting)
    said = run(tmp_path / "k.bin", TWO, waiting=waiting, chip="sm_90")
    assert said == f"launches 8 early {early}\n0 \n"


def test_a_driver_whose_graphs_know_no_early_launch(run, specs, tmp_path):
    standin.write_kernels(tmp_path / "k.bin", specs, "sm_90", waiting=BOTH)
    said = run(tmp_path / "k.bin", TWO, waiting=BOTH, chip="sm_90", version=12030)
    assert said == "launches 8 early 0\n0 \n"


@pytest.mark.parametrize(("value", "early"), [("1", 0), ("0", 8), ("", 8)])
def test_early_launches_can_be_switched_off(run, specs, tmp_path, monkeypatch, value, early):
    monkeypatch.setenv("LLMPACK_NO_PDL", value)
    standin.write_kernels(tmp_path / "k.bin", specs, "sm_90", waiting=BOTH)
    said = run(tmp_path / "k.bin", TWO, waiting=BOTH, chip="sm_90")
    assert said == f"launches 8 early {early}\n0 \n"


def test_damaged_kernel_files_are_refused(standins, operators, kernels, tmp_path):
    """Cut anywhere, and with any byte of the tables changed: a sentence or a file that reads, never a crash."""
    whole = kernels.read_bytes()
    code = """
import sys, box, pathlib
library = box.load_operators(sys.argv[1])
path, whole = pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]).read_bytes()
refused = 0
def attempt(data):
    path.write_bytes(data)
    try:
        box.open_gpu(library, path)
        library.llmpack_ops_gpu_close()
        return 0
    except RuntimeError as error:
        assert str(path) in str(error) or "GPU" in str(error), error
        return 1
tables = whole.index(b"\\x7fELF")
cuts = sum(attempt(whole[:n]) for n in [*range(0, 300), *range(300, len(whole), 997)])
print(cuts, len([*range(0, 300), *range(300, len(whole), 997)]))
changes = sum(attempt(whole[:n] + bytes([whole[n] ^ 0xFF]) + whole[n + 1:]) for n in range(0, tables, 7))
print(changes)
"""
    done = standin.run(standins, code, operators, tmp_path / "changed.bin", kernels)
    assert done.returncode == 0, done.stderr
    (refused, cut), (changed,) = ([int(n) for n in line.split()] for line in done.stdout.splitlines())
    assert refused == cut
    assert changed > 0
    assert len(whole) > 1000


@pytest.mark.parametrize("num_warps", [0, 33, 1 << 27, 1 << 31])
def test_a_kernel_of_no_or_too_many_threads_is_refused(run, kernels, num_warps):
    """As many that 32 bits do not hold them as well."""
    data = bytearray(kernels.read_bytes())
    struct.pack_into("<I", data, 64 + 112, num_warps)  # FORMAT 8.2, of the first kernel
    kernels.write_bytes(data)
    assert f" has {num_warps} warps" in run(kernels)
