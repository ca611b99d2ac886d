"""What a failed step is called: a peer that ended is exit 6, anything else a bug of ours."""

import numpy as np
import pytest

from llmrun.errors import InternalError, PeerError
from llmrun.session import RankSession
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
