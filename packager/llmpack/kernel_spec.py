"""What one GPU kernel is compiled from: a function of `llmpack_kernels`, its constants and types, and its grid (FORMAT.md 8).

Pure data, for any target; `kernel_plan.py` and `moe_plan.py` say which of them a model needs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from llmpack.kernel_file import GridAxis

FEATURES_PER_CHUNK = {"q4": 8, "mxfp4": 8, "q6": 16, "q8": 4}  # as in llmpack_kernels.matmul
# Stands for the target's own number among compile-time constants (llmpack_kernels.decode).
BACKEND = "BACKEND"

ONE, ROW = GridAxis(), GridAxis("rows")
Grid = tuple[GridAxis, GridAxis, GridAxis]


@dataclass(frozen=True)
class KernelSpec:
    """A function to compile.

    `constants` are what the launcher chooses by; `constexprs` what the function is compiled with; `types` are the parameters of
    the function that stay, in order. `threads` are those of one program.
    """

    op: str
    constants: dict[str, int]
    function: str  # "module.name" in llmpack_kernels
    constexprs: dict[str, int | str]
    types: dict[str, str]
    grid: Grid
    threads: int
    stages: int = 2
    # Constexprs, "stages" and "buffer_ops" (AMD's, default 1) that differ on chips whose name starts like this.
    chips: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    # Chips whose name starts like this have a function of their own, which takes the same parameters: its specification.
    # None: nothing; the kernel for more rows serves them.
    instead: dict[str, KernelSpec | None] = dataclasses.field(default_factory=dict)

    def of(self, chip: str) -> KernelSpec | None:
        """Return what a chip has of this operation."""
        return next((own for prefix, own in self.instead.items() if chip.startswith(prefix)), self)

    def on(self, chip: str) -> dict[str, int]:
        """Return what differs on a chip."""
        return {name: v for prefix, own in self.chips.items() if chip.startswith(prefix) for name, v in own.items()}


def power_of_two(number: int) -> int:
    """Return the smallest one that is not less."""
    return 1 << max(0, number - 1).bit_length()


def clamp(number: int, low: int, high: int) -> int:
    """Return the nearest number from low to high."""
    return max(low, min(number, high))
