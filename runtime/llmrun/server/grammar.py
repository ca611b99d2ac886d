"""Structured output: a JSON schema, regular expression, list of choices or grammar, as a constraint on tokens (llguidance).

Sources come from clients. They are bounded before they are compiled (size, depth, enum), compiled away from the
engine's thread, on a stack that the longest chain of references has room on, and the library's own limits bound what
they may use up at each token. A constraint that fails then ends its own request with an error and nothing else.
"""

from __future__ import annotations

import collections
import concurrent.futures
import importlib.util
import json
import re
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmrun.errors import UsageError
from llmrun.server.errors import ApiError, bad
from llmrun.server.json_body import json_at, parse_json
from llmrun.server.json_schema import checked_schema
from llmrun.server.limits import Limits

if TYPE_CHECKING:
    from llmrun.tokenizer import Tokenizer

CACHE_ENTRIES = 32
_MAX_LEXER_STATES = 10_000  # 1 to 2 kB each
# Between the tokens of JSON: a space, or a line break and its indentation. Without a bound a weak model never stops.
JSON_OPTIONS: Any = {"whitespace_pattern": r"(\n[ \t]{0,24}| )?"}
# The library descends a chain of references recursively: 3.3 kB a link were measured, and a link has 6 bytes or more.
_STACK_BYTES_A_BYTE = 4096
_LEAST_STACK_BYTES, _MOST_STACK_BYTES = 8 << 20, 4 << 30
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+\s*::=", re.MULTILINE)
_JSON_IN_LARK = re.compile(r"%json\s*")
_Result = TypeVar("_Result")


def lenient(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema of which a grammar leaves out what it cannot express."""
    return {**schema, "x-guidance": JSON_OPTIONS | {"lenient": True}}


def is_available() -> bool:
    """Tell whether llguidance is installed."""
    return importlib.util.find_spec("llguidance") is not None


class Grammars:
    """Compiles sources for one tokenizer, and remembers the last ones. May be used from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int], limits: Limits) -> None:
        """`vocab_size`: the model's, of which the tokenizer may know fewer."""
        self._tokenizer, self._vocab_size, self._eos, self._limits = tokenizer, vocab_size, list(eos_token_ids), limits
        self._lock = threading.Lock()  # of what is remembered
        self._compiling = threading.Lock()
        self._library_tokenizer: Any = None
        self._compiled: collections.OrderedDict[str, Any] = collections.OrderedDict()

    def constraint(self, kind: str, source: Any) -> TokenConstraint:
        """Return a new constraint; compiles the source unless it is remembered.

        Args:
            kind: "json" (a schema, or its text), "regex", "choice" (a list of texts) or "grammar" (Lark, or GBNF).
            source: what the request holds.
        Raises:
            ApiError: 400, with what is wrong with the source.
        """
        key = _key(kind, source)
        base = self._remembered(key)
        if base is None:
            with self._compiling:
                base = self._remembered(key)  # by another thread, meanwhile
                if base is None:
                    stack_bytes = _STACK_BYTES_A_BYTE * self._limits.max_schema_bytes
                    base = _on_deep_stack(lambda: self._compile(self._grammar(kind, source)), stack_bytes)
                    self._remember(key, base)
        return TokenConstraint(base.deep_copy(), self._vocab_size)

    def is_remembered(self, kind: str, source: Any) -> bool:
        """Tell whether `constraint` need not compile the source, and not wait for those that are compiled."""
        return self._remembered(_key(kind, source)) is not None

    def _remembered(self, key: str) -> Any:
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
            return self._compiled.get(key)

    def _remember(self, key: str, base: Any) -> None:
        with self._lock:
            self._compiled[key] = base
            if len(self._compiled) > CACHE_ENTRIES:
                self._compiled.popitem(last=False)

    def _grammar(self, kind: str, source: Any) -> str:
        if not is_available():
            raise bad(
                "structured output needs llguidance: `pip install 'llmpack[serve]'` on the server.", "response_format"
            )
        from llguidance import LLMatcher

        try:
            if kind == "json":
                return LLMatcher.grammar_from_json_schema(
                    json.dumps(self._checked_schema(source)), defaults=JSON_OPTIONS
                )
            if kind == "regex":
                return LLMatcher.grammar_from_regex(source)
            if kind == "choice":
                text = "|".join(map(_escape, source))
                if len(text) > self._limits.max_schema_bytes:
                    raise bad(f"the choices are larger than {self._limits.max_schema_bytes} bytes.", "response_format")
                return LLMatcher.grammar_from_regex(text)
            return LLMatcher.grammar_from_lark(self._checked_lark(_lark(source)))
        except ApiError:
            raise
        except Exception as error:
            raise _refused(str(error)) from None

    def _checked_schema(self, source: Any) -> Any:
        limits = self._limits
        if isinstance(source, str):
            source = parse_json(source.encode(), max_depth=limits.max_schema_depth)
        return checked_schema(source, limits)

    def _checked_lark(self, source: str) -> str:
        """Return a grammar with the schemas in it, which stand after `%json`, checked as others are."""
        pieces, at = [], 0
        for match in _JSON_IN_LARK.finditer(source):
            if match.start() < at:  # within a schema
                continue
            try:
                schema, end = json_at(source, match.end(), max_depth=self._limits.max_schema_depth)
            except ApiError as error:
                raise _refused(f"%json: {error.message}") from None
            pieces += [source[at : match.end()], json.dumps(checked_schema(schema, self._limits))]
            at = end
        return "".join([*pieces, source[at:]])

    def _compile(self, grammar: str) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        if self._library_tokenizer is None:
            self._library_tokenizer = self._make_tokenizer()
        bounds = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        try:
            matcher = LLMatcher(self._library_tokenizer, grammar, log_level=0, limits=bounds)
            begun = matcher.deep_copy()
            begun.compute_bitmask()  # what is only found out while it runs is better found out here
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise _refused("the library failed on it") from None
        if matcher.is_error():
            raise _refused(matcher.get_error())
        if begun.is_error():
            raise _refused(f"it cannot begin: {begun.get_error()}")
        return matcher

    def _make_tokenizer(self) -> Any:
        from llguidance import LLTokenizer, TokenizerWrapper

        tokenizer = self._tokenizer
        special = sorted(tokenizer.special_tokens.values())
        names = {token_id: text.encode() for text, token_id in tokenizer.special_tokens.items()}
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else next(iter(special), None)

        class Vocabulary:
            eos_token_id = self._eos[0] if self._eos else 0
            bos_token_id = tokenizer.bos_token_id
            special_token_ids = special
            tokens = tuple(
                names.get(i) or (tokenizer.token_bytes(i) if i < tokenizer.vocab_size else b"")
                for i in range(self._vocab_size)
            )

            def __call__(self, data: bytes | str) -> list[int]:
                text = data.decode("utf-8", "replace") if isinstance(data, bytes) else data
                # After another token, because the answer goes on after a prompt: no prefix space.
                return tokenizer.encode_segments([text] if first is None else [first, text])[
                    0 if first is None else 1 :
                ]

        return LLTokenizer(TokenizerWrapper(Vocabulary()), n_vocab=self._vocab_size, eos_token=self._eos or None)


