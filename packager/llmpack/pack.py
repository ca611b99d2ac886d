"""Table of contents of the packager: every step, in order, and nothing else.

read config and headers -> match tensors -> plan each rank -> export the logical graph -> split it -> join operators for the
CPU, lower them for GPUs and compile kernels (where asked for) -> write weights tensor by tensor (slice, fuse, quantize, lay
out) -> self-check from the written bytes -> publish.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpack import __version__, kernel_file, kernels, report
from llmpack.checkpoint import Checkpoint, open_checkpoint
from llmpack.cpu_graph import cpu_graph
from llmpack.expert_tensors import MXFP4
from llmpack.export import export
from llmpack.generation import Generation, read_generation
from llmpack.gpu_graph import gpu_graph
from llmpack.kernel_plan import KernelSpec, plan_kernels
from llmpack.options import Options
from llmpack.packed_rank import PackedRank
from llmpack.rope import for_sequences, longest_sequence
from llmpack.selfcheck import selfcheck
from llmpack.sources import Place, guesses_further, resolve_sources, sees_images
from llmpack.split import split
from llmpack.split_check import check_split, choose_group_size
from llmpack.store import write_weights
from llmpack.tokenizer_files import TokenizerFiles, read_tokenizer
from llmpack.weights import (
    EMBEDDING,
    HEAD,
    Quantization,
    RankWeight,
    check_options,
    heads_per_rank,
    plan_rank,
)
from llmpack.write import Staging
from llmrun.artifact import (
    FORMAT_NAME,
    FORMAT_VERSION,
    OPS_DOMAIN,
    OPS_VERSION,
    IncompatibleError,
    IntegrityError,
    KvCacheSpec,
    ModelConfig,
    UsageError,
    canonical_json,
)

__all__ = ["Options", "pack"]

BLOCK_SIZE = 16  # tokens in one block of the KV cache
KV_DTYPES = {"f16": "float16", "f32": "float32"}
_NO_TOKENIZER = "no tokenizer: llmrun takes token ids only"
_ROOM_FOR_SMALL_FILES = 8 << 20  # bytes: graphs, tokenizer, manifest


Progress = Callable[[str, int, int], None]


def pack(
    model_dir: Path, target: Path | None, options: Options, on_progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Pack a checkpoint.

    Args:
        model_dir: Hugging Face model directory.
        target: directory to create; None: a dry run that writes nothing and reads no weights, but for a tied head that is
            stored beside the embedding.
        options: see `Options`.
        on_progress: called with (step, bytes done, bytes in all).

    Returns:
        the figures of the artifact (`report.summarise`).

    Raises:
        LlmpackError: a subclass by cause; nothing is left at `target` that was not there before.
    """
    quantization = check_options(options.scheme, options.group_size, options.shards)
    staging = None if target is None else Staging(target, force=options.force, model_dir=model_dir)
    targets = kernels.parse_targets(options.targets)
    if len(targets) > 1:
        kernels.check_compiler()
    if options.kv_dtype is not None and options.kv_dtype not in KV_DTYPES:
        raise UsageError(f"--kv-dtype {options.kv_dtype}: expected one of {', '.join(KV_DTYPES)}.")
    with open_checkpoint(model_dir) as checkpoint:
        job = _decide(checkpoint, model_dir, options, quantization, targets)
        if staging is not None:
            _write(job, checkpoint, staging, on_progress)
    return job.summary


@dataclass(frozen=True)
class _Job:
    """Everything that is decided before a byte is written.

    Attributes:
        config: the checkpoint's, as it is packed.
        quantization: of all roles.
        places: where each of the model's sources is in the checkpoint (`resolve_sources`).
        ranks: the plan of each.
        max_seq_len: in positions.
        kv_cache: of one rank.
        targets: of `kernels.parse_targets`, the CPU first.
        specs: the GPU kernels; none without a GPU among the targets.
        tokenizer: None: ids in, ids out.
        generation: defaults for sampling.
        summary: the figures of the artifact.
    """

    config: ModelConfig
    quantization: Quantization
    places: dict[str, Place]
    ranks: list[list[RankWeight]]
    max_seq_len: int
    kv_cache: KvCacheSpec
    targets: tuple[str, ...]
    specs: list[KernelSpec]
    tokenizer: TokenizerFiles | None
    generation: Generation
    summary: dict[str, Any]

    @property
    def has_gpu(self) -> bool:
        """Whether there are graphs and kernels for GPUs."""
        return len(self.targets) > 1

    @property
    def used(self) -> set[str]:
        """Files of the model beside config and weights that are packed."""
        return {*self.generation.sources, *(self.tokenizer.sources if self.tokenizer else ())}


