"""artifacts/FORMAT.md is enough: a reader that knows nothing else finds the checkpoint and computes what llmrun does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from e2e.format_checkpoint import stitch
from e2e.format_reader import Rank, compute, encode_golden, read_manifest
from llmrun import Engine
from models import (
    DEMO,
    ERNIE_MOE,
    GEMMA,
    GLM,
    GLM_MOE,
    GPT_OSS,
    GRANITE_MOE,
    GROWING,
    HYBRID_GRANITE,
    MIXTRAL,
    PARTLY_ROTATED,
    QWEN_MOE,
    SMOLLM,
    make_checkpoint,
)
from unit.tokenizer_makers import train_byte_level

Packed = Callable[..., Path]
MODELS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "odd": {"vocab_size": 259, "num_key_value_heads": 1, "head_dim": 48},
    "tied": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "q-k-v-biases": {"model_type": "qwen2"},
    "normalised-heads": {"model_type": "qwen3", "head_dim": 64},
    "tied-in-whole-tiles": {"tie_word_embeddings": True, "vocab_size": 320},
    "tied-and-filled-up": {"tie_word_embeddings": True, "vocab_size": 319},
    "partly-rotated": PARTLY_ROTATED,
    "multiplied": HYBRID_GRANITE,
    "not-all-rotated": SMOLLM,
    "a-window": {"model_type": "mistral", "sliding_window": 2},
    "gemma": {**GEMMA, "sliding_window": 2},
    "neighbours-rotated": {**GLM, "partial_rotary_factor": 0.75},
    "shared-experts-of-glm": GLM_MOE,
    "shared-experts-of-ernie": ERNIE_MOE,
    "experts-of-qwen": QWEN_MOE,
    "experts-of-mixtral": MIXTRAL,
    "experts-in-one-tensor": GRANITE_MOE,
    # Of two for a token one choice is so close that the rounding of q8 decides it.
    "growing": GROWING,
    "experts-of-gpt-oss": {**GPT_OSS, "sliding_window": 2, "num_hidden_layers": 2, "num_experts_per_tok": 3},
}
# The largest difference from the checkpoint, of its largest weight.
ERRORS = {"f32": 0, "f16": 2**-11, "q8": 0.51 / 127, "q4": 0.13}


# Each storage, and each number of ranks, of every model; all pairs of them in the extended tests.
_SELDOM = [("f32", 2), ("f16", 1), ("f16", 2), ("q8", 1), ("q8", 4)]
SPLITS = [
    pytest.param(quant, shards, marks=pytest.mark.extended if (quant, shards) in _SELDOM else ())
    for quant in ERRORS
    for shards in (1, 2, 4)
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_checkpoint(tmp_path_factory.mktemp(name), **MODELS[name])
        return made[name]

    return get


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("quant", "shards"), SPLITS)
def test_a_reader_of_the_specification_finds_the_model(
    model: str, shards: int, quant: str, checkpoint: Callable[[str], Path], packed: Packed
) -> None:
    folder = packed(checkpoint(model), shards, quant, group_size=32 if model == "odd" else 64)
    manifest = read_manifest(folder)
    ranks = [Rank(folder, manifest, rank) for rank in range(shards)]

    given = load_file(checkpoint(model) / "model.safetensors")
    given.setdefault("lm_head.weight", given["model.embed_tokens.weight"])
    found = stitch(ranks, manifest)
    unmatched = {name for name in given if name.endswith(("bias", "sinks")) and "e_score_correction" not in name}
    assert set(given) - unmatched == set(found)
    if manifest["model"]["architecture"] == "Gemma3ForCausalLM":  # 4.4
        given = {name: tensor + np.float32(1) if tensor.ndim == 1 else tensor for name, tensor in given.items()}
    for name, matrix in found.items():
        allowed = 0 if matrix.ndim == 1 or name.endswith("bias") else ERRORS[quant]
        assert np.abs(matrix - given[name]).max() <= allowed * np.abs(given[name]).max(), name

    expected = json.loads((folder / "selfcheck.json").read_text())
    logits = compute(ranks, manifest, expected["ids"])
    assert np.abs(logits[-1] - expected["logits"]).max() <= 6e-5  # four decimals
    if shards == 1:
        with Engine(folder) as engine:
            difference = np.abs(engine.logits(expected["ids"]) - logits).max()
        assert difference <= (2e-4 if quant == "f32" else expected["tolerance"])


@pytest.mark.parametrize("quant", ERRORS)
def test_a_reader_of_the_specification_rounds_keys_as_the_packager_does(quant: str, packed_demo: Packed) -> None:
    """A key that lies halfway between two float16 may go either way; in the demo's q4 one shows in the logits."""
    folder = packed_demo(1, quant)
    manifest = read_manifest(folder)
    expected = json.loads((folder / "selfcheck.json").read_text())
    logits = compute([Rank(folder, manifest, 0)], manifest, expected["ids"])
    assert np.abs(logits[-1] - expected["logits"]).max() <= 5.1e-5  # four decimals


@pytest.mark.parametrize(
    ("vocab_size", "shards", "is_within"), [(320, 4, True), (319, 2, True), (319, 4, True), (300, 4, False)]
)
@pytest.mark.parametrize("quant", ["q4", "q8"])
def test_a_tied_head_lies_in_the_embedding_where_tiles_allow_it(
    quant: str, vocab_size: int, shards: int, is_within: bool, packed: Packed, tmp_path: Path
) -> None:
    """Of 319 tokens 4 ranks have 80 each, and the last row of the last is none: so is that of the embedding's last tile."""
    folder = packed(make_checkpoint(tmp_path, tie_word_embeddings=True, vocab_size=vocab_size), shards, quant)
    manifest = read_manifest(folder)
    for rank in range(shards):
        Rank(folder, manifest, rank)
        graph = onnx.load(folder / f"rank-{rank}/cpu.onnx", load_external_data=False).graph
        places = {
            tensor.name: [int(item.value) for item in tensor.external_data if item.key in ("offset", "length")]
            for tensor in graph.initializer
            if tensor.external_data
        }
        for part in ("weight", "scales"):
            (start, size), (first, length) = (places[f"{name}.{part}"] for name in ("lm_head", "model.embed_tokens"))
            assert (first <= start and start + size <= first + length) == is_within
        assert (manifest["ranks"][rank]["weight_bytes_by_role"]["head"] == 0) == is_within


def test_a_file_of_weights_ends_where_another_weight_could_begin(packed: Packed, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(
        tmp_path, vocab_size=259, hidden_size=96, head_dim=48
    )  # the last scales are 1,632 bytes
    folder = packed(checkpoint, 1, "q8", group_size=32)
    Rank(folder, read_manifest(folder), 0)


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers"])
def test_a_reader_of_the_specification_gives_the_golden_ids(kind: str, packed: Packed, tmp_path: Path) -> None:
    checkpoint = DEMO
    if kind == "tokenizers":
        train_byte_level(tmp_path)
        checkpoint = make_checkpoint(tmp_path, vocab_size=500)
    folder = packed(checkpoint)
    manifest = read_manifest(folder)
    assert (manifest["tokenizer"]["kind"], manifest["tokenizer"]["add_bos_token"]) == (kind, True)
    vectors = encode_golden(folder, manifest)
    assert len(vectors) > 20
    for golden, found in vectors:
        assert golden == found
