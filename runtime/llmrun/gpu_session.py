"""One rank's graph on a GPU under ONNX Runtime: the session, the KV cache on the device, and running one step plan.

In: a verified gpu.onnx, the operator library with its launcher open. Out: of each row the likeliest tokens, chosen on the
device, and whole rows of logits where the plan asks for them. Each rank holds its own columns of the logits: what it has found
there, or the columns themselves, meet on rank 0's host, once per step. A step sends the inputs that have changed. Decode steps
run as captured graphs, one for each number of sequences; their block tables have room for the longest sequence, so that a graph
stays right while sequences grow. Run on one NVIDIA GPU (tests/benchmarks/LOG.md); not yet on AMD's.
"""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrun.device import MOST_CAPTURED, PROVIDERS, Memory, Placement
from llmrun.errors import IncompatibleError, InternalError
from llmrun.graph_check import check_session
from llmrun.rows import Rows, merge_candidates
from llmrun.session import EAGER, FATAL_ONLY, import_onnxruntime
from llmrun.step_plan import StepPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmrun.manifest import KvCacheSpec

Gather = Callable[[Any], "list[Any] | None"]
_ALIGNMENT = 256  # of a layer's keys or values, as drivers align what they allocate
_ERRORS_ONLY = 3  # ORT's log level
# What ORT raises where a library of the GPU's provider is missing: which one, it only logs.
_WITHOUT_GPU = "fallback to CPU EP has been explicitly disabled"
_MOST_SHAPES = 32  # of eager steps whose memory is kept


@dataclass(frozen=True)
class _Cache:
    """A layer's keys, or its values, on the device."""

    address: int
    shape: tuple[int, ...]
    num_bytes: int


@dataclass
class _Shape:
    """A step's memory on the device, for one shape; `sent` is what lies there."""

    binding: Any
    inputs: dict[str, Any]
    logits: Any  # [R, this rank's columns]
    top: Any  # [R, num_likeliest + 1]
    options: Any
    num_rows: int  # R
    sent: dict[str, NDArray[np.int32]] = field(default_factory=dict)