def _decide(
    checkpoint: Checkpoint, model_dir: Path, options: Options, quantization: Quantization, targets: tuple[str, ...]
) -> _Job:
    """Read all but the weights, choose what was left open, and refuse what cannot be packed."""
    config = checkpoint.config
    try:
        places = resolve_sources(config, {name: info.shape for name, info in checkpoint.tensors.items()})
    except IntegrityError as error:
        raise IntegrityError(f"{model_dir}: {error}", code=error.code) from None
    notes = list(checkpoint.notes)
    if sees_images(config, checkpoint.tensors):
        notes.append("text alone: what sees images in this model is left out")
    if guesses_further(config, checkpoint.tensors):
        notes.append("one token at a time: the layers that guess further ones (MTP) are left out")
    tied = places[f"{EMBEDDING}.weight"].tensor, places[f"{HEAD}.weight"].tensor
    if config.tie_word_embeddings and not checkpoint.are_equal(*tied):
        config = dataclasses.replace(config, tie_word_embeddings=False)
        notes.append(
            f"tie_word_embeddings is true, but {tied[1]} is not {tied[0]}; both are used, as by transformers 5"
        )
    is_default = options.group_size is None
    has_mxfp4 = any(info.dtype == MXFP4 for info in checkpoint.tensors.values())
    quantization = dataclasses.replace(quantization, has_mxfp4=has_mxfp4)
    if is_default:
        quantization = choose_group_size(config, quantization, options.shards)
    check_split(config, quantization, options.shards, is_default=is_default)
    limit, what = longest_sequence(config)
    max_seq_len = limit if options.max_seq_len is None else options.max_seq_len
    if not 1 <= max_seq_len <= limit:
        raise UsageError(f"--max-seq-len {max_seq_len}: expected 1 to {what}.")
    config, note = for_sequences(config, max_seq_len)
    notes += [note] * bool(note)
    ranks = [plan_rank(config, quantization, options.shards, rank) for rank in range(options.shards)]
    kv_dtype = KV_DTYPES[options.kv_dtype or ("f32" if quantization.scheme == "f32" else "f16")]
    has_gpu = len(targets) > 1
    specs = plan_kernels(config, ranks[0], options.shards, BLOCK_SIZE) if has_gpu else []
    if has_gpu and kv_dtype != "float16":
        raise IncompatibleError("GPU kernels read a float16 cache: choose --targets cpu, or leave out --kv-dtype f32.")
    kv_heads = heads_per_rank(config, options.shards)[1]
    kv_cache = KvCacheSpec(kv_dtype, BLOCK_SIZE, config.num_hidden_layers, kv_heads, config.head_dim)
    summary = report.summarise(config, quantization, ranks, kv_cache, max_seq_len, is_group_size_default=is_default)
    tokenizer = read_tokenizer(model_dir, config.vocab_size)
    generation = read_generation(model_dir, config.vocab_size)
    summary["notes"] = [*notes, *(tokenizer.notes if tokenizer else (_NO_TOKENIZER,)), *generation.notes]
    return _Job(
        config, quantization, places, ranks, max_seq_len, kv_cache, targets, specs, tokenizer, generation, summary
    )


