"""The routes, behind the guard."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import re
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

import llmrun
from llmrun.server import openapi
from llmrun.server.chats import Chats
from llmrun.server.completions import Completions
from llmrun.server.errors import ApiError, bad
from llmrun.server.guard import Access, Guard
from llmrun.server.prompts import chat_ids
from llmrun.server.replies import TokenTexts
from llmrun.server.responses import Json
from llmrun.server.responses_api import Responses
from llmrun.server.service import Service


def make_app(service: Service, access: Access) -> ASGIApp:
    """Return the ASGI application."""
    routes = _Routes(service)
    router = Router(
        [
            Route("/", routes.page),
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
            Route("/version", routes.version),
            Route("/openapi.json", routes.openapi),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/v1/completions", Completions(service), methods=["POST"]),
            Route("/v1/chat/completions", Chats(service), methods=["POST"]),
            Route("/v1/responses", Responses(service), methods=["POST"]),
            Route("/tokenize", routes.tokenize, methods=["POST"]),
            Route("/detokenize", routes.detokenize, methods=["POST"]),
        ],
        redirect_slashes=False,
    )

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = router  # so that it raises what it refuses instead of answering by itself
        try:
            await router(scope, receive, send)
        except HTTPException as error:
            if error.status_code == 404:
                raise ApiError(404, f"there is no {scope['path'][:100]!r}.", code="not_found") from None
            # 405, the only other refusal of a router.
            takes = ", ".join(sorted((error.headers or {})["Allow"].split(", ")))
            raise ApiError(405, f"{scope['path']} takes {takes}.", code="method_not_allowed", allow=takes) from None

    return Guard(route, service.limits, access, service.metrics.responded)


class _Routes:
    """The routes that are one function each."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._page = _read_page()

    async def page(self, _request: Request) -> Response:
        """Send the chat page, which may run its own script and reach this server, and nothing else."""
        if self._page is None:
            raise ApiError(404, "this installation has no page.", code="not_found")
        body, policy = self._page
        headers = {"content-security-policy": policy, "referrer-policy": "no-referrer", "cache-control": "no-cache"}
        return HTMLResponse(body, headers=headers)

    async def health(self, _request: Request) -> Response:
        """Tell whether the model answers."""
        status = self._service.health()
        return Json({"status": status}, 200 if status == "ok" else 503)

    async def version(self, _request: Request) -> Response:
        """Tell the version."""
        return Json({"version": llmrun.__version__})

    async def openapi(self, _request: Request) -> Response:
        """Describe the interface."""
        return Json(openapi.document(self._service.schemas))

    async def models(self, _request: Request) -> Response:
        """List the model, under each of its names."""
        self._service.check_ready()
        return Json({"object": "list", "data": [self._model(name) for name in self._service.names]})

    async def model(self, request: Request) -> Response:
        """Tell of the model under one of its names."""
        name = request.path_params["name"]
        self._service.check_ready()
        self._service.check_model(name)
        return Json(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        service = self._service
        facts = {"object": "model", "created": service.created, "owned_by": "llmrun"}
        return {"id": name, **facts, "max_model_len": service.engine.max_seq_len}

    async def metrics(self, _request: Request) -> Response:
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
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def tokenize(self, request: Request) -> Response:
        """Turn text or messages into token ids."""
        service = self._service
        body, headers = await service.read(request.scope, request.receive, service.schemas.tokenize)
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
                return chat_ids(
                    tokenizer,
                    given["messages"],
                    max_depth=service.limits.max_json_depth,
                    add_generation_prompt=wants_prompt,
                    chat_template_kwargs=service.template_kwargs(given.get("chat_template_kwargs", {})),
                )
            wants_bos = None if given.get("add_special_tokens", True) else False
            return tokenizer.encode(given["prompt"], add_bos=wants_bos)

        ids = await service.in_thread(work)
        value: dict[str, Any] = {"count": len(ids), "max_model_len": service.engine.max_seq_len, "tokens": ids}
        if given.get("return_token_strs"):
            texts = TokenTexts(tokenizer)
            value["token_strs"] = [texts.text(i) for i in ids]
        return Json(value, headers=headers)

    async def detokenize(self, request: Request) -> Response:
        """Turn token ids into text."""
        service = self._service
        body, headers = await service.read(request.scope, request.receive, service.schemas.detokenize)
        given = service.schemas.detokenize.check(body, "")
        service.check_model(given.get("model"))
        tokenizer = service.engine.tokenizer
        if tokenizer is None:
            raise bad("this artifact has no tokenizer.")
        text = await service.in_thread(lambda: tokenizer.decode(given["tokens"]))
        return Json({"prompt": text}, headers=headers)


def _read_page() -> tuple[bytes, str] | None:
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
    return body, policy
