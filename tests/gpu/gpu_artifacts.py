"""From an artifact for the CPU to what a stand-in GPU runs, without a compiler: its graphs, and kernel files of names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from standin import write_kernels

from llmpack.export import export
from llmpack.gpu_graph import gpu_graph
from llmpack.kernel_plan import KernelSpec, plan_kernels
from llmpack.split import split
from llmpack.weights import Quantization, RankWeight, plan_rank
from llmrun.manifest import KvCacheSpec, ModelConfig

CHIPS = ("sm_89", "sm_90", "gfx1100")


def waiting(chip: str, specs: list[KernelSpec]) -> set[str]:
    """The operations whose kernels for a chip wait by themselves: all of a new one's."""
    return {spec.op for spec in specs} if chip == "sm_90" else set()


def specs_of(artifact: Path) -> list[KernelSpec]:
    """The plan of an artifact's kernels."""
    manifest = read_manifest(artifact)
    config = ModelConfig(**manifest["model"])
    return plan_kernels(config, weights_of(manifest, 0), manifest["shards"], manifest["kv_cache"]["block_size"])


def read_manifest(artifact: Path) -> dict[str, Any]:
    return json.loads((artifact / "manifest.json").read_text())


def weights_of(manifest: dict[str, Any], rank: int) -> list[RankWeight]:
    """What a rank holds, planned again."""
    described = manifest["quantization"]
    has_mxfp4 = described["roles"].get("experts") == "mxfp4"
    quantization = Quantization(described["scheme"], described["group_size"] or 64, has_mxfp4)
    return plan_rank(ModelConfig(**manifest["model"]), quantization, manifest["shards"], rank)


def add_gpu(artifact: Path, target: Path) -> Path:
    """Copy an artifact and add the graphs for a GPU and the kernel files; the manifest stays that of the CPU."""
    shutil.copytree(artifact, target)
    manifest = read_manifest(target)
    config, cache = ModelConfig(**manifest["model"]), KvCacheSpec(**manifest["kv_cache"])
    logical = export(config, cache.dtype, cache.block_size)
    for rank, entry in enumerate(manifest["ranks"]):
        model = split(logical, config, weights_of(manifest, rank), rank, manifest["shards"], "weights.bin")
        converted = gpu_graph(model, cache)
        (target / entry["folder"] / "gpu.onnx").write_bytes(converted.SerializeToString())
    for chip in CHIPS:
        backend = "hip" if chip.startswith("gfx") else "cuda"
        specs = specs_of(target)
        write_kernels(target / "kernels" / f"{backend}-{chip}.bin", specs, chip, waiting=waiting(chip, specs))
    return target
