"""What a GPU session binds, sends and captures, on an ONNX Runtime that only writes down what it is told."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from llmrun.device import Gpu, Placement
from llmrun.gpu_session import GpuSession
from llmrun.manifest import KvCacheSpec
from llmrun.step_plan import FIELDS, StepPlan

SPEC = KvCacheSpec("float16", 16, 1, 2, 8)
VOCABULARY = 10


class Value:
    def __init__(self, shape, dtype):
        self.array, self.updates = np.zeros(shape, dtype), 0

    def update_inplace(self, array):
        assert array.shape == self.array.shape
        assert array.dtype == self.array.dtype
        self.array[:] = array
        self.updates += 1

    def numpy(self):
        return self.array.copy()


class Binding:
    def __init__(self):
        self.inputs, self.outputs = {}, {}

    def bind_ortvalue_input(self, name, value):
        self.inputs[name] = value

    def bind_ortvalue_output(self, name, value):
        self.outputs[name] = value


class Options(SimpleNamespace):
    def add_run_config_entry(self, key, value):
        setattr(self, key, value)

    def add_session_config_entry(self, key, value):
        pass

    def register_custom_ops_library(self, path):
        pass


class Session:
    def __init__(self, _graph, _options, providers):
        self.providers, self.runs = providers, []

    def get_inputs(self):
        return [
            SimpleNamespace(name=f"{k}_cache.0", type="tensor(float16)", shape=["n", 16, 2, 8])
            for k in ("key", "value")
        ]

    def get_outputs(self):
        return [
            SimpleNamespace(name=n, shape=["R", w])
            for n, w in (("logits", VOCABULARY), ("top_values", 4), ("top_ids", 4))
        ]

    def io_binding(self):
        return Binding()

    def run_with_iobinding(self, binding, options):
        self.runs.append((binding, options.gpu_graph_id))
        binding.outputs["logits"].array[:] = len(self.runs)


@pytest.fixture
def make(monkeypatch):
    ort = SimpleNamespace(
        __version__="1.31",
        SessionOptions=Options,
        RunOptions=Options,
        GraphOptimizationLevel=SimpleNamespace(ORT_DISABLE_ALL=0),
        InferenceSession=Session,
        OrtValue=SimpleNamespace(ortvalue_from_shape_and_type=lambda shape, dtype, *_: Value(shape, dtype)),
    )
    monkeypatch.setattr("llmrun.gpu_session.import_onnxruntime", lambda: ort)

    def make(provider="cuda", gives_logits=True):
        placement = Placement(provider, Gpu(1, "RTX", "sm_89", "", 1, 0, 0), "sm_89")
        return GpuSession("g", "l", SPEC, placement, num_blocks=8, vocab_size=VOCABULARY, max_seq_len=64,
                          gives_logits=gives_logits, captures=True)  # type: ignore[arg-type]  # fmt: skip

    return make


def decode(token, length, blocks):
    numbers = ([token], [length - 1], [length - 1], [0, 1], [length], [blocks], [0])
    return StepPlan(**{name: np.array(n, np.int32) for name, n in zip(FIELDS, numbers, strict=True)})


def test_decode_steps_share_a_graph_as_sequences_grow(make):
    session = make()
    for plan in (decode(3, 5, [2]), decode(4, 6, [2]), decode(4, 17, [2, 7])):
        session.run(plan)
    runs = session._session.runs
    assert [graph for _, graph in runs] == ["1"] * 3
    assert runs[0][0] is runs[2][0]
    assert runs[0][0].inputs["block_table"].array.tolist() == [[2, 7, 0, 0]]
    assert runs[0][0].inputs["input_ids"].updates == 2  # the third step has the same token
    assert runs[0][0].inputs["query_start"].updates == 1
    assert session._session.providers[0][1] == {
        "device_id": "1", "arena_extend_strategy": "kSameAsRequested", "enable_cuda_graph": "1",
    }  # fmt: skip


def test_prompts_run_eagerly_over_the_same_cache(make):
    session = make()
    numbers = ([1, 2, 3], [0, 1, 2], [0, 1, 2], [0, 3], [3], [[0]], [2])
    session.run(StepPlan(**{name: np.array(n, np.int32) for name, n in zip(FIELDS, numbers, strict=True)}))
    session.run(decode(3, 4, [0]))
    (first, eager), (second, graph) = session._session.runs
    assert (eager, graph) == ("-1", "1")
    assert first.inputs["key_cache.0"] is second.inputs["key_cache.0"]
    assert first.inputs["block_table"].array.shape == (1, 1)


def test_only_rank_0_takes_logits_back(make):
    assert (make().run(decode(3, 5, [2])) == 1).all()
    assert (make(gives_logits=False).run(decode(3, 5, [2])) == 0).all()


def test_rocm_asks_for_its_own_graphs(make):
    assert "enable_hip_graph" in make("rocm")._session.providers[0][1]
