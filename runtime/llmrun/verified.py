"""Remembers which files were hashed and found right, so that the next start need not read them all again.

In: an opened artifact and names of its files. A stamp is a small file in the user's cache folder whose name and content
follow from the manifest's digest, the machine's boot and, for each file, device, inode, size, mtime and ctime. So a stamp
is never parsed: it is there with exactly the expected bytes, or the files are hashed. It holds as long as the file system
would report a change: ctime moves with every write, rename and change of times, and only root can set it back. It cannot
see a medium that returns other bytes than were written; `llmrun verify` and `--verify full` do. Whatever goes wrong here
(no home, a full or read-only disk, somebody else's folder) only means that files are hashed. Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path

FileTimes = Mapping[str, tuple[int, ...]]  # name -> (st_dev, st_ino, st_size, st_mtime_ns, st_ctime_ns)

MAX_STAMPS = 64
# Younger files are hashed and not stamped. Two writes within one tick of the kernel's clock (up to 10 ms) leave the same
# times, as do writes through a mapping until the system has written the page back (30 s by default, then checked each 5 s).
SETTLED_NS = 60 * 10**9
# File systems of this machine's kernel that keep ctime themselves. A server, a user's process or a read-only image made
# with fixed times decides it otherwise; tmpfs does not notice what is written through a mapping (measured, Linux 6.18), and
# neither does an overlay whose upper layer is one (a live system): that cannot be told from a container's, which is trusted.
_TRUSTED = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "zfs", "overlay"}
_ALL_USERS = 0o077


def is_stamped(manifest_digest: str, files: FileTimes) -> bool:
    """Tell whether exactly these files, unchanged since, were hashed during this boot of the machine."""
    content = _content(manifest_digest, files)
    if not content:
        return False
    with contextlib.suppress(OSError), _Folder(may_create=False) as folder:
        descriptor = os.open(_name(content), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        with open(descriptor, "rb") as file:
            return _is_private(os.fstat(descriptor), stat.S_ISREG) and file.read(len(content) + 1) == content
    return False


def stamp(manifest_digest: str, files: FileTimes, root: Path) -> bool:
    """Remember that these files of an artifact in `root` were hashed, and have not changed since; True if it is done."""
    content = _content(manifest_digest, files)
    youngest = max((time_ns for entry in files.values() for time_ns in entry[3:]), default=0)
    if not content or youngest > time.time_ns() - SETTLED_NS:
        return False
    if not all(_file_system(root / name) in _TRUSTED for name in files):  # a rank's folder may be mounted there
        return False
    with contextlib.suppress(OSError), _Folder(may_create=True) as folder:
        partial = f"{secrets.token_hex(8)}.partial"
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=folder)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
            os.rename(partial, _name(content), src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            os.unlink(partial, dir_fd=folder)
            raise
        _prune(folder)
        return True
    return False


def _content(manifest_digest: str, files: FileTimes) -> bytes:
    """Return the stamp's bytes; none if this system does not say which boot this is, or there is no file to speak of.

    The boot counts because data that was hashed in memory may never have reached the disk when the power failed.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return b""
    if not boot or not files or not all(len(entry) == 5 for entry in files.values()):
        return b""
    lines = [f"{name} {' '.join(map(str, entry))}" for name, entry in sorted(files.items())]
    return "\n".join(["llmrun verified 1", f"manifest {manifest_digest}", f"boot {boot}", *lines, ""]).encode()


def _name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _is_private(info: os.stat_result, is_kind: Callable[[int], bool]) -> bool:
    return is_kind(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & _ALL_USERS


class _Folder:
    """The cache folder, opened: ours alone and no link, or an OSError."""

    def __init__(self, *, may_create: bool) -> None:
        self._may_create = may_create
        self._descriptor = -1

    def __enter__(self) -> int:
        base = os.environ.get("XDG_CACHE_HOME", "")
        path = Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "llmrun")
        if not path.is_absolute():
            raise FileNotFoundError("no home directory")
        if self._may_create:
            path.parent.mkdir(0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                path.mkdir(0o700)
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        if not _is_private(os.fstat(self._descriptor), stat.S_ISDIR):
            os.close(self._descriptor)
            raise PermissionError(f"{path}: not this user's alone")
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _prune(folder: int) -> None:
    """Remove the oldest stamps beyond MAX_STAMPS, what interrupted writers left included."""
    ages: list[tuple[int, str]] = []
    for name in os.listdir(folder):
        with contextlib.suppress(OSError):  # another process was faster
            ages.append((os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime_ns, name))
    for _, name in sorted(ages, reverse=True)[MAX_STAMPS:]:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=folder)


def _file_system(path: Path) -> str:
    """Return the type of the file system that holds `path` (proc_pid_mountinfo(5)); empty if that cannot be told."""
    # The kernel writes these four as \ooo, and a name's other bytes as they are.
    place = re.sub(rb"[ \t\n\\]", lambda found: b"\\%03o" % ord(found[0]), os.fsencode(os.path.realpath(path)))
    best, found = -1, ""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().split(b"\n")
    except OSError:
        return ""
    for fields in (line.split(b" ") for line in lines if line):
        point = fields[4]
        is_above = place == point or place.startswith(point.rstrip(b"/") + b"/")
        if is_above and len(point) >= best:  # the last one covers
            best, found = len(point), os.fsdecode(fields[fields.index(b"-") + 1])
    return found
