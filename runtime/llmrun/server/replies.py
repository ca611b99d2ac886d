"""OpenAI's objects: log-probabilities, usage, and the frames of a stream."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from starlette.types import Send

from llmrun import console
from llmrun.logprobs import TokenLogprobs
from llmrun.server.errors import ApiError, as_api_error
from llmrun.server.guard import ClientGoneError
from llmrun.server.tasks import Choice
from llmrun.text_stream import TextStream
from llmrun.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
_LINE_ENDS = re.compile("[\x85\u2028\u2029]")  # JSON has escapes for those of ASCII
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def frame(value: Any) -> bytes:
    """Return one event of a stream."""
    return b"data: " + one_line(value) + b"\n\n"


def one_line(value: Any) -> bytes:
    """Return a value's JSON without what some client takes for the end of a line (httpx: also Unicode's)."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return _LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode("utf-8", "replace")


class Stream:
    """A response of server-sent events, which begins and ends with a context; an error in that is its last event."""

    def __init__(
        self, send: Send, headers: Mapping[str, str], failure: Callable[[ApiError], bytes] | None = None
    ) -> None:
        """`failure`: returns the event of an error."""
        self._send, self._failure = send, failure or (lambda error: frame(error.body()))
        self._headers = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __aenter__(self) -> Stream:
        """Send the status."""
        headers = [*_STREAM_HEADERS, *self._headers]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _t: TracebackType | None
    ) -> bool:
        """Tell what went wrong, and end the response; a client that has left hears nothing."""
        if isinstance(error, ClientGoneError) or not isinstance(error, Exception | None):
            return False
        if error is not None:
            await self.write(self._failure(_report(error)))
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        return True

    async def write(self, data: bytes) -> None:
        """Send frames; waits while the client does not read."""
        if data:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})


def _report(error: Exception) -> ApiError:
    """Return an error for an event; a bug of ours goes to the log as well."""
    known = as_api_error(error)
    if known.status >= 500 and known is not error:
        console.show_traceback(error)
        console.say(console.error_line(error))
    return known


def usage(choices: Sequence[Choice], *, num_thought: int | None = None) -> dict[str, Any]:
    """Return the tokens of a request; a prompt counts once, however many answers it has.

    Args:
        choices: the answers.
        num_thought: how many tokens were the model's thoughts; None: it has none.
    """
    prompts = {choice.prompt_index: choice.num_prompt for choice in choices}
    cached = {c.prompt_index: c.ticket.request.num_cached_prompt for c in reversed(choices) if c.ticket is not None}
    generated = sum(choice.num_generated for choice in choices)
    numbers: dict[str, Any] = {
        "prompt_tokens": sum(prompts.values()),
        "completion_tokens": generated,
        "total_tokens": sum(prompts.values()) + generated,
        "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
    }
    if num_thought is not None:
        numbers["completion_tokens_details"] = {"reasoning_tokens": num_thought}
    return numbers


class TokenTexts:
    """Token ids as OpenAI's log-probabilities show them."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._special = {} if tokenizer is None else {i: text for text, i in tokenizer.special_tokens.items()}

    def data(self, token_id: int) -> bytes:
        """Return a token's bytes; those of a special token's name, or of `token_id:N` where there is no text."""
        if token_id in self._special:
            return self._special[token_id].encode()
        if self._tokenizer is None or token_id >= self._tokenizer.vocab_size:
            return f"token_id:{token_id}".encode()
        return self._tokenizer.token_bytes(token_id)

    def text(self, token_id: int) -> str:
        """Return a token's text, or `bytes:` and its bytes if they are not characters."""
        data = self.data(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def chat(self, entries: Sequence[TokenLogprobs], num_top: int) -> dict[str, Any]:
        """Return `logprobs` of a chat's choice."""
        content = []
        for entry in entries:
            top = [self._chat_entry(i, logprob) for i, logprob in entry.top[:num_top]]
            content.append({**self._chat_entry(entry.token_id, entry.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def offsets(self, *, is_continuation: bool) -> TextOffsets:
        """Return a count of characters, for the tokens of one choice."""
        return TextOffsets(self._tokenizer, is_continuation=is_continuation)

    def completion(
        self, entries: Sequence[TokenLogprobs | None], ids: Sequence[int], offsets: TextOffsets
    ) -> dict[str, Any]:
        """Return `logprobs` of a completion's choice.

        Args:
            entries: one for each id; None: nothing is known (the first token of a prompt).
            ids: the tokens.
            offsets: where the choice's text has got to; counts these tokens.
        """
        result: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, entry in zip(ids, entries, strict=True):
            result["tokens"].append(self.text(token_id))
            result["token_logprobs"].append(None if entry is None else _finite(entry.logprob))
            # OpenAI's dictionary holds the token itself too; of two tokens with one text the likelier stays.
            top: dict[str, float] = {}
            for i, logprob in [] if entry is None else [*entry.top, (entry.token_id, entry.logprob)]:
                name = self.text(i)
                top[name] = max(top.get(name, -9999.0), _finite(logprob))
            result["top_logprobs"].append(top if entry is not None else None)
            result["text_offset"].append(offsets.place(token_id))
        return result

    def _chat_entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self.data(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}


class TextOffsets:
    """Where in a choice's text each token begins, in characters; one that goes on with a character: where that ends.

    Counted from the tokens, not from the text of events, which holds back what may be a stop string.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, is_continuation: bool) -> None:
        """`is_continuation`: the tokens go on after other text, so a space at their beginning counts."""
        self._stream = None if tokenizer is None else TextStream(tokenizer, is_continuation=is_continuation)
        self._vocab_size = 0 if tokenizer is None else tokenizer.vocab_size
        self.offset = 0

    def place(self, token_id: int) -> int:
        """Return where the next token begins."""
        offset = self.offset
        if self._stream is not None and token_id < self._vocab_size:
            self.offset += len(self._stream.push(token_id))
        return offset


def _finite(logprob: float) -> float:
    """Return what JSON can hold; OpenAI writes -9999 for impossible."""
    return max(logprob, -9999.0)
