"""The two tokenizer libraries, as far as packing needs them.

In: a `tokenizer.model` or `tokenizer.json`. Out: a `Library`, which knows the ids, the special tokens and how
to encode text. This stands beside the runtime's tokenizer and shares no code with it, so that golden vectors
check the one by the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmrun.artifact import IncompatibleError, IntegrityError, UsageError

__all__ = ["Library", "open_sentencepiece", "open_tokenizers"]

_SENTENCEPIECE_FATAL = 3
_DECODERS = frozenset(["ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"])


@dataclass
class Library:
    """A tokenizer of either library, as far as packing needs it."""

    kind: str
    path: Path
    vocab_size: int  # of the model
    highest_id: int
    encode: Callable[[str], list[int]]  # special tokens being text
    text: Callable[[int], str | None]
    id_of: Callable[[str], int | None]
    adds: Callable[[int | None], bool]  # whether a BOS comes first by default
    unknown_id: int | None  # stands for characters that are not in the vocabulary
    prefix: tuple[int, ...] = ()  # the tokens that the file itself puts before every text
    last_id: int | None = None  # and after it
    own: dict[str, str | None] = field(default_factory=dict)  # bos_token, eos_token that the file itself names
    special_tokens: dict[str, int] = field(default_factory=dict)

    def find(self, text: str) -> int | None:
        """Return the id of a token, None if there is none."""
        return self.special_tokens.get(text, self.id_of(text))

    def id(self, text: str) -> int:
        """Return the id of a token that must be there."""
        token_id = self.find(text)
        if token_id is None:
            raise IncompatibleError(
                f"{self.path}: token {text!r}, which tokenizer_config.json names: found none within the model's "
                f"vocabulary of {self.vocab_size} ids, expected one. Use the files of one checkpoint together."
            )
        return token_id


def open_sentencepiece(path: Path, data: bytes, added: dict[str, tuple[int, bool]], vocab_size: int) -> Library:
    """Open a tokenizer.model.

    `added` are tokens that other files add to it, {text: (id, is special)}; all are taken as special but those that are
    the model's own pieces and not marked as special.
    """
    try:
        from sentencepiece import SentencePieceProcessor, SetMinLogLevel
    except ImportError as error:
        raise UsageError(f"{path}: needs `pip install sentencepiece`: {error}") from error
    try:
        SetMinLogLevel(_SENTENCEPIECE_FATAL)  # it would log to our standard error what it also raises
        model: Any = SentencePieceProcessor(model_proto=data)
        size: int = model.get_piece_size()
        if size == 0:
            raise ValueError("it has no pieces")
    except Exception as error:
        raise IntegrityError(f"{path}: not a sentencepiece model: {error}.") from error
    pieces: dict[str, int] = {model.id_to_piece(i): i for i in range(size)}

    def own(token_id: int) -> str | None:
        return None if token_id < 0 else model.id_to_piece(token_id)

    special = {text: i for text, i in pieces.items() if model.is_control(i) or model.is_unknown(i)}
    special.update((text, i) for text, (i, is_special) in added.items() if is_special or pieces.get(text) != i)
    texts = {token_id: text for text, token_id in special.items()}
    return Library(
        kind="sentencepiece",
        path=path,
        vocab_size=vocab_size,
        highest_id=size - 1,
        encode=model.encode,
        text=lambda token_id: model.id_to_piece(token_id) if token_id < size else texts.get(token_id),
        id_of=pieces.get,
        adds=lambda bos_id: bos_id in special.values(),
        unknown_id=model.unk_id(),
        own={"bos_token": own(model.bos_id()), "eos_token": own(model.eos_id())},
        special_tokens=special,
    )


def open_tokenizers(path: Path, data: bytes, document: dict[str, Any], vocab_size: int) -> Library:
    """Open a tokenizer.json, without the added tokens that the model has no id for; `document` is what `data` parses to."""
    try:
        import tokenizers
    except ImportError as error:
        raise UsageError(f"{path}: needs `pip install tokenizers`: {error}") from error
    added = document.get("added_tokens", [])
    kept = [token for token in added if int(token["id"]) < vocab_size]
    if len(kept) < len(added):
        data = json.dumps(document | {"added_tokens": kept}).encode()
    tokenizer: Any = _call_tokenizers(path, lambda: tokenizers.Tokenizer.from_str(data.decode()))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    decoder = document.get("decoder") or {}
    for step in decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]:
        if step.get("type") not in _DECODERS:
            raise IncompatibleError(f"{path}: decoder: found {step.get('type')}, expected one of {sorted(_DECODERS)}.")

    framed = _call_tokenizers(path, lambda: tokenizer.encode("a"))
    num_before = next((i for i, is_added in enumerate(framed.special_tokens_mask) if not is_added), len(framed.ids))
    prefix = tuple(framed.ids[:num_before])
    last_id: int | None = framed.ids[-1] if framed.special_tokens_mask[num_before:][-1:] == [1] else None
    model = document["model"]
    unknown = model.get("unk_token")
    unigram_unknown: int | None = model.get("unk_id") if model.get("type") == "Unigram" else None

    def encode(text: str) -> list[int]:
        tokenizer.encode_special_tokens = True
        return _call_tokenizers(path, lambda: tokenizer.encode(text, add_special_tokens=False).ids)

    return Library(
        kind="tokenizers",
        path=path,
        vocab_size=vocab_size,
        highest_id=max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1),
        encode=encode,
        text=tokenizer.id_to_token,
        id_of=tokenizer.token_to_id,
        adds=lambda bos_id: bos_id is not None and prefix[:1] == (bos_id,),
        unknown_id=unigram_unknown if unknown is None else tokenizer.token_to_id(unknown),
        prefix=prefix,
        last_id=last_id,
        special_tokens={
            token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        },
    )


def _call_tokenizers(path: Path, call: Callable[[], Any]) -> Any:
    """Call the library; a panic in its Rust code is a BaseException of a type that cannot be imported."""
    try:
        return call()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise IntegrityError(f"{path}: the tokenizers library refuses it: {error}.") from error
