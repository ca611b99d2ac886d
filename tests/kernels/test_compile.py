"""Kernels at the sizes of a large model compile for every target, without spills, within its shared memory, and to the same
bytes anywhere.

test_pack_gpu.py compiles the demo model's; `make kernels` does every variant of several published shapes for every target,
and prints the table.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from kernel_shapes import specs_of

from llmpack import kernel_file, kernels, moe_plan
from llmpack.kernel_compiler import nvidia_tool
from llmpack.kernel_file import Kernel, KernelFile
from llmpack.kernel_plan import attention, collectives, gated, norms, qk_norm, sampling
from llmpack.kernel_spec import KernelSpec

ROOT = Path(__file__).parents[2]
SMALL = ("all_reduce", "rms_norm", "swiglu", "top_k_first", "top_k_last", "attention_combine", "embed_q6", "matmul_q6")
# Left to the extended tests: nearly what the compiler makes for sm_89 and gfx942, and of chips whose kernels begin early the
# one that no desktop has.
SELDOM = ("sm_86", "gfx90a", "sm_100")
TARGETS = [
    pytest.param(target, marks=pytest.mark.extended) if target in SELDOM else target
    for target in (*kernels.GPU_TARGETS, kernels.PTX_TARGET)
]
EARLY = ("sm_90", "sm_100", "sm_120")  # chips on which a kernel begins while the one before it ends
# Instructions that reach memory beyond the program's own parameters, and those that end it.
REACHES = re.compile(r"(LD|LDG|LDL|ST|STG|STL|ATOM|ATOMG|RED|REDG|LDGSTS|UBLKCP|UTMA[A-Z]*|EXIT|RET)(\.|$)")
# Of heads of 256 features RDNA 3 has too few registers: the operands of its matrix units take two for one.
SPILLS = [("gfx1100", "attention", 256)]
CODE_STARTS = {"cubin": b"\x7fELF", "hsaco": b"\x7fELF", "ptx": b"//"}


def representative() -> list[KernelSpec]:
    """What might outgrow registers or shared memory, at the sizes of Llama-2-70B on two GPUs, one that sees other ranks, and
    what no Llama has: Gemma's heads of 256 features and its vocabulary, the largest, among it, gpt-oss's sinks and
    experts, Qwen 3 30B-A3B's, and the choice of GLM-4.5's.
    """
    chosen = [qk_norm(32, 8, 128), gated("geglu", 14336)]
    for spec in (*norms(8192, has_post_norms=True), *collectives(8192, 2, has_post_norms=True)):
        if spec.op not in SMALL:
            chosen.append(spec)
    chosen += [spec for spec in attention(4, 1, 256, 16) if spec.op == "attention"]
    chosen += [spec for spec in attention(64, 8, 64, 16, has_sinks=True) if "has_sinks" in spec.constants]
    chosen += [spec for spec in sampling(262144) if spec.op == "top_k_last"]
    # Of the three sizes of blocks the largest; `make kernels` has all.
    products = ("moe_gate_up", "moe_down", "moe_grouped_gate_up", "moe_grouped_down")
    for shape, storage, group_size in (("qwen-3-30b-a3b", "q4", 64), ("gpt-oss-20b", "mxfp4", 32)):
        for spec in specs_of(shape, 1, group_size=group_size):
            if spec.op in [f"{op}_{storage}" for op in products] and spec.constants.get("block", 128) == 128:
                chosen.append(spec)
    own = {"num_shared": 1, "is_sigmoid": True, "has_correction_bias": True, "has_scaling_factor": True}
    glm = moe_plan.Experts(5120, 1536, 160, 8, **own)
    chosen += [spec for spec in moe_plan.routing(glm, is_normed=True) if spec.op == "moe_route"]
    for spec in specs_of("llama-2-70b", 2):
        if spec.op == "matmul_q4":
            if spec.constants["max_rows"] in (4, 8, 16, 0) and spec.constants["out_features"] == 5120:
                chosen.append(spec)
        elif spec.op not in SMALL:
            chosen.append(spec)
    return chosen


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory):
    patch = pytest.MonkeyPatch()
    patch.setenv("LLMPACK_CACHE", str(tmp_path_factory.mktemp("kernel-cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session", params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def file(target: str, cache) -> KernelFile:
    """One target's kernels. Tests go target by target, so that side by side each is compiled once."""
    chip = kernels.PTX_CHIP if target == kernels.PTX_TARGET else target
    return kernels.build(representative(), (chip,))[target]


