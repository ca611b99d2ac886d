"""Where a rank computes: decided from what the artifact holds, what the driver shows, and what the user asked for."""

from __future__ import annotations

import dataclasses
import doctest
import json
from types import SimpleNamespace

import pytest

from llmpack import kernel_plan, kernels
from llmrun import device, gpu_choice
from llmrun.errors import IncompatibleError, ResourceError, UsageError
from llmrun.manifest import KvCacheSpec

ALL = ("CUDAExecutionProvider", "ROCMExecutionProvider", "CPUExecutionProvider")
CPU_ONLY = ("CPUExecutionProvider",)


class FakeOps:
    """An operator library whose driver shows these chips, at PCI ids from `first` on; None: there is no driver."""

    def __init__(self, chips=None, free=24_000_000_000, first=0, step=1):
        self.chips, self.free, self.first, self.step = chips, free, first, step

    def llmpack_ops_gpu_probe(self, vendor, text, size):
        if self.chips is None or bool(self.chips and self.chips[0].startswith("gfx")) != bool(vendor):
            return -1
        gpus = [
            {"ordinal": i, "name": "RTX", "chip": chip, "pci_id": f"{self.first + i * self.step}", "multiprocessors": 128,
             "total_bytes": self.free}
            for i, chip in enumerate(self.chips)
        ]  # fmt: skip
        data = json.dumps({"library": "libcuda.so.1", "version": "CUDA 12.8", "devices": gpus}).encode()
        assert len(data) < size
        text.value = data
        return 0

    def llmpack_ops_gpu_free_bytes(self, _vendor, _device, found):
        found._obj.value = self.free
        return 0

    def llmpack_ops_last_error(self):
        return b"llmpack_ops_gpu_probe: no NVIDIA driver (not found): install it."


def manifest(*targets, kernels=None, scheme_bytes=18_200_000_000):
    names = targets or ("cpu", "sm_89")
    kernels = {name: name for name in names if name != "cpu"} if kernels is None else kernels
    model = SimpleNamespace(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8,
                            head_dim=128, vocab_size=32000, num_experts=None)  # fmt: skip
    cache = KvCacheSpec("float16", 16, 80, 4, 128)
    ranks = [SimpleNamespace(weight_bytes=scheme_bytes)] * 2
    return SimpleNamespace(targets=names, kernels=kernels, model=model, kv_cache=cache, shards=2, ranks=ranks)


def place(provider, held, ops, available=ALL, rank=0, size=1, **options):
    shown = [gpu_choice.shown_gpus(provider, held, ops, available)] * size
    return gpu_choice.place(provider, held, ops, available, local_rank=rank, shown=shown, **options)


@pytest.mark.parametrize(
    ("chip", "held", "taken"),
    [
        ("sm_89", ("sm_80", "sm_89", "ptx_80"), "sm_89"),
        ("sm_89", ("sm_80", "sm_86", "ptx_80"), "sm_86"),
        ("sm_86", ("sm_89", "ptx_80"), "ptx_80"),
        ("sm_90", ("sm_89", "ptx_80"), "ptx_80"),
        ("sm_121", ("sm_120", "ptx_80"), "ptx_80"),
        ("sm_87", ("sm_80", "sm_86", "ptx_80"), "ptx_80"),
        ("sm_87", ("sm_86", "sm_87", "ptx_80"), "sm_87"),
        ("sm_75", ("sm_80", "ptx_80"), None),
        ("gfx1100", ("gfx1100",), "gfx1100"),
        ("gfx1101", ("gfx1100",), None),
    ],
)
def test_the_code_for_a_chip(chip, held, taken):
    assert gpu_choice.choose_kernels(chip, held) == taken


@pytest.mark.parametrize(
    ("provider", "chip", "held", "advice"),
    [
        ("cuda", "sm_75", "sm_89", "llmpack has none for sm_75: use --provider cpu."),
        ("rocm", "gfx1101", "gfx1100", "llmpack has none for gfx1101: use --provider cpu."),
        ("rocm", "gfx1100", "gfx1201", "Pack with --targets gfx1100."),
        ("cuda", "sm_89", "sm_90", "Pack with --targets sm_89."),
        ("cuda", "sm_88", "sm_90", "Pack with --targets sm_86."),
        ("cuda", "sm_121", "sm_90", "Pack with --targets cuda."),
    ],
)
def test_the_targets_that_are_recommended_can_be_packed(provider, chip, held, advice):
    with pytest.raises(IncompatibleError) as caught:
        place(provider, manifest("cpu", held), FakeOps([chip]))
    assert str(caught.value).endswith(f"the artifact holds cpu, {held}. {advice}")
    if "--targets" in advice:
        kernels.parse_targets([advice.removesuffix(".").split()[-1]])


