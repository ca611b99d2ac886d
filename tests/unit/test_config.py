"""config.json: both spellings of RoPE, and refusals that name key and value. The oracle is transformers."""

import re
from pathlib import Path

import numpy as np
import pytest
from config_files import BASE, HYBRID, read

from llmpack.config import read_config
from llmpack.multipliers import embedding_scale, logit_scale, norm_epsilon
from llmpack.rope import attention_scale, for_sequences, longest_sequence, rope_frequencies, rotation_scale
from llmrun.artifact import IncompatibleError, IntegrityError, UsageError
from models import MULTIPLIERS

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3_OUTSIDE = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}


@pytest.mark.parametrize(
    ("changes", "number", "words"),
    [
        ({"embedding_multiplier": 1e30, "residual_multiplier": 1e-10}, embedding_scale, "is 1e+40"),
        ({"residual_multiplier": 1e-30}, norm_epsilon, "is 1e+54"),
        ({"residual_multiplier": 1e30}, norm_epsilon, "is 1e-66"),
        ({"logits_scaling": 1e-40}, logit_scale, "is 1e+40"),
    ],
)
def test_multipliers_that_no_graph_can_hold_are_refused(changes, number, words, tmp_path):
    config = read(tmp_path, model_type="granite", **changes)
    with pytest.raises(IncompatibleError, match=re.escape(words) + r", beyond float32\.$"):
        number(config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 500000.0},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 20000.0, "rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}},
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3_OUTSIDE, "original_max_position_embeddings": 32},
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3_OUTSIDE, "max_position_embeddings": 128},
        {"rope_theta": 1e6, "rope_scaling": YARN},
        {"rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5}},
        {"rope_scaling": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.8, "truncate": False}},
        {"rope_scaling": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.0, "factor": 0.5}},
        {"rope_scaling": {**YARN, "mscale": 1.2}},
        {"rope_theta": 1.5, "rope_scaling": YARN},
        {"rope_parameters": {**YARN, "rope_theta": 20.0, "original_max_position_embeddings": 100000}},
    ],
    ids=[
        "none",
        "theta",
        "linear-alone",
        "linear",
        "llama3",
        "parameters",
        "parameters-linear",
        "parameters-llama3",
        "outside",
        "original-is-max",
        "yarn",
        "yarn-betas-and-factor",
        "yarn-mscales",
        "yarn-less",
        "yarn-one-mscale",
        "yarn-low-theta",
        "yarn-no-pair-is-slow",
    ],
)
def test_frequencies_and_scale_equal_transformers(tmp_path, changes):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = read(tmp_path, **changes)
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(tmp_path))
    np.testing.assert_allclose(rope_frequencies(config), theirs.inv_freq.numpy(), rtol=2e-6)
    # Cosines and sines are multiplied there, of queries and of keys.
    assert attention_scale(config, 0) == pytest.approx(theirs.attention_scaling**2 / 4)


@pytest.mark.parametrize("extreme", [5e-324, 1e308])
@pytest.mark.parametrize("name", ["beta_fast", "beta_slow", "original_max_position_embeddings"])
def test_yarns_numbers_may_be_any(tmp_path, name, extreme):
    plain, ours = (
        rope_frequencies(read(tmp_path, rope_scaling=scaling)) for scaling in (None, {**YARN, name: extreme})
    )
    assert (plain / 4 <= ours * 1.0001).all()
    assert (ours <= plain).all()


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 1e-320}, {**YARN, "factor": 1e-320}])
def test_angles_beyond_float32_are_refused_in_one_sentence(tmp_path, scaling):
    with pytest.raises(
        IncompatibleError, match=r"^config.json: RoPE's angles are beyond float32: .* factor 1e-320[^.]*"
    ):
        rope_frequencies(read(tmp_path, rope_scaling=scaling))


LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 3.0, 9.0]}
PHI3 = {**BASE, "model_type": "phi3", "partial_rotary_factor": 0.75, "rope_scaling": LONGROPE, "rope_theta": 20000.0}
PHI3 |= {"hidden_size": 32, "max_position_embeddings": 256, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": {**LONGROPE, "type": "yarn"}},
        {"rope_scaling": {**LONGROPE, "attention_factor": 1.25}},
        {"rope_scaling": {**LONGROPE, "factor": 8.0}},
        {"rope_scaling": {**LONGROPE, "factor": 0.5}},
        {"max_position_embeddings": 64},
        {"max_position_embeddings": 8192, "original_max_position_embeddings": ...},  # not there
        {"rope_scaling": None, "rope_parameters": {**LONGROPE, "rope_type": "longrope", "partial_rotary_factor": 0.75}},
        {"rope_scaling": None},
        {"rope_scaling": None, "partial_rotary_factor": 0.5},
    ],
)
@pytest.mark.parametrize("num_positions", [64, 65, 4097])
def test_phi3s_frequencies_and_scale_equal_transformers(tmp_path, changes, num_positions):
    import torch
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    given = {key: value for key, value in {**PHI3, **changes}.items() if value is not ...}
    config, note = for_sequences(read(tmp_path, **given), num_positions)
    theirs = Phi3RotaryEmbedding(Phi3Config.from_pretrained(tmp_path))
    theirs(torch.zeros(1, num_positions, 8), torch.arange(num_positions)[None])  # which decides for short or long
    ours = rope_frequencies(config)
    assert ours.shape == (4,)
    np.testing.assert_allclose(ours[: len(theirs.inv_freq)], theirs.inv_freq.numpy(), rtol=2e-6)
    assert not ours[len(theirs.inv_freq) :].any()
    # Cosines and sines are multiplied there; of features that are not rotated there are none.
    scale = rotation_scale(config)
    half = np.ones(4) if scale is None else scale[:4]
    expected = np.where(np.arange(4) < len(theirs.inv_freq), theirs.attention_scaling, 1.0)
    np.testing.assert_allclose(half, expected, rtol=1e-6)
    assert scale is None or np.array_equal(scale[4:], half)
    assert attention_scale(config, 0) == pytest.approx(1 / 8**0.5)
    original = (theirs.config.rope_parameters or {}).get("original_max_position_embeddings", num_positions)
    assert bool(note) == (num_positions > original)


def test_longropes_factor_is_attentions_where_all_is_rotated(tmp_path):
    four = {**LONGROPE, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "attention_factor": 1.25}
    config, _ = for_sequences(read(tmp_path, **{**PHI3, "partial_rotary_factor": 1.0, "rope_scaling": four}), 65)
    assert (rotation_scale(config), attention_scale(config, 0)) == (None, pytest.approx(1.25**2 / 8**0.5))


@pytest.mark.filterwarnings("error")
def test_a_factor_beyond_float32_is_refused_in_one_sentence(tmp_path):
    config, _ = for_sequences(read(tmp_path, **{**PHI3, "rope_scaling": {**LONGROPE, "attention_factor": 1e300}}), 64)
    with pytest.raises(IncompatibleError, match=r"^config.json: RoPE's attention_factor 1e\+300 is beyond float32\.$"):
        rotation_scale(config)


def test_a_number_that_no_float_holds_contradicts_nothing(tmp_path):
    config = read(tmp_path, rope_scaling=LLAMA3_OUTSIDE, original_max_position_embeddings=2**53 + 1)
    assert config.rope["original_max_position_embeddings"] == 2.0**53


def test_null_is_not_said(tmp_path):
    plain = {**PHI3, "rope_scaling": None, "partial_rotary_factor": 0.5}
    assert read(tmp_path, **plain, rope_parameters={"partial_rotary_factor": None}).rope == read(tmp_path, **plain).rope


def test_longrope_from_one_position_on_has_no_factor(tmp_path):
    """Its logarithm is 0, and transformers divides by that."""
    config = read(tmp_path, **{**PHI3, "original_max_position_embeddings": 1})
    assert config.rope["attention_factor"] == 1