@pytest.mark.slow
def test_every_target_gets_every_kernel(file: KernelFile, target: str) -> None:
    chip = kernels.PTX_CHIP if target == kernels.PTX_TARGET else target
    wanted = [(s.op, s.constants) for s in representative() if s.of(chip) is not None]
    assert [(k.op, k.constants) for k in file.kernels] == wanted
    assert all(k.code.startswith(CODE_STARTS[file.code_kind]) for k in file.kernels)
    assert file.warp_size == (64 if target in ("gfx90a", "gfx942") else 32)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS[:-1], indirect=True)  # of PTX the driver decides
def test_no_spill_and_no_more_shared_memory_than_there_is(file: KernelFile, target: str) -> None:
    for kernel in file.kernels:
        assert kernel.registers > 0, kernel.op
        may_spill = (target, kernel.op, kernel.constants.get("head_dim")) in SPILLS
        assert kernel.spill_bytes == 0 or may_spill, (
            f"{kernel.op} {kernel.constants}: {kernel.spill_bytes} bytes spilled"
        )
        assert kernel.shared_bytes + kernel.static_shared_bytes <= kernels.SHARED_MEMORY[target], kernel.op
        assert kernel.num_warps * file.warp_size <= 1024
        assert (kernel.num_ctas, kernel.cooperative, kernel.global_scratch_bytes, kernel.profile_scratch_bytes) == (
            1, False, 0, 0,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_120", kernels.PTX_TARGET], indirect=True)
def test_the_oldest_driver_that_the_launcher_takes_takes_the_code(file: KernelFile, target: str) -> None:
    """CUDA 12.0: its PTX is 8.0, and ABI 7 in an ELF header's ident is that of its cubins (CUDA 13 writes 8). sm_120: 12.8."""
    if target == kernels.PTX_TARGET:
        assert all(b".version 8.0\n" in kernel.code for kernel in file.kernels)
        assert all(b".target sm_80\n" in kernel.code for kernel in file.kernels)
        assert all(kernel.code.endswith(b"\0") for kernel in file.kernels)
    elif target == "sm_120":
        assert all(b"compilation tools, release 12." in kernel.code for kernel in file.kernels)
    else:
        assert {kernel.code[8] for kernel in file.kernels} == {7}


@pytest.mark.slow
@pytest.mark.parametrize("target", [kernels.PTX_TARGET], indirect=True)
def test_waiting_for_other_ranks_only_loads(file: KernelFile) -> None:
    """FORMAT 8.5: one atomic, on the rank's own memory; flags and rows of others by loads that no cache serves."""
    found = [k.code.decode() for k in file.kernels if k.op.startswith("all_reduce_")]
    assert len(found) == 2
    for text in found:
        assert re.findall(r"\b(?:atom|red)\.\S+", text) == ["atom.global.sys.acq_rel.add.u32"]
        assert len(re.findall(r"ld\.volatile\.global\.b32", text)) >= 2  # a flag of each rank


@pytest.mark.slow
def test_every_kernel_of_a_new_chip_waits_before_all_else(file: KernelFile, target: str) -> None:
    """FORMAT 8.6: on every path, and what comes before reads and writes nothing; older chips have no such instruction."""
    for kernel in file.kernels:
        waits = target in EARLY and not (target == "sm_90" and is_gluon(kernel))
        assert kernel.waits == waits, kernel.op
        if kernel.waits:
            check_wait(kernel)


def is_gluon(kernel: Kernel) -> bool:
    return kernel.op == "matmul_q4" and kernel.constants["max_rows"] == 0


def check_wait(kernel: Kernel) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.code)
        file.flush()
        command = [nvidia_tool("nvdisasm"), "--print-code", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, *after = text.split("ACQBULK")  # griddepcontrol.wait
    assert len(after) == 1, f"{kernel.op}: {len(after)} waits"
    names = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?\w+ +)?([A-Z][\w.]*)", before)
    assert "PREEXIT" not in names, f"{kernel.op}: the next kernel begins before this one has waited"
    assert after[0].count("PREEXIT") == 1, kernel.op  # griddepcontrol.launch_dependents
    assert [name for name in names if REACHES.match(name)] == [], kernel.op
    targets, places = set(re.findall(r"\((\.L_\w+)\)", before)), set(re.findall(r"^(\.L_\w+):", before, re.MULTILINE))
    assert targets <= places, f"{kernel.op}: a jump over the wait"


