"""What a session refuses and fails with; of a failed step, a peer that ended is exit 6, anything else a bug of ours."""

import sys
import types

import numpy as np
import pytest

import llmrun.session
from llmrun import Engine
from llmrun.errors import IncompatibleError, InternalError, PeerError, ResourceError
from llmrun.session import RankSession, import_onnxruntime
from llmrun.step_plan import StepPlan


class _Failing:
    def __init__(self, text):
        self.text = text

    def run_with_iobinding(self, *_):
        raise RuntimeError(self.text)


PLAN = StepPlan.of(
    input_ids=[3],
    positions=[0],
    slot_mapping=[0],
    query_start=[0, 1],
    seq_lens=[1],
    block_table=np.zeros((1, 1), np.int32),
    logit_rows=[0],
)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("AllReduce: rank 1 (pid 4711) has ended, and rank 0 waits for it", PeerError),
        ("AllReduce: rank 3 (pid 9) has left the communicator, and rank 0 waits for it", PeerError),
        ("PagedAttention: slot_mapping[0] is 99, expected less than 16", InternalError),
    ],
)
def test_a_failed_step_has_the_exit_code_of_its_cause(text, kind):
    session = RankSession.__new__(RankSession)
    session._shape, session._message, session._binding = PLAN.shape, np.array(PLAN.message, np.int32).data, None
    session._run_options = session._prompt_options = None
    session._session = _Failing(text)
    with pytest.raises(kind) as caught:
        session.run(PLAN)
    assert type(caught.value) is kind
    assert text in str(caught.value)


def test_a_step_without_memory_spoils_no_later_one(engine, monkeypatch):
    """The next has the shape of the last that ran: what was bound for the failed one must not be taken for its own."""
    options = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True}
    before = list(engine.generate_ids([5], **options))
    with monkeypatch.context() as patch:
        patch.setattr(RankSession, "_value_of", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            list(engine.generate_ids([9, 9, 9], **options))
    assert list(engine.generate_ids([5], **options)) == before


@pytest.mark.parametrize(
    ("what", "words"), [("_zeros", "KV cache: the system refuses"), ("MappedWeights", "cannot be mapped")]
)
def test_memory_that_the_system_refuses_is_one_sentence(packed_tiny, monkeypatch, what, words):
    def refuse(*_):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(llmrun.session, what, refuse)
    with pytest.raises(ResourceError, match=words):
        Engine(packed_tiny(1, "f32"))


def test_a_graph_that_takes_all_memory_is_not_called_another_models(packed_tiny, monkeypatch):
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(ResourceError):
        Engine(packed_tiny(1, "f32"))


@pytest.mark.parametrize(
    ("version", "is_enough"), [("1.9.2", False), ("1.21.1", False), ("1.22.0", True), ("2.0.0", True)]
)
def test_an_onnxruntime_that_is_too_old_is_refused(monkeypatch, version, is_enough):
    installed = types.SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "onnxruntime", installed)
    if is_enough:
        assert import_onnxruntime() is installed
        return
    with pytest.raises(IncompatibleError, match=f"onnxruntime {version} is installed, 1.22 or newer is needed"):
        import_onnxruntime()
