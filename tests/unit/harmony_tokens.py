"""A tokenizer with gpt-oss's special tokens, and a chat template of its kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizer_makers import byte_level_spec, make_artifact, train_byte_level

from harmony_model import SPECIAL, TEMPLATE
from llmrun.tokenizer import Tokenizer, load_tokenizer


def harmony_tokenizer(folder: Path) -> Tokenizer:
    library = train_byte_level(folder, SPECIAL)
    ends = tuple(library.token_to_id(text) for text in ("<|return|>", "<|endoftext|>", "<|call|>"))
    spec = byte_level_spec(library, SPECIAL, add_bos_token=False, eos_token="<|return|>", eos_token_ids=ends)
    artifact: Any = make_artifact(folder, "tokenizers", "tokenizer.json", chat_template=TEMPLATE, **spec)
    loaded = load_tokenizer(artifact)
    assert loaded is not None
    return loaded


def ids_of(tokenizer: Tokenizer, written: str) -> list[int]:
    return tokenizer.encode(written, add_bos=False, parse_special=True)
