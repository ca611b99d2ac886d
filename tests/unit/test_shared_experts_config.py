"""Mixtures some of whose experts all tokens share: which layers have them, what is refused, and what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mixtures import ERNIE_21B, GLM_AIR, read, shapes_of
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llmpack.config import read_config
from llmpack.pack import Options, pack
from llmpack.sources import resolve_sources
from llmrun.artifact import IncompatibleError, IntegrityError
from models import ERNIE_MOE, GLM_MOE, make_checkpoint


@pytest.mark.parametrize(
    ("keys", "sparse"),
    [
        ({"first_k_dense_replace": 3}, [0, 0, 0, 1]),
        ({"first_k_dense_replace": 0}, [1, 1, 1, 1]),
        ({"first_k_dense_replace": 9}, [0, 0, 0, 0]),
        ({"moe_layer_start_index": 2}, [0, 0, 1, 1]),
        ({"moe_layer_end_index": 2}, [0, 1, 1, 0]),
        ({"moe_layer_end_index": -1, "moe_layer_start_index": 0}, [1, 1, 1, 1]),
        ({"moe_layer_end_index": 3, "moe_layer_interval": 2}, [0, 1, 0, 1]),
        ({"moe_layer_end_index": 9, "moe_layer_start_index": 0, "moe_layer_interval": 3}, [0, 0, 1, 0]),
    ],
)
def test_layers_with_experts_are_those_of_glm_and_ernie(
    keys: dict[str, Any], sparse: list[int], tmp_path: Path
) -> None:
    """Of transformers' own modules, where it builds the same."""
    model = GLM_AIR if "first_k_dense_replace" in keys else ERNIE_21B
    given = {**model, "num_hidden_layers": 4, **keys}
    found = read(tmp_path, given)
    assert [found.is_sparse(i) for i in range(4)] == [bool(flag) for flag in sparse]
    assert (found.num_experts is None) == (found.num_shared_experts is None) == (1 not in sparse)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given))
    assert [int(hasattr(layer.mlp, "experts")) for layer in theirs.model.layers] == sparse


@pytest.mark.parametrize(
    ("model", "keys", "error", "match"),
    [
        (GLM_AIR, {"n_group": 8}, IncompatibleError, r"n_group is 8, which is not supported; supported: 1\."),
        (GLM_AIR, {"topk_group": 4}, IncompatibleError, r"topk_group is 4, which is not supported; supported: 1\."),
        (
            GLM_AIR,
            {"n_shared_experts": 897},
            IncompatibleError,
            r"n_routed_experts 128 and n_shared_experts 897; .* 1024",
        ),
        (
            GLM_AIR,
            {"n_shared_experts": -1},
            IntegrityError,
            r"n_shared_experts is -1; expected an integer of at least 0",
        ),
        (GLM_AIR, {"first_k_dense_replace": "1"}, IntegrityError, r"first_k_dense_replace is '1'; expected an integer"),
        (GLM_AIR, {"routed_scaling_factor": 0}, IntegrityError, r"routed_scaling_factor is 0; expected"),
        (GLM_AIR, {"use_qk_norm": 1}, IntegrityError, r"use_qk_norm is 1; expected true or false"),
        (
            ERNIE_21B,
            {"use_bias": True},
            IncompatibleError,
            r"use_bias is True, which is not supported; supported: False",
        ),
        (
            ERNIE_21B,
            {"moe_norm_min": 0.1},
            IncompatibleError,
            r"moe_norm_min is 0.1, which is not supported; supported: 1e-12",
        ),
        (ERNIE_21B, {"moe_k": 65}, IntegrityError, r"moe_k is 65; expected at most moe_num_experts, 64"),
        (ERNIE_21B, {"moe_layer_interval": 0}, IntegrityError, r"moe_layer_interval is 0; expected an integer"),
        (ERNIE_21B, {"moe_layer_end_index": -2}, IntegrityError, r"moe_layer_end_index is -2; expected an integer"),
    ],
)
def test_what_cannot_be_of_shared_experts_is_refused(
    model: dict[str, Any], keys: dict[str, Any], error: type[Exception], match: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        read(tmp_path, {**model, **keys})


def test_the_most_experts_are_taken_with_those_that_all_tokens_share(tmp_path: Path) -> None:
    assert read(tmp_path, {**GLM_AIR, "n_shared_experts": 896}).num_all_experts == 1024
    assert read(tmp_path, {**GLM_AIR, "n_shared_experts": 0}).num_shared_experts is None


@pytest.mark.parametrize(
    ("model", "extra"),
    [
        (GLM_MOE, ["model.layers.3.eh_proj.weight", "model.layers.3.mlp.experts.0.up_proj.weight"]),
        (ERNIE_MOE, ["model.mtp_block.0.mlp.up_proj.weight", "model.mtp_linear_proj.0.weight"]),
    ],
)
def test_layers_that_guess_further_tokens_are_left_out_and_no_others(
    model: dict[str, Any], extra: list[str], tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path, **model)
    assert not any("MTP" in note for note in pack(folder, None, Options())["notes"])
    config, shapes = read_config(folder), shapes_of(folder)
    places = resolve_sources(config, {**shapes, **dict.fromkeys(extra, (1,))})
    assert not set(extra) & {place.tensor for place in places.values()}
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({**tensors, **dict.fromkeys(extra, np.zeros(1, np.float32))}, folder / "model.safetensors")
    assert any("MTP" in note for note in pack(folder, None, Options())["notes"])
    # GLM's layer without what tells that it guesses, and ERNIE's under another name.
    other = extra[1].replace("mtp", "ntp")
    with pytest.raises(IntegrityError, match=f"not known to a model of this configuration: {other}"):
        resolve_sources(config, {**shapes, other: (1,)})
