"""A server of OpenAI's chat protocol that plays parts of a text, for the tests of the chat page: no model behind it.

The last message chooses the part: `PARTS`. What was asked is kept in `requests`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "runtime" / "llmrun" / "page" / "index.html"
HOSTILE = """\
# <script>window.hacked = 1</script>

<img src=x onerror="window.hacked = 2"> <svg onload="window.hacked = 3"> <iframe src="javascript:window.hacked = 4"></iframe>

[one](javascript:window.hacked=5) [two](data:text/html,<script>window.hacked=6</script>) [three](vbscript:x)
[four](JaVaScRiPt:window.hacked=7) <javascript:window.hacked=8> ![five](javascript:window.hacked=9)
[good](https://example.org/a_(b)?c=1) and https://example.org/bare. <a href="javascript:window.hacked=10">x</a>
[six](https://example.org"onclick="window.hacked=11) [![seven](x)](javascript:window.hacked=12)

```"><script>window.hacked = 13</script>
</code></pre><script>window.hacked = 14</script>
```

| <img src=x onerror="window.hacked=15"> | b |
|---|---|
| [eight](javascript:window.hacked=16) | `<b>` |
"""
MARKDOWN = """\
## Two ways

A **bold** word, an *italic* one, ~~gone~~, `code`, snake_case_name and 2 * 3 * 4.
**Both
lines** and a break  
here.

1. first
2. second
   - nested **one**
   - nested two

   with a paragraph

> quoted
> > twice

| name | size |
|:-----|-----:|
| a \\| b | 12 |

```python
if a < b:
    print("**not bold**")
```

---
Done.
"""
NASTY = (
    "[" * 5000
    + "*" * 5000
    + "`" * 4999
    + " ``x" * 1000
    + "![" * 3000
    + "_a" * 4000
    + "\n"
    + "> " * 3000
    + "x\n"
    + "|" * 4000
)


def content_security_policy(page: bytes) -> str:
    """Return a policy that admits the page's own script and style by digest, its own server, and nothing else."""

    def digests(element: str) -> str:
        texts = re.findall(f"<{element}>(.*?)</{element}>".encode(), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in texts)

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Server(ThreadingHTTPServer):
    """Listens on a free port of the loopback."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.broken_pipes = 0
        self.key: str | None = None
        self.prefix = ""  # as a proxy puts before every path
        self.model = "demo-q4-tp2"  # none: it is being loaded
        self.refusals: list[tuple[Any, ...]] = []  # answers to come: status, message, perhaps a code
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{self.prefix}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        path = self.path.removeprefix(self.server.prefix) if self.path.startswith(self.server.prefix) else ""
        if path == "/":
            body = PAGE.read_bytes()
            headers = {"Content-Security-Policy": content_security_policy(body)}
            self._send(200, body, "text/html; charset=utf-8", headers)
        elif path == "/v1/models" and self._is_allowed():
            if self._is_loaded():
                self._send_json(200, {"object": "list", "data": [{"id": self.server.model, "object": "model"}]})
        elif path != "/v1/models":
            self._send_json(404, {"error": {"message": "not here"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != f"{self.server.prefix}/v1/chat/completions":
            self._send_json(404, {"error": {"message": "not here"}})
            return
        if not self._is_allowed():
            return
        self.server.requests.append(body)
        if self.server.refusals:
            status, message, *code = self.server.refusals.pop(0)
            error = {"message": message, "code": code[0] if code else None}
            self._send_json(status, {"error": error}, {"Retry-After": "7"})
            return
        if not self._is_loaded():
            return
        if body["model"] != self.server.model:
            message = f"the model {body['model']!r} does not exist: this is {self.server.model}."
            self._send_json(404, {"error": {"message": message}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self._play(body["messages"][-1]["content"])
        except (BrokenPipeError, ConnectionResetError):
            self.server.broken_pipes += 1

    def _play(self, part: str) -> None:
        self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], "usage": None})
        if part == "slow":
            for i in range(2000):
                self._text(f"word{i} ")
                time.sleep(0.02)
        elif part == "die":
            self._text("so far ")
            self._event({"error": {"message": "rank 1 (pid 4711) is gone; the job has ended.", "code": "E601"}})
            return
        elif part in ("think", "think on"):
            for text in ("It is ", "<b>late</b>.\n", "So?"):
                self._text(text, "reasoning_content")
            for text in ("Good ", "night.") if part == "think" else ():
                self._text(text)
        elif part == "break off":
            self._text("so far ")
            return
        else:
            text = {"hostile": HOSTILE, "markdown": MARKDOWN, "nasty": NASTY}.get(part, "You said: " + part)
            step = 7 if len(text) < 5000 else 4000
            for i in range(0, len(text), step):
                self._text(text[i : i + step])
                time.sleep(0.01)  # as an engine's steps do: what comes all at once has no speed to tell
        self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": None})
        self._event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 20, "total_tokens": 23}})
        self._write(b"data: [DONE]\n\n")

    def _text(self, text: str, field: str = "content") -> None:
        self._event({"choices": [{"index": 0, "delta": {field: text}, "finish_reason": None}], "usage": None})

    def _event(self, event: dict[str, Any]) -> None:
        data = f": ping\n\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
        half = len(data) * 2 // 3  # may cut a character: streams are cut anywhere
        self._write(data[:half])
        self._write(data[half:])

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def _is_allowed(self) -> bool:
        if self.server.key is None or self.headers.get("Authorization") == f"Bearer {self.server.key}":
            return True
        self._send_json(401, {"error": {"message": "no key"}})
        return False

    def _is_loaded(self) -> bool:
        if not self.server.model:
            self._send_json(503, {"error": {"message": "the model is being loaded."}})
        return bool(self.server.model)

    def _send_json(self, status: int, value: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", headers or {})

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
