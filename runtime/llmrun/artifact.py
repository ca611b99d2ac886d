"""The contract between packager and runtime: what an artifact is, how it is opened, how it is refused.

In: a directory that follows artifacts/FORMAT.md. Out: an `Artifact` whose manifest was checked clause by clause and whose
files have the listed sizes; `Artifact.verify` then checks digests. Standard library only: the packager imports this module,
and nothing here reads a weight, a graph or a tokenizer. It does not guard against somebody who may write to the directory
while the model runs: `Artifact.recheck` notices a replaced or rewritten file, not a page changed after it was read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrun import huge_pages
from llmrun.errors import (
    IncompatibleError,
    IntegrityError,
    InternalError,
    LlmpackError,
    NumericError,
    PeerError,
    ResourceError,
    UsageError,
)
from llmrun.manifest import (
    CHUNK_BYTES,
    CUDA_TARGETS,
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    OPS_DOMAIN,
    OPS_VERSION,
    PTX_TARGET,
    ROCM_TARGETS,
    ROW_TILE,
    WEIGHT_ALIGNMENT,
    FileEntry,
    GenerationDefaults,
    KvCacheSpec,
    Manifest,
    ModelConfig,
    RankEntry,
    SourceEntry,
    TokenizerSpec,
    canonical_json,
    manifest_bytes,
    parse_manifest,
)
from llmrun.strict_json import parse_json

LARGEST_LOGIT = 1e30  # of selfcheck.json (FORMAT 6.1): larger ones are of no model that works
_SURROGATE = re.compile("[\ud800-\udfff]")

__all__ = [
    "CHUNK_BYTES",
    "CUDA_TARGETS",
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "LARGEST_LOGIT",
    "MANIFEST_NAME",
    "OPS_DOMAIN",
    "OPS_VERSION",
    "PTX_TARGET",
    "ROCM_TARGETS",
    "ROW_TILE",
    "WEIGHT_ALIGNMENT",
    "Artifact",
    "FileEntry",
    "GenerationDefaults",
    "IncompatibleError",
    "IntegrityError",
    "InternalError",
    "KvCacheSpec",
    "LlmpackError",
    "Manifest",
    "ModelConfig",
    "NumericError",
    "PeerError",
    "RankEntry",
    "ResourceError",
    "SourceEntry",
    "TokenizerSpec",
    "UsageError",
    "canonical_json",
    "digest_file",
    "manifest_bytes",
    "open_artifact",
]


def digest_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> FileEntry:
    """Hash a file chunk by chunk; `on_bytes` hears of each piece read."""
    chunks: list[str] = []
    size = 0
    with open(path, "rb", buffering=0) as file:
        piece = memoryview(bytearray(1 << 20))  # fits a cache, and divides CHUNK_BYTES
        digest = hashlib.sha256()
        while count := file.readinto(piece[: min(len(piece), CHUNK_BYTES - size % CHUNK_BYTES)]):
            digest.update(piece[:count])
            size += count
            if size % CHUNK_BYTES == 0:
                chunks.append(digest.hexdigest())
                digest = hashlib.sha256()
            if on_bytes is not None:
                on_bytes(count)
    if size % CHUNK_BYTES:
        chunks.append(digest.hexdigest())
    return FileEntry(size, tuple(chunks))


@dataclass(frozen=True)
class Artifact:
    """An opened artifact: manifest checked, sizes checked, contents not read yet."""

    path: Path
    manifest: Manifest
    digest: str
    _stamps: dict[str, tuple[int, ...]]

    def resolve(self, relative: str) -> Path:
        """Return where a listed file lies."""
        if relative not in self.manifest.files:
            raise InternalError(f"{relative} is not listed in {self.path / MANIFEST_NAME}")
        return self.path / relative

    def with_ranks(self, ranks: Sequence[int]) -> Artifact:
        """Return the artifact with the folders of `ranks` complete on this host; raises as `open_artifact`."""
        return Artifact(self.path, self.manifest, self.digest, _check_tree(self.path, self.manifest, ranks))

    def files_of_rank(self, rank: int) -> list[str]:
        """Return what one rank reads: the common files and its own folder's."""
        mine = self.manifest.ranks[rank].folder + "/"
        folders = tuple(entry.folder + "/" for entry in self.manifest.ranks)
        return sorted(p for p in self.manifest.files if p.startswith(mine) or not p.startswith(folders))

    def times_of(self, files: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Return (device, inode, size, mtime, ctime) of files as `open_artifact` saw them; empty for an absent one."""
        return {name: self._stamps.get(name, ()) for name in files}

    def verify(
        self,
        files: Iterable[str],
        on_progress: Callable[[int, int], None] | None = None,
        *,
        num_threads: int | None = None,
    ) -> None:
        """Compare digests with the manifest's.

        Args:
            files: paths as listed.
            on_progress: called with (bytes done, bytes in all).
            num_threads: None: the cores that this process may use.
        Raises:
            IntegrityError: names the file and the first chunk that differs.
        """
        import concurrent.futures  # imports logging: a start that hashes nothing goes without

        names = list(files)
        total = sum(self.manifest.files[name].size for name in names)
        done = 0
        jobs = [(name, index) for name in names for index in range(len(self.manifest.files[name].chunks))]
        workers = (num_threads or len(os.sched_getaffinity(0))) if total > 2 * CHUNK_BYTES else 1
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:  # hashlib releases the GIL
            for size in pool.map(lambda job: self._verify_chunk(*job), jobs):
                done += size
                if on_progress is not None:
                    on_progress(done, total)

    def _verify_chunk(self, name: str, index: int) -> int:
        entry = self.manifest.files[name]
        digest, left = hashlib.sha256(), min(CHUNK_BYTES, entry.size - index * CHUNK_BYTES)
        try:
            with open(self.path / name, "rb", opener=_open_regular) as file:
                if _stamp_of(os.fstat(file.fileno())) != self._stamps.get(name):
                    raise _changed(self.path / name)
                file.seek(index * CHUNK_BYTES)
                size = left
                with contextlib.closing(huge_pages.Reader(file.fileno(), index * CHUNK_BYTES, size)) as pages:
                    while left > 0:
                        if (size - left) % huge_pages.HUGE_PAGE_BYTES == 0:
                            pages.bring(size - left)
                        if not (piece := file.read(min(left, 1 << 20))):
                            break
                        digest.update(piece)
                        left -= len(piece)
        except OSError as error:
            raise _unreadable(self.path / name, error) from None
        if left > 0 or digest.hexdigest() != entry.chunks[index]:
            raise IntegrityError(
                f"{self.path / name}: sha256 differs in chunk {index + 1} (of {len(entry.chunks)})."
                " The file is damaged: copy it again.",
                code="E302",
            )
        return size

    def read_selfcheck(self) -> tuple[list[int], list[float], float]:
        """Return (token ids, logits after the last of them, tolerance) of selfcheck.json (FORMAT 6.1)."""
        vocab_size = self.manifest.model.vocab_size
        match self._read_json(self.manifest.selfcheck):
            case {"ids": list(ids), "logits": list(logits), "tolerance": float() | int() as tolerance}:
                if (
                    0 < len(ids) <= self.manifest.max_seq_len
                    and all(type(i) is int and 0 <= i < vocab_size for i in ids)
                    and len(logits) == vocab_size
                    and all(
                        type(number) in (int, float) and abs(number) < LARGEST_LOGIT for number in (tolerance, *logits)
                    )
                ):
                    return ids, logits, tolerance
        raise self._not_as_packed(self.manifest.selfcheck, "no ids, logits and tolerance that fit the model")

    def read_golden_texts(self) -> list[tuple[str, list[int]]]:
        """Return the tokenizer's golden texts with their ids; none without a tokenizer."""
        if self.manifest.tokenizer is None:
            return []
        name = self.manifest.tokenizer.golden
        examples = self._read_json(name)
        texts = []
        for example in examples if isinstance(examples, list) else [None]:
            match example:
                case {"text": str(text), "ids": list(ids)} if not _SURROGATE.search(text):
                    texts.append((text, ids))
                case _:
                    raise self._not_as_packed(name, "not a list of texts with their ids")
        return texts

    def _read_json(self, name: str) -> Any:
        try:
            return parse_json(self.resolve(name).read_bytes())
        except OSError as error:
            raise _unreadable(self.path / name, error) from None
        except ValueError as error:
            raise self._not_as_packed(name, f"not JSON: {error}") from None

    def _not_as_packed(self, name: str, what: str) -> IntegrityError:
        return IntegrityError(f"{self.path / name}: {what}. Pack the model again.", code="E320")

    def recheck(self, files: Iterable[str]) -> None:
        """Make sure that the files are those that `open_artifact` saw (device, inode, size, times)."""
        for name in files:
            if _stamp(self.path / name) != self._stamps.get(name):
                raise _changed(self.path / name)


def open_artifact(path: str | os.PathLike[str], ranks: Sequence[int] | None = None) -> Artifact:
    """Read the manifest and check the directory against it, without reading any other file.

    Args:
        path: the artifact's directory (may itself be a symbolic link: `current -> v7`).
        ranks: ranks whose folders must be complete on this host; None: all.
    Raises:
        UsageError: `path` is no path, there is no directory at it, or it is not an artifact.
        IntegrityError: a file is missing, unlisted, of another size or not a regular file; the manifest is damaged.
        IncompatibleError: another format or operator version.
        ResourceError: no permission to look.
    """
    try:
        root = Path(path)
    except TypeError:
        raise UsageError(f"artifact {path!r}: expected the path of a directory made by `pack`.", code="E202") from None
    try:
        is_folder = stat.S_ISDIR(root.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{root}: no such directory; expected an artifact made by `pack`.", code="E202") from None
    except PermissionError as error:
        raise _unreadable(root, error) from None
    except (OSError, ValueError) as error:  # a loop of links, a name that is too long, a NUL in it
        raise UsageError(f"{root}: {error}; expected an artifact made by `pack`.", code="E202") from None
    if not is_folder:
        raise UsageError(f"{root}: not a directory; expected an artifact made by `pack`.", code="E202")
    manifest, digest = _read_manifest(root / MANIFEST_NAME)
    if ranks is not None and (bad := [rank for rank in ranks if not 0 <= rank < manifest.shards]):
        raise IncompatibleError(f"{root}: packed for {manifest.shards} ranks, there is no rank {bad[0]}.")
    stamps = _check_tree(root, manifest, ranks)
    return Artifact(root, manifest, digest, stamps)


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        return _stamp_of(path.lstat())
    except OSError:
        return ()


def _stamp_of(info: os.stat_result) -> tuple[int, ...]:
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def _open_regular(path: str | os.PathLike[str], flags: int) -> int:
    """Open without following a link and without waiting for a pipe's other end."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _unreadable(path: Path, error: OSError) -> LlmpackError:
    if error.errno == errno.ELOOP:
        return IntegrityError(f"{path}: a link; links and devices are refused.", code="E305")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return ResourceError(f"{path}: cannot be read: {error.strerror}.")
    return IntegrityError(f"{path}: cannot be read: {error.strerror}. Copy it again.")


def _changed(path: Path) -> IntegrityError:
    return IntegrityError(
        f"{path}: changed while it was being loaded. Artifacts are replaced by renaming their directory, never in place:"
        " start again.",
        code="E303",
    )


def _check_tree(root: Path, manifest: Manifest, ranks: Sequence[int] | None) -> dict[str, tuple[int, ...]]:
    """Check clauses 1.2 to 1.4; return the stamp of every file that is there."""
    needed = range(manifest.shards) if ranks is None else ranks
    optional = {entry.folder for entry in manifest.ranks if entry.rank not in needed}
    absent = tuple(folder + "/" for folder in optional if not os.path.lexists(root / folder))
    stamps: dict[str, tuple[int, ...]] = {}
    for name, entry in manifest.files.items():
        if name.startswith(absent):
            continue
        file = root / name
        try:
            info = file.lstat()
        except (FileNotFoundError, NotADirectoryError):
            raise IntegrityError(f"{file}: missing; expected {entry.size} bytes. Copy it again.", code="E304") from None
        except OSError as error:
            raise _unreadable(file, error) from None
        if not stat.S_ISREG(info.st_mode):
            raise _not_regular(file)
        if info.st_size != entry.size:
            raise IntegrityError(
                f"{file}: found {info.st_size} bytes, expected {entry.size}. Copy it again.", code="E306"
            )
        stamps[name] = _stamp_of(info)
    folders = {parent.as_posix() for name in manifest.files for parent in Path(name).parents}
    for folder, subfolders, files in os.walk(root, onerror=_refuse_folder):
        here = Path(folder).relative_to(root)
        for name in subfolders:
            relative = (here / name).as_posix()
            if (root / relative).is_symlink() or relative not in folders:
                raise IntegrityError(
                    f"{root / relative}: a folder that the manifest does not list, or a link. Remove it, or copy the artifact"
                    " again.",
                    code="E305",
                )
        for name in files:
            relative = (here / name).as_posix()
            if relative not in manifest.files and relative != MANIFEST_NAME:
                raise IntegrityError(
                    f"{root / relative}: not listed in the manifest. Remove it, or copy the artifact again.",
                    code="E307",
                )
    return stamps


def _refuse_folder(error: OSError) -> typing.NoReturn:
    raise _unreadable(Path(error.filename), error) from None


def _read_manifest(path: Path) -> tuple[Manifest, str]:
    try:
        descriptor = _open_regular(path, os.O_RDONLY)
    except FileNotFoundError:
        if (path.parent / "config.json").exists():
            message = f"{path.parent}: a checkpoint, not an artifact. Pack it: `pack {path.parent} -o ARTIFACT`."
        else:
            message = f"{path.parent}: no {path.name}; expected an artifact made by `pack`."
        raise UsageError(message, code="E202") from None
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise _not_regular(path) from None
        raise _unreadable(path, error) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _not_regular(path)
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    finally:
        os.close(descriptor)
    if len(data) > MAX_MANIFEST_BYTES:
        raise IntegrityError(f"{path}: longer than {MAX_MANIFEST_BYTES} bytes. Copy it again.", code="E308")
    return parse_manifest(data, path)


def _not_regular(path: Path) -> IntegrityError:
    return IntegrityError(f"{path}: not a regular file; links and devices are refused.", code="E305")
