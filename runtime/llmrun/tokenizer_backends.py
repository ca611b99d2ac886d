"""The two tokenizer libraries behind one face: sentencepiece and tokenizers.

In: the bytes of a `tokenizer.model` or `tokenizer.json`. Out: ids for text, bytes for ids. The libraries are
imported when a backend is made. What is special, and what users may type, is decided in `llmrun.tokenizer`.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llmrun.errors import IncompatibleError, IntegrityError

if TYPE_CHECKING:
    from llmrun.artifact import TokenizerSpec

__all__ = ["Backend", "SentencePieceBackend", "TokenizersBackend", "alternation"]

_SPACE = "\u2581"  # sentencepiece's sign for a space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# normalizer_spec (field 3) { add_dummy_prefix (field 3): false }. Protocol Buffers merge a message that
# occurs twice, so these bytes at the end of a model override that one field
# (protobuf.dev/programming-guides/encoding, "Last One Wins").
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Backend(Protocol):
    """What `Tokenizer` needs of a library.

    Attributes:
        unknown_id: the token for characters that are not in the vocabulary.
        strips_leading_space: whether the encoding puts a space before all text.
        takes_space_before, takes_space_after: added tokens that swallow the white space beside them.
    """

    unknown_id: int | None
    strips_leading_space: bool
    takes_space_before: frozenset[str] = frozenset()
    takes_space_after: frozenset[str] = frozenset()

    def encode_plain(self, text: str) -> list[int]:
        """Encode text, special tokens in it being text as far as the library can."""
        ...

    def encode_special(self, text: str) -> list[int]:
        """Encode text, special tokens in it being ids."""
        ...

    def encode_segments(self, segments: Sequence[str | int]) -> list[int]:
        """Encode segments as if they stood in one text: a str as `encode_plain` does, an int as itself."""
        ...

    def token_text(self, token_id: int) -> str | None:
        """Return the library's name of a token, None if it has none."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for, none for an id without a token."""
        ...


class SentencePieceBackend(Backend):
    """sentencepiece, twice: as it was trained, and without the prefix space, for text that follows something."""

    def __init__(self, data: bytes, spec: TokenizerSpec, where: str) -> None:
        try:
            from sentencepiece import SentencePieceProcessor  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise IncompatibleError(f"{where}: needs the Python package sentencepiece: {error}") from error
        self._first: Any = SentencePieceProcessor(model_proto=data)
        self._following: Any = SentencePieceProcessor(model_proto=data + _NO_DUMMY_PREFIX)
        self._size: int = self._first.get_piece_size()
        if not 0 < self._size <= spec.vocab_size:
            raise IntegrityError(f"{where}: {self._size} pieces: the manifest says {spec.vocab_size}")
        self.unknown_id: int | None = self._first.unk_id()
        self.strips_leading_space = self._first.encode("a") != self._following.encode("a")
        self._special_tokens = spec.special_tokens
        self._special_pattern = alternation(spec.special_tokens)

    def encode_plain(self, text: str) -> list[int]:  # noqa: D102
        return self._first.encode(text)

    def encode_special(self, text: str) -> list[int]:  # noqa: D102
        ids: list[int] = []
        end = 0
        for match in self._special_pattern.finditer(text):
            ids += self._run(text[end : match.start()], end)
            ids.append(self._special_tokens[match[0]])
            end = match.end()
        return ids + self._run(text[end:], end)

    def _run(self, text: str, start: int) -> list[int]:
        return (self._following if start else self._first).encode(text) if text else []

    def encode_segments(self, segments: Sequence[str | int]) -> list[int]:  # noqa: D102
        ids: list[int] = []
        for start, segment in enumerate(segments):
            ids += [segment] if isinstance(segment, int) else self._run(segment, start)
        return ids

    def token_text(self, token_id: int) -> str | None:  # noqa: D102
        return self._first.id_to_piece(token_id) if token_id < self._size else None

    def token_bytes(self, token_id: int) -> bytes:  # noqa: D102
        if token_id >= self._size or self._first.is_control(token_id) or self._first.is_unused(token_id):
            return b""
        piece: str = self._first.id_to_piece(token_id)
        if self._first.is_byte(token_id):
            return bytes.fromhex(piece[3:5])
        if token_id == self.unknown_id:
            return self._first.decode([token_id]).encode()
        return piece.replace(_SPACE, " ").encode()


