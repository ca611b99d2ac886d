"""Texts many times as long as a window of attention are those of transformers, whatever the engine does with its cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmrun import Engine
from llmrun.core import Core
from models import GEMMA, make_checkpoint
from mpi.harness import RunningJob, mpirun_command

NUM_TOKENS, NUM_SEQS = 70, 4
MODELS: dict[str, dict[str, Any]] = {
    "within-a-block": {"model_type": "mistral", "sliding_window": 12},
    "across-blocks": {"model_type": "mistral", "sliding_window": 33, "num_key_value_heads": 2},
    # Not tied: with random weights those say the last token again.
    "in-some-layers": {**GEMMA, "sliding_window": 20, "tie_word_embeddings": False},
}
STEM = [(37 * i + 11) % 250 for i in range(100)]  # of two prompts, of a third in part; the last invites guesses
PROMPTS = [[*STEM, 7, 8, 9], [*STEM, 250], [*STEM[:50], 5, 6], [5], STEM[:9] * 14]


@dataclass
class Case:
    checkpoint: Path
    texts: list[list[int]]  # prompt and answer, of transformers
    logits: list[np.ndarray]  # of those

    @property
    def answers(self) -> list[list[int]]:
        return [text[len(prompt) :] for prompt, text in zip(PROMPTS, self.texts, strict=True)]


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("windows") / request.param
    make_checkpoint(folder, max_position_embeddings=256, **MODELS[request.param])
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # for 70 steps of a tiny model two that wait for each other take a minute on a busy machine
    greedy = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        prompts = [torch.tensor([prompt]) for prompt in PROMPTS]
        # Without a mask it takes any token 0 for padding.
        texts = [model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)[0].tolist() for ids in prompts]
        logits = [model(torch.tensor([text])).logits[0].numpy() for text in texts]
    torch.set_num_threads(threads)
    for prompt, text, rows in zip(PROMPTS, texts, logits, strict=True):
        best = np.sort(rows[len(prompt) - 1 : len(text) - 1])
        assert (best[:, -1] - best[:, -2]).min() > 1e-4  # no near tie
        assert len(set(text[len(prompt) :])) > 20
    return Case(folder, texts, logits)


@pytest.fixture(scope="module")
def engine(case: Case, packed: Callable[..., Path]) -> Iterator[Engine]:
    with Engine(packed(case.checkpoint, 1, "f32"), max_num_seqs=NUM_SEQS) as engine:
        yield engine


@pytest.mark.parametrize("chunk", [None, 7])
def test_logits(chunk: int | None, case: Case, engine: Engine) -> None:
    for text, truth in zip(case.texts, case.logits, strict=True):
        np.testing.assert_allclose(engine.logits(text, chunk=chunk), truth, rtol=0, atol=2e-4)


@pytest.mark.parametrize("num_blocks", [16, 20, 64])
@pytest.mark.parametrize("speculate", [0, 5])
def test_answers_side_by_side(num_blocks: int, speculate: int, case: Case, engine: Engine) -> None:
    """Twice, so that the second time finds prefixes; with few blocks sequences lose theirs and are computed again."""
    core = Core(engine.job, None, max_seq_len=256, max_num_seqs=NUM_SEQS, num_blocks=num_blocks, speculate=speculate)
    for _ in range(2):
        requests = [core.prepare(prompt, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True) for prompt in PROMPTS]
        for request in requests:
            core.enqueue(request)
            core.step()
        while core.has_work:
            core.step()
        assert [request.ids for request in requests] == case.answers
    stats = core.stats()
    assert stats.prefix_hits > 0
    assert (stats.preemptions > 0) == (num_blocks < 64)
    assert (stats.accepted_tokens > 0) <= (speculate > 0)


@pytest.mark.mpi
def test_two_ranks(case: Case, packed: Callable[..., Path], tmp_path: Path) -> None:
    questions = {"sequences": case.texts, "chunks": [13], "greedy": PROMPTS, "max_tokens": NUM_TOKENS}
    (tmp_path / "questions").write_text(json.dumps(questions))
    script = Path(__file__).parent / "answers_ranks.py"
    artifact = packed(case.checkpoint, 2, "f32")
    command = [sys.executable, script, artifact, tmp_path / "questions", tmp_path / "answers.npz"]
    outcome = RunningJob([*mpirun_command(2), *map(str, command)]).finish()
    assert (outcome.code, outcome.leftovers) == (0, []), outcome.stderr
    found = np.load(tmp_path / "answers.npz")
    assert [found[f"greedy.{i}"].tolist() for i in range(len(PROMPTS))] == case.answers
    for i, truth in enumerate(case.logits):
        np.testing.assert_allclose(found[f"logits.{i}.0"], truth, rtol=0, atol=2e-4)
