"""gpt-oss as it is published: experts in MXFP4 that are packed to the very numbers, and what transformers makes of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from e2e.format_reader import Rank, read_manifest
from llmpack.pack import Options, pack
from llmrun import Engine
from llmrun.errors import IncompatibleError, IntegrityError
from models import GPT_OSS, make_checkpoint
from mxfp4_checkpoint import store_in_mxfp4

Packed = Callable[..., Path]
IDS = [(31 * i + 7) % 250 + 1 for i in range(30)]  # longer than the window
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_in_mxfp4(make_checkpoint(tmp_path_factory.mktemp("gpt-oss"), seed=4, **GPT_OSS))


@pytest.fixture(scope="module")
def truth(published: Path) -> torch.nn.Module:
    """Transformers' own reading of the blocks and scales."""
    reading: dict[str, Any] = {"quantization_config": Mxfp4Config(dequantize=True), "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(published, attn_implementation="eager", **reading).eval()


def test_the_packed_model_computes_what_transformers_computes(
    published: Path, truth: torch.nn.Module, packed: Packed
) -> None:
    with torch.no_grad():
        expected = truth(torch.tensor([IDS])).logits[0].numpy()
    with Engine(packed(published, 1, "f32")) as engine:
        np.testing.assert_allclose(engine.logits(IDS), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("quant", ["q4", "q8"])
@pytest.mark.parametrize("shards", [1, 2])
def test_what_is_published_in_four_bits_stays_the_very_numbers(
    quant: str, shards: int, published: Path, truth: torch.nn.Module, packed: Packed
) -> None:
    folder = packed(published, shards, quant)
    manifest = read_manifest(folder)
    assert manifest["quantization"]["roles"]["experts"] == "mxfp4"
    ranks = [Rank(folder, manifest, rank) for rank in range(shards)]
    given = truth.get_parameter(f"{EXPERTS}.gate_up_proj").detach().numpy()  # [experts, in_features, out_features]
    gate_up, down = (
        [np.stack(np.split(rank.matrices[f"{EXPERTS}.{name}.weight"], 6)) for rank in ranks]
        for name in ("gate_up_proj", "down_proj")
    )
    for turn in (0, 1):
        half = np.concatenate([np.split(matrix, 2, 1)[turn] for matrix in gate_up], 1)
        np.testing.assert_array_equal(half, given[:, :, turn::2].transpose(0, 2, 1))
    given = truth.get_parameter(f"{EXPERTS}.down_proj").detach().numpy()
    np.testing.assert_array_equal(np.concatenate(down, 2), given.transpose(0, 2, 1))


@pytest.mark.parametrize("quant", ["f16", "q8", "q4"])
def test_the_packagers_example_holds(quant: str, published: Path, packed: Packed) -> None:
    with Engine(packed(published, 1, quant)) as engine:
        difference, tolerance = engine.selfcheck()
        assert 0 < difference <= tolerance


def test_down_has_its_biases_on_the_first_rank_alone(published: Path, packed: Packed) -> None:
    """Each rank's are those of its rows; what ranks sum up is added once."""
    folder = packed(published, 2, "q4")
    manifest, given = read_manifest(folder), load_file(published / "model.safetensors")
    ranks = [Rank(folder, manifest, rank) for rank in (0, 1)]
    of_gate_up = given[f"{EXPERTS}.gate_up_proj_bias"]  # [experts, gate and up in turn]
    for i, rank in enumerate(ranks):
        own = np.s_[:, i * 128 : (i + 1) * 128]
        expected = np.concatenate([of_gate_up[:, ::2][own], of_gate_up[:, 1::2][own]], 1)
        np.testing.assert_array_equal(rank.tensors[f"{EXPERTS}.gate_up_proj.bias"], expected)
        sinks = given["model.layers.1.self_attn.sinks"]
        np.testing.assert_array_equal(rank.tensors["model.layers.1.self_attn.sinks"], np.split(sinks, 2)[i])
        np.testing.assert_array_equal(
            rank.tensors["model.layers.1.mlp.gate.bias"], given["model.layers.1.mlp.router.bias"]
        )
    np.testing.assert_array_equal(ranks[0].tensors[f"{EXPERTS}.down_proj.bias"], given[f"{EXPERTS}.down_proj_bias"])
    assert f"{EXPERTS}.down_proj.bias" not in ranks[1].tensors


def test_a_token_reads_the_biases_of_its_experts_alone(published: Path) -> None:
    (rank,) = pack(published, None, Options())["ranks"]
    held = rank["weight_bytes_by_role"]
    of_experts = held["experts"] + 4 * 6 * (2 * 256 + 256) * 4
    assert rank["weight_bytes_per_token"] == sum(held.values()) - held["embedding"] - of_experts * 4 // 6


def changed(published: Path, folder: Path, change: Callable[[dict[str, np.ndarray], dict[str, Any]], None]) -> Path:
    tensors = load_file(published / "model.safetensors")
    config = json.loads((published / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without_scales(tensors: dict[str, np.ndarray], _: dict[str, Any]) -> None:
    del tensors[f"{EXPERTS}.down_proj_scales"]


def of_other_groups(tensors: dict[str, np.ndarray], _: dict[str, Any]) -> None:
    blocks = tensors[f"{EXPERTS}.down_proj_blocks"]
    tensors[f"{EXPERTS}.down_proj_blocks"] = blocks.reshape(*blocks.shape[:2], -1, 32)


def of_fewer_features(tensors: dict[str, np.ndarray], _: dict[str, Any]) -> None:
    for part in ("blocks", "scales"):
        name = f"{EXPERTS}.gate_up_proj_{part}"
        tensors[name] = np.ascontiguousarray(tensors[name][:, :-2])


def of_another_method(_: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    config["quantization_config"] = {"quant_method": "fp8"}


def of_no_number(tensors: dict[str, np.ndarray], _: dict[str, Any]) -> None:
    tensors[f"{EXPERTS}.down_proj_scales"][3, 2, 1] = 255


def of_biases_of_fewer_experts(tensors: dict[str, np.ndarray], _: dict[str, Any]) -> None:
    tensors[f"{EXPERTS}.down_proj_bias"] = tensors[f"{EXPERTS}.down_proj_bias"][:-1].copy()


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (without_scales, IncompatibleError, f"{EXPERTS}.down_proj_blocks has dtype U8; supported: F32, F16, BF16"),
        (of_other_groups, IncompatibleError, f"{EXPERTS}.down_proj_blocks has dtype U8; supported: F32, F16, BF16"),
        (
            of_fewer_features, IntegrityError,
            f"{EXPERTS}.gate_up_proj: shape [6, 510, 256], but config.json asks for [6, 512, 256]",
        ),
        (
            of_another_method, IncompatibleError,
            "quantization_config (quant_method 'fp8'); llmpack packs f32, f16, bf16 and mxfp4 weights",
        ),
        (of_no_number, IntegrityError, f"{EXPERTS}.down_proj: holds NaN or infinity; it cannot be packed"),
        (
            of_biases_of_fewer_experts, IntegrityError,
            f"{EXPERTS}.down_proj_bias: shape [5, 256], but config.json asks for [6, 256]",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    change: Callable[..., None], error: type[Exception], match: str, published: Path, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    folder = changed(published, tmp_path / "m", change)
    with pytest.raises(error, match=re.escape(match)):
        pack(folder, tmp_path / "a", Options())
    assert not (tmp_path / "a").exists()


def test_bytes_are_no_weights_of_other_models(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].view(np.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(IncompatibleError, match=f"{name} has dtype U8; supported: F32, F16, BF16"):
        pack(folder, None, Options())
