"""What a GPU session binds, sends and captures, on an ONNX Runtime that only writes down what it is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from llmrun.device import MOST_CAPTURED, Gpu, Placement
from llmrun.errors import IncompatibleError
from llmrun.gpu_session import GpuSession
from llmrun.manifest import KvCacheSpec
from llmrun.step_plan import FIELDS, StepPlan

SPEC = KvCacheSpec("float16", 16, 1, 2, 8)
VOCABULARY, K = 10, 4


class Value:
    def __init__(self, shape, dtype):
        self.array, self.updates, self.reads = np.zeros(shape, dtype), 0, 0

    def update_inplace(self, array):
        assert array.shape == self.array.shape
        assert array.dtype == self.array.dtype
        self.array[:] = array
        self.updates += 1

    def numpy(self):
        self.reads += 1
        return self.array.copy()


class Binding:
    def __init__(self):
        self.inputs, self.outputs = {}, {}

    def bind_ortvalue_input(self, name, value):
        self.inputs[name] = value

    def bind_input(self, name, kind, device, dtype, shape, address):
        assert (kind, device, dtype) == ("cuda", 1, np.float16)
        self.inputs[name] = (address, shape)

    def bind_ortvalue_output(self, name, value):
        self.outputs[name] = value


class Memory:
    """The driver's: what was taken, and what was filled."""

    def __init__(self):
        self.sizes, self.fills = [], []

    def allocate(self, num_bytes):
        self.sizes.append(num_bytes)
        return 4096 * len(self.sizes)

    def fill(self, *arguments):
        self.fills.append(arguments)


class Options(SimpleNamespace):
    def add_run_config_entry(self, key, value):
        setattr(self, key, value)

    def add_session_config_entry(self, key, value):
        pass

    def register_custom_ops_library(self, path):
        pass


class Session:
    """Gives a row of 1, 2, 3, ... each run, and a record of two candidates that its id 1 is the likeliest: 5.0 and then 4.0."""

    columns = VOCABULARY
    preloads: ClassVar[list[str]] = []

    def __init__(self, _graph, _options, providers):
        self.preloaded = Session.preloads.copy()
        Session.preloads.clear()
        self.providers, self.runs = providers, []

    def get_inputs(self):
        return [
            SimpleNamespace(name=f"{k}_cache.0", type="tensor(float16)", shape=["n", 16, 2, 8])
            for k in ("key", "value")
        ]

    def get_outputs(self):
        return [SimpleNamespace(name=n, shape=["R", w]) for n, w in (("logits", self.columns), ("top", K + 1))]

    def io_binding(self):
        return Binding()

    def run_with_iobinding(self, binding, options):
        self.runs.append((binding, options.gpu_graph_id))
        binding.outputs["logits"].array[:] = len(self.runs)
        five, four = (int(np.float32(v).view(np.int32)) << 32 for v in (5, 4))
        keys = [five | 0x7FFFFFFF - 1, four | 0x7FFFFFFF - 2, 1, 0]
        binding.outputs["top"].array[:] = [*keys, int(np.float32(1.5).view(np.int32))]


@pytest.fixture
def make(monkeypatch):
    ort = SimpleNamespace(
        __version__="1.31",
        SessionOptions=Options,
        RunOptions=Options,
        GraphOptimizationLevel=SimpleNamespace(ORT_DISABLE_ALL=0),
        set_default_logger_severity=lambda severity: None,
        preload_dlls=lambda: Session.preloads.append("cuda"),
        InferenceSession=Session,
        OrtValue=SimpleNamespace(ortvalue_from_shape_and_type=lambda shape, dtype, *_: Value(shape, dtype)),
    )
    monkeypatch.setattr("llmrun.gpu_session.import_onnxruntime", lambda: ort)

    def make(provider="cuda", **options):
        placement = Placement(provider, Gpu(1, "RTX", "sm_89", "", 1, 0), "sm_89")
        memory = options.pop("memory", Memory())
        return GpuSession("g", "l", SPEC, placement, memory, num_blocks=8, vocab_size=VOCABULARY, max_seq_len=64,
                          max_rows=100, captures=True, **options)  # type: ignore[arg-type]  # fmt: skip

    return make


def plan_of(*numbers):
    return StepPlan.of(**dict(zip(FIELDS, numbers, strict=True)))


def decode(token, length, blocks, *, whole_rows=True):
    plan = plan_of([token], [length - 1], [length - 1], [0, 1], [length], [blocks], [0])
    plan.asks_whole_rows = whole_rows
    return plan


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
    session.run(plan_of([1, 2, 3], [0, 1, 2], [0, 1, 2], [0, 3], [3], [[0]], [2]))
    session.run(decode(3, 4, [0]))
    (first, eager), (second, graph) = session._session.runs
    assert (eager, graph) == ("-1", "1")
    assert first.inputs["key_cache.0"] == second.inputs["key_cache.0"] == (4096, (8, 16, 2, 8))
    assert first.inputs["block_table"].array.shape == (1, 8)


