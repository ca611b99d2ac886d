"""What the files of a Hugging Face tokenizer say of single tokens: which were added, which are special, what has a name.

In: the files. Out: texts, ids and properties, as transformers reads them; nothing here knows a tokenizer library but to ask
it for names of its own.
"""

from __future__ import annotations

import itertools
from typing import Any

from llmpack.model_files import ModelFiles
from llmpack.tokenizer_libraries import Library
from llmrun.artifact import IncompatibleError, IntegrityError

__all__ = [
    "NAMES",
    "added_tokens",
    "extra_tokens",
    "named_token",
    "named_tokens",
    "some",
    "swallowing_tokens",
    "text_of",
]

# Whatever tokens have these names in tokenizer_config.json are special, whether they are marked so or not.
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def added_tokens(files: ModelFiles) -> dict[str, tuple[int, bool]]:
    """Return {text: (id, is special)} of tokens that were added to the tokenizer's own."""
    added: dict[str, tuple[int, bool]] = {}
    try:
        for text, token_id in files.json("added_tokens.json").items():
            added[text] = int(token_id), True
        for entry in files.json("tokenizer.json").get("added_tokens", []):
            added[entry["content"]] = int(entry["id"]), bool(entry.get("special", False))
        for token_id, entry in files.json("tokenizer_config.json").get("added_tokens_decoder", {}).items():
            added[entry["content"]] = int(token_id), bool(entry.get("special", False))
        if any(not text or token_id < 0 for text, (token_id, _) in added.items()):
            raise ValueError("an empty text or a negative id")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{files.model_dir}: the list of added tokens is malformed: {error!r}.") from error
    return added


def swallowing_tokens(files: ModelFiles) -> list[dict[str, tuple[bool, bool]]]:
    """Return the added tokens that swallow white space, {text: (before it, after it)}: of tokenizer.json, of the config."""
    found = []
    for entries in (
        files.json("tokenizer.json").get("added_tokens", []),
        files.json("tokenizer_config.json").get("added_tokens_decoder", {}).values(),
    ):
        sides = {entry["content"]: (bool(entry.get("lstrip")), bool(entry.get("rstrip"))) for entry in entries}
        found.append({text: side for text, side in sides.items() if any(side)})
    return found


def named_token(files: ModelFiles, library: Library, key: str) -> str | None:
    """Return the text of bos_token or eos_token: a string, or an object with its content; null says that there is none."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        config = files.json(name)
        if key in config:
            value = config[key]
            text = text_of(value)
            if text is not None and not isinstance(text, str):
                raise IncompatibleError(f"{files.model_dir / name}: {key}: found {value!r}, expected text.")
            return text
    return library.own.get(key)


def extra_tokens(files: ModelFiles) -> list[str]:
    """Return the texts of the special tokens that have no name of their own in transformers."""
    for name, key in itertools.product(_token_files(files), ("extra_special_tokens", "additional_special_tokens")):
        value = files.json(name).get(key)
        if value:
            entries = list(value.values()) if isinstance(value, dict) else value
            texts = [text_of(entry) for entry in entries] if isinstance(entries, list) else [None]
            if not all(isinstance(text, str) and text for text in texts):
                raise IncompatibleError(f"{files.model_dir / name}: {key}: found {value!r}, expected texts of tokens.")
            return [str(text) for text in dict.fromkeys(texts)]
    return []


def named_tokens(files: ModelFiles) -> dict[str, str]:
    """Return the texts of all tokens that have a name, as chat templates know them, by that."""
    found: dict[str, Any] = {}
    for name in _token_files(files):
        members = files.json(name)
        extra = members.get("extra_special_tokens")
        found |= {key: value for key, value in members.items() if key.endswith("_token")}
        found |= extra if isinstance(extra, dict) else {}
    return {key: text for key, value in found.items() if isinstance(text := text_of(value), str)}


def _token_files(files: ModelFiles) -> tuple[str, ...]:
    """Return the names of the files that name tokens, as transformers reads them."""
    name = "tokenizer_config.json"
    return (name,) if "added_tokens_decoder" in files.json(name) else (name, "special_tokens_map.json")


def text_of(entry: Any) -> Any:
    """Return what a file gives as a token's text: it is a string, or in an object."""
    return entry.get("content") if isinstance(entry, dict) else entry


def some(tokens: list[str]) -> str:
    """Name the first few of tokens."""
    return ", ".join([*map(repr, tokens[:3]), *([f"{len(tokens) - 3} more tokens"] if len(tokens) > 3 else [])])
