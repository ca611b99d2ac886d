"""Forms of calls, and tools, for the tests of both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmrun.server.tools import ToolForm

LLAMA = ToolForm("parameters")
HERMES = ToolForm("arguments", "<tool_call>\n", "\n</tool_call>", tag="<tool_call>")
CODER = replace(HERMES, is_spelled=True)
GLM = replace(HERMES, is_glm=True)
# The ids are the demo's <unk>, <s> and </s>, which no text gives.
MISTRAL = ToolForm("arguments", "[TOOL_CALLS] [", "]", tag="[TOOL_CALLS]", tokens=(("[TOOL_CALLS]", 1),))
NAMED = ToolForm(
    opening="[TOOL_CALLS]", middle="[ARGS]", tag="[TOOL_CALLS]", tokens=(("[TOOL_CALLS]", 1), ("[ARGS]", 0))
)
FUNCTION = ToolForm(opening="<function=", closing="</function>", middle=">", tag="<function=")
GRANITE = ToolForm("arguments", "<|tool_call|>[", "]", tag="<|tool_call|>", tokens=(("<|tool_call|>", 1),))
PHI = ToolForm(
    *("arguments", "<|tool_call|>[", "]<|/tool_call|>"),
    tag="<|tool_call|>",
    tokens=(("<|tool_call|>", 1), ("<|/tool_call|>", 0)),
)
FORMS = [LLAMA, HERMES, CODER, GLM, MISTRAL, NAMED, FUNCTION, GRANITE, PHI]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TOOLS = [WEATHER, {"type": "function", "function": {"name": "now"}}]


def tool(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}
