"""Atomic writer: a partial directory beside the target, the manifest last, one rename.

In: files and the members of the manifest. Out: at `target`, at every instant and after a power failure, either what was there
before or the whole new artifact. Also decides whether there is room, and cleans up what killed runs left. It does not know
what the files mean.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import glob
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llmrun.artifact import (
    FORMAT_NAME,
    MANIFEST_NAME,
    FileEntry,
    ResourceError,
    UsageError,
    digest_file,
    manifest_bytes,
    open_artifact,
)
from llmrun.huge_pages import HUGE_PAGE_BYTES
from llmrun.manifest import MAX_MANIFEST_BYTES

_RENAME_EXCHANGE = 2  # <linux/fs.h>
_AT_FDCWD = -100  # <fcntl.h>
_OLD = "-old"  # ends the name of the artifact that is being replaced where the two cannot be exchanged
_BLOCK_BYTES = HUGE_PAGE_BYTES
_MAX_OPEN_BLOCKS = 16


class Staging:
    """A directory under construction; use as a context manager. Without `publish` nothing remains of it.

    What may not become an artifact, or be replaced by one, is refused when it is made: before any work.
    """

    def __init__(self, target: Path, *, force: bool, model_dir: Path | None = None) -> None:
        self.target, self.force = target.absolute(), force
        if model_dir is not None:
            self._check_apart_from(model_dir)
        self._check_target()
        self.partial = self.target.parent / f".{self.target.name}.partial-{os.getpid()}"
        self._lock = -1
        self._sealed: dict[str, Future[FileEntry]] = {}

    def __enter__(self) -> Staging:
        with translate_os_errors(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            self._check_target()  # an old artifact may be back
            try:
                while self._lock < 0:
                    self.partial.mkdir()
                    with contextlib.suppress(FileNotFoundError):  # another run took it for one that was left
                        self._lock = _lock_directory(self.partial)
                self._background, self._is_over = ThreadPoolExecutor(min(4, os.cpu_count() or 1)), False
            except FileExistsError:  # somebody else's: of a process of our number in another container
                raise
            except BaseException:  # a signal: nobody calls __exit__ after half an __enter__
                self._discard()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._background.shutdown(cancel_futures=True)
        self._discard()

    def _discard(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
        _remove(self.partial)

    def _check_apart_from(self, model_dir: Path) -> None:
        """Refuse to replace the model, or to write into its directory, by whatever name."""
        target, model = (Path(os.path.realpath(path)) for path in (self.target, model_dir))
        if _is_same(target, model):
            found = "is the model's own directory"
        elif any(_is_same(folder, target) for folder in model.parents):
            found = f"contains the model {model_dir}"
        elif any(_is_same(folder, model) for folder in target.parents):
            found = f"lies inside the model's directory {model_dir}"
        else:
            return
        raise UsageError(f"{self.target}: {found}, which stays as it is; choose another -o, apart from it.")

    def _check_target(self) -> None:
        if self.target.parent == self.target or _is_same(self.target, Path()):
            raise UsageError(f"{self.target}: cannot be replaced by an artifact; choose another -o.")
        if self.target.is_symlink():
            raise UsageError(f"{self.target}: a symbolic link; -o must be the directory itself.")
        folders = Path(os.path.realpath(self.target)).parents
        if (above := next((folder for folder in folders if _is_artifact(folder)), None)) is not None:
            raise UsageError(
                f"{self.target}: lies inside the artifact {above}, which stays as it is; choose another -o, apart from it."
            )
        if (file := next((above for above in folders if above.exists() and not above.is_dir()), None)) is not None:
            raise UsageError(f"{self.target}: {file} is a file, not a directory; choose another -o.")
        if not self.target.exists():
            return
        if _is_mount_point(self.target):
            raise UsageError(
                f"{self.target}: is a mount point, which no new directory can replace; choose one inside it:"
                f" -o {self.target / 'artifact'}."
            )
        if not self.force:
            raise UsageError(f"{self.target}: exists; --force replaces it by the new artifact.", code="E205")
        # --force must not be able to wipe somebody's home directory.
        if not self.target.is_dir() or (any(self.target.iterdir()) and not _read_manifest(self.target)):
            raise UsageError(f"{self.target}: not an artifact; --force replaces artifacts and empty directories only.")
        if (name := _find_unlisted(self.target)) is not None:
            raise UsageError(
                f"{self.target}: holds {name}, which is not of the artifact, and --force would remove it; move it elsewhere"
                " or choose another -o."
            )

    def _remove_abandoned(self) -> None:
        """Remove partial directories whose process is gone: their lock is free. The only copy of an artifact goes back."""
        for path in self.target.parent.glob(f".{glob.escape(self.target.name)}.partial-*"):
            with contextlib.suppress(OSError):
                descriptor = _lock_directory(path, fcntl.LOCK_NB)
                try:
                    if path.name.endswith(_OLD):
                        _put_back_or_remove(path, self.target)
                    else:
                        _remove(path)
                finally:
                    os.close(descriptor)

    def check_room(self, num_bytes: int) -> None:
        """Refuse before work starts what the disk cannot hold."""
        free = shutil.disk_usage(self.partial).free
        if free < num_bytes:
            raise ResourceError(
                f"{self.target}: the artifact needs {num_bytes} bytes, the disk has {free} free.", code="E502"
            )

    def add(self, name: str, data: bytes) -> None:
        """Write one small file."""
        with translate_os_errors(self.target):
            path = self.partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    @contextlib.contextmanager
    def create(self, name: str, size: int) -> Iterator[Callable[[int, np.ndarray], None]]:
        """Open a file of `size` bytes (zeros so far); yields write(offset, array), for any number of threads.

        Once it is closed it must not change: it is hashed and made durable while other work goes on.
        """
        path = self.partial / name
        with translate_os_errors(self.target):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.truncate(size)
                blocks = _Blocks(file.fileno(), size)
                yield blocks.write
                blocks.flush()
            self._sealed[name] = self._background.submit(self._seal, name)

    def publish(self, members: dict[str, Any]) -> None:
        """Hash all files, write the manifest, make everything durable, and put it in place."""
        with translate_os_errors(self.target):
            names = sorted(p.relative_to(self.partial).as_posix() for p in self.partial.rglob("*") if p.is_file())
            for name in names:
                self._sealed[name] = self._sealed.get(name) or self._background.submit(self._seal, name)
            files = {name: dataclasses.asdict(self._sealed[name].result()) for name in names}
            self.add(MANIFEST_NAME, manifest_bytes({**members, "files": files}))
            open_artifact(self.partial)  # what cannot be read back is never published
            _sync(self.partial / MANIFEST_NAME)
            for folder in [p for p in self.partial.rglob("*") if p.is_dir()] + [self.partial]:
                _sync(folder)
            self._move_into_place()
            _sync(self.target.parent)

    def _seal(self, name: str) -> FileEntry:
        entry = digest_file(self.partial / name, self._go_on)
        _sync(self.partial / name)
        return entry

    def _go_on(self, _: int) -> None:
        """Stop hashing a file that nobody waits for any more."""
        if self._is_over:
            raise InterruptedError

    def _move_into_place(self) -> None:
        self._check_target()
        if not self.target.exists():
            os.rename(self.partial, self.target)
            return
        libc = ctypes.CDLL(None, use_errno=True)
        paths = os.fsencode(self.partial), os.fsencode(self.target)
        if libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
            return  # the old artifact is now the partial directory, which __exit__ removes
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        # A file system that cannot exchange: absent for an instant, in which no other run must take the old one as left.
        old = self.partial.with_name(self.partial.name + _OLD)
        descriptor = _lock_directory(self.target)
        try:
            os.rename(self.target, old)
            os.rename(self.partial, self.target)
        finally:
            _put_back_or_remove(old, self.target)
            os.close(descriptor)


def _is_same(path: Path, other: Path) -> bool:
    """Tell whether two paths lead to one directory."""
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def _is_mount_point(path: Path) -> bool:
    """Tell whether something is mounted there; a directory of the same disk shows in the list of mounts only."""
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().split(b"\n")
    except OSError:
        mounts = []
    escaped = re.sub(rb"[ \t\n\\]", lambda found: b"\\%03o" % ord(found[0]), os.fsencode(os.path.realpath(path)))
    return os.path.ismount(path) or any(line.split(b" ")[4:5] == [escaped] for line in mounts)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of an artifact of any version, even if it is damaged; empty for what is no artifact."""
    if not (folder / MANIFEST_NAME).is_file():
        return {}
    with open(folder / MANIFEST_NAME, "rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT_NAME else {}


def _is_artifact(folder: Path) -> bool:
    """Tell whether there is an artifact, as far as that can be read."""
    with contextlib.suppress(OSError):
        return bool(_read_manifest(folder))
    return False


def _find_unlisted(folder: Path) -> str | None:
    """Return the name of something in an artifact that its manifest does not list; None: there is nothing."""
    files = _read_manifest(folder).get("files")
    listed = [Path(name) for name in (MANIFEST_NAME, *(files if isinstance(files, dict) else ()))]
    known = {*listed, *(parent for path in listed for parent in path.parents)}
    found = (path.relative_to(folder) for path in folder.rglob("*"))
    return next((str(path) for path in found if path not in known), None)


def _lock_directory(path: Path, flags: int = 0) -> int:
    """Lock the directory that is at `path`, once it is free, and return its descriptor, which holds the lock.

    Raises:
        FileNotFoundError: it is not there any more: who held the lock, or was faster, has removed or renamed it.
        BlockingIOError: it is not free (flags: LOCK_NB).
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
        if not os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _put_back_or_remove(old: Path, target: Path) -> None:
    """End a replacement, whole or not: the old artifact goes back if nothing has taken its place, else it is removed."""
    try:
        os.rename(old, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            _remove(old)


def _remove(folder: Path) -> None:
    """Remove a folder of ours; those in it that nobody may write to (a shipped artifact's, made read-only) as well."""
    with contextlib.suppress(OSError):
        folder.chmod(0o700)
    for where, names, _ in os.walk(folder):
        for path in (os.path.join(where, name) for name in names):
            if not os.path.islink(path):
                with contextlib.suppress(OSError):
                    os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)


class _Blocks:
    """A file that gets its bytes in whole aligned blocks of 2 MB, whatever the pieces that threads write.

    Linux keeps what came in one write as one piece of the page cache; pieces that are huge pages are mapped as such, so that
    who runs the artifact without having copied it reads its weights faster (`llmrun/huge_pages.py`).
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor, self._size = descriptor, size
        self._lock = threading.Lock()
        # Block number: its bytes, and how many of them are still to come.
        self._open: dict[int, tuple[memoryview, int]] = {}
        self._early: set[int] = set()  # blocks that were written before they were whole
        self._spare: list[memoryview] = []

    def write(self, offset: int, array: np.ndarray) -> None:
        """Take bytes at `offset`, once for each byte of the file at most; bytes that nobody writes are zero."""
        view = np.ascontiguousarray(array).data.cast("B")
        while len(view):
            number, start = divmod(offset, _BLOCK_BYTES)
            piece = view[: _BLOCK_BYTES - start]
            if (whole := self._take(number, start, piece)) is not None:
                _write_all(self._descriptor, whole, number * _BLOCK_BYTES)
                if len(whole) == _BLOCK_BYTES:  # the file's last block may be shorter
                    self._spare.append(whole)
            view, offset = view[len(piece) :], offset + len(piece)

    def flush(self) -> None:
        """Write what is left."""
        with self._lock:
            for number in list(self._open):
                self._write_early(number)

    def _take(self, number: int, start: int, piece: memoryview) -> memoryview | None:
        """Put a piece into its block; return the block if that makes it whole."""
        with self._lock:
            if number in self._early:
                _write_all(self._descriptor, piece, number * _BLOCK_BYTES + start)
                return None
            if number not in self._open:
                # Bytes between weights never come, so some blocks never get whole: the oldest give way.
                if len(self._open) == _MAX_OPEN_BLOCKS:
                    self._write_early(next(iter(self._open)))
                self._open[number] = self._new_block(number)
            block, missing = self._open[number]
            block[start : start + len(piece)] = piece
            if missing > len(piece):
                self._open[number] = (block, missing - len(piece))
                return None
            del self._open[number]
            return block

    def _new_block(self, number: int) -> tuple[memoryview, int]:
        length = min(_BLOCK_BYTES, self._size - number * _BLOCK_BYTES)
        if length == _BLOCK_BYTES and self._spare:
            block = self._spare.pop()
            np.frombuffer(block, np.uint8)[:] = 0
        else:
            block = memoryview(bytearray(length))
        return block, length

    def _write_early(self, number: int) -> None:
        block, _ = self._open.pop(number)
        self._early.add(number)
        _write_all(self._descriptor, block, number * _BLOCK_BYTES)


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while len(view):
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def translate_os_errors(target: Path) -> Any:
    """Turn what the file system says into one sentence and exit code 5; nothing is left at `target`."""
    try:
        yield
    except OSError as error:
        where = error.filename or target
        detail = error.strerror or str(error)
        raise ResourceError(f"{where}: {detail}; nothing was written to {target}.", code="E502") from None
