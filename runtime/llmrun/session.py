"""One rank's graph on ONNX Runtime: the session, the KV cache's memory, and running one step plan.

In: a verified graph file, its weights and the operator library. Out: logits, whole rows. The packager has decided everything
about the graph, so graph optimizations are off; weights, cache and step inputs are memory of ours that ORT uses in place.
Plans nothing, knows no other rank: the collectives inside the graph are the operator library's.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrun.device import PROVIDERS
from llmrun.errors import IncompatibleError, InternalError, PeerError, ResourceError
from llmrun.graph_check import check_session
from llmrun.rows import Rows
from llmrun.step_plan import StepPlan
from llmrun.weights_map import MappedWeights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from llmrun.graph_check import StoredTensor
    from llmrun.manifest import KvCacheSpec

MIN_ORT_VERSION = (1, 22)
_FEW_TOKENS = 32  # their activations are a few MB, and kept
_PEER_ENDED = re.compile(r"rank \d+ (\(pid \d+\) )?has (ended|left)")  # custom_ops/cpu/collectives_shared.cpp
EAGER = "-1"  # gpu_graph_id of a run that is neither captured nor replayed
FATAL_ONLY = 4  # ORT's log level: its errors come to us as exceptions


def import_onnxruntime() -> Any:
    """Import ONNX Runtime.

    Raises:
        IncompatibleError: it is missing, broken or older than 1.22.
    """
    needed = ".".join(str(n) for n in MIN_ORT_VERSION)
    # Since 1.32 the wheel holds a telemetry client with a thread of its own; nothing here needs it.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise IncompatibleError(
            f'onnxruntime cannot be imported ({error}). `pip install "llmpack[cpu]"`.', code="E414"
        ) from None
    version = getattr(onnxruntime, "__version__", "0.0")
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_ORT_VERSION:
        raise IncompatibleError(
            f"onnxruntime {version} is installed, {needed} or newer is needed. `pip install -U onnxruntime`.",
            code="E414",
        )
    return onnxruntime


class RankSession:
    """A loaded graph with its KV cache."""

    num_likeliest = 0  # tokens of each row that a step names without whole rows

    def __init__(
        self,
        graph: Path,
        weights: Path,
        stored: Sequence[StoredTensor],
        library: Path,
        kv_cache: KvCacheSpec,
        *,
        num_blocks: int,
        vocab_size: int,
    ) -> None:
        """Load `graph`, and reserve `num_blocks` cache blocks, whose memory is taken as they are used.

        Args:
            graph: checked by `check_graph`.
            weights: the file that holds what `check_graph` returned.
            stored: that.
            library: the operators'.
            kv_cache: the manifest's.
            num_blocks: of the cache.
            vocab_size: columns of the logits.
        Raises:
            IncompatibleError: ORT is too old, or refuses the graph or the operator library; or the graph is another model's.
            ResourceError: the system refuses the memory.
        """
        self._ort = import_onnxruntime()
        self._vocab_size = vocab_size
        options = self._options()
        try:
            self._weights = MappedWeights(weights)
        except OSError as error:
            raise ResourceError(f"{weights}: cannot be mapped: {error.strerror}.", code="E502") from None
        values = {tensor.name: self._value_of(self._weights.tensor(tensor)) for tensor in stored}
        try:
            for name, value in values.items():
                options.add_initializer(name, value)
            options.register_custom_ops_library(str(library))
            self._session = self._ort.InferenceSession(str(graph), sess_options=options, providers=[PROVIDERS["cpu"]])
        except MemoryError:
            raise
        except Exception as error:  # ORT's exception types have no common base
            text = " ".join(str(error).split())
            raise IncompatibleError(
                f"{graph}: onnxruntime {self._ort.__version__} refuses it: {text}.", code="E417"
            ) from error
        self._values = values  # ORT uses them as long as the session lives
        check_session(graph, self._session, kv_cache, {"logits": vocab_size}, is_gpu=False)
        self._run_options, self._prompt_options = self._ort.RunOptions(), self._ort.RunOptions()
        for run_options in (self._run_options, self._prompt_options):
            run_options.log_severity_level = FATAL_ONLY
            # Unset, ORT's Python (1.32) asks for it in each run all the same, and catches the C++ exception: 80 us.
            run_options.add_run_config_entry("gpu_graph_id", EAGER)
        self._prompt_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._binding = self._session.io_binding()
        self._caches = self._bind_caches(kv_cache, num_blocks)
        self.graph_s = 0.0  # seconds inside ONNX Runtime so far
        self._shape: tuple[int, ...] = ()
        self._message = np.empty(0, np.int32).data  # a step's inputs, as ORT knows where they are
        self._logits = np.empty((0, vocab_size), np.float32)
        self._bound: list[Any] = []  # OrtValues of the current shape: ORT does not keep their memory alive

    def run(self, plan: StepPlan) -> Rows:
        """Run one step.

        Returns:
            whole rows; their memory is reused by the next step.
        Raises:
            PeerError: another rank has ended while an operator waited for it.
            InternalError: an operator failed; its sentence is in the message.
        """
        if plan.shape != self._shape:
            self._bind_step(plan)
        self._message[:] = plan.message
        started = time.perf_counter()
        try:
            # Activations of many tokens would stay with ORT for good: 128 MB of a 512-token step with Llama 2 7B's shape.
            is_prompt = plan.num_tokens > _FEW_TOKENS
            self._session.run_with_iobinding(self._binding, self._prompt_options if is_prompt else self._run_options)
        except Exception as error:
            text = " ".join(str(error).split())
            if _PEER_ENDED.search(text):
                raise PeerError(f"a step failed: {text}") from error
            raise InternalError(f"a step failed: {text}") from error
        self.graph_s += time.perf_counter() - started
        return Rows(self._logits)

    def spoil_cache(self) -> None:
        """Put NaN into the first cache, for fault injection."""
        self._caches[1][0] = np.nan

    def _options(self) -> Any:
        ort = self._ort
        ort.set_default_logger_severity(FATAL_ONLY)
        options = ort.SessionOptions()
        options.log_severity_level = FATAL_ONLY
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # the operators have threads of their own
        return options

    def _bind_caches(self, spec: KvCacheSpec, num_blocks: int) -> list[NDArray[Any]]:
        """Bind key and value memory of each layer, zeroed by the system page by page when first touched."""
        caches: list[NDArray[Any]] = []
        for layer in range(spec.num_layers):
            for name, block in spec.shapes(is_gpu=False).items():
                try:
                    memory = _zeros((num_blocks, *block), np.dtype(spec.dtype))
                except OSError:
                    total = num_blocks * spec.block_size * spec.bytes_per_token
                    raise ResourceError(
                        f"KV cache: the system refuses {total} bytes. Use a shorter --max-seq-len.", code="E502"
                    ) from None
                caches.append(memory)
                self._binding.bind_ortvalue_input(f"{name}.{layer}", self._value_of(memory))
        return caches

    def _bind_step(self, plan: StepPlan) -> None:
        """Bind memory for the plan's shape; decode steps of a sequence mostly share one."""
        self._shape = ()  # until all of it is bound: a step that fails here may be followed by others
        message = np.array(plan.message, np.int32)
        self._message = message.data
        self._logits = np.empty((plan.num_rows, self._vocab_size), np.float32)
        values = {name: self._value_of(memory) for name, memory in StepPlan.read(message).fields().items()}
        output = self._value_of(self._logits)
        for name, value in values.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_ortvalue_output("logits", output)
        self._bound = [*values.values(), output]
        self._shape = plan.shape

    def _value_of(self, memory: NDArray[Any]) -> Any:
        """Wrap CPU memory as an OrtValue that shares it."""
        value = self._ort.OrtValue.ortvalue_from_numpy(memory)
        if memory.size and value.data_ptr() != memory.ctypes.data:
            raise InternalError("onnxruntime copied memory that it was to share")
        return value


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return zeros that take memory page by page as they are touched, from an address that is one of a page.

    In small pages: each layer's cache would begin with a huge one of its own, 120 MB of a rank of Llama 2 7B for the first
    word, and attention is no faster for it (LOG.md 2026-11-25).

    Raises:
        OSError: the system refuses.
    """
    memory = mmap.mmap(-1, int(np.prod(shape)) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)
