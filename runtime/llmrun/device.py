"""GPUs as the driver shows them (through the operator library, which finds the driver at run time), and their memory.

What there is and how fast, whether an artifact's weights, cache and steps fit, opening one for a job and giving it back. Where
a rank computes is chosen elsewhere (`gpu_choice.py`). Opens no session; knows no graph.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmrun.errors import IncompatibleError, InternalError, ResourceError

if TYPE_CHECKING:
    from llmrun.manifest import Manifest
    from llmrun.watchdog import Watchdog

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "rocm": "ROCMExecutionProvider"}
VENDORS = {"cuda": 0, "rocm": 1}
# Sequences of a decode step that is captured, at most: their logits take memory by the square, and the time of larger steps is
# the kernels', not that of launching them.
MOST_CAPTURED = 32
_CODE_REFUSED = 1  # LLMPACK_GPU_CODE_REFUSED of llmpack_ops.h
_JSON_BYTES = 1 << 16
_SPARE_SHARE = 0.05  # of a GPU's free memory: allocators round up
# What the packager lays out for the choice of the likeliest tokens (FORMAT 5.9, 8.4): how many of a row, from how many columns.
_TOP_K, _TOP_K_CHUNK = 64, 2048
GRAPH = "gpu"  # the key of a rank's graph for any GPU


@dataclass(frozen=True)
class Gpu:
    """One GPU as its driver shows it; `chip` is "sm_89" or "gfx1100"."""

    ordinal: int
    name: str
    chip: str
    pci_id: str
    multiprocessors: int
    total_bytes: int


@dataclass(frozen=True)
class Placement:
    """Where a rank computes. On the CPU, `gpu` and `kernels` are None; `sharers`: ranks on the same GPU.

    `free_bytes`: of the GPU's memory, when it was chosen; `why_not_gpu`: what kept "auto" from the GPU that it looked for.
    """

    provider: str
    gpu: Gpu | None = None
    kernels: str | None = None
    sharers: int = 1
    free_bytes: int = 0
    why_not_gpu: str = field(default="", compare=False)

    @property
    def graph(self) -> str:
        """Key of the rank's graph in the manifest."""
        return "cpu" if self.gpu is None else GRAPH


def probe(ops: ctypes.CDLL, provider: str) -> tuple[str, list[Gpu]]:
    """Return the driver's version and its GPUs.

    Raises:
        IncompatibleError: there is no driver, it is too old, or it shows no GPU.
    """
    found = _ask(ops.llmpack_ops_gpu_probe, ops, VENDORS[provider])
    return f"{found['library']}, {found['version']}", [Gpu(**gpu) for gpu in found["devices"]]


def free_bytes(ops: ctypes.CDLL, provider: str, gpu: Gpu) -> int:
    """Return what is free of a GPU's memory; this process uses the GPU from now on.

    Raises:
        IncompatibleError: it cannot.
    """
    found = ctypes.c_int64()
    if ops.llmpack_ops_gpu_free_bytes(VENDORS[provider], gpu.ordinal, ctypes.byref(found)) != 0:
        raise IncompatibleError(_last_error(ops), code="E421")
    return found.value


def measure(ops: ctypes.CDLL, provider: str, device: int, peer: int = -1) -> dict[str, Any]:
    """Measure a GPU's links (llmpack_ops.h); `peer`: another GPU, -1 for none."""
    return _ask(ops.llmpack_ops_gpu_measure, ops, VENDORS[provider], device, peer)


def _ask(function: Any, ops: ctypes.CDLL, *arguments: int) -> dict[str, Any]:
    text = ctypes.create_string_buffer(_JSON_BYTES)
    if function(*arguments, text, _JSON_BYTES) != 0:
        raise IncompatibleError(_last_error(ops), code="E421")
    return json.loads(text.value)


def _last_error(ops: ctypes.CDLL) -> str:
    text = ops.llmpack_ops_last_error().decode("utf-8", "replace")
    return text.partition(": ")[2] or text  # without the function's name


