"""Kernel files as Triton compiles them, on the stand-in driver: parameters bound, launches allowed; computes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import shapes
import standin

pytest.importorskip("triton")

CODE = """
import ctypes, sys, pathlib, box, shapes
from device import Device
from executor import GpuModel, MiniOrt
from llmpack import kernel_file
operators, mini, kernels, folder, is_hip, name = *map(pathlib.Path, sys.argv[1:5]), sys.argv[5] == "True", sys.argv[6]
library = box.load_operators(operators)
driver = ctypes.CDLL("libamdhip64.so.7" if is_hip else "libcuda.so.1")
driver.standin_report.restype = ctypes.c_char_p
for kernel in kernel_file.from_bytes(kernels.read_bytes(), "").kernels:
    kinds = [{"i32": "i", "fp32": "f"}.get(p.type, "n" if p.name.endswith("_scratch") else "p") for p in kernel.parameters]
    driver.standin_declare(kernel.function.encode(), "".join(["w" * kernel.waits, *kinds]).encode())
box.open_gpu(library, kernels, vendor=int(is_hip))
ort = MiniOrt(mini, operators, "ROCMExecutionProvider" if is_hip else "CUDAExecutionProvider")
config = shapes.config_of(name)
shapes.write_graph(config, folder / "graph.onnx")
model = GpuModel(folder / "graph.onnx", ort, Device(is_hip=is_hip), 32, shapes.random_weights(config))
steps = ([[5]], [7]), ([[5, 6, 7, 8, 9, 10]], [6]), ([[1], [2], [3]], [4, 5, 6]), ([[1] * 40], [40]), ([[1] * 300], [300])
for ids, lengths in steps:
    model.step(box.feeds(ids, lengths, 20 if len(ids) == 1 else 2)).run()
late = sum(node.op_type == "MatMulQ4" for node, _ in model.nodes)  # on sm_90, of more than 64 rows: hopper.py
print(driver.standin_violations(), driver.standin_count(1), driver.standin_count(7), late, driver.standin_report().decode())
"""


@pytest.fixture(scope="session")
def compiled():
    from llmpack import kernels

    models = ("dry", "dry-gemma", "dry-moe")
    return {name: kernels.build(shapes.specs_of(shapes.config_of(name)), ["sm_90", "gfx1100"]) for name in models}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dry", "dry-gemma", "dry-moe"])
@pytest.mark.parametrize(("target", "chip"), [("sm_90", "sm_90"), ("ptx_80", "sm_121"), ("gfx1100", "gfx1100")])
def test_every_launch_of_compiled_code_is_allowed(
    target, chip, name, compiled, standins: Path, operators: Path, tmp_path: Path
):
    from llmpack import kernel_file
    from llmpack.kernels import SHARED_MEMORY

    (tmp_path / "k.bin").write_bytes(kernel_file.to_bytes(compiled[name][target]))
    mini, is_hip = standins / "libmini_ort.so", target.startswith("gfx")
    done = standin.run(
        standins,
        CODE,
        operators,
        mini,
        tmp_path / "k.bin",
        tmp_path,
        is_hip,
        name,
        chip=chip,
        shared=SHARED_MEMORY.get(chip, 99 << 10),
    )
    assert done.returncode == 0, done.stderr
    violations, launches, early, late, *report = done.stdout.split(maxsplit=4)
    assert int(violations) == 0, report
    assert int(launches) > 60
    assert int(early) == (int(launches) - int(late) if target == "sm_90" else 0)
