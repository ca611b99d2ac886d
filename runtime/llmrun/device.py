"""Which processor a rank computes on: the CPU or one GPU, which GPU, with which code, and whether everything fits.

In: what the artifact holds, what the driver shows (through the operator library, which finds the driver at run time), what the
user asked for. Out: a `Placement`, or one sentence that says what is missing. Opens no session; knows no graph.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmrun.errors import IncompatibleError, InternalError, ResourceError, UsageError
from llmrun.manifest import CUDA_TARGETS, PTX_TARGET, ROCM_TARGETS

if TYPE_CHECKING:
    from llmrun.manifest import Manifest
    from llmrun.watchdog import Watchdog

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "rocm": "ROCMExecutionProvider"}
_VENDORS = {"cuda": 0, "rocm": 1}
# Sequences of a decode step that is captured, at most: their logits take memory by the square, and the time of larger steps is
# the kernels', not that of launching them.
MOST_CAPTURED = 32
_CODE_REFUSED = 1  # LLMPACK_GPU_CODE_REFUSED of llmpack_ops.h
_TEGRA = 87  # runs no code of the desktop's chips (CUDA's programming guide, "Binary Compatibility")
_PACKAGES = {"cuda": "onnxruntime-gpu", "rocm": "onnxruntime-rocm"}
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
    found = _ask(ops.llmpack_ops_gpu_probe, ops, _VENDORS[provider])
    return f"{found['library']}, {found['version']}", [Gpu(**gpu) for gpu in found["devices"]]


def free_bytes(ops: ctypes.CDLL, provider: str, gpu: Gpu) -> int:
    """Return what is free of a GPU's memory; this process uses the GPU from now on.

    Raises:
        IncompatibleError: it cannot.
    """
    found = ctypes.c_int64()
    if ops.llmpack_ops_gpu_free_bytes(_VENDORS[provider], gpu.ordinal, ctypes.byref(found)) != 0:
        raise IncompatibleError(_last_error(ops), code="E421")
    return found.value


def measure(ops: ctypes.CDLL, provider: str, device: int, peer: int = -1) -> dict[str, Any]:
    """Measure a GPU's links (llmpack_ops.h); `peer`: another GPU, -1 for none."""
    return _ask(ops.llmpack_ops_gpu_measure, ops, _VENDORS[provider], device, peer)


def _ask(function: Any, ops: ctypes.CDLL, *arguments: int) -> dict[str, Any]:
    text = ctypes.create_string_buffer(_JSON_BYTES)
    if function(*arguments, text, _JSON_BYTES) != 0:
        raise IncompatibleError(_last_error(ops), code="E421")
    return json.loads(text.value)


def _last_error(ops: ctypes.CDLL) -> str:
    text = ops.llmpack_ops_last_error().decode("utf-8", "replace")
    return text.partition(": ")[2] or text  # without the function's name


def choose_kernels(chip: str, targets: Iterable[str]) -> str | None:
    """Return which of the targets runs on a chip; None: no one does (FORMAT 8.1).

    >>> choose_kernels("sm_89", ["sm_86", "sm_80", "ptx_80"])
    'sm_86'
    >>> choose_kernels("sm_121", ["sm_120", "ptx_80"])
    'ptx_80'
    """
    kernels = list(targets)
    if chip in kernels:
        return chip
    if not chip.startswith("sm_"):
        return None
    number = int(chip.removeprefix("sm_"))
    if number // 10 == 8 and number != _TEGRA:
        near = [int(name.removeprefix("sm_")) for name in kernels if name.startswith("sm_8")]
        if older := [n for n in near if n < number]:
            return f"sm_{max(older)}"
    texts = [int(name.removeprefix("ptx_")) for name in kernels if name.startswith("ptx_")]
    usable = [n for n in texts if n <= number]
    return f"ptx_{max(usable)}" if usable else None


def best_target(chip: str) -> str | None:
    """Return which of all targets that can be packed runs on a chip; None: llmpack has no code for it."""
    return choose_kernels(chip, (*CUDA_TARGETS, *ROCM_TARGETS, PTX_TARGET))


def shown_gpus(provider: str, manifest: Manifest, ops: ctypes.CDLL, available: Sequence[str]) -> dict[str, list[str]]:
    """Return the names of the GPUs that this process is shown and the artifact has code for, by provider.

    What keeps it from a provider's GPUs is said by `place`.
    """
    wanted = _wanted(manifest, available) if provider == "auto" else [provider] if provider in _VENDORS else []
    found: dict[str, list[str]] = {}
    for name in wanted:
        with contextlib.suppress(IncompatibleError):
            named = _by_name(probe(ops, name)[1])
            found[name] = [own for own, gpu in named.items() if choose_kernels(gpu.chip, manifest.kernels)]
    return found


def _by_name(gpus: Sequence[Gpu]) -> dict[str, Gpu]:
    """Name GPUs as every process of the host would: by PCI id, and the parts of one that is split by number, too."""
    ids = [gpu.pci_id for gpu in gpus]
    parts = [ids[:place].count(pci_id) for place, pci_id in enumerate(ids)]
    return {pci_id + f"#{part}" * (part > 0): gpu for pci_id, part, gpu in zip(ids, parts, gpus, strict=True)}


