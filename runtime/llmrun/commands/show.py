"""Print what an artifact holds."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from llmrun import console
from llmrun.commands import common

if TYPE_CHECKING:
    from llmrun.manifest import Manifest

_MAX_TOKENS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    common.add_artifact(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the manifest's facts; reads no other file and starts no rank."""
    if console.environment_rank() != 0:
        return 0
    from llmrun.artifact import open_artifact

    artifact = open_artifact(arguments.artifact, ranks=[])
    facts = _facts(artifact.manifest, artifact.digest)
    if arguments.json:
        common.write(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    else:
        width = max(len(name) for name in facts)
        common.write("".join(f"{name:<{width}}  {_in_words(value)}\n" for name, value in facts.items()))
    return 0


def _facts(manifest: Manifest, digest: str) -> dict[str, Any]:
    """Return the manifest but for the list of files, and what follows from it."""
    facts = dataclasses.asdict(manifest)
    files = facts.pop("files")
    cache_bytes = manifest.kv_cache.bytes_per_token * manifest.max_seq_len
    return {
        **facts,
        "num_files": len(files),
        "total_bytes": sum(entry["size"] for entry in files.values()),
        "kv_cache_bytes_per_sequence_per_rank": cache_bytes,
        "manifest_sha256": digest,
    }


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        shown = {name: _first(item) if name == "special_tokens" else item for name, item in value.items()}
        return "  ".join(f"{name}={_in_words(item)}" for name, item in shown.items())
    if isinstance(value, tuple | list):
        return "; ".join(_in_words(item) for item in value) or "none"
    return "none" if value is None else str(value)


def _first(tokens: dict[str, int]) -> list[Any]:
    """Return the first tokens in the order of their ids, and how many more there are: vocabularies reserve up to a thousand."""
    texts = [f"{text}={token_id}" for text, token_id in sorted(tokens.items(), key=lambda token: token[1])]
    more = len(texts) - _MAX_TOKENS
    return texts if more <= 0 else [*texts[:_MAX_TOKENS], f"{more} more (--json has all)"]
