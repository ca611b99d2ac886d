"""What a chat template may have: tags beside Jinja's own, those of transformers' `apply_chat_template`, and filters.

Out: extensions for a Jinja environment, and names. The packager, which parses a template, and the runtime, which renders
it, take them from here, so that what was packed can be rendered. jinja2 is imported when they are asked for.
"""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["FILTERS", "template_extensions"]

# Jinja's filters without those that build much from little, reach attributes by name, or have no business in
# a prompt.
FILTERS = frozenset(
    (
        *("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby"),
        *("indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject"),
        *("rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "title"),
        *("tojson", "trim", "truncate", "unique", "upper"),
    )
)


@functools.cache
def template_extensions() -> tuple[Any, ...]:
    """Return loop controls, and `{% generation %}...{% endgeneration %}`, which stands for what it encloses.

    With it transformers marks the model's own part of a conversation, for training. There its body is a macro:
    what is set inside is not seen outside.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    return "jinja2.ext.loopcontrols", Generation
