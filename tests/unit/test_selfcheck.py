"""The example that an artifact holds: nothing is published whose bytes the operator library and numpy read differently."""

import numpy as np
import pytest

from llmpack import packed_rank
from llmpack.native import packed_product
from llmpack.pack import Options, pack
from llmpack.packed_rank import PackedRank
from llmpack.selfcheck import round_activations
from llmpack.weights import Quantization, plan_rank
from llmrun.artifact import InternalError, open_artifact


@pytest.mark.parametrize("quant", ["f32", "f16", "q8", "q4"])
@pytest.mark.parametrize("row", [0, -1])
def test_a_library_that_reads_a_weight_otherwise_than_numpy_is_found(
    row, quant, tiny_checkpoint, tmp_path, monkeypatch
):
    """It also writes them, so what it reads back may be right by its own lights; the first and the last tile are compared."""

    def slightly_wrong(*arguments):
        y = packed_product(*arguments)
        y[row] += 1e-6 * np.abs(y).max()
        return y

    monkeypatch.setattr(packed_rank, "packed_product", slightly_wrong)
    with pytest.raises(InternalError, match=r"qkv_proj: the operator library and numpy read tile \d+ apart"):
        pack(tiny_checkpoint, tmp_path / "a", Options(scheme=quant))
    assert not list(tmp_path.iterdir())


def test_weights_that_end_too_early_are_noticed(packed, tiny_checkpoint, tmp_path):
    config = open_artifact(packed(tiny_checkpoint, 1, "f32")).manifest.model
    plan = plan_rank(config, Quantization("f32", 64), 1, 0)
    data = (packed(tiny_checkpoint, 1, "f32") / "rank-0/weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(data[: plan[-1].initializers[0].offset + 1])
    with PackedRank(tmp_path / "weights.bin", plan) as rank, pytest.raises(InternalError, match=r"ends before lm_head"):
        rank.matmul("lm_head", np.ones((1, config.hidden_size)))


def test_activations_are_rounded_to_the_nearest_of_127_steps_in_each_group():
    x = np.array([[127.0, 1.4, -0.6, 0.0], [0.0, 0.0, -2.54, 0.011]])
    expected = [[127.0, 1.0, -0.6, 0.0], [0.0, 0.0, -2.54, 0.02]]
    np.testing.assert_allclose(round_activations(x, 2), expected, rtol=1e-12)
