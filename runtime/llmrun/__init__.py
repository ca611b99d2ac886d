"""llmrun: runs a packed Llama model on ONNX Runtime, split over MPI ranks.

`Engine` is the Python interface; the command line is `llmrun.cli`. Importing this package has no effects.
"""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
    from llmrun.engine import Engine
    from llmrun.requests import Completion
    from llmrun.sampler import SamplingParams

__version__ = "0.1.0"
__all__ = ["Completion", "Engine", "SamplingParams", "__version__"]

_HOMES = {"Engine": "llmrun.engine", "Completion": "llmrun.requests", "SamplingParams": "llmrun.sampler"}


def __getattr__(name: str) -> typing.Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'llmrun' has no attribute {name!r}")
