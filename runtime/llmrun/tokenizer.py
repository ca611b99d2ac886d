"""Text to ids and ids to bytes, with the checkpoint's own tokenizer.

In: an artifact's `tokenizer` member and the file it names. Out: a `Tokenizer` over one of two libraries,
sentencepiece (`tokenizer.model`) or tokenizers (`tokenizer.json`), which are imported only when they are
needed. It renders no chat templates (`llmrun.chat`), and streams nothing (`llmrun.text_stream`).

Two rules that the libraries do not have:

* Text is text. Special tokens that a user types are encoded like any other characters, unless `parse_special`
  is asked for.
* A token is a string of bytes. The text of a sequence is the bytes of its tokens, one leading space taken off
  where the encoding put one there, decoded as UTF-8 with U+FFFD for what is not. Both families of Llama
  tokenizers are of this kind: byte-level BPE, and pieces with byte fallback. A tokenizer.json with another
  decoder is refused. The result is that of the library's own decoding for valid UTF-8 and, for byte-level BPE,
  for every sequence.

With `parse_special`, sentencepiece text is encoded as by transformers' LlamaTokenizer with legacy=False: the
prefix space is put before text at the very beginning only, never after a special token. One difference
remains: transformers 5 leaves the prefix out if the text itself begins with a space, sentencepiece does not,
and we follow sentencepiece.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from llmrun.errors import IncompatibleError, IntegrityError, LlmpackError, UsageError
from llmrun.tokenizer_backends import Backend, SentencePieceBackend, TokenizersBackend, alternation

if TYPE_CHECKING:
    from llmrun.artifact import Artifact, TokenizerSpec

__all__ = ["Tokenizer", "load_tokenizer"]

_SPACES = re.compile(r"\s+")


def load_tokenizer(artifact: Artifact) -> Tokenizer | None:
    """Load the artifact's tokenizer; None if it has none.

    Raises:
        IntegrityError: a file does not parse or does not agree with the manifest.
        IncompatibleError: the library is not installed, or the tokenizer is of a kind that this version does
        not know.
    """
    spec = artifact.manifest.tokenizer
    if spec is None:
        return None
    path = artifact.resolve(spec.file)
    backends = {"sentencepiece": SentencePieceBackend, "tokenizers": TokenizersBackend}
    if spec.kind not in backends:
        raise IncompatibleError(f"{path}: tokenizer kind {spec.kind!r}: this version knows {sorted(backends)}")
    try:
        data = path.read_bytes()
        template = artifact.resolve(spec.chat_template).read_text("utf-8") if spec.chat_template else None
    except (OSError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{path.parent}: {error}") from error
    with _library_errors(str(path), IntegrityError):
        backend = backends[spec.kind](data, spec, str(path))
    for text, token_id in spec.special_tokens.items():
        if not 0 <= token_id < spec.vocab_size or backend.token_text(token_id) not in (None, text):
            raise IntegrityError(f"{path}: id {token_id} is not the special token {text!r} that the manifest says")
    return Tokenizer(spec, backend, template)


class Tokenizer:
    """Text to ids and back. May be used from several threads.

    Attributes:
        bos_token_id, bos_token: the token that begins a sequence, if there is one, and the text that a chat template gets,
            mostly its own; without a text it is an ordinary token, no special one.
        prefix: the ids that begin a sequence: mostly the BOS alone; empty without one.
        eos_token_ids, eos_token: the tokens that end one; the same holds for the text.
        vocab_size: ids are 0 to vocab_size - 1; a model may have more, which stand for nothing.
        chat_template: Jinja source of the template, if the artifact has one.
        special_tokens: texts of the special tokens, and their ids.
        strips_leading_space: whether the encoding puts a space before all text, which decoding takes off.
    """

    def __init__(self, spec: TokenizerSpec, backend: Backend, chat_template: str | None = None) -> None:
        self.bos_token_id = spec.bos_token_id
        self.bos_token = spec.bos_token
        self.prefix = list(spec.prefix_token_ids) or ([] if spec.bos_token_id is None else [spec.bos_token_id])
        self.eos_token_ids = spec.eos_token_ids
        self.eos_token = spec.eos_token
        self.vocab_size = spec.vocab_size
        self.chat_template = chat_template
        self.strips_leading_space = backend.strips_leading_space
        self._add_bos_token = spec.add_bos_token
        self._backend = backend
        self.special_tokens = spec.special_tokens
        self._special_ids = frozenset(spec.special_tokens.values())
        # A character that the tokenizer does not know gives the unknown token: that is no way to smuggle one
        # in.
        self._never_from_text = self._special_ids - {backend.unknown_id}
        self._special_pattern = alternation(spec.special_tokens)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Encode text.

        Args:
            text: any text that is valid Unicode; the empty text has no ids (but may get a BOS).
            add_bos: put `prefix` first, unless the ids begin with it and its tokens are special; None does what the
            checkpoint says.
            parse_special: let the text of special tokens stand for their ids, as a rendered chat template
            needs.
        Raises:
            UsageError: text is not a str, or holds a lone surrogate.
        """
        _check_text(text)
        with _library_errors("tokenizer", UsageError):
            ids = self._backend.encode_special(text) if parse_special else self._encode_plain(text)
        if self._add_bos_token if add_bos is None else add_bos:
            if add_bos and not self.prefix:
                raise UsageError("tokenizer: there is no BOS token to add")
            if ids[: len(self.prefix)] != self.prefix or not self._special_ids.issuperset(self.prefix):
                ids = [*self.prefix, *ids]
        return ids

    def encode_segments(self, segments: Sequence[str | int]) -> list[int]:
        """Encode one text that is given in segments: a str is plain text, an int stands for itself.

        The prefix space comes before text at the very beginning only. Segments do not merge into common
        tokens.
        """
        for segment in segments:
            if isinstance(segment, str):
                _check_text(segment)
        with _library_errors("tokenizer", UsageError):
            return self._neutralize(segments)

    def split_special(self, text: str) -> list[str | int]:
        """Split text at its special tokens (the leftmost, then the longest) into segments; empty text is left out.

        White space that a token swallows is left out too.
        """
        segments: list[str | int] = []
        end = 0
        for match in self._special_pattern.finditer(text):
            before, token = text[end : match.start()], match[0]
            segments += [before.rstrip() if token in self._backend.takes_space_before else before]
            segments += [self.special_tokens[token]]
            end = match.end()
            if token in self._backend.takes_space_after and (spaces := _SPACES.match(text, end)):
                end = spaces.end()
        return [segment for segment in [*segments, text[end:]] if segment != ""]

    def mark_special(self, text: str, opening: str, closing: str) -> str:
        """Put `opening` and `closing` around each special token in text."""
        return self._special_pattern.sub(lambda match: f"{opening}{match[0]}{closing}", text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without special tokens.

        Raises:
            UsageError: an id is not one of the tokenizer's.
        """
        data = b"".join(map(self.token_bytes, ids))
        if self.strips_leading_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, none for a special one.

        Raises:
            UsageError: the id is not one of the tokenizer's.
        """
        data = self._bytes.get(token_id)
        if data is None:
            if not 0 <= token_id < self.vocab_size:
                raise UsageError(f"tokenizer: there is no token {token_id}: ids run from 0 to {self.vocab_size - 1}")
            data = b"" if token_id in self._special_ids else self._backend.token_bytes(token_id)
            self._bytes[token_id] = data
        return data

    def _encode_plain(self, text: str) -> list[int]:
        ids = self._backend.encode_plain(text)
        return ids if self._never_from_text.isdisjoint(ids) else self._neutralize([text])

    def _neutralize(self, segments: Sequence[str | int]) -> list[int]:
        """Encode segments so that their text gives no special id, by cutting ever more of it into single characters."""
        given = sum(segment in self._never_from_text for segment in segments if isinstance(segment, int))
        everything = re.compile(r"(?s).")
        for pattern in (None, self._special_pattern, everything):
            parts = list(segments) if pattern is None else list(_cut(segments, pattern))
            ids = self._backend.encode_segments(parts)
            if sum(token_id in self._never_from_text for token_id in ids) <= given:
                return ids
        raise UsageError("tokenizer: this tokenizer gives a special token for ordinary text")


def _cut(segments: Sequence[str | int], pattern: re.Pattern[str]) -> Iterator[str | int]:
    """Cut each match in the text of segments into single characters."""
    for segment in segments:
        if isinstance(segment, int):
            yield segment
            continue
        end = 0
        for match in pattern.finditer(segment):
            yield from filter(None, [segment[end : match.start()]])
            yield from match[0]
            end = match.end()
        yield from filter(None, [segment[end:]])


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise UsageError(f"tokenizer: the text is {type(text).__name__}: expected str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"tokenizer: the text is not valid Unicode: lone surrogate at character {error.start}"
        ) from error


@contextlib.contextmanager
def _library_errors(where: str, kind: type[LlmpackError]) -> Iterator[None]:
    """Turn whatever a tokenizer library raises into one of our errors.

    A panic in tokenizers' Rust code arrives as pyo3_runtime.PanicException, which is no Exception but a
    BaseException and cannot be imported.
    """
    try:
        yield
    except (LlmpackError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{where}: the tokenizer library failed: {type(error).__name__}: {error}") from error
