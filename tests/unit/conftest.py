"""What the tests of an engine of one rank, those of grammars and of tools, and those of tokenizers have in common."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizer_makers import train_byte_level, train_sentencepiece

from llmrun import Engine
from llmrun.artifact import open_artifact
from llmrun.server.grammar import Grammars
from llmrun.server.limits import Limits
from llmrun.tokenizer import Tokenizer, load_tokenizer

Packed = Callable[..., Path]


@pytest.fixture(scope="module")
def engine(packed_tiny: Packed) -> Iterator[Engine]:
    with Engine(packed_tiny(1, "f32"), max_num_seqs=3) as engine:
        yield engine


@pytest.fixture(scope="module")
def tokenizer(packed_demo: Packed) -> Tokenizer:
    loaded = load_tokenizer(open_artifact(packed_demo(2, "q4")))
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    # As many ids more as a padded embedding has: ids that stand for nothing are never allowed.
    return Grammars(tokenizer, tokenizer.vocab_size + 61, sorted(tokenizer.eos_token_ids), Limits())


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizers of two kinds: sentencepiece's, byte-level."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("sp", "bl")}
    train_sentencepiece(folders["sp"])
    train_byte_level(folders["bl"])
    return folders


@pytest.fixture
def sp(originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals["sp"], tmp_path / "model"))


@pytest.fixture
def bl(originals: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals["bl"], tmp_path / "model"))
