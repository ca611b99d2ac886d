"""What tests of gpt-oss's form of answers share: its special tokens, and a template that does what its own does."""

from __future__ import annotations

import json
from pathlib import Path

from models import make_checkpoint
from unit.tokenizer_makers import edit_json, train_byte_level

SPECIAL = [
    *("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>"),
    *("<|message|>", "<|call|>"),
]
TEMPLATE = """\
{%- macro described(tools) -%}
    {%- for tool in tools %}
        {{- "// " + tool.function.description + "\\n" + tool.function.name }}
        {%- for name, schema in ((tool.function.parameters or {}).properties or {}).items() if schema.default is defined %}
            {{- "(" + name + " = " + (schema.default if schema.enum else schema.default | tojson) + ")" }}
        {%- endfor %}
        {{- ";" }}
    {%- endfor -%}
{%- endmacro -%}
{%- macro system() -%}
    {%- if reasoning_effort is not defined %}{% set reasoning_effort = "medium" %}{% endif -%}
    {{ (model_identity or "A model.") + " " + strftime_now("%Y") + " Reasoning: " + reasoning_effort }}
    {%- for tool in builtin_tools or [] %}{{ " " + tool }}{% endfor -%}
{%- endmacro -%}
{{- "<|start|>system<|message|>" + system() + "<|end|>" }}
{%- set turns = messages[1:] if messages[0].role == "system" else messages %}
{%- if tools or turns | length < messages | length %}
    {{- "<|start|>developer<|message|>" + (messages[0].content if turns | length < messages | length else "") }}
    {{- described(tools or []) + "<|end|>" }}
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for message in turns %}
    {%- if message.role == "assistant" and "tool_calls" in message %}
        {%- if message.content and message.thinking %}{{ raise_exception("content and thinking") }}{% endif %}
        {%- set answered = namespace(found=false) %}
        {%- for later in turns[loop.index:] if later.role == "assistant" and "tool_calls" not in later %}
            {%- set answered.found = true %}
        {%- endfor %}
        {%- if (message.thinking or message.content) and not answered.found %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + (message.thinking or message.content) + "<|end|>" }}
        {%- endif %}
        {%- set last.name = message.tool_calls[0].function.name %}
        {{- "<|start|>assistant to=functions." + last.name + "<|channel|>commentary json<|message|>" }}
        {{- message.tool_calls[0].function.arguments | tojson + "<|call|>" }}
    {%- elif message.role == "assistant" %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
    {%- elif message.role == "tool" %}
        {%- if last.name is none %}{{ raise_exception("a result without a call") }}{% endif %}
        {{- "<|start|>functions." + last.name + " to=assistant<|channel|>commentary<|message|>" }}
        {{- message.content | tojson + "<|end|>" }}
    {%- elif message.role == "user" %}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start|>assistant" }}{% endif %}
"""


def harmony_checkpoint(folder: Path) -> dict[str, int]:
    """Write a random tiny model whose tokenizer, template and end tokens are of gpt-oss's kind; return its special tokens."""
    folder.mkdir(parents=True)
    library = train_byte_level(folder, SPECIAL)
    special = {text: library.token_to_id(text) for text in SPECIAL}
    make_checkpoint(folder, vocab_size=512, max_position_embeddings=1024)
    edit_json(folder, "tokenizer_config.json", eos_token="<|return|>")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    ends = [special[name] for name in ("<|return|>", "<|endoftext|>", "<|call|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return special
