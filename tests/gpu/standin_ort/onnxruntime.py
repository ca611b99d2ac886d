"""Takes onnxruntime-gpu's place in a process of llmrun's: the slice that `gpu_session.py` calls, on the stand-in driver.

A session runs the rank's own gpu.onnx through our operators and launcher (executor.py), with numpy for the kernels. Values
are host arrays, the KV cache is where llmrun has put it: what is tested is llmrun from its command line to the launches. Which
graph of the driver's each step was, and how many bytes came back, is appended to $LLMPACK_STEPS.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import standin
from device import Device
from executor import STEP, GpuModel, MiniOrt
from gpu_artifacts import specs_of

__version__ = "1.22.0"
_FLOAT16 = 10
GraphOptimizationLevel = SimpleNamespace(ORT_DISABLE_ALL=0)


def get_available_providers() -> list[str]:
    return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def preload_dlls() -> None:
    pass


_severity = 2  # warnings


def set_default_logger_severity(severity: int) -> None:
    global _severity
    _severity = severity


class OrtValue:
    taken_bytes = 0  # by the host, of all values

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.array = np.zeros(shape, dtype)

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape: tuple[int, ...], dtype: Any, kind: str, _device: int) -> OrtValue:
        assert kind == "cuda"
        return cls(shape, dtype)

    def update_inplace(self, array: np.ndarray) -> None:
        assert (array.shape, array.dtype) == (self.array.shape, self.array.dtype)
        self.array[:] = array

    def numpy(self) -> np.ndarray:
        OrtValue.taken_bytes += self.array.nbytes
        return self.array.copy()


class _Options(SimpleNamespace):
    library = ""

    def add_run_config_entry(self, key: str, value: str) -> None:
        setattr(self, key, value)

    add_session_config_entry = add_run_config_entry

    def register_custom_ops_library(self, path: str) -> None:
        self.library = path


SessionOptions = RunOptions = _Options


class _Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, OrtValue] = {}
        self.outputs: dict[str, OrtValue] = {}
        self.caches: dict[str, tuple[int, tuple[int, ...], int]] = {}
        self.bind_ortvalue_input, self.bind_ortvalue_output = self.inputs.__setitem__, self.outputs.__setitem__

    def bind_input(self, name: str, kind: str, _device: int, dtype: Any, shape: tuple[int, ...], address: int) -> None:
        assert (kind, dtype) == ("cuda", np.float16)
        assert address > 0
        self.caches[name] = (_FLOAT16, shape, address)


class InferenceSession:
    def __init__(self, graph: str, options: _Options, providers: list[tuple[str, dict[str, str]]]) -> None:
        if _severity <= 2:  # as 1.31 does
            print("[W:onnxruntime:Default] No registered plugin EP device found", file=sys.stderr)
        ((self._provider, self._settings),) = providers
        self._driver = standin.serve_launches(specs_of(Path(graph).parents[1]))
        self._graph, self._ort = Path(graph), MiniOrt(Path(os.environ["LLMPACK_MINI_ORT"]), Path(options.library))
        self._model = GpuModel(self._graph, self._ort, Device(), num_blocks=1)
        self._step: Any = None
        self._shape: tuple = ()

    def _nodes(self, infos: Any) -> list[SimpleNamespace]:
        names = {_FLOAT16: "tensor(float16)"}
        return [
            SimpleNamespace(
                name=v.name,
                type=names.get(v.type.tensor_type.elem_type, ""),
                shape=[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
            )
            for v in infos
        ]

    def get_inputs(self) -> list[SimpleNamespace]:
        return self._nodes(self._model.graph.input)

    def get_outputs(self) -> list[SimpleNamespace]:
        return self._nodes(self._model.graph.output)

    def io_binding(self) -> _Binding:
        return _Binding()

    def run_with_iobinding(self, binding: _Binding, options: _Options) -> None:
        assert self._settings.get("enable_cuda_graph", "0") == "1"
        assert set(binding.outputs) == {"logits", "top"}
        feeds = {name: binding.inputs[name].array for name in STEP}
        shape = (*(feeds[name].shape for name in STEP), tuple(feeds["logit_rows"]))
        if shape != self._shape:
            if self._step is not None:
                self._step.close()
            assert binding.caches.keys() == {name for name in self._model.tensors if "_cache." in name}
            self._model.tensors |= binding.caches
            self._step, self._shape = self._model.step(feeds), shape
        self._step.feed(feeds)
        self._step.run()
        for name, value in binding.outputs.items():
            value.array[:] = self._step.output(name)
        if violations := self._driver.standin_violations():
            raise RuntimeError(f"{violations} violations: {self._driver.standin_report().decode()}")
        entry = {"graph": options.gpu_graph_id, "rows": len(feeds["logit_rows"]), "taken": OrtValue.taken_bytes}
        with open(os.environ["LLMPACK_STEPS"], "a") as file:
            file.write(json.dumps(entry) + "\n")
