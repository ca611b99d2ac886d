"""What a user may decide about a job, and every rank must know alike."""

from __future__ import annotations

from dataclasses import dataclass

from llmrun.errors import UsageError
from llmrun.requests import is_whole
from llmrun.step_budget import DEFAULT_TOKEN_BUDGET, most_tokens

PROVIDER_CHOICES = ("auto", "cpu", "cuda", "rocm")
VERIFY_MODES = ("auto", "full", "size", "off")
# Of the CPU kernels; llmpack_ops.h says what each needs.
ISAS = ("portable", "avx2", "avx2-vnni", "avx512", "avx512-vbmi", "neon")


@dataclass(frozen=True)
class JobOptions:
    """What every rank of a job must be told alike."""

    provider: str = "auto"
    threads: int | None = None
    max_seq_len: int | None = None
    max_num_seqs: int = 8
    verify: str = "auto"
    isa: str | None = None
    kv_cache_mb: int | None = None
    share_gpu: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.verify not in VERIFY_MODES:
            raise UsageError(f"verify {self.verify!r}: expected one of {', '.join(VERIFY_MODES)}.")
        for name in ("threads", "max_seq_len", "max_num_seqs", "kv_cache_mb"):
            value = getattr(self, name)
            if value is not None and not is_whole(value, 1):
                raise UsageError(f"{name.replace('_', '-')} {value!r}: expected a whole number from 1.")

    @property
    def most_tokens(self) -> int:
        """Tokens in a step, at most: a GPU's memory is laid out for as many."""
        return most_tokens(DEFAULT_TOKEN_BUDGET, self.max_num_seqs)
