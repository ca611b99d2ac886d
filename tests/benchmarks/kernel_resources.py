"""Registers, spills and shared memory of every GPU kernel on every target: compiles, prints a table, fails on a spill.

    python tests/benchmarks/kernel_resources.py [--targets all] [--shapes llama-2-7b,qwen-3-30b-a3b] [--shards 1,2] [--quant q4]

No GPU is needed. Compiled kernels come from the packager's cache where they are there.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from kernel_shapes import SHAPES, specs_of

from llmpack import kernels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="all")
    parser.add_argument("--shapes", default="llama-2-7b,llama-2-70b,qwen-3-30b-a3b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--shards", default="1,2")
    parser.add_argument("--quant", default="q4")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    args = parser.parse_args()
    targets = kernels.parse_targets(args.targets.split(","))[1:]
    specs = {}
    for shape in args.shapes.split(","):
        for shards in map(int, args.shards.split(",")):
            for spec in specs_of(shape, shards, args.quant):
                if args.only in spec.op:
                    specs[spec.op, *sorted(spec.constants.items())] = spec
    start = time.monotonic()
    files = kernels.build(list(specs.values()), targets, lambda n, of: print(f"\r{n}/{of}", end="", file=sys.stderr))
    print(f"\n{len(specs)} kernels, {len(targets)} targets, {time.monotonic() - start:.0f} s", file=sys.stderr)
    print("target   op                      constants | warps registers spill_bytes shared_bytes code_bytes")
    failures = 0
    for target in targets:
        for k in files[target].kernels:
            shared = k.shared_bytes + k.static_shared_bytes
            is_bad = k.spill_bytes > 0 or shared > kernels.SHARED_MEMORY[target]
            failures += is_bad
            constants = " ".join(f"{name}={value}" for name, value in sorted(k.constants.items()))
            print(
                f"{target:8} {k.op:23} {constants} | {k.num_warps} {k.registers} {k.spill_bytes} {shared} {len(k.code)}"
                + (" FAILS" if is_bad else "")
            )
    print(f"{failures} of {len(specs) * len(targets)} kernels spill or want more shared memory than there is")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