@pytest.mark.slow
def test_files_read_back_as_written(file: KernelFile, target: str) -> None:
    data = kernel_file.to_bytes(file)
    again = kernel_file.from_bytes(data, target)
    assert kernel_file.to_bytes(again) == data
    assert sorted(map(_key, again.kernels)) == sorted(map(_key, file.kernels))


def _key(kernel: Kernel) -> tuple[object, ...]:
    return (
        kernel.op,
        sorted(kernel.constants.items()),
        kernel.code,
        kernel.grid,
        kernel.parameters,
        kernel.shared_bytes,
    )


# Compiles without the cache, from a copy of the kernels in another directory.
_ELSEWHERE = """
import hashlib, sys
sys.meta_path[:] = [f for f in sys.meta_path if "Redirect" not in type(f).__name__]
sys.path[:0] = sys.argv[1:]
from llmpack.kernel_compiler import compile_kernel, prepare_worker
prepare_worker(sys.argv[1] + "/scratch")
from test_compile import representative
import llmpack_kernels
assert llmpack_kernels.__file__.startswith(sys.argv[1]), llmpack_kernels.__file__
specs = {s.op: s for s in representative()}
for op, chip in (("add_rms_norm", "sm_89"), ("cache_write", "gfx1100")):
    for kind, kernel in compile_kernel(specs[op], "hip" if chip[0] == "g" else "cuda", chip).items():
        print(op, chip, kind, hashlib.sha256(kernel.code).hexdigest())
"""


@pytest.mark.slow
def test_another_directory_gives_the_same_bytes(cache, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "custom_ops/llmpack_kernels", tmp_path / "llmpack_kernels")
    paths = [tmp_path, ROOT / "packager", ROOT / "runtime", ROOT / "tests/kernels"]
    command = [sys.executable, "-c", _ELSEWHERE, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [(op, kind) for op, _, kind, _ in lines] == [
        ("add_rms_norm", "cubin"), ("add_rms_norm", "ptx"), ("cache_write", "hsaco"),
    ]  # fmt: skip
    specs = {s.op: s for s in representative()}
    for op, chip, kind, digest in lines:
        if kind == "ptx":
            continue  # of sm_89; the file holds sm_80's
        (kernel,) = kernels.build([specs[op]], (chip,))[chip].kernels
        assert hashlib.sha256(kernel.code).hexdigest() == digest, op


def test_the_cache_gives_the_same_bytes_and_survives_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMPACK_CACHE", str(tmp_path))
    specs = [s for s in representative() if s.op in ("cache_write", "qk_norm")]
    first = kernels.build(specs, ["gfx1100"])["gfx1100"]
    entries = sorted(kernels.cache_directory().iterdir())
    assert len(entries) == 2
    for is_damaged in (False, True):
        for entry in entries if is_damaged else ():  # one changed byte in each
            data = bytearray(entry.read_bytes())
            data[len(data) // 2] ^= 1
            entry.write_bytes(data)
        again = kernels.build(specs, ["gfx1100"])["gfx1100"]
        assert [kernel.code for kernel in again.kernels] == [kernel.code for kernel in first.kernels]
