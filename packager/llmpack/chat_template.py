"""Find a checkpoint's chat template.

In: the files of a Hugging Face model directory. Out: one Jinja text, and notes.

transformers has one template or several with names: of these it takes `tool_use` if a conversation has a list of tools, be
it empty, else `default`. An artifact has one template: of two with these names it is made one that chooses likewise. llmrun
gives a template the texts of the BOS and EOS tokens; others that it asks for are set at its beginning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmpack.model_files import ModelFiles
from llmrun.artifact import IncompatibleError, IntegrityError
from llmrun.template_tags import FILTERS, template_extensions

__all__ = ["has_chat_template", "read_chat_template"]

_DEFAULT, _TOOL_USE = "default", "tool_use"


def read_chat_template(files: ModelFiles, tokens: Mapping[str, str]) -> tuple[str | None, tuple[str, ...]]:
    """Return the chat template, None if there is none, and what was left out, for a person.

    Args:
        files: of the checkpoint.
        tokens: the texts of the tokens that have a name in the tokenizer's files, by that.
    Raises:
        IncompatibleError: a template that does not parse, or is no text.
        IntegrityError: a file is not UTF-8.
    """
    found = _find(files)
    if not found:
        return None, ()
    if _DEFAULT not in found:
        return None, (f"chat templates {_names(found)}: left out, as none is named {_DEFAULT}: chats need one",)
    filters: set[str] = set()
    asked: set[str] = set()
    for name in (_DEFAULT, _TOOL_USE):
        if name in found:
            filters_here, asked_here = _examine(*found[name])
            filters |= filters_here
            asked |= asked_here
    others = sorted(found.keys() - {_DEFAULT, _TOOL_USE})
    notes = [f"chat templates {_names(others)}: left out: {_DEFAULT} and {_TOOL_USE} are used"] if others else []
    if unknown := sorted(filters - FILTERS):
        notes.append(f"chat template: filters {_names(unknown)}: not supported: chats that come to them fail")
    template = found[_DEFAULT][1]
    if _TOOL_USE in found and found[_TOOL_USE][1] != template:
        template = _choose(found[_TOOL_USE][1], template)
    to_set = sorted((asked & tokens.keys()) - {"bos_token", "eos_token"})
    lines = [f"{{% set {name} = {json.dumps(tokens[name], ensure_ascii=False)} %}}\n" for name in to_set]
    return "".join(lines) + template, tuple(notes)


def has_chat_template(files: ModelFiles) -> bool:
    """Return whether there is any."""
    return bool(_find(files))


def _find(files: ModelFiles) -> dict[str, tuple[Path, Any]]:
    """Return all templates, {name: (file, template)}: those in files of their own, else those of tokenizer_config.json.

    Else that of chat_template.json, where models that see images had it first.
    """
    names = {_DEFAULT: "chat_template.jinja"} if files.exists("chat_template.jinja") else {}
    names.update((Path(name).stem, name) for name in files.more_templates())
    found: dict[str, tuple[Path, Any]] = {}
    for name, file in names.items():
        try:
            found[name] = files.model_dir / file, files.bytes(file).decode()
        except UnicodeDecodeError as error:
            raise IntegrityError(f"{files.model_dir / file}: not UTF-8: {error}.") from error
    if found:
        return found
    path = files.model_dir / "tokenizer_config.json"
    template = files.json(path.name).get("chat_template")
    if isinstance(template, list):
        return {str(entry.get("name")): (path, entry.get("template")) for entry in template if isinstance(entry, dict)}
    if template is None and files.exists("chat_template.json"):
        path = files.model_dir / "chat_template.json"
        template = files.json(path.name).get("chat_template")
    return {} if template is None else {_DEFAULT: (path, template)}


def _examine(path: Path, template: Any) -> tuple[set[str], set[str]]:
    """Return the names of the filters that a template uses, and of the variables that it asks for."""
    if not isinstance(template, str):
        raise IncompatibleError(f"{path}: chat_template: found {type(template).__name__}, expected text.")
    from jinja2 import TemplateError, meta, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=template_extensions())
    try:
        tree = environment.parse(template)
        filters = {node.name for node in tree.find_all(nodes.Filter)}
        environment.filters.update(dict.fromkeys(filters, str))  # Jinja looks for no variables where it misses one
        return filters, meta.find_undeclared_variables(tree)
    except (TemplateError, RecursionError) as error:
        raise IncompatibleError(f"{path}: chat template: {error}.") from error


def _choose(with_tools: str, without: str) -> str:
    """Return one template of two.

    Each is rendered as if it were alone: llmrun's `trim_blocks` takes the line breaks that follow the tags here, the "+"
    keeps `lstrip_blocks` from what comes before them, and a template's own last line break is not part of it in Jinja.
    """
    first, second = (re.sub(r"(\r\n|\r|\n)\Z", "", template) for template in (with_tools, without))
    return "{% if tools is not none %}\n" + first + "{%+ else %}\n" + second + "{%+ endif %}"


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