def activation_bytes(manifest: Manifest, num_tokens: int, max_num_seqs: int) -> int:
    """Bound the memory of steps beside weights and cache: activations, logits of every row, and the launcher's workspace.

    A decode step of each number of sequences up to MOST_CAPTURED is a graph of its own, with logits of its own. Logits, and
    what is chosen among them, are values of ONNX Runtime's, whose allocator takes powers of two from the driver: up to twice
    as much.
    """
    model, shards = manifest.model, manifest.shards
    heads = (model.num_attention_heads + 2 * max(model.num_key_value_heads, shards)) // shards * model.head_dim
    per_token = 3 * 4 * model.hidden_size + 2 * 2 * model.hidden_size + 2 * heads
    per_token += 2 * 3 * model.intermediate_size // shards + 4 * model.head_dim
    experts_of_all = 0
    if model.num_experts is not None:  # the launcher's workspace: custom_ops/ort/gpu_moe.cpp
        width = (model.moe_intermediate_size or 0) // shards
        per_token += model.num_all_experts_per_tok * (16 + 2 * (width + model.hidden_size)) + 4 * model.num_experts
        experts_of_all = 12 * model.num_all_experts
    columns = -(-model.vocab_size // shards)  # of the logits, and for the choice among them (FORMAT 8.4)
    logits_and_record = 4 * columns + 8 * (_TOP_K + 1)
    per_row = logits_and_record + (8 * _TOP_K + 4) * (columns // _TOP_K_CHUNK + 1)
    most = min(max_num_seqs, MOST_CAPTURED)
    graphs = most * (most + 1) // 2 * logits_and_record
    return num_tokens * (per_token + 2 * per_row) + experts_of_all + 2 * graphs + (64 << 20)


def fit_blocks(
    placement: Placement,
    manifest: Manifest,
    rank: int,
    wanted: int,
    least: int,
    num_tokens: int,
    max_num_seqs: int,
    *,
    is_exact: bool,
) -> int:
    """Return how many of the wanted cache blocks the GPU's free memory holds beside the weights.

    Args:
        placement: on a GPU.
        manifest: sizes.
        rank: whose.
        wanted: cache blocks.
        least: blocks of one sequence of full length.
        num_tokens: in a step, at most.
        max_num_seqs: sequences in a step, at most.
        is_exact: fewer than wanted will not do.

    Raises:
        ResourceError: not even `least`; says what is needed and what is free.
    """
    gpu = placement.gpu
    assert gpu is not None
    spec, weight_bytes = manifest.kv_cache, manifest.ranks[rank].weight_bytes
    block_bytes = spec.block_size * spec.bytes_per_token
    fixed = weight_bytes + activation_bytes(manifest, num_tokens, max_num_seqs)
    free = int(placement.free_bytes * (1 - _SPARE_SHARE)) // placement.sharers
    num_blocks = min(wanted, (free - fixed) // block_bytes)
    needed = wanted if is_exact else least
    if num_blocks < needed:
        need, positions = fixed + needed * block_bytes, needed * spec.block_size
        sharing = f", shared by {placement.sharers} ranks" if placement.sharers > 1 else ""
        raise ResourceError(
            f"rank {rank} needs {need / 1e9:.1f} GB ({weight_bytes / 1e9:.1f} weights,"
            f" {needed * block_bytes / 1e9:.1f} KV cache of {positions} positions), GPU {gpu.ordinal} has"
            f" {placement.free_bytes / 1e9:.1f} GB free{sharing}: use a"
            f" {'smaller --kv-cache-mb' if is_exact else 'shorter --max-seq-len'}, or pack for more shards.",
            code="E504",
        )
    return num_blocks


class _Description(ctypes.Structure):
    """`LlmpackGpu` of llmpack_ops.h."""

    _fields_ = (
        ("struct_size", ctypes.c_int32),
        ("vendor", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("max_sequences", ctypes.c_int32),
        ("max_rows", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("kernels", ctypes.c_char_p),
    )


_user: Watchdog | None = None  # of the job for which this process has opened a GPU


class CodeRefusedError(IncompatibleError):
    """The driver takes no such code, and may take another target's."""


def open_gpu(
    ops: ctypes.CDLL, placement: Placement, kernels: bytes, max_sequences: int, num_tokens: int, *, user: Watchdog
) -> None:
    """Make the GPU and its code those of this process, until another job opens one after `user` was closed.

    Raises:
        CodeRefusedError: the driver is older than what assembled the code.
        IncompatibleError: the driver or the launcher refuses; says what it found.
    """
    assert placement.gpu is not None
    size, vendor = ctypes.sizeof(_Description), VENDORS[placement.provider]
    global _user
    if _user is None or _user.is_closed:
        # Here all ranks have done with it; when a job ends, one may still read what another shares.
        ops.llmpack_ops_gpu_close()
        _open_memories.clear()
        _user = user
    given = _Description(size, vendor, placement.gpu.ordinal, max_sequences, num_tokens, 0, kernels)
    if (result := ops.llmpack_ops_gpu_open(ctypes.byref(given))) != 0:
        kind = CodeRefusedError if result == _CODE_REFUSED else IncompatibleError
        raise kind(_last_error(ops), code="E422")


class Memory:
    """A piece of memory of the GPU that `open_gpu` opened, until it is closed, or the next GPU is opened."""

    def __init__(self, ops: ctypes.CDLL) -> None:
        self._ops, self._address = ops, 0

    def allocate(self, num_bytes: int) -> int:
        """Return the address of `num_bytes`, all zero; once.

        Raises:
            ResourceError: the driver has no more.
        """
        address = ctypes.c_void_p()
        if self._ops.llmpack_ops_gpu_allocate(num_bytes, ctypes.byref(address)) != 0:
            raise ResourceError(
                f"{_last_error(self._ops)} There was more when this was planned: end what else took it, or use a smaller"
                " --kv-cache-mb or --max-seq-len.",
                code="E504",
            )
        self._address = address.value or 0
        _open_memories.add(self)
        return self._address

    def fill(self, address: int, byte: int, num_bytes: int) -> None:
        """Set each of `num_bytes` to `byte`.

        Raises:
            InternalError: the driver refuses.
        """
        if self._ops.llmpack_ops_gpu_fill(address, byte, num_bytes) != 0:
            raise InternalError(_last_error(self._ops))

    def close(self) -> None:
        """Give it back, unless its GPU was closed; no step may use it any more."""
        if self in _open_memories:
            _open_memories.discard(self)
            self._ops.llmpack_ops_gpu_free(self._address)


_open_memories: set[Memory] = set()


def join_gpus(ops: ctypes.CDLL) -> tuple[str, bool]:
    """Join the ranks' GPUs, in step on every rank; return how values travel, and whether a step may be captured."""
    if ops.llmpack_ops_gpu_share() != 0:
        raise IncompatibleError(_last_error(ops), code="E422")
    flag = ctypes.c_int()
    text = ops.llmpack_ops_gpu_transport(ctypes.byref(flag)).decode()
    return text, bool(flag.value)