def test_phi3s_first_name_of_longrope(tmp_path):
    assert read(tmp_path, **{**PHI3, "rope_scaling": {**LONGROPE, "type": "su"}}) == read(tmp_path, **PHI3)


def test_sequences_are_as_long_as_yarn_makes_them(tmp_path):
    assert longest_sequence(read(tmp_path, rope_scaling=YARN, max_position_embeddings=64))[0] == 256
    assert longest_sequence(read(tmp_path, rope_scaling=YARN, max_position_embeddings=300))[0] == 300
    most = read(tmp_path, rope_scaling={**YARN, "factor": 1e308, "attention_factor": 1e308})
    assert (longest_sequence(most)[0], attention_scale(most, 0)) == (2**31 - 1, float("inf"))
    assert longest_sequence(read(tmp_path, rope_scaling=LLAMA3, max_position_embeddings=64))[0] == 64


def test_the_widest_heads_are_those_that_the_operator_takes(tmp_path):
    source = (Path(__file__).parents[2] / "custom_ops/cpu/isa.h").read_text()
    widest = int(re.findall(r"kMaxHeadDim = (\d+);", source)[0])
    assert read(tmp_path, head_dim=widest).head_dim == widest
    with pytest.raises(IncompatibleError, match=f"head_dim {widest + 2}"):
        read(tmp_path, head_dim=widest + 2)


def test_both_spellings_are_one(tmp_path):
    old = read(tmp_path, rope_theta=500000.0, rope_scaling=LLAMA3)
    assert old == read(tmp_path, rope_parameters={"rope_theta": 500000.0, **LLAMA3})


def test_values_that_change_nothing_are_accepted(tmp_path):
    spelled_out = {
        "hidden_act": "silu",
        "partial_rotary_factor": 1.0,
        "logit_scale": 1.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": None,
        "logits_scaling": 1.0,
        "num_local_experts": 0,
        "use_qk_norm": False,
        "is_encoder_decoder": False,
        "layer_types": ["full_attention"],
        "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        "rope_scaling": {"rope_type": "default"},
    }
    plain = read(tmp_path)
    assert read(tmp_path, **spelled_out) == plain
    assert read(tmp_path, num_local_experts=1) == plain


