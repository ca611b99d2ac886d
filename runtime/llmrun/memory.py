"""Memory that this host has to give, how many blocks of the KV cache it holds, and what a process gives back."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

from llmrun.control_groups import control_groups
from llmrun.errors import ResourceError

if TYPE_CHECKING:
    from llmrun.manifest import KvCacheSpec, Manifest

_M_MMAP_THRESHOLD = -3  # <malloc.h>
_LARGE_BLOCK_BYTES = 1 << 20


def give_large_blocks_back() -> None:
    """Let the C library return blocks of a megabyte and more to the system as soon as they are freed.

    By itself glibc raises that size to the largest block freed so far, up to 32 MB, and a server whose requests differ then
    holds the gaps between them (LOG.md 2026-11-25: 67 instead of 110 MB). For the whole process, so for programs of ours
    alone; the user's MALLOC_MMAP_THRESHOLD_ takes precedence.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)


def available_bytes() -> int:
    """Return the memory that the system could give now, within the limits of the control groups around this process."""
    available = 1 << 62
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    return min([available, *(left for group in control_groups("memory") if (left := _left_of(group)) is not None)])


def _left_of(group: Path) -> int | None:
    """Return what a control group may still take, files' pages that can be dropped included; None: no limit."""
    for limit_name, used_name, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            limit, used = (int((group / name).read_text()) for name in (limit_name, used_name))
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # "max", or no limit can be set here
        cached = sum(int(statistics.get(f"{prefix}{name}_file", 0)) for name in ("active", "inactive"))
        return max(limit - used + cached, 0)
    return None


def expect_one_sequence(spec: KvCacheSpec, num_blocks: int, max_seq_len: int) -> None:
    """Refuse a cache, of --kv-cache-mb, in which the longest sequence does not fit.

    Raises:
        ResourceError: says how much it takes.
    """
    least = -(-max_seq_len // spec.block_size)
    if num_blocks < least:
        needed = least * spec.block_size * spec.bytes_per_token
        raise ResourceError(
            f"--kv-cache-mb holds {num_blocks * spec.block_size} positions, and one sequence has up to {max_seq_len}."
            f" Give {-(-needed >> 20)} MiB or more, or use a shorter --max-seq-len.",
            code="E502",
        )


def fit_blocks(manifest: Manifest, rank: int, free_bytes: int, wanted: int, max_seq_len: int, *, is_exact: bool) -> int:
    """Return how many of the wanted cache blocks fit a rank's share of the host's memory.

    Args:
        manifest: says what a block takes.
        rank: for the message.
        free_bytes: beside the weights, for this rank.
        wanted: blocks.
        max_seq_len: positions of the longest sequence, which must fit.
        is_exact: fewer than wanted will not do.
    Raises:
        ResourceError: they do not fit.
    """
    spec = manifest.kv_cache
    block_bytes = spec.block_size * spec.bytes_per_token
    fitting = int(0.9 * free_bytes) // block_bytes
    least = -(-max_seq_len // spec.block_size)
    if is_exact:
        expect_one_sequence(spec, wanted, max_seq_len)
    if fitting < (wanted if is_exact else least):
        needed = (wanted if is_exact else least) * block_bytes >> 20
        what = "--kv-cache-mb asks for" if is_exact else f"the KV cache of {max_seq_len} positions needs"
        raise ResourceError(
            f"rank {rank}: {free_bytes >> 20} MiB are free beside the weights"
            f" ({manifest.ranks[rank].weight_bytes >> 20} MiB), of which the cache may take 9 in 10, and {what} {needed} MiB."
            f" Use a {'smaller --kv-cache-mb' if is_exact else 'shorter --max-seq-len'}.",
            code="E502",
        )
    return min(wanted, fitting)
