"""llmrun: runs a packed Llama model on ONNX Runtime, split over MPI ranks.

`Engine` is the Python interface; the command line is `llmrun.cli`. Importing this package has no effects.
"""

from __future__ import annotations

TYPE_CHECKING = False  # which tools take for true; `typing` takes longer to import than all of this
if TYPE_CHECKING:
    from typing import Any

    from llmrun.async_engine import AsyncEngine
    from llmrun.constraint import Constraint
    from llmrun.engine import Engine
    from llmrun.engine_loop import EngineLoop, Ticket
    from llmrun.logprobs import TokenLogprobs
    from llmrun.requests import Completion, Event, Request, RequestOptions
    from llmrun.sampler import SamplingParams
    from llmrun.stats import Stats

__version__ = "0.1.0"
__all__ = [
    "AsyncEngine",
    "Completion",
    "Constraint",
    "Engine",
    "EngineLoop",
    "Event",
    "Request",
    "RequestOptions",
    "SamplingParams",
    "Stats",
    "Ticket",
    "TokenLogprobs",
    "__version__",
]

_HOMES = {
    "AsyncEngine": "llmrun.async_engine",
    "Completion": "llmrun.requests",
    "Constraint": "llmrun.constraint",
    "Engine": "llmrun.engine",
    "EngineLoop": "llmrun.engine_loop",
    "Event": "llmrun.requests",
    "Request": "llmrun.requests",
    "RequestOptions": "llmrun.requests",
    "SamplingParams": "llmrun.sampler",
    "Stats": "llmrun.stats",
    "Ticket": "llmrun.engine_loop",
    "TokenLogprobs": "llmrun.logprobs",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'llmrun' has no attribute {name!r}")
