"""The small files of a Hugging Face model directory, beside its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llmpack.model_reader import read_file, read_json
from llmrun.artifact import IncompatibleError

_MORE_TEMPLATES = "additional_chat_templates"


def list_names(model_dir: Path) -> list[str]:
    """Return the names of the directory's files, and those of the one folder in it that has something for us."""
    folder = model_dir / _MORE_TEMPLATES
    more = [f"{_MORE_TEMPLATES}/{name}" for name in os.listdir(folder)] if folder.is_dir() else []
    return sorted([*os.listdir(model_dir), *more])


class ModelFiles:
    """The directory's files, each read once; a missing JSON file is an empty object."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self._read: dict[str, Any] = {}

    def exists(self, name: str) -> bool:
        """Return whether the file is there."""
        return os.path.lexists(self.model_dir / name)  # a link to nothing is an error, not the absence of a tokenizer

    def json(self, name: str) -> dict[str, Any]:
        """Return a JSON file's object, which is empty if there is no such file.

        Raises:
            IntegrityError: the file is not a JSON object.
        """
        if not self.exists(name):
            return {}
        if name not in self._read:
            self._read[name] = read_json(self.model_dir / name)
        return self._read[name]

    def bytes(self, name: str) -> bytes:
        """Return a file's bytes."""
        self._read.setdefault(name, None)
        return read_file(self.model_dir / name)

    def more_templates(self) -> list[str]:
        """Return the names of the files that hold chat templates beside the one that has none."""
        names = list_names(self.model_dir)
        return [name for name in names if name.startswith(f"{_MORE_TEMPLATES}/") and name.endswith(".jinja")]

    def ids(self, name: str, key: str) -> tuple[int, ...]:
        """Return the token ids that a JSON file gives under key: none, one or a list.

        Those of a model that sees images may be in the part that its language model has, as in transformers.

        Raises:
            IncompatibleError: what is there is no token id.
        """
        members = self.json(name)
        value, text_config = members.get(key), members.get("text_config")
        if value is None and isinstance(text_config, dict):
            value = text_config.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise IncompatibleError(f"{self.model_dir / name}: {key}: found {value!r}, expected token ids.")
        return tuple(dict.fromkeys(ids))

    def names(self, *more: str) -> tuple[str, ...]:
        """Return the names of the files that were read, and `more`, sorted."""
        return tuple(sorted({*self._read, *more}))