def test_whole_rows_come_when_the_plan_asks_for_them(make):
    session = make()
    for whole_rows in (False, True):
        rows = session.run(decode(3, 5, [2], whole_rows=whole_rows))
        assert rows.likeliest.ids[0, :2].tolist() == [1, 2]
        assert rows.likeliest.logits[0, :2].tolist() == [5.0, 4.0]
        assert (rows.whole is not None) == whole_rows
    assert rows.logits.tolist() == [[2.0] * VOCABULARY]
    logits = session._session.runs[0][0].outputs["logits"]
    assert logits.reads == 1, "whole rows were copied to the host without need"


def test_keys_and_values_take_their_bytes_and_no_more(make):
    session = make(memory=(memory := Memory()))
    size = 8 * 16 * 2 * 8 * 2
    assert memory.sizes == [2 * size]
    session.spoil_cache()
    assert memory.fills == [(4096 + size, 0xFF, size)]
    assert np.isnan(np.full(2, 0xFF, np.uint8).view(np.float16)).all()


def test_steps_of_very_many_sequences_are_not_captured(make):
    session = make()
    for n in (MOST_CAPTURED, MOST_CAPTURED + 1):
        session.run(
            plan_of(
                [3] * n, [0] * n, list(range(n)), list(range(n + 1)), [1] * n, [[i] for i in range(n)], list(range(n))
            )
        )
    assert [graph for _, graph in session._session.runs] == [str(MOST_CAPTURED), "-1"]


def test_logits_of_large_steps_are_not_all_kept(make):
    """Rows of the whole vocabulary, of prompts whose log-probabilities are wanted, in steps of many sizes."""
    session = make()
    for n in range(60, 100):
        session.run(plan_of([3] * n, list(range(n)), list(range(n)), [0, n], [n], [[0] * 8], list(range(n))))
        kept = sum(len(shape.logits.array) for shape in session._shapes.values())
        assert n <= kept <= 100
    session.run(decode(3, 5, [2]))
    session.run(plan_of([3] * 99, list(range(99)), list(range(99)), [0, 99], [99], [[0] * 8], list(range(99))))
    assert len(session._shapes) == 2, "a captured step was forgotten"


def test_rank_0_joins_what_the_ranks_have(make, monkeypatch):
    monkeypatch.setattr(Session, "columns", 4)  # of 10 tokens over 3 ranks
    sent = []

    def gather(values):
        sent.append(values)
        return [values, values + (values.dtype == np.float32), values]

    rows = make(size=3, gather=gather).run(decode(3, 5, [2]))
    assert rows.logits.tolist() == [[1.0] * 4 + [2.0] * 4 + [1.0] * 2]
    assert rows.likeliest.weight_sums.tolist() == [4.5]
    assert [values.dtype.name for values in sent] == ["int64", "float32"]


def test_other_ranks_send_and_keep_nothing(make, monkeypatch):
    monkeypatch.setattr(Session, "columns", 5)
    rows = make(size=2, gather=lambda values: None).run(decode(3, 5, [2]))
    assert (rows.whole, rows.likeliest) == (None, None)


def test_a_graph_with_other_columns_is_refused(make, monkeypatch):
    monkeypatch.setattr(Session, "columns", 7)
    with pytest.raises(IncompatibleError, match="it belongs to another model"):
        make(size=2)


@pytest.mark.parametrize(("provider", "expected"), [("cuda", ["cuda"]), ("rocm", [])])
def test_cuda_libraries_of_pip_packages_are_loaded_before_the_session_looks_for_them(provider, expected, make):
    assert make(provider)._session.preloaded == expected


def test_rocm_asks_for_its_own_graphs(make):
    assert "enable_hip_graph" in make("rocm")._session.providers[0][1]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        ("driver version is insufficient", r"refuses it: driver version is insufficient\.$"),
        ("nodes are on the CPU, but fallback to CPU EP has been explicitly disabled by the user.", "which library"),
    ],
)
def test_a_gpu_that_onnxruntime_cannot_use_is_named(raised, expected, monkeypatch, capsys):
    """By itself ONNX Runtime prints to stdout, makes the session on the CPU, and raises what that says."""
    import onnxruntime

    from llmrun.library import find_library

    def create(session, providers, *_):
        session._fallback_providers = ["CPUExecutionProvider"]
        raise RuntimeError(raised if "CUDA" in str(providers) else "no kernel on the CPU")

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", create)
    placement = Placement("cuda", Gpu(0, "RTX", "sm_89", "", 1, 0), "sm_89")
    with pytest.raises(IncompatibleError, match=expected):
        GpuSession(Path("gpu.onnx"), find_library(), SPEC, placement, Memory(), num_blocks=8,  # type: ignore[arg-type]
                   vocab_size=VOCABULARY, max_seq_len=64, max_rows=100, captures=True)  # fmt: skip
    assert capsys.readouterr().out == ""
