"""Structured output in the interpreter that runs this: python lowest_grammars.py ARTIFACT

For the lowest release of llguidance, beside which there is no pytest. The exit code says whether all is as asked for.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from grammar_walk import line_breaks_allowed, walk

from llmrun.artifact import open_artifact
from llmrun.server.grammar import Grammars
from llmrun.server.limits import Limits
from llmrun.server.tools import ToolForm, call_grammar, find_calls
from llmrun.tokenizer import load_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 1, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["age", "ok"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]
PATTERN = r"[0-9]{3}-[a-z]{2}"


def main(artifact: Path) -> None:
    tokenizer = load_tokenizer(open_artifact(artifact))
    assert tokenizer is not None
    grammars = Grammars(tokenizer, tokenizer.vocab_size + 61, sorted(tokenizer.eos_token_ids), Limits())
    for seed in range(5):
        value = json.loads(walk(grammars, tokenizer, "json", SCHEMA, seed) or "")
        assert set(value) == {"age", "ok"}
        assert re.fullmatch(PATTERN, walk(grammars, tokenizer, "regex", PATTERN, seed) or "")
    form = ToolForm(
        opening="[TOOL_CALLS]", middle="[ARGS]", tag="[TOOL_CALLS]", tokens=(("[TOOL_CALLS]", 1), ("[ARGS]", 0))
    )
    text = walk(grammars, tokenizer, *call_grammar(form, TOOLS, "required", Limits()), 1, shown=form.shown_tokens)
    assert text is not None
    _, (call,) = find_calls(form, TOOLS, text)
    assert set(json.loads(call["function"]["arguments"])) == {"age", "ok"}
    # White space in a call of a tool ends: one line break, not two.
    constraint = grammars.constraint(*call_grammar(ToolForm("parameters"), TOOLS, "required", Limits()))
    assert line_breaks_allowed(constraint, tokenizer, '{"name"') == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