def _write(job: _Job, checkpoint: Checkpoint, staging: Staging, on_progress: Progress) -> None:
    """Write the artifact and publish it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(staging)
        background, stopped = stack.enter_context(ThreadPoolExecutor(1)), threading.Event()
        stack.callback(stopped.set)  # an error does not wait until gigabytes are hashed
        staging.check_room(sum(rank["weight_bytes"] for rank in job.summary["ranks"]) + _ROOM_FOR_SMALL_FILES)
        sources = background.submit(checkpoint.hash_sources, job.used, stopped.is_set)
        _add_graphs(job, staging)
        code = _add_kernels(job, staging, on_progress)
        write_weights(checkpoint, job.places, job.ranks, staging, on_progress)
        on_progress("self-check", 0, 1)
        staging.add("selfcheck.json", canonical_json(_selfcheck(job, staging)))
        tokenizer = _add_tokenizer(job.tokenizer, staging)
        members = _members(job, tokenizer, code, [dataclasses.asdict(entry) for entry in sources.result()])
        checkpoint.check_unchanged(job.used)
        on_progress("publish", 0, 1)
        staging.publish(members)


def _add_graphs(job: _Job, staging: Staging) -> None:
    logical = export(job.config, job.kv_cache.dtype, BLOCK_SIZE)
    for rank, plan in enumerate(job.ranks):
        graph = split(logical, job.config, plan, rank, len(job.ranks), "weights.bin")
        staging.add(f"rank-{rank}/cpu.onnx", cpu_graph(graph).SerializeToString(deterministic=True))
        if job.has_gpu:
            graph = gpu_graph(graph, job.kv_cache)
            staging.add(f"rank-{rank}/gpu.onnx", graph.SerializeToString(deterministic=True))


def _add_kernels(job: _Job, staging: Staging, on_progress: Progress) -> dict[str, str]:
    """Compile for every GPU among the targets; return the file of each."""
    if not job.has_gpu:
        return {}
    code = kernels.build(job.specs, job.targets, lambda done, total: on_progress("kernels", done, total))
    for name, file in code.items():
        staging.add(kernels.file_name(name), kernel_file.to_bytes(file))
    return {name: kernels.file_name(name) for name in code}


def _selfcheck(job: _Job, staging: Staging) -> dict[str, Any]:
    with contextlib.ExitStack() as files:
        packed = [
            files.enter_context(PackedRank(staging.partial / f"rank-{rank}/weights.bin", plan))
            for rank, plan in enumerate(job.ranks)
        ]
        num_tokens = min(8, job.max_seq_len)
        return selfcheck(job.config, packed, job.quantization.scheme, job.kv_cache.dtype, num_tokens)


def _members(
    job: _Job, tokenizer: dict[str, Any] | None, code: dict[str, str], sources: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the manifest, but for its digests."""
    members = {
        "format": FORMAT_NAME,
        "format_version": list(FORMAT_VERSION),
        "producer": {"name": "llmpack", "version": __version__},
        "ops": {"domain": OPS_DOMAIN, "version": OPS_VERSION},
        "model": dataclasses.asdict(job.config),
        "max_seq_len": job.max_seq_len,
        "quantization": _describe(job.quantization, job.summary),
        "kv_cache": dataclasses.asdict(job.kv_cache),
        "shards": len(job.ranks),
        "targets": list(job.targets),
        "ranks": [_describe_rank(rank, job.has_gpu) for rank in job.summary["ranks"]],
        "tokenizer": tokenizer,
        "eos_token_ids": list(job.tokenizer.eos_token_ids if job.tokenizer else job.generation.eos_token_ids),
        "generation": dataclasses.asdict(job.generation.defaults),
        "selfcheck": "selfcheck.json",
        "source": sources,
    }
    if job.has_gpu:
        members["kernels"] = code
    return members


def _describe(quantization: Quantization, summary: dict[str, Any]) -> dict[str, Any]:
    roles = {role: quantization.of_role(role) for role in summary["ranks"][0]["weight_bytes_by_role"]}
    figures = {key: summary[key] for key in ("scheme", "group_size", "bits_per_weight", "bits_per_weight_of_file")}
    return {**figures, "roles": roles}


def _describe_rank(rank: dict[str, Any], has_gpu: bool) -> dict[str, Any]:
    folder = f"rank-{rank['rank']}"
    kinds = ("cpu", "gpu") if has_gpu else ("cpu",)
    return {
        "rank": rank["rank"],
        "folder": folder,
        "graphs": {kind: f"{folder}/{kind}.onnx" for kind in kinds},
        "weights": f"{folder}/weights.bin",
        "weight_bytes": rank["weight_bytes"],
        "weight_bytes_per_token": rank["weight_bytes_per_token"],
        "weight_bytes_by_role": rank["weight_bytes_by_role"],
    }


def _add_tokenizer(tokenizer: TokenizerFiles | None, staging: Staging) -> dict[str, Any] | None:
    """Copy the tokenizer's files into the artifact; return the manifest's member."""
    if tokenizer is None:
        return None
    file, golden, template = f"tokenizer/{tokenizer.source_file.name}", "tokenizer/golden.json", None
    staging.add(file, tokenizer.source_file.read_bytes())
    staging.add(golden, canonical_json(tokenizer.golden))
    if tokenizer.chat_template is not None:
        template = "tokenizer/chat_template.jinja"
        staging.add(template, tokenizer.chat_template.encode())
    return {
        "kind": tokenizer.kind,
        "file": file,
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_ids": list(tokenizer.eos_token_ids),
        "add_bos_token": tokenizer.add_bos_token,
        "special_tokens": tokenizer.special_tokens,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "chat_template": template,
        "golden": golden,
        **({"prefix_token_ids": list(tokenizer.prefix_token_ids)} if tokenizer.prefix_token_ids else {}),
    }
