"""Every bound of the server, with its default: one dataclass, from which `llmrun serve --help` and the checks are made."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from llmrun.errors import UsageError
from llmrun.text_stream import MAX_STOP_CHARS, MAX_STOPS


def _limit(default: float, unit: str, text: str) -> Any:
    return field(default=default, metadata={"unit": unit, "help": text})


@dataclass(frozen=True)
class Limits:
    """What one client, and all clients together, may use up. Seconds, bytes or counts; each is an option of the same name."""

    max_body_bytes: int = _limit(2 << 20, "BYTES", "largest request body (413)")
    max_header_bytes: int = _limit(16 << 10, "BYTES", "all headers of a request together (431, or 400)")
    max_headers: int = _limit(64, "N", "headers of a request (431)")
    header_timeout: float = _limit(10, "S", "from the connection to the end of the headers, also between requests")
    body_timeout: float = _limit(30, "S", "from the headers to the end of the body (408)")
    write_timeout: float = _limit(30, "S", "a client that reads nothing for so long is cut off")
    request_timeout: float = _limit(600, "S", "from the body to the end of the answer (408, or an error event)")
    ping_interval: float = _limit(30, "S", "a comment keeps a silent stream open")
    health_timeout: float = _limit(30, "S", "work but no step for so long: /health says stuck")
    drain_timeout: float = _limit(30, "S", "after SIGTERM, for the answers under way")
    max_connections: int = _limit(128, "N", "open connections (more are closed with 503)")
    max_queue: int = _limit(64, "N", "sequences that wait beside those that run (429 with Retry-After)")
    max_choices: int = _limit(8, "N", "`n` of a request")
    max_prompts: int = _limit(64, "N", "prompts in one request to /v1/completions")
    max_messages: int = _limit(1024, "N", "messages of a chat")
    max_top_logprobs: int = _limit(20, "N", "`top_logprobs`, and `logprobs` of /v1/completions")
    max_stops: int = _limit(MAX_STOPS, "N", f"stop strings, each of at most {MAX_STOP_CHARS} characters")
    max_logit_bias: int = _limit(1024, "N", "entries of `logit_bias`")
    max_tools: int = _limit(128, "N", "tools of a request")
    max_schema_bytes: int = _limit(64 << 10, "BYTES", "a JSON schema, grammar or regular expression")
    max_schema_depth: int = _limit(32, "N", "nesting of a JSON schema")
    max_enum: int = _limit(1000, "N", "values of an `enum`, or choices")
    grammar_timeout: float = _limit(5, "S", "to compile a schema, grammar or regular expression")
    max_json_depth: int = _limit(64, "N", "nesting of a request's JSON")

    def __post_init__(self) -> None:
        """Refuse what would bound nothing or everything."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not 0 < value < 1 << 40:
                raise UsageError(f"--{entry.name.replace('_', '-')} {value}: expected a number above 0.")
        if self.max_stops > MAX_STOPS:
            raise UsageError(f"--max-stops {self.max_stops}: expected at most {MAX_STOPS}, the engine's own bound.")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each limit."""
    group = parser.add_argument_group("limits")
    for entry in fields(Limits):
        default, unit = Limits.__dict__[entry.name], entry.metadata["unit"]
        shown = f"{default >> 10} KiB" if unit == "BYTES" else f"{default:g}"
        group.add_argument(
            f"--{entry.name.replace('_', '-')}",
            type=float if unit == "S" else int,
            default=default,
            metavar=unit,
            help=f"{entry.metadata['help']} ({shown})",
        )


def from_arguments(arguments: argparse.Namespace) -> Limits:
    """Return the limits that the user chose."""
    return Limits(**{entry.name: getattr(arguments, entry.name) for entry in fields(Limits)})
