"""Mixtures of experts in config.json: as published, as transformers writes them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mixtures import GPT_OSS_20B, MIXTRAL_8X7B, PUBLISHED, QWEN_30B, read, shapes_of
from transformers import AutoConfig, AutoModelForCausalLM

from llmpack.config import read_config
from llmpack.pack import Options, pack
from llmpack.sources import resolve_sources
from llmpack.split_check import check_split, choose_group_size
from llmpack.weights import Quantization
from llmrun.artifact import IncompatibleError, IntegrityError, UsageError
from models import ERNIE_MOE, GLM_MOE, GRANITE_MOE, MIXTRAL, QWEN_MOE, make_checkpoint


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("spelling", ["published", "transformers", "without-what-transformers-knows"])
def test_settings_are_those_of_transformers(name: str, spelling: str, tmp_path: Path) -> None:
    config = PUBLISHED[name]
    if spelling == "without-what-transformers-knows":
        sizes = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        sizes += ("head_dim",) if name == "glm" else ()  # which transformers rounds down otherwise
        config = {key: config[key] for key in ("architectures", "model_type", *sizes)}
    truth = AutoConfig.for_model(**config)
    if spelling == "transformers":
        truth.save_pretrained(tmp_path)
        config = {**json.loads((tmp_path / "config.json").read_text()), "architectures": config["architectures"]}
    found = read(tmp_path, config)
    num_experts = truth.num_experts if name == "ernie" else truth.num_local_experts
    assert (found.num_experts, found.num_experts_per_tok) == (num_experts, truth.num_experts_per_tok)
    assert found.moe_intermediate_size == getattr(truth, "moe_intermediate_size", truth.intermediate_size)
    assert found.norm_topk_prob == getattr(truth, "norm_topk_prob", True)
    assert found.intermediate_size == truth.intermediate_size
    num_shared = getattr(truth, "n_shared_experts", getattr(truth, "moe_num_shared_experts", None))
    assert found.num_shared_experts == num_shared
    assert found.routed_scaling_factor == getattr(truth, "routed_scaling_factor", 1.0)
    if num_shared is None:
        assert found.mlp_layer_types is None
    else:
        assert found.mlp_layer_types == ("dense", *["sparse"] * (truth.num_hidden_layers - 1))
    if name == "glm":
        assert (found.attention_bias, found.has_output_bias) == (truth.attention_bias, False)
        assert (found.has_qk_norm, found.rope["rotary_dim"]) == (False, found.head_dim // 2)
    if name == "gpt-oss":
        assert (found.sliding_window, list(found.layer_types or ())) == (truth.sliding_window, truth.layer_types)
        assert (found.swiglu_alpha, found.swiglu_limit) == (truth.swiglu_alpha, truth.swiglu_limit)
        assert found.rope.items() >= truth.rope_parameters.items()
        assert (found.attention_bias, found.has_output_bias) == (truth.attention_bias, truth.attention_bias)
    else:
        assert (found.sliding_window, found.layer_types, found.swiglu_limit) == (None, None, None)
    assert (found.num_attention_heads, found.num_key_value_heads) == (
        truth.num_attention_heads,
        truth.num_key_value_heads,
    )
    assert found.head_dim == getattr(truth, "head_dim", None) or truth.hidden_size // truth.num_attention_heads
    assert found.rms_norm_eps == truth.rms_norm_eps
    assert found.rope["rope_theta"] == truth.rope_parameters["rope_theta"]
    assert found.max_position_embeddings == truth.max_position_embeddings
    assert found.tie_word_embeddings == truth.tie_word_embeddings
    for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        assert getattr(found, key) == getattr(truth, key, 1.0)


@pytest.mark.parametrize(
    ("keys", "sparse"),
    [
        ({"mlp_only_layers": [0, 3]}, [0, 1, 1, 0]),
        ({"decoder_sparse_step": 2}, [0, 1, 0, 1]),
        ({"decoder_sparse_step": 3}, [0, 0, 1, 0]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [0, 0, 0, 1]),
        ({"mlp_only_layers": None, "decoder_sparse_step": None}, [1, 1, 1, 1]),
        ({"mlp_only_layers": [0, 1, 2, 3]}, [0, 0, 0, 0]),
        ({"mlp_only_layers": [7]}, [1, 1, 1, 1]),
    ],
)
def test_layers_with_experts_are_those_of_qwens_rule(keys: dict[str, Any], sparse: list[int], tmp_path: Path) -> None:
    found = read(tmp_path, {**QWEN_30B, "num_hidden_layers": 4, **keys})
    assert [found.is_sparse(i) for i in range(4)] == [bool(flag) for flag in sparse]
    assert found.has_dense_layers == (0 in sparse)
    assert (found.num_experts is None) == (1 not in sparse)


def test_layers_of_other_families_all_have_experts_whatever_qwens_keys_say(tmp_path: Path) -> None:
    found = read(tmp_path, {**MIXTRAL_8X7B, "mlp_only_layers": [0], "decoder_sparse_step": 2})
    assert found.mlp_layer_types is None


@pytest.mark.parametrize("keys", [{"num_experts": 1024}, {"num_experts": 8}, {"num_experts_per_tok": 128}])
def test_the_most_experts_are_taken(keys: dict[str, Any], tmp_path: Path) -> None:
    found = read(tmp_path, {**QWEN_30B, **keys})
    assert {key: getattr(found, key) for key in keys} == keys


@pytest.mark.parametrize(
    ("keys", "error", "match"),
    [
        ({"num_experts": 1025}, IncompatibleError, r"num_experts 1025; llmpack packs up to 1024 experts"),
        ({"num_experts": 0}, IntegrityError, r"num_experts is 0; expected an integer of at least 1"),
        ({"num_experts": 4}, IntegrityError, r"num_experts_per_tok is 8; expected at most num_experts, 4"),
        ({"num_experts_per_tok": "8"}, IntegrityError, r"num_experts_per_tok is '8'; expected an integer"),
        ({"moe_intermediate_size": -1}, IntegrityError, r"moe_intermediate_size is -1; expected an integer"),
        ({"norm_topk_prob": 1}, IntegrityError, r"norm_topk_prob is 1; expected true or false"),
        ({"mlp_only_layers": "all"}, IntegrityError, r"mlp_only_layers is 'all'; expected a list of layers' numbers"),
        ({"mlp_only_layers": 3}, IntegrityError, r"mlp_only_layers is 3; expected a list of layers' numbers"),
        ({"mlp_only_layers": [True]}, IntegrityError, r"mlp_only_layers is \[True\]; expected a list"),
        ({"decoder_sparse_step": 0}, IntegrityError, r"decoder_sparse_step is 0; expected an integer of at least 1"),
        ({"hidden_act": "gelu"}, IncompatibleError, r"hidden_act is 'gelu', which is not supported"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], error: type[Exception], match: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=match):
        read(tmp_path, {**QWEN_30B, **keys})


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "granite", "granitemoehybrid"])
def test_experts_of_other_families_are_refused(model_type: str, tmp_path: Path) -> None:
    config = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    with pytest.raises(IncompatibleError, match="num_local_experts is 8, which is not supported"):
        read(tmp_path, {**config, "vocab_size": 9, "model_type": model_type, "num_local_experts": 8})


@pytest.mark.parametrize(
    ("model", "tensor"),
    [
        (QWEN_MOE, "model.layers.1.mlp.experts.5.up_proj.weight"),
        (QWEN_MOE, "model.layers.2.mlp.gate.weight"),
        (MIXTRAL, "model.layers.0.block_sparse_moe.experts.3.w2.weight"),
        (MIXTRAL, "model.layers.1.block_sparse_moe.gate.weight"),
        (GLM_MOE, "model.layers.1.mlp.shared_experts.down_proj.weight"),
        (GLM_MOE, "model.layers.2.mlp.gate.e_score_correction_bias"),
        (ERNIE_MOE, "model.layers.1.mlp.shared_experts.up_proj.weight"),
        (GRANITE_MOE, "model.layers.0.block_sparse_moe.input_linear.weight"),
        (GRANITE_MOE, "model.layers.1.block_sparse_moe.router.layer.weight"),
    ],
)
def test_a_tensor_that_is_missing_or_of_another_shape_is_named(
    model: dict[str, Any], tensor: str, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path, **model)
    config, shapes = read_config(folder), shapes_of(folder)
    resolve_sources(config, shapes)
    with pytest.raises(IntegrityError, match=rf"missing: {tensor}; not known to a model of this configuration: none"):
        resolve_sources(config, {name: shape for name, shape in shapes.items() if name != tensor})
    *rest, last = shapes[tensor]
    with pytest.raises(IntegrityError, match=rf"{tensor}: shape .*{last + 1}\], but config.json asks for .*{last}\]"):
        resolve_sources(config, {**shapes, tensor: (*rest, last + 1)})
    if len(rest) == 2:  # as one matrix
        with pytest.raises(IntegrityError, match=rf"{tensor}: shape .*, but config.json asks for \[6, 512, 256\]"):
            resolve_sources(config, {**shapes, tensor: (rest[0] * rest[1], last)})


@pytest.mark.parametrize("model", [QWEN_MOE, MIXTRAL, GRANITE_MOE, GLM_MOE, ERNIE_MOE])
def test_experts_saved_as_transformers_has_them_in_memory_give_the_same_bytes(
    model: dict[str, Any], tmp_path: Path
) -> None:
    published = make_checkpoint(tmp_path / "published", **model)
    saved = tmp_path / "saved"
    AutoModelForCausalLM.from_pretrained(published).save_pretrained(saved, save_original_format=False)
    joined = [name for name in shapes_of(saved) if name.endswith(".experts.gate_up_proj")]
    assert joined
    for scheme in ("f32", "q4"):
        for folder in (published, saved):
            pack(folder, tmp_path / f"{folder.name}-{scheme}", Options(shards=2, scheme=scheme))
        for rank in (0, 1):
            one, other = (tmp_path / f"{name}-{scheme}/rank-{rank}/weights.bin" for name in ("published", "saved"))
            assert one.read_bytes() == other.read_bytes()
    config, shapes = read_config(saved), shapes_of(saved)
    with pytest.raises(IntegrityError, match=rf"missing: {joined[1]}; not known to a model of this .*: none"):
        resolve_sources(config, {name: shape for name, shape in shapes.items() if name != joined[1]})
    number, rows, columns = shapes[joined[0]]
    with pytest.raises(IntegrityError, match=rf"config.json asks for \[{number}, {rows}, {columns}\]"):
        resolve_sources(config, {**shapes, joined[0]: (number + 1, rows, columns)})


@pytest.mark.parametrize(
    ("sizes", "shards", "scheme", "match"),
    [
        (
            {"moe_intermediate_size": 96},
            2,
            "q4",
            r"256 \(down_proj\), 48 \(down_proj of an expert, of whole tiles of 16\)\. --shards 1 works",
        ),
        ({"moe_intermediate_size": 24}, 1, "f32", r"24 \(down_proj of an expert.*\)\. It cannot be packed\."),
        (
            {"moe_intermediate_size": 256, "intermediate_size": 500},
            1,
            "q8",
            r"500 \(down_proj\), 256 .*\. Use --quant f16 or f32\.",
        ),
    ],
)
def test_a_split_into_parts_of_tiles_is_refused(
    sizes: dict[str, Any], shards: int, scheme: str, match: str, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path, **{**QWEN_MOE, "num_attention_heads": 6, "num_key_value_heads": 6, **sizes})
    with pytest.raises(UsageError, match=match):
        pack(folder, None, Options(shards=shards, scheme=scheme))


@pytest.mark.parametrize("shards", [1, 2])
def test_bytes_of_a_token_are_those_of_the_experts_it_goes_through(shards: int, tmp_path: Path) -> None:
    summary = pack(make_checkpoint(tmp_path, **QWEN_MOE), None, Options(shards=shards))
    for rank in summary["ranks"]:
        held = rank["weight_bytes_by_role"]
        of_all = sum(size for role, size in held.items() if role not in ("embedding", "experts"))
        assert rank["weight_bytes_per_token"] == of_all + held["experts"] * 3 // 8
        # Two layers: 4.25 bits for each of three matrices of eight experts; a router in float16, filled up to a tile.
        assert held["experts"] * 8 == 2 * 8 * 3 * 256 * 256 * 4.25 / shards
        assert held["router"] == 2 * 16 * 256 * 2
    unused = 2 * 5 * 3 * 256 * 256
    assert summary["parameters"] - summary["parameters_per_token"] == unused


@pytest.mark.parametrize("group_size", [32, 64])
def test_experts_in_mxfp4_split_by_their_own_groups(group_size: int, tmp_path: Path) -> None:
    """Two ranks have 1,440 features of each expert: 45 groups of 32, and no whole number of 64."""
    config = read(tmp_path, GPT_OSS_20B)
    published = Quantization("q4", group_size, has_mxfp4=True)
    for shards in (1, 2):
        check_split(config, published, shards)
    with pytest.raises(UsageError, match=r"720 \(down_proj of an expert.*\)\. --shards 1 or 2 works\."):
        check_split(config, published, 4)
    as_others = Quantization("q4", group_size)
    if group_size == 64:
        with pytest.raises(
            UsageError, match=r"1440 \(down_proj of an expert.*\)\. --group-size 32 works; --shards 1 works"
        ):
            check_split(config, as_others, 2)
        assert choose_group_size(config, as_others, 2).group_size == 32
    assert choose_group_size(config, published, 2) == Quantization("q4", 64, has_mxfp4=True)
