"""A launch as the launcher does it, by Triton's interpreter: grid and constants from the plan, arguments by name."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch

from llmpack.kernel_spec import BACKEND, KernelSpec

BACKENDS = {"cuda": 1, "hip": 2}  # llmpack_kernels.decode


def launch(
    spec: KernelSpec,
    backend: str = "cuda",
    *,
    sequences: int = 0,
    splits: int = 0,
    num_experts: int = 0,
    **arguments: Any,
) -> None:
    """Run a kernel on numpy arrays, which it changes in place. The first array's first axis is the rows."""
    module, _, name = spec.function.partition(".")
    function = getattr(importlib.import_module(f"llmpack_kernels.{module}"), name)
    assert set(arguments) == set(spec.types), "arguments are those of the plan"
    rows = len(next(value for n in spec.types if isinstance(value := arguments[n], np.ndarray)))
    sizes = {"one": 1, "rows": rows, "sequences": sequences, "splits": splits, "experts": num_experts, None: 0}
    grid = tuple(-(-sizes[a.dimension] // a.divisor) * a.factor + sizes[a.plus] for a in spec.grid)
    other = spec.on({"cuda": "sm_80", "hip": "gfx1100"}[backend])
    values = {n: BACKENDS[backend] if v == BACKEND else other.get(n, v) for n, v in spec.constexprs.items()}
    for n, type_ in spec.types.items():
        value = arguments[n]
        expected = {"*fp16": "float16", "*fp32": "float32", "*i32": "int32", "*i64": "int64", "*u8": "uint8"}.get(type_)
        assert expected is None or (value.dtype == expected and value.flags.c_contiguous), n
        values[n] = torch.from_numpy(value) if expected else value
    if 0 not in grid:
        function[grid](**values)
