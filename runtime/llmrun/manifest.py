"""manifest.json: its members as types, its canonical bytes, and the checks that it must pass (FORMAT section 2).

In: bytes. Out: a frozen `Manifest`. Standard library only; reads no file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from llmrun.errors import IncompatibleError, IntegrityError
from llmrun.model_config import ModelConfig
from llmrun.strict_json import parse_json

FORMAT_NAME = "llmpack"
FORMAT_VERSION = (1, 0)
OPS_DOMAIN = "ai.llmpack"
OPS_VERSION = 9
READABLE_OPS_VERSIONS = (2, 3, 4, 5, 6, 7, 8, OPS_VERSION)  # the library has all that the older ones have
MANIFEST_NAME = "manifest.json"
CHUNK_BYTES = 64 << 20
ROW_TILE = 16  # output features side by side in a weight tile (FORMAT 4.3)
WEIGHT_ALIGNMENT = 64  # bytes (FORMAT 4.1)
# The GPU targets that the packager compiles for, and the PTX that it adds to any of CUDA's (FORMAT 8.1).
CUDA_TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
ROCM_TARGETS = ("gfx90a", "gfx942", "gfx1100", "gfx1201")
PTX_TARGET = "ptx_80"

MAX_MANIFEST_BYTES = 4 << 20
_MAX_FILES = 4096
_MAX_INT32 = (1 << 31) - 1  # positions, token ids and cache slots are int32 in the graph
_MAX_SHOWN = 300  # characters of a message that come from the file
_PATH = re.compile(r"(?!-)(?!\.{1,2}(/|$))[A-Za-z0-9._-]+(/(?!-)(?!\.{1,2}(/|$))[A-Za-z0-9._-]+)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class KvCacheSpec:
    """One rank's cache of keys and of values, for each layer, as its graphs have them (FORMAT 3.2)."""

    dtype: str
    block_size: int
    num_layers: int
    num_kv_heads_per_rank: int
    head_dim: int

    def shapes(self, is_gpu: bool) -> dict[str, tuple[int, int, int]]:
        """Return the shape of one block of "key_cache" and of "value_cache"."""
        heads, size, dim = self.num_kv_heads_per_rank, self.block_size, self.head_dim
        if is_gpu:
            return {"key_cache": (size, heads, dim), "value_cache": (size, heads, dim)}
        return {"key_cache": (heads, dim, size), "value_cache": (heads, size, dim)}

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values, all layers of one rank."""
        item_bytes = {"float16": 2, "float32": 4}[self.dtype]
        return 2 * self.num_layers * self.num_kv_heads_per_rank * self.head_dim * item_bytes


@dataclass(frozen=True)
class RankEntry:
    """Where one rank's files are; sizes in bytes."""

    rank: int
    folder: str
    graphs: dict[str, str]
    weights: str
    weight_bytes: int
    weight_bytes_per_token: int
    weight_bytes_by_role: dict[str, int]


@dataclass(frozen=True)
class TokenizerSpec:
    """How text becomes ids; `file`, `chat_template` and `golden` are paths in the artifact.

    Attributes:
        prefix_token_ids: what begins a text, where that is more than `bos_token_id`, its first.
    """

    kind: str
    file: str
    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    add_bos_token: bool
    special_tokens: dict[str, int]
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None
    golden: str
    prefix_token_ids: tuple[int, ...] = field(default_factory=tuple)  # may be absent


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling defaults of the checkpoint; temperature 0 is greedy."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0


@dataclass(frozen=True)
class SourceEntry:
    """One file of the checkpoint that was packed."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes, and the sha256 of each chunk of CHUNK_BYTES."""

    size: int
    chunks: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """manifest.json, checked (FORMAT 2.5)."""

    format_version: tuple[int, int]
    producer: dict[str, Any]
    ops: dict[str, Any]
    model: ModelConfig
    max_seq_len: int
    quantization: dict[str, Any]
    kv_cache: KvCacheSpec
    shards: int
    targets: tuple[str, ...]
    ranks: tuple[RankEntry, ...]
    tokenizer: TokenizerSpec | None
    eos_token_ids: tuple[int, ...]
    generation: GenerationDefaults
    selfcheck: str
    source: tuple[SourceEntry, ...]
    files: dict[str, FileEntry]
    kernels: dict[str, str] = field(default_factory=dict)  # GPU target -> kernel file (FORMAT 8.1)


