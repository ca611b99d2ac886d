"""Mistral Small 3.1 and later, which see images, and Ministral 3, whose queries grow late in a sequence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seeing_models import check_language_model, named_as_modules, save_seeing, write_config
from test_right_answers import answers

from llmpack.config import read_config
from llmpack.pack import Options, pack
from llmpack.rope import longest_sequence, query_growth
from llmrun import Engine
from llmrun.artifact import IncompatibleError, IntegrityError
from models import GROWING, MINISTRAL, TINY, make_checkpoint

Packed = Callable[..., Path]
IDS = [(37 * i + 11) % 250 for i in range(60)]
IDS_BEYOND = [(37 * i + 11) % 250 for i in range(150)]
# As published.
SMALL_3_1 = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "text_config": {
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "max_position_embeddings": 131072,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "vocab_size": 131072,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1024, "model_type": "pixtral"},
}
MINISTRAL_3 = {
    **SMALL_3_1,
    "dtype": "bfloat16",
    "text_config": {
        **{"head_dim": 128, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 9216},
        **{"max_position_embeddings": 262144, "model_type": "ministral3", "num_attention_heads": 32},
        **{"num_hidden_layers": 26, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "vocab_size": 131072},
        "rope_parameters": {
            **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0},
            **{"mscale_all_dim": 1.0, "original_max_position_embeddings": 16384, "rope_theta": 1000000.0},
            **{"rope_type": "yarn", "type": "yarn"},
        },
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
}
UNSAID = {**MINISTRAL_3["text_config"], "rope_parameters": None}


@pytest.mark.parametrize(
    "published", [SMALL_3_1, MINISTRAL_3, UNSAID], ids=["small-3.1", "ministral-3", "ministral-3-text"]
)
@pytest.mark.parametrize("spelling", ["published", "transformers"])
def test_settings_are_those_of_transformers(tmp_path: Path, published: dict[str, Any], spelling: str) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.from_pretrained(write_config(tmp_path, published))
    if spelling == "transformers":
        theirs.save_pretrained(tmp_path)
    text = getattr(theirs, "text_config", theirs)
    ours = read_config(tmp_path)
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert getattr(ours, name) == getattr(text, name), name
    for name in ("head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "sliding_window"):
        assert getattr(ours, name) == getattr(text, name), name
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope.items() <= {"truncate": True, "attention_factor": 1.0, **text.rope_parameters}.items()
    is_new = text.model_type == "ministral3"
    assert ours.architecture == ("Ministral3ForCausalLM" if is_new else "MistralForCausalLM")
    assert longest_sequence(ours)[0] == text.max_position_embeddings


@pytest.mark.parametrize(
    ("config", "kind", "words"),
    [
        ({**SMALL_3_1, "text_config": "mistral"}, IntegrityError, "text_config is 'mistral'; expected an object"),
        ({**SMALL_3_1, "text_config": {"model_type": "llama"}}, IncompatibleError, "supported: 'mistral', 'ministral3'"),
        ({**SMALL_3_1, "quantization_config": {"quant_method": "fp8"}}, IncompatibleError, "quant_method 'fp8'"),
        ({**UNSAID, "rope_parameters": {"llama_4_scaling_beta": 0.1}}, IntegrityError, "original_max_position_embeddings"),
        ({**UNSAID, "rope_parameters": {"llama_4_scaling_beta": -1}}, IntegrityError, "llama_4_scaling_beta is -1"),
        ({**UNSAID, "model_type": []}, IncompatibleError, "model_type is \\[\\]"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(tmp_path: Path, config: dict[str, Any], kind: type, words: str) -> None:
    with pytest.raises(kind, match=words):
        read_config(write_config(tmp_path, config))


@pytest.fixture(scope="module", params=["mistral", "ministral3"])
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that sees images, as transformers saves it, and `logits.npy` of IDS."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(3)
    eyes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    config = Mistral3Config(
        text_config={**TINY, **MINISTRAL, "model_type": request.param, "sliding_window": None},
        vision_config={**eyes, "model_type": "pixtral", "image_size": 28, "patch_size": 14},
        image_token_index=258,
        tie_word_embeddings=request.param == "ministral3",
    )
    model = Mistral3ForConditionalGeneration(config).eval()
    return save_seeing(model, tmp_path_factory.mktemp(request.param), IDS, norm=1)


@pytest.mark.parametrize("names", ["saved", "of_modules"])
def test_the_language_model_of_one_that_sees_is_packed(
    names: str, seeing: Path, packed: Packed, tmp_path: Path
) -> None:
    folder = named_as_modules(seeing, tmp_path / "m") if names == "of_modules" else seeing
    check_language_model(folder, seeing, IDS, packed)


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Ministral 3 whose queries grow twice within IDS_BEYOND."""
    return make_checkpoint(tmp_path_factory.mktemp("growing") / "m", **{**MINISTRAL, "max_position_embeddings": 256})


@pytest.mark.mpi
@pytest.mark.parametrize("shards", [1, 2])
def test_queries_grow_as_in_transformers(shards: int, growing: Path, tmp_path: Path) -> None:
    """In one piece, in several, and token by token; from where it begins on, logits would be others without it."""
    from transformers import AutoModelForCausalLM

    pack(growing, tmp_path / "a", Options(scheme="f32", shards=shards))
    questions = {"sequences": [IDS_BEYOND], "chunks": [None, 50, 1], "greedy": []}
    ours = answers(tmp_path / "a", shards, tmp_path, questions)
    model = AutoModelForCausalLM.from_pretrained(growing, attn_implementation="eager").eval()

    def logits() -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([IDS_BEYOND])).logits[0].numpy()

    theirs = logits()
    assert len(ours) == 4
    for name, found in ours.items():
        np.testing.assert_allclose(found, theirs, rtol=0, atol=2e-4, err_msg=name)
    model.config.rope_parameters["llama_4_scaling_beta"] = 0.0
    difference = np.abs(logits() - theirs).max(axis=1)
    assert difference[:64].max() < 1e-5
    assert difference[64:].min() > 1e-3


def test_the_packagers_example_grows_as_the_operators_do(packed: Packed, tmp_path: Path) -> None:
    with Engine(packed(make_checkpoint(tmp_path / "m", **GROWING), 1, "f32")) as engine:
        difference, tolerance = engine.selfcheck()
    assert difference < 0.1 * tolerance


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"llama_4_scaling_beta": 1e39}, r"llama_4_scaling_beta 1e\+39 is beyond float32"),
        ({"llama_4_scaling_beta": 1e-60}, "llama_4_scaling_beta 1e-60 is beyond float32"),
        ({"original_max_position_embeddings": 64.5}, "original_max_position_embeddings is 64.5; expected a whole number"),
    ],
)  # fmt: skip
def test_growth_that_no_attribute_holds_is_named(
    growing: Path, changed: dict[str, float], words: str, tmp_path: Path
) -> None:
    config = json.loads((growing / "config.json").read_text())
    config["rope_parameters"] |= changed
    with pytest.raises(IncompatibleError, match=words):
        query_growth(read_config(write_config(tmp_path, config)))