def test_auto_takes_the_gpu_that_the_artifact_has_code_for():
    placement = place("auto", manifest(), FakeOps(["sm_89"]))
    assert (placement.provider, placement.kernels, placement.graph) == ("cuda", "sm_89", "gpu")


@pytest.mark.parametrize(
    ("held", "ops", "available"),
    [
        (manifest("cpu"), FakeOps(["sm_89"]), ALL),
        (manifest(), FakeOps(None), ALL),
        (manifest(), FakeOps(["sm_75"]), ALL),
        (manifest(), FakeOps(["sm_89"]), CPU_ONLY),
    ],
)
def test_auto_falls_back_to_the_cpu(held, ops, available):
    assert place("auto", held, ops, available) == device.Placement("cpu")


def test_an_artifact_without_code_for_the_cpu_says_what_the_gpu_lacks():
    with pytest.raises(IncompatibleError, match="no code for GPU 0"):
        place("auto", manifest("sm_89"), FakeOps(["sm_75"]))


def test_auto_takes_rocm():
    held = manifest("cpu", "gfx1100")
    assert place("auto", held, FakeOps(["gfx1100"])).provider == "rocm"


@pytest.mark.parametrize(
    ("provider", "held", "ops", "available", "kind", "text"),
    [
        ("cuda", manifest("cpu"), FakeOps(["sm_89"]), ALL, IncompatibleError, "holds code for cpu only"),
        ("rocm", manifest(), FakeOps(["gfx1100"]), ALL, IncompatibleError, "pack with --targets rocm"),
        ("cuda", manifest(), FakeOps(None), ALL, IncompatibleError, "no NVIDIA driver"),
        ("cuda", manifest(), FakeOps([]), ALL, IncompatibleError, "the driver shows no GPU"),
        ("cuda", manifest(), FakeOps(["sm_75"]), ALL, IncompatibleError, "GPU 0 (RTX, sm_75); the artifact holds cpu, sm_89."),
        ("cuda", manifest(), FakeOps(["sm_89"]), CPU_ONLY, IncompatibleError, '`pip install "llmpack[cuda]"`'),
        ("cpu", manifest("sm_89"), FakeOps(["sm_89"]), ALL, IncompatibleError, "is for sm_89 only"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_in_one_sentence(provider, held, ops, available, kind, text):
    with pytest.raises(kind) as caught:
        place(provider, held, ops, available)
    assert text in str(caught.value)


def test_worked_examples_hold():
    assert doctest.testmod(gpu_choice).failed == 0


def test_a_rank_beyond_the_gpus_is_told_what_they_lack():
    with pytest.raises(IncompatibleError, match=r"no code for GPU 0 \(RTX, sm_75\)"):
        place("cuda", manifest(), FakeOps(["sm_75"]), rank=1, size=2)


def test_a_rank_that_is_shown_no_gpu_takes_none_from_another():
    placement = gpu_choice.place(
        "cuda", manifest(), FakeOps(["sm_89"]), ALL, local_rank=0, shown=[{"cuda": ["0"]}, {"cuda": []}]
    )
    assert placement.sharers == 1


def test_more_ranks_than_gpus():
    with pytest.raises(UsageError, match=r"2 ranks and 1 GPU on this host.*--share-gpu"):
        place("cuda", manifest(), FakeOps(["sm_89"]), size=2)
    placement = place("cuda", manifest(), FakeOps(["sm_89"]), rank=1, size=2, share_gpu=True)
    assert placement.gpu is not None
    assert (placement.gpu.ordinal, placement.sharers) == (0, 2)


def test_each_local_rank_has_its_own_gpu():
    placements = [place("cuda", manifest(), FakeOps(["sm_89"] * 2), rank=rank, size=2) for rank in range(2)]
    assert [(p.gpu.ordinal, p.sharers) for p in placements if p.gpu] == [(0, 1), (1, 1)]


def test_ranks_that_are_shown_one_gpu_each_share_none():
    """By Slurm, or by a wrapper that sets CUDA_VISIBLE_DEVICES."""
    drivers = [FakeOps(["sm_89"], first=number) for number in (4, 5)]
    shown = [gpu_choice.shown_gpus("cuda", manifest(), ops, ALL) for ops in drivers]
    assert shown == [{"cuda": ["4"]}, {"cuda": ["5"]}]
    for share_gpu in (False, True):
        for rank, ops in enumerate(drivers):
            placement = gpu_choice.place(
                "cuda", manifest(), ops, ALL, local_rank=rank, shown=shown, share_gpu=share_gpu
            )
            assert placement.gpu is not None
            assert (placement.gpu.pci_id, placement.sharers) == (f"{4 + rank}", 1)


def test_the_parts_of_a_split_gpu_are_gpus():
    """Their drivers give them one PCI id."""
    ops = FakeOps(["gfx942"] * 2, step=0)
    placements = [place("rocm", manifest("cpu", "gfx942"), ops, rank=rank, size=2) for rank in range(2)]
    assert [(p.gpu.ordinal, p.sharers) for p in placements if p.gpu] == [(0, 1), (1, 1)]


def test_a_gpu_without_code_is_passed_over():
    """A processor's own graphics beside a card."""
    held = manifest("cpu", "gfx1100")
    for provider in ("auto", "rocm"):
        placement = place(provider, held, FakeOps(["gfx1036", "gfx1100"]))
        assert placement.gpu is not None
        assert (placement.gpu.ordinal, placement.kernels, placement.sharers) == (1, "gfx1100", 1)
    with pytest.raises(UsageError, match="2 ranks and 1 GPU on this host that the artifact has code for"):
        place("rocm", held, FakeOps(["gfx1036", "gfx1100"]), size=2)


def test_the_memory_plan_names_need_and_room():
    placement = place("cuda", manifest(), FakeOps(["sm_89"], free=17_200_000_000))
    with pytest.raises(ResourceError, match=r"rank 0 needs 1\d\.\d GB .*GPU 0 has 17\.2 GB free") as caught:
        device.fit_blocks(
            placement, manifest(), 0, wanted=512, least=256, num_tokens=512, max_num_seqs=8, is_exact=False
        )
    assert caught.value.exit_code == 5


def test_the_cache_takes_what_is_left():
    placement = place("cuda", manifest(), FakeOps(["sm_89"], free=20_000_000_000))
    blocks = device.fit_blocks(
        placement, manifest(), 0, wanted=100_000, least=16, num_tokens=512, max_num_seqs=8, is_exact=False
    )
    assert 16 <= blocks < 100_000
    shared = dataclasses.replace(placement, sharers=2)
    with pytest.raises(ResourceError, match="shared by 2 ranks"):
        device.fit_blocks(shared, manifest(), 0, wanted=100, least=16, num_tokens=512, max_num_seqs=8, is_exact=False)


def test_a_cache_of_a_given_size_is_not_made_smaller():
    placement = place("cuda", manifest(), FakeOps(["sm_89"], free=20_000_000_000))
    with pytest.raises(ResourceError, match=r"KV cache of 1600000 positions.*use a smaller --kv-cache-mb"):
        device.fit_blocks(
            placement, manifest(), 0, wanted=100_000, least=16, num_tokens=512, max_num_seqs=8, is_exact=True
        )


def test_many_sequences_take_memory_for_each_number_of_them():
    placement = place("cuda", manifest(), FakeOps(["sm_89"], free=24_000_000_000))
    sizes = {"wanted": 100_000, "least": 16, "num_tokens": 512, "is_exact": False}
    few, many = (device.fit_blocks(placement, manifest(), 0, max_num_seqs=n, **sizes) for n in (8, 512))
    captured = device.MOST_CAPTURED
    logits = (captured * (captured + 1) - 8 * 9) // 2 * 16000 * 4  # of this rank's half of the vocabulary
    # Twice: ONNX Runtime's allocator takes powers of two from the driver.
    block = 16 * manifest().kv_cache.bytes_per_token
    assert (few - many) * block == pytest.approx(2 * logits, abs=block)


def test_memory_is_planned_for_the_packagers_records_of_likeliest_tokens():
    assert (device._TOP_K, device._TOP_K_CHUNK) == (kernel_plan.TOP_K, kernel_plan.TOP_K_CHUNK)