def canonical_json(value: Any) -> bytes:
    """Serialise as FORMAT 2.2 demands: the same object always gives the same bytes."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


def manifest_bytes(members: dict[str, Any]) -> bytes:
    """Return the manifest file for `members`, with `manifest_sha256` added (FORMAT 2.2)."""
    digest = hashlib.sha256(canonical_json(members)).hexdigest()
    return canonical_json({**members, "manifest_sha256": digest})


def parse_manifest(data: bytes, path: Path) -> tuple[Manifest, str]:
    """Check FORMAT section 2 in order: syntax, version, canonical bytes, members.

    Args:
        data: the bytes of manifest.json.
        path: where they come from, for messages.
    Returns:
        the manifest, and its digest.
    Raises:
        IntegrityError: not the bytes that a packager wrote.
        IncompatibleError: another format or operator version.
    """
    damaged = IntegrityError(f"{path}: damaged (its own sha256 differs). Copy it again.", code="E308")
    try:
        raw = parse_json(data)
    except ValueError as error:
        raise IntegrityError(f"{path}: not the JSON of a manifest: {error}. Copy it again.", code="E308") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT_NAME:
        raise IntegrityError(f"{path}: not the manifest of an llmpack artifact. Copy it again.", code="E308")
    version = raw.get("format_version")
    if _is_version(version) and version[0] != FORMAT_VERSION[0]:
        raise IncompatibleError(
            f"{path}: format {version[0]}.{version[1]}; this llmrun reads format {FORMAT_VERSION[0]}."
            " Install the llmpack release that reads it, or pack the model again.",
            code="E402",
        )
    digest = raw.pop("manifest_sha256", None)
    try:
        intact = isinstance(digest, str) and manifest_bytes(raw) == data
    except ValueError:  # a number that JSON does not have, made by a large exponent
        intact = False
    if not intact or not isinstance(digest, str):
        raise damaged
    manifest = _build(Manifest, raw, path, "")
    domain, ops_version = manifest.ops.get("domain"), manifest.ops.get("version")
    if domain != OPS_DOMAIN or type(ops_version) is not int or ops_version not in READABLE_OPS_VERSIONS:
        found = f"{domain} version {ops_version}"
        raise IncompatibleError(
            f"{path}: needs operators {found[:_MAX_SHOWN]!r}; this llmrun has {OPS_DOMAIN} version {OPS_VERSION}."
            " Install the llmpack release that has them, or pack the model again.",
            code="E403",
        )
    _check_members(manifest, path)
    return manifest, digest


def _is_version(value: Any) -> typing.TypeGuard[list[int]]:
    """Tell whether this is [major, minor]: what says that a manifest is of another format, and not damaged."""
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and n >= 0 for n in value)


def _check_members(manifest: Manifest, path: Path) -> None:
    """Check what types cannot say: paths, digests, and that the members agree with each other."""

    def refuse(what: str) -> typing.NoReturn:
        raise IntegrityError(f"{path}: {what[:_MAX_SHOWN]}. The manifest was not written by `pack`.", code="E309")

    if manifest.format_version[0] != FORMAT_VERSION[0] or manifest.format_version[1] < 0:
        refuse(f"format_version is {manifest.format_version}")
    _check_files(manifest.files, refuse)
    _check_ranks(manifest, refuse)
    _check_numbers(manifest, refuse)
    if not isinstance(manifest.quantization.get("scheme"), str):
        refuse("quantization.scheme is missing")
    for name in ("name", "version"):
        if not isinstance(manifest.producer.get(name), str):
            refuse(f"producer.{name} is missing")
    common = [manifest.selfcheck]
    if (tokenizer := manifest.tokenizer) is not None:
        common += [tokenizer.file, tokenizer.golden]
        if tokenizer.chat_template is not None:
            common.append(tokenizer.chat_template)
    folders = tuple(entry.folder + "/" for entry in manifest.ranks)
    if missing := [target for target in manifest.targets if target not in ("cpu", *manifest.kernels)]:
        refuse(f"kernels has no file for {missing[0]!r}")
    common += manifest.kernels.values()
    for name in common:
        if name not in manifest.files or name.startswith(folders):
            refuse(f"{name!r} is used but not listed in files, or in a rank's folder")


def _check_files(files: dict[str, FileEntry], refuse: Callable[[str], typing.NoReturn]) -> None:
    if not 1 <= len(files) <= _MAX_FILES:
        refuse(f"lists {len(files)} files, expected 1 to {_MAX_FILES}")
    places: set[str] = set()
    for name, entry in files.items():
        if len(name) > 200 or not _PATH.fullmatch(name) or name.lower() == MANIFEST_NAME:
            refuse(f"file name {name!r} is not allowed (FORMAT 1.1)")
        places |= {name, *(parent.as_posix() for parent in Path(name).parents)}
        if entry.size < 0 or len(entry.chunks) != -(-entry.size // CHUNK_BYTES):
            refuse(f"{name}: {len(entry.chunks)} chunk digests for {entry.size} bytes")
        if not all(_SHA256.fullmatch(digest) for digest in entry.chunks):
            refuse(f"{name}: a digest is not 64 hexadecimal digits")
    if len({place.lower() for place in places}) != len(places):
        refuse("lists two names that differ in case only")


def _check_ranks(manifest: Manifest, refuse: Callable[[str], typing.NoReturn]) -> None:
    # Lengths first: `shards` may be any number, and a range of it more than memory holds.
    if not 0 < len(manifest.ranks) == manifest.shards or any(e.rank != i for i, e in enumerate(manifest.ranks)):
        refuse(f"{len(manifest.ranks)} ranks for {manifest.shards} shards, expected each from 0 on, in order")
    if len({entry.folder for entry in manifest.ranks}) != len(manifest.ranks):
        refuse("two ranks share a folder")
    for entry in manifest.ranks:
        if not _PATH.fullmatch(entry.folder) or "/" in entry.folder:
            refuse(f"rank folder {entry.folder!r} is not allowed (FORMAT 1.1)")
        graphs = ["cpu" if target == "cpu" else "gpu" for target in manifest.targets]
        if missing := [graph for graph in graphs if graph not in entry.graphs]:
            refuse(f"rank {entry.rank} has no graph for {missing[0]!r}")
        for name in (entry.weights, *entry.graphs.values()):
            if name not in manifest.files or not name.startswith(entry.folder + "/"):
                refuse(f"rank {entry.rank}: {name!r} is not listed in files, or outside {entry.folder}")


def _check_numbers(manifest: Manifest, refuse: Callable[[str], typing.NoReturn]) -> None:
    """Check that sizes can be sizes and ids ids: memory is computed from them, and graphs index by them."""
    model, cache, defaults = manifest.model, manifest.kv_cache, manifest.generation
    sizes = {"max_seq_len": manifest.max_seq_len}
    for where, member in (("model", model), ("kv_cache", cache)):
        sizes |= {f"{where}.{key}": value for key, value in vars(member).items() if type(value) is int}
    if bad := [f"{name} is {size}" for name, size in sizes.items() if not 1 <= size <= _MAX_INT32]:
        refuse(f"{bad[0]}, expected 1 to {_MAX_INT32}")
    if cache.dtype not in ("float16", "float32"):
        refuse(f"kv_cache.dtype {cache.dtype!r}, expected float16 or float32")
    heads = max(1, model.num_key_value_heads // manifest.shards)
    expected = (model.num_hidden_layers, heads, model.head_dim)
    if (cache.num_layers, cache.num_kv_heads_per_rank, cache.head_dim) != expected:
        refuse("kv_cache is not that of model and shards")
    for entry in manifest.ranks:
        if min(entry.weight_bytes, entry.weight_bytes_per_token, *entry.weight_bytes_by_role.values()) < 0:
            refuse("a rank's weight_bytes is negative")
    ids, limit = list(manifest.eos_token_ids), model.vocab_size
    if (tokenizer := manifest.tokenizer) is not None:
        ids += [tokenizer.vocab_size - 1, *tokenizer.eos_token_ids, *tokenizer.special_tokens.values()]
        ids += [*([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]), *tokenizer.prefix_token_ids]
        if tokenizer.prefix_token_ids and tokenizer.prefix_token_ids[0] != tokenizer.bos_token_id:
            refuse("tokenizer.prefix_token_ids does not begin with bos_token_id")
    if bad_ids := [i for i in ids if not 0 <= i < limit]:
        refuse(f"token id {bad_ids[0]} is not in the vocabulary of {limit}")
    # The ranges of `llmrun.sampler`, roughly: what a user did not ask for is not a usage error.
    if not (0 <= defaults.temperature <= 100 and defaults.top_k >= 0 and 0 < defaults.top_p <= 1):
        refuse("generation: temperature, top_k or top_p is out of its range")
    if not (0 <= defaults.min_p < 1 and 0 < defaults.repeat_penalty <= 10):
        refuse("generation: min_p or repeat_penalty is out of its range")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _build(kind: Any, value: Any, path: Path, where: str) -> Any:
    """Turn parsed JSON into the annotated type, or refuse it; unknown members are ignored (FORMAT 2.3)."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    shown = where.lstrip(".")[:_MAX_SHOWN]
    if is_dataclass(kind) and isinstance(value, dict):
        hints = _hints(kind)
        given = [f for f in fields(kind) if f.name in value or f.default_factory is MISSING]
        if missing := [f.name for f in given if f.name not in value]:
            raise IntegrityError(f"{path}: {shown or 'manifest'}: no member {missing[0]!r}.", code="E309")
        built = {f.name: _build(hints[f.name], value[f.name], path, f"{where}.{f.name}") for f in given}
        return typing.cast(Any, kind)(**built)
    if origin is tuple and isinstance(value, list):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            return tuple(_build(k, v, path, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict and isinstance(value, dict):
        return {key: _build(args[1], item, path, f"{where}.{key}") for key, item in value.items()}
    if origin is types.UnionType:
        return None if value is None else _build(args[0], value, path, where)
    if kind is Any:
        return value
    if kind in (str, bool, float) and type(value) is kind:
        return value
    if kind in (int, float) and type(value) is int:
        return kind(value)
    raise IntegrityError(f"{path}: member {shown!r} has an unexpected value.", code="E309")
