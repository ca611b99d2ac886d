"""What the packager takes over of a model's sampling defaults and end tokens, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizer_makers import edit_json

from llmpack.generation import read_generation
from llmpack.pack import Options, pack
from llmrun.artifact import GenerationDefaults, IncompatibleError


def test_the_artifact_ends_answers_at_the_tokenizer_s_eos_where_no_config_names_one(tiny_text_checkpoint, tmp_path):
    folder = Path(shutil.copytree(tiny_text_checkpoint, tmp_path / "model"))
    edit_json(folder, "config.json", eos_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)

    def ends():
        pack(folder, tmp_path / "artifact", Options(scheme="f32", force=True))
        return json.loads((tmp_path / "artifact/manifest.json").read_text("utf-8"))["eos_token_ids"]

    assert ends() == [theirs.eos_token_id]
    edit_json(folder, "config.json", eos_token_id=[7, 9])
    assert ends() == [7, 9, theirs.eos_token_id]


@pytest.mark.parametrize(
    ("outside", "inside"), [({}, [1, 106]), ({"eos_token_id": None}, [1, 106]), ({"eos_token_id": [1, 106]}, 1)]
)
def test_end_tokens_of_a_model_that_sees_images_are_those_of_transformers(outside, inside, tmp_path):
    transformers = pytest.importorskip("transformers")
    text = {"model_type": "gemma3_text", "eos_token_id": inside}
    edit_json(tmp_path, "config.json", model_type="gemma3", text_config=text, **outside)
    theirs = transformers.GenerationConfig.from_model_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert list(read_generation(tmp_path, 200).eos_token_ids) == theirs.eos_token_id == [1, 106]


def test_the_settings_of_a_model_without_a_tokenizer_are_a_source(tiny_checkpoint, tmp_path):
    pack(tiny_checkpoint, tmp_path / "artifact", Options())
    source = json.loads((tmp_path / "artifact/manifest.json").read_text("utf-8"))["source"]
    assert [entry["path"] for entry in source] == ["config.json", "generation_config.json", "model.safetensors"]


def test_what_was_left_out_is_told(tiny_text_checkpoint, tmp_path):
    folder = Path(shutil.copytree(tiny_text_checkpoint, tmp_path / "model"))
    size = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
    edit_json(folder, "added_tokens.json", **{f"<{i}>": size + i for i in range(5)})
    (note,) = pack(folder, None, Options(scheme="f32"))["notes"]
    assert note == f"'<0>', '<1>', '<2>', 2 more tokens: added beyond vocab_size {size}, therefore left out"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, GenerationDefaults()),
        ({"temperature": 0.6, "top_p": 0.9}, GenerationDefaults(top_p=0.9)),
        ({"do_sample": False, "temperature": 0.6}, GenerationDefaults()),
        ({"do_sample": True}, GenerationDefaults(temperature=1.0)),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 40, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1},
            GenerationDefaults(0.6, 40, 0.9, 0.1, 1.1),
        ),
        ({"do_sample": True, "temperature": None, "top_k": None}, GenerationDefaults(temperature=1.0)),
        ({"top_k": 50.0}, GenerationDefaults(top_k=50)),
        ({"do_sample": True, "temperature": 0.0, "top_k": 0, "min_p": 0.0}, GenerationDefaults()),
        (
            {"do_sample": True, "temperature": 100, "top_p": 1, "repetition_penalty": 10},
            GenerationDefaults(100.0, repeat_penalty=10.0),
        ),
        ({"repetition_penalty": 0.5}, GenerationDefaults(repeat_penalty=0.5)),
    ],
)
def test_sampling_defaults(tmp_path, config, expected):
    edit_json(tmp_path, "generation_config.json", **config)
    assert read_generation(tmp_path, 100).defaults == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("temperature", 100.5),
        ("temperature", "0.6"),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_k", float("inf")),
        ("top_k", float("nan")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("min_p", 1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 10.5),
        ("repetition_penalty", float("nan")),
        ("eos_token_id", -1),
        ("eos_token_id", "2"),
        ("eos_token_id", [2, None]),
        ("eos_token_id", True),
    ],
)
def test_bad_generation_settings_are_refused_by_file_and_key(tmp_path, key, value):
    edit_json(tmp_path, "generation_config.json", do_sample=True, **{key: value})
    with pytest.raises(IncompatibleError, match=rf"generation_config.json: {key}: found .*, expected"):
        read_generation(tmp_path, 100)


def test_generation_settings_that_nothing_honours_are_told(tiny_text_checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = Path(shutil.copytree(tiny_text_checkpoint, tmp_path / "model"))
    off = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": [], "stop_strings": None}
    transformers.GenerationConfig(**off, max_new_tokens=9).save_pretrained(folder)
    edit_json(folder, "generation_config.json", **off)
    assert pack(folder, None, Options(scheme="f32"))["notes"] == []
    transformers.GenerationConfig(no_repeat_ngram_size=3, stop_strings=["User:"]).save_pretrained(folder)
    (note,) = pack(folder, None, Options(scheme="f32"))["notes"]
    assert note == (
        "generation_config.json: stop_strings ['User:'], no_repeat_ngram_size 3: not supported, therefore left out"
    )


def test_an_eos_id_beyond_the_vocabulary_is_refused_without_a_tokenizer_too(tmp_path):
    edit_json(tmp_path, "config.json", eos_token_id=[99, 100])
    with pytest.raises(IncompatibleError, match="eos_token_id: found 100, but the model's vocab_size is 100"):
        read_generation(tmp_path, 100)
