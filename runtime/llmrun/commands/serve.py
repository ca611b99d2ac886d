"""Serve the model over HTTP, as OpenAI's API does.

Rank 0 listens, the others compute with it. Needs `pip install 'llmpack[serve]'`.
"""

from __future__ import annotations

import argparse
import atexit
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmrun import console, stdin
from llmrun.commands import common
from llmrun.errors import IncompatibleError, UsageError
from llmrun.job_options import JobOptions
from llmrun.server import limits as limits_of_server
from llmrun.thoughts import REASONING_FORMATS

if TYPE_CHECKING:
    from llmrun.engine import Engine
    from llmrun.failstop import Signals
    from llmrun.server.http_thread import HttpThread
    from llmrun.server.service import Service

DEFAULT_PORT = 8000
KEY_VARIABLE = "LLMRUN_API_KEY"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_FORMS = {  # of options whose other values would match no request, or no reader of /metrics, without a word
    "--served-model-name": (r".+", "a name"),
    "--allowed-host": (
        r"\[[0-9a-fA-F:.]+\]|[^\s:@/\[\]*]+(?<!\.)",
        "one name or [address], without scheme, port, * and a dot at the end",
    ),
    "--cors-origin": (
        r"\*|null|(?!https://.*:443$)(?!http://.*:80$)[a-z][a-z0-9+.-]*://[^\sA-Z@/?#*]+",
        "https://host or https://host:port as browsers send it: lower case, no path, no port that is the default; or *",
    ),
    "--metrics-prefix": (r"[a-zA-Z_:][a-zA-Z0-9_:]*", "letters, digits, _ and :"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    common.add_artifact(parser)
    group = parser.add_argument_group("listening")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="listen on ADDRESS (127.0.0.1)")
    group.add_argument("--port", type=int, default=DEFAULT_PORT, metavar="N", help="0: any free one (8000)")
    group.add_argument(
        "--served-model-name",
        type=common.text_of("--served-model-name"),
        action="append",
        metavar="NAME",
        help="the model's name (the directory's); repeatable",
    )
    group.add_argument("--api-key", metavar="KEY", help=f"ask for KEY; better: --api-key-file, or {KEY_VARIABLE}")
    group.add_argument("--api-key-file", metavar="FILE", help="ask for one of the keys in FILE, one a line")
    group.add_argument("--allow-unauthenticated", action="store_true", help="beyond loopback without a key")
    group.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="a Host to answer; repeatable"
    )
    group.add_argument(
        "--cors-origin", action="append", default=[], metavar="URL", help="an origin whose pages may ask; repeatable"
    )
    group.add_argument(
        "--max-num-seqs",
        type=int,
        default=JobOptions.max_num_seqs,
        metavar="N",
        help="sequences that run together (%(default)s)",
    )
    common.add_template_option(group)
    group.add_argument(
        "--reasoning-format",
        choices=REASONING_FORMATS,
        default=REASONING_FORMATS[0],
        help="what a model thinks first: as reasoning_content, or none: within the text (%(default)s)",
    )
    group.add_argument("--metrics-prefix", default="vllm", metavar="NAME", help="of the names in /metrics (vllm)")
    limits_of_server.add_options(parser)
    common.add_engine_options(parser, speculates=True)


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; both let the answers under way finish."""
    if missing := [name for name in ("uvicorn", "starlette", "llguidance") if importlib.util.find_spec(name) is None]:
        raise IncompatibleError(f"{missing[0]} is not installed: `pip install 'llmpack[serve]'`.", code="E417")
    command = _Serve(arguments)
    work = common.RankWork(command.serve, command.prepare, drains=True)
    atexit.register(command.end)  # before anything else is, and so called last: MPI has been left by then
    command.code = common.run_on_ranks(arguments, work)
    return command.code


class _Serve:
    code: int | None = None  # the process's, once the job has ended in order

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._limits = limits_of_server.from_arguments(arguments)
        if not 0 <= arguments.port < 1 << 16:
            raise UsageError(f"--port {arguments.port}: expected 0 to 65535.")
        for option, (form, expected) in _FORMS.items():
            given = getattr(arguments, option[2:].replace("-", "_"))
            for value in [given] if isinstance(given, str) else given or []:
                if not re.fullmatch(form, value):
                    raise UsageError(f"{option} {value}: expected {expected}.")
        self._service: Service | None = None
        self._http: HttpThread | None = None

    def prepare(self, engine: Engine) -> None:
        """Listen, before the weights are read: a taken port is known at once, and /health says "loading"."""
        from llmrun import failstop
        from llmrun.server.app import make_app
        from llmrun.server.guard import LOOPBACK, Access
        from llmrun.server.http_thread import HttpThread, listen
        from llmrun.server.service import Service

        arguments = self._arguments
        keys = _read_keys(arguments)  # on rank 0 alone: a pipe can be read but once
        is_loopback = arguments.host in _LOOPBACK
        if not (is_loopback or keys or arguments.allow_unauthenticated):
            raise UsageError(
                f"--host {arguments.host} is open to others: give --api-key-file, or --allow-unauthenticated."
            )
        names = arguments.served_model_name or [Path(os.path.abspath(arguments.artifact)).name]
        allowed = frozenset(name.lower() for name in arguments.allowed_host)
        hosts = LOOPBACK | allowed if is_loopback or allowed else None
        access = Access(keys, hosts, tuple(arguments.cors_origin))
        self._service = Service(
            self._limits,
            names,
            arguments.metrics_prefix,
            arguments.max_num_seqs,
            arguments.chat_template_kwargs,
            arguments.reasoning_format,
        )
        sock = listen(arguments.host, arguments.port)
        self._http = HttpThread(make_app(self._service, access), self._service, sock)
        failstop.before_leaving(self._service.last_words)

    def serve(self, engine: Engine, signals: Signals) -> int:
        """Answer until told to end."""
        service, http = self._service, self._http
        assert service is not None
        assert http is not None
        with signals.draining(service.drain, self._limits.drain_timeout):
            try:
                service.attach(engine)
            except BaseException:
                service.drain()
                raise
            host, port = http.address
            shown = f"[{host}]" if ":" in host else host
            console.say(f"llmrun: serving {service.model_name} on http://{shown}:{port}")
            http.join()
            service.loop.close()
        if service.failure is not None:
            raise service.failure
        return 0

    def end(self) -> None:
        """Leave a thread that still compiles or parses where it is: it might meet an interpreter half taken down."""
        if self.code is not None and self._service is not None and self._service.is_busy:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
            os._exit(self.code)


def _read_keys(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return the keys of the command line, the environment and the file."""
    keys = [key for key in (arguments.api_key, os.environ.get(KEY_VARIABLE)) if key is not None]
    if arguments.api_key_file is not None:
        lines = stdin.decode_utf8(stdin.read_file(arguments.api_key_file), arguments.api_key_file).splitlines()
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise UsageError(f"{arguments.api_key_file}: holds no key.", code="E209")
        keys += found
    if any(not key.strip() or not (key.isascii() and key.isprintable()) for key in keys):
        raise UsageError("an API key is empty or holds a character that a header cannot: expected printable ASCII.")
    return tuple(keys)
