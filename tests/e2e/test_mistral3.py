"""Mistral Small 3.1 and later, which see images, and Ministral 3, whose queries grow late in a sequence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seeing_models import check_language_model, named_as_modules, save_seeing, write_config

from llmpack.config import read_config
from llmpack.pack import Options, pack
from llmpack.rope import longest_sequence
from llmrun import Engine
from llmrun.artifact import IncompatibleError, IntegrityError, UsageError
from models import MINISTRAL, TINY, make_checkpoint

Packed = Callable[..., Path]
IDS = [(37 * i + 11) % 250 for i in range(60)]
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
    assert longest_sequence(ours)[0] == (16384 if is_new else 131072)


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


def test_sequences_end_where_queries_begin_to_grow(tmp_path: Path) -> None:
    """Up to there logits are those of transformers, and from there on others without the growth."""
    from transformers import AutoModelForCausalLM

    folder = make_checkpoint(tmp_path / "m", **MINISTRAL)
    summary = pack(folder, tmp_path / "a", Options(scheme="f32"))
    assert any(note.startswith("sequences end at 64, original_max_position_embeddings") for note in summary["notes"])
    with pytest.raises(UsageError, match="expected 1 to 64, original_max_position_embeddings"):
        pack(folder, tmp_path / "b", Options(scheme="f32", max_seq_len=65))
    assert pack(folder, tmp_path / "c", Options(scheme="f32", max_seq_len=63))["notes"] != summary["notes"]

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = [(37 * i + 11) % 250 for i in range(80)]

    def logits() -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy()

    theirs = logits()
    with Engine(tmp_path / "a") as engine:
        np.testing.assert_allclose(engine.logits(ids[:64]), theirs[:64], rtol=0, atol=2e-4)
    model.config.rope_parameters["llama_4_scaling_beta"] = 0.0
    differs = np.abs(logits() - theirs).max(axis=1) > 1e-5
    assert not differs[:64].any()
    assert differs[64:].all()
