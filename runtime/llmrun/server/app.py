"""The routes: a dictionary from path and method to a handler, behind the guard."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
from collections.abc import Awaitable, Callable
from typing import Any

import llmrun
from llmrun.server import openapi
from llmrun.server.chats import Chats
from llmrun.server.completions import Completions
from llmrun.server.errors import ApiError, bad
from llmrun.server.guard import Access, App, Guard, Receive, Scope, Send, send_bytes, send_json
from llmrun.server.prompts import chat_ids
from llmrun.server.replies import TokenTexts
from llmrun.server.service import Service

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]


def make_app(service: Service, access: Access) -> App:
    """Return the ASGI application."""
    routes = _Routes(service)
    table: dict[str, dict[str, Handler]] = {
        "/": {"GET": routes.page},
        "/health": {"GET": routes.health},
        "/metrics": {"GET": routes.metrics},
        "/version": {"GET": routes.version},
        "/openapi.json": {"GET": routes.openapi},
        "/v1/models": {"GET": routes.models},
        "/v1/completions": {"POST": Completions(service)},
        "/v1/chat/completions": {"POST": Chats(service)},
        "/tokenize": {"POST": routes.tokenize},
        "/detokenize": {"POST": routes.detokenize},
    }

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        handlers = table.get(scope["path"])
        if handlers is None:
            raise ApiError(404, f"there is no {scope['path'][:100]!r}.", code="not_found")
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if method not in handlers:
            raise ApiError(405, f"{scope['path']} takes {', '.join(handlers)}.", code="method_not_allowed")
        await handlers[method](scope, receive, send)

    return Guard(route, service.limits, access, service.metrics.responded)


class _Routes:
    """The routes that are one function each."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._page = _read_page()

    async def page(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Send the chat page, which may run its own script and reach this server, and nothing else."""
        if self._page is None:
            raise ApiError(404, "this installation has no page.", code="not_found")
        body, policy = self._page
        headers = [
            (b"content-security-policy", policy),
            (b"referrer-policy", b"no-referrer"),
            (b"cache-control", b"no-cache"),
        ]
        await send_bytes(send, 200, body, headers, b"text/html; charset=utf-8")

    async def health(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Tell whether the model answers."""
        status = self._service.health()
        await send_json(send, {"status": status}, status=200 if status == "ok" else 503)

    async def version(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Tell the version."""
        await send_json(send, {"version": llmrun.__version__})

    async def openapi(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Describe the interface."""
        await send_json(send, openapi.document(self._service.schemas))

    async def models(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """List the model, under each of its names."""
        service = self._service
        service.check_ready()
        facts = {"object": "model", "created": service.created, "owned_by": "llmrun"}
        names = [{"id": name, **facts, "max_model_len": service.engine.max_seq_len} for name in service.names]
        await send_json(send, {"object": "list", "data": names})

    async def metrics(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        """Send the numbers."""
        service = self._service
        service.check_ready()
        stats = service.loop.stats()
        gauges = {
            "num_requests_running": (stats.running, "Sequences that run."),
            "num_requests_waiting": (stats.waiting, "Sequences that wait."),
            "kv_cache_usage_perc": (
                stats.kv_blocks_used / max(stats.kv_blocks_total, 1),
                "Used share of the cache, 0 to 1.",
            ),
        }
        counters = {
            "prompt_tokens_total": (stats.prompt_tokens, "Prompt tokens computed."),
            "generation_tokens_total": (stats.generated_tokens, "Tokens sampled."),
            "num_preemptions_total": (stats.preemptions, "Sequences that lost their cache and began again."),
            "prefix_cache_queries_total": (stats.prefix_queries, "Prompt tokens looked for in the cache."),
            "prefix_cache_hits_total": (stats.prefix_hits, "Prompt tokens found in the cache."),
            "spec_decode_num_draft_tokens_total": (stats.draft_tokens, "Tokens proposed by speculation."),
            "spec_decode_num_accepted_tokens_total": (stats.accepted_tokens, "Proposed tokens that were right."),
            "engine_steps_total": (stats.steps, "Steps of the engine."),
        }
        text = service.metrics.text(gauges, counters)  # type: ignore[arg-type]
        await send_bytes(send, 200, text.encode(), kind=b"text/plain; version=0.0.4; charset=utf-8")

    async def tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Turn text or messages into token ids."""
        service = self._service
        body, headers = await service.read(scope, receive, service.schemas.tokenize)
        given = service.schemas.tokenize.check(body, "")
        service.check_model(given.get("model"))
        tokenizer = service.engine.tokenizer
        if tokenizer is None:
            raise bad("this artifact has no tokenizer.")
        if ("prompt" in given) == ("messages" in given):
            raise bad("give either prompt or messages.", "prompt")

        def work() -> list[int]:
            if "messages" in given:
                wants_prompt = given.get("add_generation_prompt", True)
                return chat_ids(tokenizer, given["messages"], add_generation_prompt=wants_prompt)
            wants_bos = None if given.get("add_special_tokens", True) else False
            return tokenizer.encode(given["prompt"], add_bos=wants_bos)

        ids = await service.in_thread(work)
        value: dict[str, Any] = {"count": len(ids), "max_model_len": service.engine.max_seq_len, "tokens": ids}
        if given.get("return_token_strs"):
            texts = TokenTexts(tokenizer)
            value["token_strs"] = [texts.text(i) for i in ids]
        await send_json(send, value, headers)

    async def detokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Turn token ids into text."""
        service = self._service
        body, headers = await service.read(scope, receive, service.schemas.detokenize)
        given = service.schemas.detokenize.check(body, "")
        service.check_model(given.get("model"))
        tokenizer = service.engine.tokenizer
        if tokenizer is None:
            raise bad("this artifact has no tokenizer.")
        text = await service.in_thread(lambda: tokenizer.decode(given["tokens"]))
        await send_json(send, {"prompt": text}, headers)


def _read_page() -> tuple[bytes, bytes] | None:
    """Return the chat page, and the policy that allows exactly the scripts and styles written in it."""
    try:
        body = importlib.resources.files("llmrun").joinpath("page", "index.html").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    sources = {}
    for tag in (b"script", b"style"):
        found = re.findall(rb"<%s(?:\s[^>]*)?>(.*?)</%s>" % (tag, tag), body, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in found]
        sources[tag.decode()] = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    policy = (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return body, policy.encode()
