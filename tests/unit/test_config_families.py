"""What families of models differ in: defaults, biases, windows. The oracle is transformers."""

import pytest
from config_files import BASE, HYBRID, read

from llmrun.errors import IntegrityError
from models import MULTIPLIERS


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "mistral",
        "ministral",
        "qwen2",
        "qwen3",
        "phi3",
        "granite",
        "smollm3",
        "seed_oss",
        "glm",
        "glm4",
        "ernie4_5",
    ],
)
def test_defaults_are_transformers_defaults(tmp_path, model_type):
    from transformers import AutoConfig

    given = {**BASE, "num_attention_heads": 32, "model_type": model_type}
    ours, theirs = read(tmp_path, **given), AutoConfig.for_model(**given)
    for name in ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.attention_bias == getattr(theirs, "attention_bias", ours.attention_bias)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64 // 32)
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    rope = {**ours.rope, "partial_rotary_factor": ours.rope.get("rotary_dim", ours.head_dim) / ours.head_dim}
    rope.pop("rotary_dim", None)
    assert rope == {"partial_rotary_factor": 1.0, **theirs.rope_parameters}
    assert read(tmp_path, **given, num_key_value_heads=None).num_key_value_heads == 32
    if model_type == "smollm3":
        longer = {**given, "num_hidden_layers": 9}
        assert list(read(tmp_path, **longer).no_rope_layers or ()) == AutoConfig.for_model(**longer).no_rope_layers
    if model_type == "granite":
        for name in MULTIPLIERS:
            assert getattr(ours, name) == getattr(theirs, name), name


def test_the_mlp_of_a_hybrid_that_is_none_has_the_shared_size(tmp_path):
    """`attention` is transformers 4's name of that kind of layer, `full_attention` is 5's."""
    for kind in ("attention", "full_attention"):
        assert read(tmp_path, **{**HYBRID, "layer_types": [kind]}).intermediate_size == 96


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "phi3",
        "granite",
        "granitemoehybrid",
        "smollm3",
        "seed_oss",
        "glm4",
        "ernie4_5",
    ],
)
def test_biases_are_those_of_transformers_whatever_a_family_ignores(tmp_path, model_type, said):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {**BASE, **(HYBRID if model_type == "granitemoehybrid" else {}), "model_type": model_type}
    ours = read(tmp_path, **given, num_key_value_heads=4, attention_bias=said, mlp_bias=said)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path, pad_token_id=0))
    biases = {name.split(".")[3] for name, _ in theirs.named_parameters() if name.endswith(".bias")}
    assert (ours.attention_bias, ours.mlp_bias) == ("self_attn" in biases, "mlp" in biases)


def test_a_window_that_is_not_used_by_its_own_words_is_none(tmp_path):
    assert read(tmp_path, sliding_window=4096, use_sliding_window=False) == read(tmp_path)


def test_a_deep_llama_has_no_window(tmp_path):
    """It says nothing of max_window_layers either, which is 28 where windows are used."""
    assert read(tmp_path, num_hidden_layers=80).sliding_window is None


@pytest.mark.parametrize("first", ["0", -1, 1.5, True])
def test_layers_that_slide_are_counted(tmp_path, first):
    said = {"use_sliding_window": True, "max_window_layers": first}
    with pytest.raises(IntegrityError, match=r"max_window_layers is .*; expected an integer of at least 0"):
        read(tmp_path, model_type="qwen2", num_key_value_heads=4, **said)


def test_every_layer_has_a_kind(tmp_path):
    said = {"use_sliding_window": True, "num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 2}
    with pytest.raises(IntegrityError, match="layer_types has 2 entries; expected one for each of 3 layers"):
        read(tmp_path, model_type="qwen2", num_key_value_heads=4, **said)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "mistral"},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral", "sliding_window": 100},
        {
            "model_type": "mistral",
            "num_hidden_layers": 2,
            "sliding_window": 100,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": 100, "layer_types": ["full_attention"] * 2},
        {"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": 100, "layer_types": None},
        {
            "model_type": "mistral",
            "num_hidden_layers": 2,
            "sliding_window": None,
            "layer_types": ["full_attention"] * 2,
        },
        {"model_type": "ministral", "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
        {"model_type": "ministral", "sliding_window": None},
        {"model_type": "qwen2", "sliding_window": 100},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0},
        {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 0, "sliding_window": None},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0, "sliding_window": 100},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 100},
        {"model_type": "qwen2", "max_window_layers": 0, "sliding_window": 100},
        {"model_type": "qwen2", "use_sliding_window": True, "num_hidden_layers": 28},
        {"model_type": "qwen2", "use_sliding_window": True, "num_hidden_layers": 29},
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 100,
            "max_window_layers": 1,
            "layer_types": ["sliding_attention"],
        },
        {
            **{"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 100, "num_hidden_layers": 3},
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        {"model_type": "qwen3", "use_sliding_window": True, "num_hidden_layers": 3, "max_window_layers": 2},
        {"model_type": "phi3", "sliding_window": 100, "pad_token_id": 0},
        {"model_type": "phi3", "pad_token_id": 0},
    ],
)
def test_windows_are_those_of_transformers_layer_by_layer(tmp_path, changes):
    from transformers import AutoConfig

    ours = read(tmp_path, num_key_value_heads=4, **changes)
    theirs = AutoConfig.from_pretrained(tmp_path)
    kinds = ["sliding_attention"] * ours.num_hidden_layers
    if theirs.model_type not in ("mistral", "phi3"):
        kinds = theirs.layer_types
    for i, kind in enumerate(kinds):
        assert ours.window_of(i) == (theirs.sliding_window if kind == "sliding_attention" else None)
