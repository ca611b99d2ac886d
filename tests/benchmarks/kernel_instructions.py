"""Instructions for each weight in the inner loop of a one-token product, from its disassembly: is it bound by memory?

    python tests/benchmarks/kernel_instructions.py [--chips sm_80,sm_89,sm_90,gfx1100] [--storage q4] [--rows 1]

No GPU is needed; it says what was compiled, not how fast it runs. Budgets are issue slots: lanes that can issue in the time in
which the memory delivers one weight, at the data sheet's bandwidth and boost clock.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from llmpack import kernel_compiler
from llmpack.kernel_plan import FEATURES_PER_CHUNK, product

# (multiprocessors or compute units, lanes that issue per clock, GHz, GB/s)
CHIPS = {
    "sm_80": ("A100 80 GB", 108, 128, 1.41, 1935),
    "sm_86": ("A10G", 80, 128, 1.71, 600),
    "sm_89": ("RTX 4090", 128, 128, 2.52, 1008),
    "sm_90": ("H100 SXM", 132, 128, 1.755, 3350),
    "sm_120": ("RTX 5090", 170, 128, 2.41, 1792),
    "gfx1100": ("RX 7900 XTX", 96, 64, 2.5, 960),
    "gfx942": ("MI300X", 304, 64, 2.1, 5300),
}
BITS = {"q4": 4.25, "q6": 6.125, "q8": 8.25}
K, N = 8192, 5120


def loop_of(chip: str, code: bytes, assembly: str) -> list[str]:
    """Mnemonics between the target of the longest backward branch and the branch."""
    if chip.startswith("sm_"):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(code)
            file.flush()
            tool = kernel_compiler.nvidia_tool("nvdisasm")
            assembly = subprocess.run([tool, file.name], capture_output=True, text=True, check=True).stdout
    lines = assembly.splitlines()
    label, branch = (
        (r"^(\.L_x_\d+):", r"\bBRA.*`\((\.L_x_\d+)\)")
        if chip.startswith("sm_")
        else (r"^(\.LBB\w+):", r"s_cbranch\w*\s+(\.LBB\w+)")
    )
    labels: dict[str, int] = {}
    best: tuple[int, int] = (0, 0)
    for i, line in enumerate(lines):
        if found := re.match(label, line.strip()):
            labels[found[1]] = i
        if (found := re.search(branch, line)) and found[1] in labels and i - labels[found[1]] > best[1] - best[0]:
            best = (labels[found[1]], i)
    pattern = (
        r"^\s+(?:/\*\w+\*/)?\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)"
        if chip.startswith("sm_")
        else r"^\t((?!s_delay)[vsdgb]\w+)"
    )
    return [found[1] for line in lines[best[0] : best[1] + 1] if (found := re.match(pattern, line))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default="sm_80,sm_89,sm_90,gfx1100,gfx942", help=f"of {', '.join(CHIPS)}")
    parser.add_argument("--storage", default="q4")
    parser.add_argument("--rows", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        kernel_compiler.prepare_worker(scratch)
        for chip in args.chips.split(","):
            spec = product(args.storage, N, K, 64, 16, args.rows)
            spec = spec.of(chip) or product(args.storage, N, K, 64, 16, 8).of(chip) or spec  # eight rows serve fewer
            backend = "hip" if chip.startswith("gfx") else "cuda"
            kernels = kernel_compiler.compile_kernel(spec, backend, chip)
            assembly = next((p.read_text() for p in Path(scratch).rglob("*.amdgcn") if chip in p.read_text()), "")
            kernel = kernels["hsaco" if backend == "hip" else "cubin"]
            loop = loop_of(chip, kernel.code, assembly)
            if "CHUNKS" in spec.constexprs:
                # The loop is unrolled twice; a program of `threads` shares 16 rows of CHUNKS chunks.
                weights = 2 * int(spec.constexprs["CHUNKS"]) * FEATURES_PER_CHUNK[args.storage] * 16 / spec.threads
            else:  # few.matmul_q4: each warp 64 input features of 16 rows
                weights = int(spec.constexprs["DEPTH"]) * int(spec.constexprs["TILES"]) * 64 * 16 / 32
            name, units, lanes, clock, bandwidth = CHIPS[chip]
            budget = units * lanes * clock / (bandwidth / (BITS[args.storage] / 8))
            per_weight = len(loop) / weights
            loads = Counter(m for m in loop if m.startswith(("LDG", "global_load", "buffer_load")))
            groups = Counter(re.split(r"[._]", m)[0] if backend == "cuda" else "_".join(m.split("_")[:3]) for m in loop)
            print(
                f"{chip} ({name}): {len(loop)} instructions for {weights:g} weights: {per_weight:.2f} each, budget {budget:.1f}"
            )
            print(
                f"    {per_weight / budget:.0%} of the issue slots at full bandwidth; {kernel.registers} regs; {dict(loads)}"
            )
            print(f"    {dict(groups.most_common(9))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