class GpuSession:
    """A loaded graph with its KV cache on a GPU; the interface of `session.RankSession`."""

    def __init__(
        self,
        graph: Path,
        library: Path,
        kv_cache: KvCacheSpec,
        placement: Placement,
        memory: Memory,
        *,
        num_blocks: int,
        vocab_size: int,
        max_seq_len: int,
        max_rows: int,
        captures: bool,
        size: int = 1,
        gather: Gather = lambda values: [values],
    ) -> None:
        """Load `graph` onto the placement's GPU.

        `memory`: of that GPU, for keys and values: ONNX Runtime's allocator of values takes up to twice as much, of what a step
        needs. `max_rows`: rows of logits in a step, at most; those of the steps whose memory is kept are together no more.
        `captures`: decode steps are graphs of the driver's; `size`: number of ranks; `gather` collects their arrays on rank 0
        and returns None on the others.

        Raises:
            IncompatibleError: ORT refuses the graph, the operator library or the GPU; or the graph is another model's.
        """
        assert placement.gpu is not None
        self._ort = import_onnxruntime()
        self._device = placement.gpu.ordinal
        self._vocab_size, self._gather, self._captures = vocab_size, gather, captures
        self._max_rows = max_rows
        self._columns = -(-max_seq_len // kv_cache.block_size)
        # Its warnings are no user's; that a provider's library cannot be loaded is an error, and in no exception.
        self._ort.set_default_logger_severity(_ERRORS_ONLY)
        options = self._ort.SessionOptions()
        options.log_severity_level = FATAL_ONLY
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        try:
            options.register_custom_ops_library(str(library))
            # Where it cannot use the GPU, it prints that to stdout and tries the CPU: what it raises is about the latter.
            with contextlib.redirect_stdout(io.StringIO()):
                if placement.provider == "cuda":  # from pip's nvidia-* packages, where it does not look by itself
                    self._ort.preload_dlls()
                self._session = self._ort.InferenceSession(
                    str(graph), options, providers=[(PROVIDERS[placement.provider], self._provider_options(placement))]
                )
        except Exception as error:  # ORT's exception types have no common base
            text = " ".join(str(error.__cause__ or error).split()).rstrip(".")
            hint = (
                " Its line above says which library of the provider cannot be loaded." if _WITHOUT_GPU in text else ""
            )
            raise IncompatibleError(
                f"{graph}: onnxruntime {self._ort.__version__} refuses it: {text}.{hint}", code="E417"
            ) from error
        self._num_columns = -(-vocab_size // size)
        self._top_width = next((node.shape[1] for node in self._session.get_outputs() if node.name == "top"), 0)
        check_session(
            graph, self._session, kv_cache, {"logits": self._num_columns, "top": self._top_width}, is_gpu=True
        )
        self.num_likeliest = min(self._top_width - 1, vocab_size)
        self._memory, self._cache_type = memory, np.dtype(kv_cache.dtype)
        self._caches = self._make_caches(kv_cache, num_blocks)
        self._shapes: dict[tuple[Any, ...], _Shape] = {}
        self.graph_s = 0.0  # seconds inside ONNX Runtime so far

    def run(self, plan: StepPlan) -> Rows:
        """Run one step; see `RankSession.run`. Ranks other than 0 return nothing of use.

        Raises:
            InternalError: an operator failed; its sentence is in the message.
        """
        is_captured = self._captures and plan.is_decode and plan.num_rows == plan.num_seqs <= MOST_CAPTURED
        values = plan.fields()
        if is_captured:
            known = values["block_table"][:, : self._columns]
            values["block_table"] = np.zeros((plan.num_seqs, self._columns), np.int32)
            values["block_table"][:, : known.shape[1]] = known
        shape = self._shape_of(values, is_captured)
        for name, value in values.items():
            if name not in shape.sent or not np.array_equal(shape.sent[name], value):
                shape.inputs[name].update_inplace(np.ascontiguousarray(value, np.int32))
                shape.sent[name] = np.array(value, np.int32)
        started = time.perf_counter()
        try:
            self._session.run_with_iobinding(shape.binding, shape.options)
        except Exception as error:
            raise InternalError(f"a step failed: {' '.join(str(error).split())}") from error
        self.graph_s += time.perf_counter() - started
        records = self._gather(shape.top.numpy())
        columns = self._gather(shape.logits.numpy()) if plan.asks_whole_rows else None
        if records is None:
            return Rows()
        whole = None if columns is None else np.concatenate(columns, axis=1)[:, : self._vocab_size]
        return Rows(whole, merge_candidates(records, self._vocab_size))

    def spoil_cache(self) -> None:
        """Put NaN into a cache, for fault injection."""
        cache = self._caches["value_cache.0"]
        self._memory.fill(cache.address, 0xFF, cache.num_bytes)  # each number then is a NaN

    def _provider_options(self, placement: Placement) -> dict[str, str]:
        options = {"device_id": str(self._device), "arena_extend_strategy": "kSameAsRequested"}
        if self._captures:
            options["enable_cuda_graph" if placement.provider == "cuda" else "enable_hip_graph"] = "1"
        return options

    def _value(self, shape: tuple[int, ...], dtype: Any) -> Any:
        # ROCm's build, too, calls the memory of its GPU "cuda".
        return self._ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, "cuda", self._device)

    def _make_caches(self, spec: KvCacheSpec, num_blocks: int) -> dict[str, _Cache]:
        shapes = {name: (num_blocks, *block) for name, block in spec.shapes(is_gpu=True).items()}
        sizes = {name: math.prod(shape) * self._cache_type.itemsize for name, shape in shapes.items()}
        strides = {name: -(-size // _ALIGNMENT) * _ALIGNMENT for name, size in sizes.items()}
        # One piece: a driver rounds each up, to 2 MB and the like.
        address = self._memory.allocate(spec.num_layers * sum(strides.values()))
        caches = {}
        for layer in range(spec.num_layers):
            for name, shape in shapes.items():
                caches[f"{name}.{layer}"] = _Cache(address, shape, sizes[name])
                address += strides[name]
        return caches

    def _shape_of(self, values: dict[str, NDArray[np.int32]], is_captured: bool) -> _Shape:
        key = (is_captured, *(value.shape for value in values.values()))
        if key in self._shapes:
            return self._shapes[key]
        num_rows = len(values["logit_rows"])
        eager = [known for known in self._shapes if not known[0]]  # captured ones stay: their addresses are in a graph
        kept_rows = sum(self._shapes[known].num_rows for known in eager)
        while eager and (len(eager) >= _MOST_SHAPES or kept_rows + num_rows > self._max_rows):
            kept_rows -= self._shapes.pop(eager.pop(0)).num_rows
        binding = self._session.io_binding()
        inputs = {name: self._value(value.shape, np.int32) for name, value in values.items()}
        for name, cache in self._caches.items():
            binding.bind_input(name, "cuda", self._device, self._cache_type.type, cache.shape, cache.address)
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        logits = self._value((num_rows, self._num_columns), np.float32)
        top = self._value((num_rows, self._top_width), np.int64)
        binding.bind_ortvalue_output("logits", logits)
        binding.bind_ortvalue_output("top", top)
        options = self._ort.RunOptions()
        options.log_severity_level = FATAL_ONLY
        if self._captures:
            # One graph for each number of sequences; 0 is ORT's own.
            options.add_run_config_entry("gpu_graph_id", str(len(values["seq_lens"])) if is_captured else EAGER)
        self._shapes[key] = _Shape(binding, inputs, logits, top, options, num_rows)
        return self._shapes[key]
