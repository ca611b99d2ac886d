"""Perplexity of the demo model on text it has not seen, by scheme: the bounds of the README's table.

The float32 figure's oracle is transformers, with the same windows.
"""

import json
import math
import re

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from llmrun import Engine
from models import DEMO, HELDOUT
from mpi.harness import run_alone

WINDOW = 512
LIMITS = {"f16": 1.001, "q8": 1.005, "q4": 1.05}


@pytest.fixture(scope="session")
def perplexity(packed_demo, tmp_path_factory):
    done = {}

    def get(quant):
        if quant not in done:
            outcome = run_alone(
                "perplexity", packed_demo(1, quant), HELDOUT, "--json", "--threads", "2", deadline_s=240
            )
            assert outcome.code == 0, outcome.stderr
            done[quant] = json.loads(outcome.stdout)
        return done[quant]

    return get


def test_float32_equals_transformers(perplexity, packed_demo):
    with Engine(packed_demo(1, "f32")) as engine:
        assert engine.tokenizer is not None
        ids = engine.tokenizer.encode(HELDOUT.read_text(), add_bos=False)
    model = LlamaForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    nll, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids), WINDOW - 1):
            window = torch.tensor([[1, *ids[start : start + WINDOW - 1]]])
            nll += float(model(window, labels=window).loss) * (window.shape[1] - 1)
            count += window.shape[1] - 1
    ours = perplexity("f32")
    assert ours["tokens"] == count
    assert math.isclose(ours["perplexity"], math.exp(nll / count), rel_tol=1e-4)


@pytest.mark.parametrize("quant", LIMITS)
def test_quantization_costs_no_more_than_promised(quant, perplexity):
    ratio = perplexity(quant)["perplexity"] / perplexity("f32")["perplexity"]
    assert 1 / LIMITS[quant] < ratio <= LIMITS[quant]


@pytest.mark.parametrize("quant", ["f32", *LIMITS])
def test_the_readmes_figures_are_these(quant, perplexity):
    readme = (DEMO.parents[2] / "README.md").read_text()
    (row,) = re.findall(rf"^\| {quant}\b.*$", readme, re.MULTILINE)
    shown = float(row.split("|")[3])
    assert abs(perplexity(quant)["perplexity"] - shown) < 0.002  # instruction sets differ by 0.0001


def test_q4_really_is_quantized(perplexity, packed_demo):
    """Negative control for the bounds above: the figures differ."""
    assert len({round(perplexity(quant)["perplexity"], 4) for quant in ("f32", "q8", "q4")}) == 3


def test_logits_out_holds_every_row(packed_demo, tmp_path):
    ids = [1, 17, 300, 42, 5]
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    out = tmp_path / "logits.npy"
    outcome = run_alone(
        "perplexity", packed_demo(1, "f32"), tmp_path / "ids.json", "--ids", "--logits-out", out, "--json"
    )
    assert outcome.code == 0, outcome.stderr
    logits = np.load(out)
    assert logits.dtype == np.float32
    with Engine(packed_demo(1, "f32")) as engine:
        np.testing.assert_allclose(logits, engine.logits(ids), atol=1e-5)
