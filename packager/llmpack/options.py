"""What a user decides about an artifact; the defaults live here."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """What `pack` takes beside the two directories.

    Attributes:
        shards: number of ranks.
        scheme: of the weights: q4, q8, f16 or f32.
        group_size: weights per scale; None: the first of `weights.DEFAULT_GROUP_SIZES` that divides.
        targets: names of `kernels.parse_targets`.
        max_seq_len: positions of a sequence at most; None: the model's.
        force: replace an artifact that exists.
        kv_dtype: of keys and values, "f16" or "f32"; None: f32 if the weights are f32, else f16.
    """

    shards: int = 1
    scheme: str = "q4"
    group_size: int | None = None
    targets: tuple[str, ...] = ("cpu",)
    max_seq_len: int | None = None
    force: bool = False
    kv_dtype: str | None = None