class TokenizersBackend(Backend):
    """Hugging Face's tokenizers. Post-processors are not used: BOS is ours to add, so it never comes twice."""

    def __init__(self, data: bytes, spec: TokenizerSpec, where: str) -> None:
        try:
            import tokenizers  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise IncompatibleError(f"{where}: needs the Python package tokenizers: {error}") from error
        self._lock = threading.Lock()
        self._library = tokenizers
        # A vocabulary of 262,144 takes a second to parse and hundreds of megabytes: that is done once, by the library.
        self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(data)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added: list[Any] = [added[token_id] for token_id in sorted(added) if token_id < spec.vocab_size]
        if len(self._added) < len(added):  # the model has no such ids: their texts are like any other
            self._tokenizer = self._with_tokens(self._added)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        highest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if highest >= spec.vocab_size:
            raise IntegrityError(f"{where}: has id {highest}: the manifest says {spec.vocab_size} ids")
        self.takes_space_before = frozenset(token.content for token in self._added if token.lstrip)
        self.takes_space_after = frozenset(token.content for token in self._added if token.rstrip)
        self.unknown_id = _unknown_id(self._tokenizer)
        self._is_byte_level, self._byte_fallback, self.strips_leading_space = _read_decoder(
            _state(self._tokenizer.decoder), where
        )

    def _with_tokens(self, added: Sequence[Any]) -> Any:
        """Return a tokenizer with the model and the rules of this one, which they share, and with these added tokens."""
        tokenizer = self._library.Tokenizer(self._tokenizer.model)
        for rule in ("normalizer", "pre_tokenizer", "decoder"):
            if (value := getattr(self._tokenizer, rule)) is not None:
                setattr(tokenizer, rule, value)
        tokenizer.add_tokens(list(added))
        return tokenizer

    @functools.cached_property
    def _marked(self) -> tuple[Any, str]:
        """A second tokenizer with one more token, which stands for any special one; random, so no text can hold it."""
        mark = f"\ue000{secrets.token_hex(16)}\ue001"
        tokenizer = self._with_tokens([*self._added, self._library.AddedToken(mark, normalized=False)])
        tokenizer.encode_special_tokens = True
        return tokenizer, mark

    def _encode(self, text: str, *, as_text: bool) -> list[int]:
        with self._lock:
            self._tokenizer.encode_special_tokens = as_text
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_plain(self, text: str) -> list[int]:  # noqa: D102
        return self._encode(text, as_text=True)

    def encode_special(self, text: str) -> list[int]:  # noqa: D102
        return self._encode(text, as_text=False)

    def encode_segments(self, segments: Sequence[str | int]) -> list[int]:  # noqa: D102
        # One text in which a mark takes the place of each id, so that every segment is encoded where it
        # stands.
        tokenizer, mark = self._marked
        text = ""
        marks: list[int | None] = []
        after_text = False
        for segment in segments:
            if isinstance(segment, int):
                text += mark
                marks.append(segment)
            else:
                if after_text:
                    text += mark
                    marks.append(None)
                text += segment
            after_text = isinstance(segment, str)
        ids: list[int] = []
        stands_for = iter(marks)
        encoding = tokenizer.encode(text, add_special_tokens=False)
        # The mark is told by its text: where a vocabulary has gaps, its id may be another token's, too.
        for token, token_id in zip(encoding.tokens, encoding.ids, strict=True):
            actual = next(stands_for) if token == mark else token_id
            if actual is not None:
                ids.append(actual)
        return ids

    def token_text(self, token_id: int) -> str | None:  # noqa: D102
        return self._tokenizer.id_to_token(token_id)

    def token_bytes(self, token_id: int) -> bytes:  # noqa: D102
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            # As tokenizers' ByteLevel decoder: a token with any character that is no byte's sign stands for
            # itself.
            table = _byte_level_table()
            data = [table.get(char) for char in token]
            return token.encode() if None in data else bytes(byte for byte in data if byte is not None)
        match = _BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        return bytes.fromhex(match[1]) if match else token.replace(_SPACE, " ").encode()


def _state(part: Any) -> dict[str, Any]:
    """Return a part of a tokenizer as tokenizer.json has it; empty if there is none."""
    return {} if part is None else json.loads(part.__getstate__())


def _unknown_id(tokenizer: Any) -> int | None:
    model = tokenizer.model
    if hasattr(model, "unk_token"):
        return None if model.unk_token is None else tokenizer.token_to_id(model.unk_token)
    return _state(model).get("unk_id")  # Unigram models name it by its id, the others by its text


def _read_decoder(decoder: dict[str, Any], where: str) -> tuple[bool, bool, bool]:
    """Return (is byte-level, has byte fallback, strips a leading space) of a tokenizer.json's decoder."""
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return True, False, False
    strips = False
    for step in steps:
        shape = {key: value for key, value in step.items() if key != "type"}
        match step.get("type"):
            case "Replace" if shape == {"pattern": {"String": _SPACE}, "content": " "}:
                pass
            case "Strip" if shape == {"content": " ", "start": 1, "stop": 0}:
                strips = True
            case "Metaspace" if shape.get("replacement", _SPACE) == _SPACE:
                strips = shape.get("prepend_scheme", "always") != "never" and shape.get("add_prefix_space", True)
            case "ByteFallback" | "Fuse":
                pass
            case kind:
                raise IncompatibleError(
                    f"{where}: decoder {kind} {shape}: expected ByteLevel, or Replace, ByteFallback, Fuse and Strip"
                )
    return False, "ByteFallback" in kinds, strips


@functools.cache
def _byte_level_table() -> dict[str, int]:
    """Return the byte that each character stands for in byte-level BPE (`bytes_to_unicode` of OpenAI's GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def alternation(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds the leftmost of texts and, of several there, the longest."""
    longest_first = sorted((text for text in texts if text), key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