class TokenConstraint:
    """One request's place in a grammar (`llmrun.constraint.Constraint`)."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros((1, -(-vocab_size // 32)), np.int32)

    def mask(self, tokens: Sequence[int]) -> NDArray[Any]:
        """Return the tokens that may follow, as bits.

        Raises:
            UsageError: the grammar has become too complex here.
        """
        from llguidance.numpy import fill_next_token_bitmask

        try:
            fill_next_token_bitmask(self._matcher, self._bits, 0)
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise UsageError("the grammar library failed") from None
        if self._matcher.is_error():
            raise UsageError(f"the grammar cannot go on: {_gist(self._matcher.get_error())}")
        return self._bits[0]

    def accept(self, token_id: int) -> None:
        """Take the token that was sampled.

        Raises:
            UsageError: the grammar has become too complex here.
        """
        if not self._matcher.consume_token(token_id):
            raise UsageError(f"the grammar cannot go on: {_gist(self._matcher.get_error())}")

    @property
    def is_done(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped()


def _on_deep_stack(work: Callable[[], _Result], stack_bytes: int) -> _Result:
    """Return what work gives on a thread with such a stack, of which it takes what it touches."""
    outcome: concurrent.futures.Future[_Result] = concurrent.futures.Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="grammar", daemon=True)
    previous = threading.stack_size(min(max(stack_bytes, _LEAST_STACK_BYTES), _MOST_STACK_BYTES))
    try:
        thread.start()
    finally:
        threading.stack_size(previous)
    thread.join()
    return outcome.result()


def _key(kind: str, source: Any) -> str:
    # Of what came, not of what is made of it: converting GBNF alone can take seconds.
    return json.dumps([kind, source])


def _lark(source: str) -> str:
    """Return a grammar as Lark; llama.cpp's GBNF is told by a line that begins with a name and `::=`."""
    if not _GBNF_RULE.search(source):
        return source
    from llguidance.gbnf_to_lark import gbnf_to_lark

    return gbnf_to_lark(source)


def _escape(text: str) -> str:
    # Not "<" and ">": with a backslash they are the beginning and the end of a word.
    return re.sub(r"([\\.+*?()|\[\]{}^$#&\-~/\"@])", r"\\\1", text)


def _refused(why: str) -> ApiError:
    return bad(f"the schema or grammar is refused: {_gist(why)}.", "response_format", "invalid_grammar")


def _gist(text: str) -> str:
    """Return what a message of the library says: of a regular expression it shows the place first."""
    lines = text.strip().splitlines() or ["unknown error"]
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return told[:300].rstrip(".")


def _is_panic(error: BaseException) -> bool:
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
