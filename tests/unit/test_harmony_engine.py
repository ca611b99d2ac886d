"""A model that speaks harmony, in Python and on a terminal: what a scripted answer becomes."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from harmony_model import harmony_checkpoint
from llmrun import Engine
from llmrun.cli import build_parser
from llmrun.commands import chat

ASKED = [{"role": "user", "content": "Rain?"}]
WRITTEN = "<|channel|>analysis<|message|>A b.<|end|><|start|>assistant<|channel|>final<|message|>Yes, no."


class Scripted:
    """A constraint that leaves one answer."""

    def __init__(self, engine: Engine, written: str) -> None:
        assert engine.tokenizer is not None
        ids = engine.tokenizer.encode(written, add_bos=False, parse_special=True)
        self._ids = [*ids, min(engine.manifest.eos_token_ids)]
        self._size = engine.manifest.model.vocab_size
        self.is_done = False

    def mask(self, tokens: Sequence[int]) -> NDArray[Any]:
        return np.arange(self._size) == self._ids[len(tokens)]

    def accept(self, token_id: int) -> None:
        pass


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, packed: Callable[..., Path]) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("harmony") / "model"
    harmony_checkpoint(folder)
    with Engine(packed(folder, 1, "f32"), max_num_seqs=2) as engine:
        yield engine


def test_the_ends_of_an_answer_are_those_of_the_generation_config(engine: Engine) -> None:
    assert engine.tokenizer is not None
    special = engine.tokenizer.special_tokens
    assert set(engine.manifest.eos_token_ids) == {special[name] for name in ("<|return|>", "<|endoftext|>", "<|call|>")}


def test_a_chat_yields_what_is_for_the_user(engine: Engine) -> None:
    pieces = list(engine.chat(ASKED, constraint=Scripted(engine, WRITTEN)))
    assert "".join(pieces) == "Yes, no."
    assert len(pieces) > 2
    done = engine.complete(ASKED, constraint=Scripted(engine, WRITTEN), stop=", n")
    assert (done.text, done.finish_reason) == ("Yes", "stop")
    assert engine.tokenizer is not None
    prompt = engine.tokenizer.encode("Rain?")  # no chat: what the tokens are
    assert engine.complete(prompt, constraint=Scripted(engine, WRITTEN)).text == "analysisA b.assistantfinalYes, no."


class Telling:
    """An engine that gives one answer after the other."""

    def __init__(self, engine: Engine, answers: list[str]) -> None:
        self._engine, self._answers = engine, answers
        self.prompts: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, prompt: list[int], **options: Any) -> Any:
        tokenizer = self._engine.tokenizer
        assert tokenizer is not None
        names = {token_id: text for text, token_id in tokenizer.special_tokens.items()}
        self.prompts.append("".join(names.get(i) or tokenizer.token_bytes(i).decode() for i in prompt))
        return self._engine.submit(prompt, **options, constraint=Scripted(self._engine, self._answers.pop(0)))


@pytest.mark.parametrize("is_json", [False, True])
def test_a_chat_on_standard_input_writes_what_is_for_the_user(
    is_json: bool, engine: Engine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = build_parser().parse_args(["chat", "x", *(["--json"] if is_json else [])])
    telling: Any = Telling(engine, [WRITTEN, "Hm."])
    signals: Any = SimpleNamespace(answering=contextlib.nullcontext, stop_answer=threading.Event())
    monkeypatch.setattr("llmrun.commands.chat.stdin.read_lines", lambda: iter([b"Rain?", b"Sure?"]))
    chat._Chat(arguments).talk(telling, signals)
    written = capfd.readouterr().out
    texts = [json.loads(line)["text"] for line in written.splitlines()] if is_json else written.splitlines()
    assert texts == ["Yes, no.", "Hm."]
    final = "<|start|>assistant<|channel|>final<|message|>Yes, no.<|end|>"
    assert telling.prompts[1].endswith(f"{final}<|start|>user<|message|>Sure?<|end|><|start|>assistant")


def test_a_terminal_gets_thoughts_marked_as_such(engine: Engine) -> None:
    arguments = build_parser().parse_args(["chat", "x"])
    telling: Any = Telling(engine, [WRITTEN])
    told: list[tuple[str, bool]] = []
    done = chat._Chat(arguments)._answer(telling, ASKED, lambda *piece: told.append(piece), lambda: False)
    assert "".join(text for text, is_thought in told if is_thought) == "A b.\n\n"
    assert "".join(text for text, is_thought in told if not is_thought) == done.text == "Yes, no."
    assert [is_thought for _, is_thought in told] == sorted((is_thought for _, is_thought in told), reverse=True)