def share_out(shown: Sequence[Sequence[str]]) -> list[str]:
    """Return which GPU each rank of a host takes, of those that it is shown; "" for one that is shown none.

    A scheduler shows each rank one of its own, or all ranks all. Who has the least choice chooses first, and takes the one
    that the fewest have taken.

    >>> share_out([["a", "b"], ["a", "b"], ["a", "b"]])
    ['a', 'b', 'a']
    >>> share_out([["a", "b"], ["a"]])
    ['b', 'a']
    """
    taken = [""] * len(shown)
    for rank in sorted(range(len(shown)), key=lambda rank: len(shown[rank])):
        taken[rank] = min(shown[rank], key=taken.count, default="")
    return taken


def place(
    provider: str,
    manifest: Manifest,
    ops: ctypes.CDLL,
    available: Sequence[str],
    *,
    local_rank: int,
    shown: Sequence[Mapping[str, Sequence[str]]],
    share_gpu: bool = False,
) -> Placement:
    """Decide where a rank computes.

    Args:
        provider: "auto", "cpu", "cuda" or "rocm".
        manifest: what the artifact holds.
        ops: the operator library.
        available: ONNX Runtime's execution providers.
        local_rank: number of this rank among those of its host.
        shown: what `shown_gpus` says on each of those.
        share_gpu: let ranks share a GPU where there are too few.

    Raises:
        IncompatibleError: what was asked for cannot run here.
        UsageError: more ranks than GPUs.
    """
    reasons: list[str] = []
    if provider == "auto":
        for name in _wanted(manifest, available):
            try:
                return _place_on_gpu(name, manifest, ops, local_rank, shown, share_gpu)
            except (IncompatibleError, UsageError) as error:
                if "cpu" not in manifest.targets:
                    raise
                reasons.append(str(error))
        provider = "cpu"
    if provider == "cpu":
        if "cpu" not in manifest.targets:
            raise IncompatibleError(f"--provider cpu: the artifact is for {_targets(manifest)} only.", code="E415")
        return Placement("cpu", why_not_gpu=" ".join(reasons))
    if not _holds(manifest, provider):
        raise IncompatibleError(
            f"--provider {provider}: the artifact holds code for {_targets(manifest)} only. Use --provider cpu, or pack with"
            f" --targets {provider}.",
            code="E415",
        )
    placement = _place_on_gpu(provider, manifest, ops, local_rank, shown, share_gpu)
    if PROVIDERS[provider] not in available:
        raise IncompatibleError(
            f"--provider {provider}: the installed onnxruntime has {', '.join(available)} only. Uninstall it and"
            f' `pip install "llmpack[{provider}]"` ({_PACKAGES[provider]}).',
            code="E414",
        )
    return placement


def _place_on_gpu(
    provider: str,
    manifest: Manifest,
    ops: ctypes.CDLL,
    local_rank: int,
    shown: Sequence[Mapping[str, Sequence[str]]],
    share_gpu: bool,
) -> Placement:
    _, gpus = probe(ops, provider)
    if not gpus:
        raise IncompatibleError(f"--provider {provider}: the driver shows no GPU.", code="E421")
    taken = share_out([own.get(provider, ()) for own in shown])
    if not taken[local_rank]:
        raise _no_code(provider, manifest, gpus[local_rank % len(gpus)])
    named = _by_name(gpus)
    ranks, num_gpus = len(taken) - taken.count(""), len({*taken} - {""})
    if ranks > num_gpus and not share_gpu:
        which = " that the artifact has code for" if any(name not in taken for name in named) else ""
        raise UsageError(
            f"--provider {provider}: {ranks} ranks and {num_gpus} GPU{'s' * (num_gpus > 1)} on this host{which}. Pack for"
            f" --shards {num_gpus}, or let them share with --share-gpu (slow).",
            code="E209",
        )
    gpu = named[taken[local_rank]]
    target = choose_kernels(gpu.chip, manifest.kernels)
    return Placement(provider, gpu, target, taken.count(taken[local_rank]), free_bytes(ops, provider, gpu))


def _no_code(provider: str, manifest: Manifest, gpu: Gpu) -> IncompatibleError:
    best = best_target(gpu.chip)
    advice = f"Pack with --targets {'cuda' if best == PTX_TARGET else best}."
    return IncompatibleError(
        f"--provider {provider}: no code for GPU {gpu.ordinal} ({gpu.name}, {gpu.chip}); the artifact holds"
        f" {_targets(manifest)}. {advice if best else f'llmpack has none for {gpu.chip}: use --provider cpu.'}",
        code="E422",
    )


def _wanted(manifest: Manifest, available: Sequence[str]) -> list[str]:
    """Return the providers of GPUs that "auto" tries, in order."""
    return [name for name in _VENDORS if PROVIDERS[name] in available and _holds(manifest, name)]


def _holds(manifest: Manifest, provider: str) -> bool:
    prefixes = ("gfx",) if provider == "rocm" else ("sm_", "ptx_")
    return any(name.startswith(prefixes) for name in manifest.kernels)


def _targets(manifest: Manifest) -> str:
    return ", ".join(dict.fromkeys((*manifest.targets, *manifest.kernels)))


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
    columns = -(-model.vocab_size // shards)  # of the logits, and for the choice among them (FORMAT 8.4)
    logits_and_record = 4 * columns + 8 * (_TOP_K + 1)
    per_row = logits_and_record + (8 * _TOP_K + 4) * (columns // _TOP_K_CHUNK + 1)
    most = min(max_num_seqs, MOST_CAPTURED)
    graphs = most * (most + 1) // 2 * logits_and_record
    return num_tokens * (per_token + 2 * per_row) + 2 * graphs + (64 << 20)


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
    size, vendor = ctypes.sizeof(_Description), _VENDORS[placement.provider]
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
