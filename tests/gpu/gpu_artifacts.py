"""From an artifact for the CPU to what a stand-in GPU runs, without a compiler: its graphs, and kernel files of names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
from standin import write_kernels

from llmpack.gpu_graph import gpu_graph
from llmpack.kernel_plan import KernelSpec, plan_kernels
from llmpack.weights import Quantization, plan_rank
from llmrun.manifest import KvCacheSpec, ModelConfig

CHIPS = ("sm_89", "gfx1100")


def specs_of(artifact: Path) -> list[KernelSpec]:
    """The plan of an artifact's kernels."""
    manifest = json.loads((artifact / "manifest.json").read_text())
    config = ModelConfig(**manifest["model"])
    described = manifest["quantization"]
    quantization = Quantization(described["scheme"], described["group_size"] or 64)
    weights = plan_rank(config, quantization, manifest["shards"], 0)
    return plan_kernels(config, weights, manifest["shards"], manifest["kv_cache"]["block_size"])


def add_gpu(artifact: Path, target: Path) -> Path:
    """Copy an artifact and add the graphs for a GPU and the kernel files; the manifest stays that of the CPU."""
    shutil.copytree(artifact, target)
    manifest = json.loads((target / "manifest.json").read_text())
    cache = KvCacheSpec(**manifest["kv_cache"])
    for entry in manifest["ranks"]:
        model = onnx.load(str(target / entry["graphs"]["cpu"]), load_external_data=False)
        converted = gpu_graph(model, cache)
        (target / entry["folder"] / "gpu.onnx").write_bytes(converted.SerializeToString())
    for chip in CHIPS:
        backend = "hip" if chip.startswith("gfx") else "cuda"
        write_kernels(target / "kernels" / f"{backend}-{chip}.bin", specs_of(target), chip)
    return target
