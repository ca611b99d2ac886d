"""Gemma 3: what config.json says in its spellings, and models that see images, of which the language model is packed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file
from seeing_models import check_language_model, named_as_modules, save_seeing, write_config

from llmpack.config import read_config
from llmpack.pack import Options, pack
from llmrun.artifact import IncompatibleError, IntegrityError
from models import GEMMA, make_checkpoint

Packed = Callable[..., Path]
IDS = [(37 * i + 11) % 250 for i in range(40)]
# As published: the first says its numbers, the other leaves most of them to transformers.
TEXT = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}
SEEING = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}

# Nothing as published, nor as transformers has it by default.
OTHER = {
    **{**TEXT, "rope_theta": 5e5, "rope_local_base_freq": 5e3, "sliding_window": 100, "sliding_window_pattern": 4},
    **{"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "query_pre_attn_scalar": 168, "rms_norm_eps": 1e-5},
}


@pytest.mark.parametrize("published", [TEXT, SEEING, OTHER], ids=["text", "seeing", "other"])
@pytest.mark.parametrize("spelling", ["published", "transformers"])
def test_settings_are_those_of_transformers(tmp_path: Path, published: dict[str, Any], spelling: str) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.from_pretrained(write_config(tmp_path, published))
    if spelling == "transformers":
        theirs.save_pretrained(tmp_path)
        assert "layer_types" in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    text = getattr(theirs, "text_config", theirs)
    ours = read_config(tmp_path)
    for name in (
        *(
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        ),
        *(
            "vocab_size",
            "max_position_embeddings",
            "rms_norm_eps",
            "tie_word_embeddings",
            "attention_bias",
            "sliding_window",
        ),
    ):
        assert getattr(ours, name) == getattr(text, name), name
    assert list(ours.layer_types or ()) == text.layer_types
    assert ours.rope == text.rope_parameters["full_attention"]
    assert ours.rope_local == text.rope_parameters["sliding_attention"]
    assert ours.attention_multiplier == text.query_pre_attn_scalar**-0.5
    assert (ours.architecture, ours.dtype) == ("Gemma3ForCausalLM", "bfloat16")
    in_its_type = torch.tensor(text.hidden_size**0.5, dtype=torch.bfloat16)
    assert ours.embedding_multiplier == in_its_type.item() != text.hidden_size**0.5


def test_what_the_language_model_leaves_to_all_parts_is_theirs(tmp_path: Path) -> None:
    said = {**SEEING["text_config"], "torch_dtype": None, "dtype": None, "quantization_config": None}
    assert read_config(write_config(tmp_path, {**SEEING, "text_config": said})).dtype == "bfloat16"
    with pytest.raises(IncompatibleError, match="quant_method 'bnb'"):
        read_config(
            write_config(tmp_path, {**SEEING, "text_config": said, "quantization_config": {"quant_method": "bnb"}})
        )


@pytest.mark.parametrize(("dtype", "scale"), [("float32", np.float32(1152**0.5)), ("float16", np.float16(1152**0.5))])
def test_the_embedding_is_scaled_in_its_own_type(tmp_path: Path, dtype: str, scale: float) -> None:
    assert read_config(write_config(tmp_path, {**TEXT, "torch_dtype": dtype})).embedding_multiplier == scale


@pytest.mark.parametrize(
    ("config", "kind", "words"),
    [
        ({**TEXT, "final_logit_softcapping": 30.0}, IncompatibleError, "final_logit_softcapping is 30.0"),
        ({**TEXT, "attn_logit_softcapping": 50.0}, IncompatibleError, "attn_logit_softcapping is 50.0"),
        ({**TEXT, "use_bidirectional_attention": True}, IncompatibleError, "use_bidirectional_attention is True"),
        ({**TEXT, "hidden_activation": "gelu"}, IncompatibleError, "hidden_activation is 'gelu'"),
        ({**TEXT, "sliding_window": None}, IntegrityError, "sliding_window is null"),
        ({**TEXT, "layer_types": ["sliding_attention"]}, IntegrityError, "layer_types has 1 entries"),
        ({**TEXT, "rope_parameters": {"rope_theta": 1e4}}, IncompatibleError, "expected an object for full_attention"),
        ({**SEEING, "text_config": None}, IntegrityError, "text_config is None; expected an object"),
        ({**SEEING, "text_config": {"model_type": "llama"}}, IncompatibleError, "text_config.model_type is 'llama'"),
        ({**SEEING, "architectures": ["Gemma3ForCausalLM"]}, IncompatibleError, "Gemma3ForConditionalGeneration"),
        ({**SEEING, "quantization_config": {"quant_method": "bnb"}}, IncompatibleError, "quant_method 'bnb'"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, config: dict[str, Any], kind: type, words: str) -> None:
    with pytest.raises(kind, match=words):
        read_config(write_config(tmp_path, config))


@pytest.mark.parametrize("shards", [1, 2])
def test_no_norm_has_a_node_of_its_own(shards: int, packed: Packed, tmp_path: Path) -> None:
    folder = packed(make_checkpoint(tmp_path / "m", **GEMMA), shards, "f16")
    counts = Counter(
        node.op_type for node in onnx.load(folder / "rank-0/cpu.onnx", load_external_data=False).graph.node
    )
    before = "AllReduce" if shards > 1 else ""
    assert counts[f"MatMulF16{before}RMSNormAddRMSNorm"] == 2 * GEMMA["num_hidden_layers"]
    assert counts["MatMulF16GeGLU"] == GEMMA["num_hidden_layers"]
    assert [counts[op] for op in ("RMSNorm", "AddRMSNorm", "AllReduce", "GeGLU")] == [1, 0, 0, 0]


@pytest.mark.parametrize("is_tied", [True, False])
def test_parameters_are_those_of_the_checkpoint(is_tied: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "m", **{**GEMMA, "tie_word_embeddings": is_tied, "attention_bias": True})
    tensors = load_file(folder / "model.safetensors")
    assert pack(folder, tmp_path / "a", Options(scheme="q8"))["parameters"] == sum(t.size for t in tensors.values())


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that sees images, as transformers saves it, and `logits.npy` of IDS."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(3)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 259}
    eyes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**GEMMA, **sizes, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = Gemma3Config(
        text_config={**text, "model_type": "gemma3_text"},
        vision_config={**eyes, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=258,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    return save_seeing(model, tmp_path_factory.mktemp("seeing"), IDS, norm=0)


@pytest.mark.parametrize("names", ["published", "of_modules"])
def test_the_language_model_of_one_that_sees_is_packed(
    names: str, seeing: Path, packed: Packed, tmp_path: Path
) -> None:
    folder = named_as_modules(seeing, tmp_path / "m") if names == "of_modules" else seeing
    check_language_model(folder, seeing, IDS, packed)


def test_that_what_sees_is_left_out_is_said(seeing: Path, tmp_path: Path) -> None:
    notes = pack(seeing, tmp_path / "a", Options(scheme="q8", group_size=32))["notes"]
    assert "text alone: what sees images in this model is left out" in notes
