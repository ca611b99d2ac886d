"""Choose where a rank computes: on the CPU, or on which GPU of its host and with which of the artifact's code.

In: what the user asked for, what the artifact holds, the GPUs that each rank of the host is shown. Out: a `Placement`, or one
sentence that says what is missing. It opens nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from llmrun import device
from llmrun.device import PROVIDERS, VENDORS, Gpu, Placement
from llmrun.errors import IncompatibleError, UsageError
from llmrun.manifest import CUDA_TARGETS, PTX_TARGET, ROCM_TARGETS

if TYPE_CHECKING:
    from llmrun.manifest import Manifest

_TEGRA = 87  # runs no code of the desktop's chips (CUDA's programming guide, "Binary Compatibility")
_PACKAGES = {"cuda": "onnxruntime-gpu", "rocm": "onnxruntime-rocm"}


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
    wanted = _wanted(manifest, available) if provider == "auto" else [provider] if provider in VENDORS else []
    found: dict[str, list[str]] = {}
    for name in wanted:
        with contextlib.suppress(IncompatibleError):
            named = _by_name(device.probe(ops, name)[1])
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
    _, gpus = device.probe(ops, provider)
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
    return Placement(provider, gpu, target, taken.count(taken[local_rank]), device.free_bytes(ops, provider, gpu))


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
    return [name for name in VENDORS if PROVIDERS[name] in available and _holds(manifest, name)]


def _holds(manifest: Manifest, provider: str) -> bool:
    prefix = "gfx" if provider == "rocm" else "sm_"
    return any(name.startswith(prefix) for name in manifest.kernels)


def _targets(manifest: Manifest) -> str:
    return ", ".join(dict.fromkeys((*manifest.targets, *manifest.kernels)))
