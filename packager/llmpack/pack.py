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
from llmpack.checkpoint import open_checkpoint
from llmpack.cpu_graph import cpu_graph
from llmpack.export import export, rope_frequencies
from llmpack.generation import read_generation
from llmpack.gpu_graph import gpu_graph
from llmpack.kernel_plan import plan_kernels
from llmpack.selfcheck import PackedRank, selfcheck
from llmpack.split import split
from llmpack.store import write_weights
from llmpack.tokenizer_files import TokenizerFiles, read_tokenizer
from llmpack.weights import (
    EMBEDDING,
    HEAD,
    Quantization,
    check_options,
    check_split,
    choose_group_size,
    heads_per_rank,
    plan_rank,
    resolve_sources,
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
    UsageError,
    canonical_json,
)

BLOCK_SIZE = 16  # tokens in one block of the KV cache
KV_DTYPES = {"f16": "float16", "f32": "float32"}
_ROOM_FOR_SMALL_FILES = 8 << 20  # bytes: graphs, tokenizer, manifest


@dataclass(frozen=True)
class Options:
    """What the command line chooses; the defaults live here."""

    shards: int = 1
    scheme: str = "q4"
    group_size: int | None = None  # None: the first of weights.DEFAULT_GROUP_SIZES that divides
    targets: tuple[str, ...] = ("cpu",)  # names of `kernels.parse_targets`
    max_seq_len: int | None = None
    force: bool = False
    kv_dtype: str | None = None  # "f16" or "f32"; None: f32 if the weights are f32, else f16


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
    if has_gpu := len(targets) > 1:
        kernels.check_compiler()
    if options.kv_dtype is not None and options.kv_dtype not in KV_DTYPES:
        raise UsageError(f"--kv-dtype {options.kv_dtype}: expected one of {', '.join(KV_DTYPES)}.")
    with open_checkpoint(model_dir) as checkpoint:
        config = checkpoint.config
        try:
            names = resolve_sources(config, {name: info.shape for name, info in checkpoint.tensors.items()})
        except IntegrityError as error:
            raise IntegrityError(f"{model_dir}: {error}", code=error.code) from None
        notes = list(checkpoint.notes)
        tied = names[f"{EMBEDDING}.weight"], names[f"{HEAD}.weight"]
        if config.tie_word_embeddings and not checkpoint.are_equal(*tied):
            config = dataclasses.replace(config, tie_word_embeddings=False)
            notes.append(
                f"tie_word_embeddings is true, but {tied[1]} is not {tied[0]}; both are used, as by transformers 5"
            )
        if options.group_size is None:
            quantization = choose_group_size(config, quantization, options.shards)
        check_split(config, quantization, options.shards, is_default=options.group_size is None)
        max_seq_len = config.max_position_embeddings if options.max_seq_len is None else options.max_seq_len
        if not 1 <= max_seq_len <= config.max_position_embeddings:
            raise UsageError(
                f"--max-seq-len {max_seq_len}: expected 1 to max_position_embeddings {config.max_position_embeddings}."
            )
        plans = [plan_rank(config, quantization, options.shards, rank) for rank in range(options.shards)]
        kv_dtype = KV_DTYPES[options.kv_dtype or ("f32" if quantization.scheme == "f32" else "f16")]
        specs = plan_kernels(config, plans[0], options.shards, BLOCK_SIZE) if has_gpu else []
        if has_gpu and kv_dtype != "float16":
            raise IncompatibleError(
                "GPU kernels read a float16 cache: choose --targets cpu, or leave out --kv-dtype f32."
            )
        kv_heads = heads_per_rank(config, options.shards)[1]
        kv_cache = KvCacheSpec(kv_dtype, BLOCK_SIZE, config.num_hidden_layers, kv_heads, config.head_dim)
        summary = report.summarise(
            config, quantization, plans, kv_cache, max_seq_len, is_group_size_default=options.group_size is None
        )
        tokenizer = read_tokenizer(model_dir, config.vocab_size)
        generation = read_generation(model_dir, config.vocab_size)
        summary["notes"] = [*notes, *(tokenizer.notes if tokenizer else ()), *generation.notes]
        if staging is None:
            return summary
        with contextlib.ExitStack() as stack:
            stack.enter_context(staging)
            background, stopped = stack.enter_context(ThreadPoolExecutor(1)), threading.Event()
            stack.callback(stopped.set)  # an error does not wait until gigabytes are hashed
            staging.check_room(sum(rank["weight_bytes"] for rank in summary["ranks"]) + _ROOM_FOR_SMALL_FILES)
            used = {*generation.sources, *(tokenizer.sources if tokenizer else ())}
            sources = background.submit(checkpoint.hash_sources, used, stopped.is_set)
            logical = export(config, kv_dtype, BLOCK_SIZE)
            for rank, plan in enumerate(plans):
                graph = split(logical, config, plan, rank, options.shards, "weights.bin")
                staging.add(f"rank-{rank}/cpu.onnx", cpu_graph(graph).SerializeToString(deterministic=True))
                if has_gpu:
                    graph = gpu_graph(graph, kv_cache)
                    staging.add(f"rank-{rank}/gpu.onnx", graph.SerializeToString(deterministic=True))
            code = (
                kernels.build(specs, targets, lambda done, total: on_progress("kernels", done, total))
                if has_gpu
                else {}
            )
            for name, file in code.items():
                staging.add(kernels.file_name(name), kernel_file.to_bytes(file))
            write_weights(checkpoint, names, plans, staging, on_progress)
            on_progress("self-check", 0, 1)
            with contextlib.ExitStack() as files:
                packed = [
                    files.enter_context(PackedRank(staging.partial / f"rank-{r}/weights.bin", plan))
                    for r, plan in enumerate(plans)
                ]
                check = selfcheck(
                    config, packed, quantization.scheme, kv_dtype, rope_frequencies(config), min(8, max_seq_len)
                )
            staging.add("selfcheck.json", canonical_json(check))
            members = {
                "format": FORMAT_NAME,
                "format_version": list(FORMAT_VERSION),
                "producer": {"name": "llmpack", "version": __version__},
                "ops": {"domain": OPS_DOMAIN, "version": OPS_VERSION},
                "model": dataclasses.asdict(config),
                "max_seq_len": max_seq_len,
                "quantization": _describe(quantization, summary),
                "kv_cache": dataclasses.asdict(kv_cache),
                "shards": options.shards,
                "targets": list(targets),
                "ranks": [_describe_rank(rank, has_gpu) for rank in summary["ranks"]],
                "tokenizer": _add_tokenizer(tokenizer, staging),
                "eos_token_ids": list(tokenizer.eos_token_ids if tokenizer else generation.eos_token_ids),
                "generation": dataclasses.asdict(generation.defaults),
                "selfcheck": "selfcheck.json",
                "source": [dataclasses.asdict(entry) for entry in sources.result()],
            }
            if has_gpu:
                members["kernels"] = {name: kernels.file_name(name) for name in code}
            checkpoint.check_unchanged(used)
            on_progress("publish", 0, 1)
            staging.publish(members)
    return summary


def _describe(quantization: Quantization, summary: dict[str, Any]) -> dict[str, Any]:
    roles = {role: quantization.of_role(role) for role in ("linear", "head", "embedding", "norm", "bias")}
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
    }