def test_head_dim_need_not_be_hidden_size_by_heads(tmp_path):
    assert read(tmp_path, hidden_size=66, head_dim=16).head_dim == 16
    with pytest.raises(IncompatibleError, match="hidden_size 66 is not a multiple"):
        read(tmp_path, hidden_size=66)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_both_spellings_of_the_data_type(tmp_path, key):
    assert read(tmp_path, **{key: "bfloat16"}).dtype == "bfloat16"
    assert read(tmp_path, **{key: None}).dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma"}, "'gemma'; llmpack packs 'llama', 'mistral', 'ministral', 'ministral3', 'qwen2'"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]"),
        ({"model_type": "qwen2", "architectures": ["LlamaForCausalLM"]}, "Qwen2ForCausalLM"),
        (
            {"model_type": "qwen2", "num_key_value_heads": 4, "layer_types": ["sliding_attention"]},
            r"layer_types\[0\] is",
        ),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"quantization_config": {"quant_method": "gptq", "ignore": ["x"] * 999}}, r"\(quant_method 'gptq'\); .{,99}$"),
        ({"quantization_config": "gptq"}, r"\(quant_method 'gptq'\)"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"sliding_window": 4096, "use_sliding_window": True}, "sliding_window"),
        ({"rope_scaling": {"rope_type": [1], "factor": 2.0}}, r"rope_scaling.rope_type is \[1\]"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\]"),
        ({"layer_types": 5}, "layer_types is 5"),
        ({"layer_types": ["sliding_attention"], "use_sliding_window": True}, r"layer_types\[0\] is"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types\[1\] is"),
        ({"hidden_act": ["silu"]}, "hidden_act is"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"is_causal": False}, "is_causal is False"),
        ({"use_qk_norm": True}, "use_qk_norm is True, which is not supported; supported: False"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5"),
        *(({name: 2.5}, f"{name} is 2.5, which is not supported") for name in MULTIPLIERS),
        ({**HYBRID, "num_local_experts": 64}, "num_local_experts is 64, .* supported: 0"),
        ({**HYBRID, "num_local_experts": 1}, "num_local_experts is 1, .* supported: 0"),
        ({**HYBRID, "num_local_experts": None}, "num_local_experts is None, .* supported: 0"),
        ({**HYBRID, "position_embedding_type": None}, "position_embedding_type is None, .* supported: 'rope'"),
        (
            {**HYBRID, "layer_types": ["attention", *["mamba"] * 39]},
            r"layer_types\[1\] is 'mamba'; supported: 'full_attention' and 'attention' only",
        ),
        ({**HYBRID, "layer_types": None}, "layer_types is missing; supported: 'attention'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"head_dim": 258}, "head_dim 258; .* 256"),
        ({"hidden_size": 2048}, "head_dim 512; .* 256"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "rope_scaling": {**LLAMA3}},
            "rope_parameters and rope_scaling contradict each other: rope_type 'default' and 'llama3', factor None and 8.0",
        ),
        (
            {**PHI3, "rope_parameters": {**LONGROPE, "short_factor": [9.125] * 3}},
            r"contradict each other: short_factor \[9.125, 9.125, 9.125\] and \[1.0, 1.5, 2.0\].$",
        ),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 32}, "64 and .* 32 contradict"),
        (
            {"model_type": "phi3", "rope_scaling": {**LONGROPE, "original_max_position_embeddings": 8192}},
            r"8192 and .* 4096 \(the default\) contradict",
        ),
    ],
)
def test_unsupported_is_refused_by_key_and_value(tmp_path, changes, words):
    with pytest.raises(IncompatibleError, match=words):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": 1e99}, "hidden_size"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"model_type": "smollm3", "no_rope_layers": []}, r"no_rope_layers is \[\]; expected 0 or 1 for each of 1"),
        ({"model_type": "smollm3", "no_rope_layers": [2]}, r"no_rope_layers is \[2\]; expected 0 or 1"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 10"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {**YARN, "mscale": "1", "mscale_all_dim": 1}}, "rope_scaling.mscale is '1'"),
        ({"rope_scaling": YARN, "rope_theta": 1}, "rope_theta is 1; expected more than 1"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "rope_scaling.truncate is 1"),
        ({"rope_scaling": LLAMA3_OUTSIDE, "original_max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.short_factor is None; expected 8 numbers"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": "x" * 999}}, "short_factor is 'x{,99}; expected 8"),
        ({**PHI3, "rope_scaling": {**LONGROPE, "long_factor": [1]}}, "long_factor is a list of 1; expected 3 numbers"),
        ({**PHI3, "rope_scaling": {**LONGROPE, "long_factor": [1, 2, 0]}}, r"rope_scaling.long_factor\[2\] is 0"),
        (
            {**PHI3, "partial_rotary_factor": 0.4},
            "partial_rotary_factor is 0.4 of head_dim 8; .* even number of features",
        ),
        ({**PHI3, "partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5 of head_dim 8; .* from 2 to 8"),
        ({**PHI3, "partial_rotary_factor": 1e-9}, "partial_rotary_factor is 1e-09"),
        ({**PHI3, "partial_rotary_factor": 1e300}, "partial_rotary_factor is 1e"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor is 1; .* low_freq_factor 1"),
    ],
)
def test_impossible_numbers_are_named(tmp_path, changes, words):
    with pytest.raises(IntegrityError, match=words):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *(("", "not JSON"), ("[]", "a JSON list, expected an object"), ("{", "not JSON"), ("\xff", "not JSON")),
        ("version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, .* `git lfs pull`"),
    ],
)
def test_not_a_config_at_all(tmp_path, text, words):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(IntegrityError, match=rf"config\.json: .*{words}"):
        read_config(tmp_path)


def test_no_config_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"config\.json: no such file"):
        read_config(tmp_path)
