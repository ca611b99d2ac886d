"""Checkpoints and artifacts that tests share, made and packed on demand."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Kernels run in Triton's interpreter, which must be chosen before anything (torch, say) imports Triton.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import settings

from emulated.emulator import Emulator, build, missing
from llmpack.pack import Options, pack
from models import DEMO, make_checkpoint

# Containers often have it, shells of users not: there the interpreter flushes its streams at exit, and says if it could not.
os.environ.pop("PYTHONUNBUFFERED", None)

# ONNX Runtime's wheels since 1.32 hold a telemetry client with a thread of its own.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

# Under nohup SIGHUP is ignored, and SIGINT behind a script's "&", in every process that tests start too, and llmrun
# rightly leaves it so.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# `make test` decides about a change, so it draws the same examples every time; `make fuzz` draws new ones.
settings.register_profile("gate", derandomize=True, deadline=None)
settings.register_profile("fuzz", deadline=None)
settings.load_profile(os.environ.get("LLMPACK_HYPOTHESIS", "gate"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test` leaves to `make test-all`.

    That is minutes on an emulator, between network namespaces and in builds with sanitizers, and the launches of really
    compiled GPU code on the stand-in driver. A test may bear the mark itself.
    """
    for item in items:
        is_far = any(w in item.nodeid for w in ("aarch64", "emulat", "sanitizer")) or item.path.parent.name == "hosts"
        if is_far or item.path.name == "test_compiled.py":
            item.add_marker("extended")


@pytest.fixture(scope="session", autouse=True)
def temporary_folder() -> Iterator[None]:
    """What tests and what they start leave behind, when killed for instance, goes into one folder, removed at the end."""
    folder = tempfile.mkdtemp(prefix="llmpack-tests-")
    os.environ["TMPDIR"], tempfile.tempdir = folder, None
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def emulator() -> Iterator[Emulator]:
    """The operator library on an emulated aarch64 machine."""
    if reason := missing():
        pytest.skip(reason)
    build()
    emulator = Emulator()
    yield emulator
    emulator.close()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny model without a tokenizer: ids in, ids out."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny model with the demo model's tokenizer and template."""
    vocab_size = json.loads((DEMO / "config.json").read_text())["vocab_size"]
    folder = make_checkpoint(tmp_path_factory.mktemp("tiny-text") / "model", vocab_size=vocab_size)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Pack a checkpoint once per session and options; the artifact must not be changed (copy it to damage it)."""
    root = tmp_path_factory.mktemp("packed")
    done: dict[tuple[Any, ...], Path] = {}

    def get(checkpoint: Path, shards: int = 1, quant: str = "f32", **options: Any) -> Path:
        key = (checkpoint, shards, quant, *sorted(options.items()))
        if key not in done:
            target = root / f"{len(done)}-{quant}-tp{shards}"
            pack(checkpoint, target, Options(shards=shards, scheme=quant, **options))
            done[key] = target
        return done[key]

    return get


@pytest.fixture(scope="session")
def packed_tiny(packed: Callable[..., Path], tiny_text_checkpoint: Path) -> Callable[..., Path]:
    """The random tiny model with a tokenizer, packed: packed_tiny(shards, quant)."""
    return lambda shards=1, quant="f32", **options: packed(tiny_text_checkpoint, shards, quant, **options)


@pytest.fixture(scope="session")
def packed_demo(packed: Callable[..., Path]) -> Callable[..., Path]:
    """The demo model, packed: packed_demo(shards, quant)."""
    return lambda shards=1, quant="f32", **options: packed(DEMO, shards, quant, **options)
