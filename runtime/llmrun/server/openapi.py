"""The server's OpenAPI document, made from the tables that check the requests."""

from __future__ import annotations

from typing import Any

from llmrun import __version__
from llmrun.server.schemas import Schemas

_ERRORS = {
    "400": "not a request that this server can carry out",
    "401": "no key, or a wrong one",
    "403": "a Host or Origin that is not allowed",
    "404": "no such model",
    "408": "too slow",
    "413": "the body is too large",
    "415": "the body is not application/json",
    "429": "the queue is full",
    "431": "too many headers",
    "500": "the model failed",
    "503": "not ready, or shutting down",
}


def document(schemas: Schemas) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document."""
    error = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                },
            }
        },
    }
    failures = {
        status: {
            "description": text,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        for status, text in _ERRORS.items()
    }

    def get(summary: str, kind: str = "application/json") -> dict[str, Any]:
        good = {"200": {"description": "ok", "content": {kind: {}}}}
        return {"get": {"summary": summary, "responses": {**good, **failures}}}

    def post(summary: str, name: str, kinds: tuple[str, ...] = ("application/json",)) -> dict[str, Any]:
        good = {"200": {"description": "ok", "content": {kind: {} for kind in kinds}}}
        body = {"required": True, "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}}
        return {"post": {"summary": summary, "requestBody": body, "responses": {**good, **failures}}}

    name_in_path = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    streams = ("application/json", "text/event-stream")
    return {
        "openapi": "3.1.0",
        "info": {"title": "llmrun", "version": __version__},
        "paths": {
            "/v1/chat/completions": post("Answer a chat", "Chat", streams),
            "/v1/responses": post("Answer a chat, in items", "Responses", streams),
            "/v1/completions": post("Continue a text", "Completion", streams),
            "/v1/models": get("The model that is served"),
            "/v1/models/{name}": {**get("The model under that name"), "parameters": [name_in_path]},
            "/tokenize": post("Text or messages to token ids", "Tokenize"),
            "/detokenize": post("Token ids to text", "Detokenize"),
            "/version": get("The version"),
            "/health": get("Whether the model answers"),
            "/metrics": get("Numbers for Prometheus", "text/plain"),
            "/openapi.json": get("This document"),
        },
        "components": {
            "schemas": {
                "Error": error,
                "Chat": schemas.chat.schema(),
                "Responses": schemas.responses.schema(),
                "Completion": schemas.completion.schema(),
                "Tokenize": schemas.tokenize.schema(),
                "Detokenize": schemas.detokenize.schema(),
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }
