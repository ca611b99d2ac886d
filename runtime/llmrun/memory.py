"""Memory that this host has to give, and how many blocks of the KV cache it holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmrun.errors import ResourceError

if TYPE_CHECKING:
    from llmrun.manifest import Manifest


def available_bytes() -> int:
    """Return the memory that the system could give now, within the container's limit."""
    available = 1 << 62
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            reclaimable = 0
            for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines():
                if line.startswith(("inactive_file ", "active_file ")):
                    reclaimable += int(line.split()[1])
            available = min(available, int(limit) - used + reclaimable)
    except (OSError, ValueError):
        pass
    return available


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
    if is_exact and wanted < least:
        raise ResourceError(
            f"--kv-cache-mb holds {wanted * spec.block_size} positions, and one sequence has up to {max_seq_len}."
            f" Give {-(-least * block_bytes >> 20)} MiB or more, or use a shorter --max-seq-len.",
            code="E502",
        )
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
