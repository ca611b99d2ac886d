"""What the packager finds in a model directory, and what it refuses."""

import dataclasses
import json
import shutil

import pytest
from tokenizer_makers import (
    BYTE_LEVEL_SPECIAL,
    edit_json,
    load_files,
    train_byte_level,
    train_sentencepiece,
)

from llmpack.generation import read_generation
from llmpack.tokenizer_files import GOLDEN_TEXTS, read_tokenizer
from llmrun.artifact import GenerationDefaults, IncompatibleError, IntegrityError, LlmpackError


def test_a_model_without_tokenizer_has_none(tmp_path):
    assert read_tokenizer(tmp_path, 100) is None
    assert read_generation(tmp_path, 100).defaults == GenerationDefaults()
    assert read_generation(tmp_path, 100).eos_token_ids == ()


def test_sentencepiece(sp):
    files = read_tokenizer(sp, 420)
    assert (files.kind, files.source_file.name, files.vocab_size) == ("sentencepiece", "tokenizer.model", 420)
    assert files.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert (files.bos_token, files.bos_token_id, files.eos_token, files.eos_token_ids) == ("<s>", 1, "</s>", (2,))
    assert files.add_bos_token
    assert files.chat_template is None
    assert files.sources == ("config.json", "tokenizer.model", "tokenizer_config.json")


def test_a_lone_tokenizer_model_speaks_for_itself(sp):
    expected = read_tokenizer(sp, 420)
    (sp / "tokenizer_config.json").unlink()
    (sp / "config.json").unlink()
    assert read_tokenizer(sp, 420) == dataclasses.replace(expected, sources=("tokenizer.model",))


def test_tokenizers(bl):
    files = read_tokenizer(bl, 500)
    assert (files.kind, files.source_file.name) == ("tokenizers", "tokenizer.json")
    assert sorted(files.special_tokens) == sorted(BYTE_LEVEL_SPECIAL)  # "<tool>" was added, but is not special
    assert files.bos_token_id == files.special_tokens["<|begin_of_text|>"]
    assert files.eos_token_ids == (files.special_tokens["<|eot_id|>"],)
    assert files.add_bos_token  # its post-processor does
    edit_json(bl, "tokenizer.json", post_processor=None)
    assert not read_tokenizer(bl, 500).add_bos_token


@pytest.mark.parametrize("kind", ["sp", "bl"])
def test_the_runtime_gives_the_golden_ids(kind, request):
    files = read_tokenizer(request.getfixturevalue(kind), 500)
    ours = load_files(files)
    assert len(files.golden) == len(GOLDEN_TEXTS) == 24
    for vector in files.golden:
        assert ours.encode(vector["text"], add_bos=False) == vector["ids"], vector
        expected = vector["text"].replace("\u2581", " ") if kind == "sp" else vector["text"]
        assert ours.decode(vector["ids"]) == expected


@pytest.mark.parametrize("kind", ["sp", "bl"])
def test_the_runtime_begins_a_text_as_transformers_does(kind, request):
    folder = request.getfixturevalue(kind)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    assert load_files(read_tokenizer(folder, 500)).encode("Hello house") == theirs.encode("Hello house")


def test_of_both_files_the_one_that_gives_transformers_ids_is_taken(sp):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(sp)
    theirs.backend_tokenizer.save(str(sp / "tokenizer.json"))
    files = read_tokenizer(sp, 420)
    assert files.kind == "sentencepiece"
    theirs = transformers.AutoTokenizer.from_pretrained(sp)
    text = "<s>[INST] a [/INST] b </s><s> c"
    ours = load_files(files).encode(text, add_bos=False, parse_special=True)
    assert ours == theirs.encode(text, add_special_tokens=False)

    edit_json(sp, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert read_tokenizer(sp, 420).kind == "tokenizers"


@pytest.mark.parametrize("config", [{"legacy": True}, {"add_prefix_space": False}], ids=str)
def test_a_space_before_words_that_no_tokenizer_model_knows_needs_tokenizer_json(config, sp):
    theirs = pytest.importorskip("transformers").AutoTokenizer
    theirs.from_pretrained(sp).backend_tokenizer.save(str(sp / "first.json"))
    edit_json(sp, "tokenizer_config.json", **config, chat_template="{{ bos_token }}{{ messages[0].content }}")
    ((key, value),) = config.items()
    refusal = (
        rf"tokenizer\.model: tokenizer_config\.json: {key}: found {value}, expected a tokenizer\.json.*save_pretrained"
    )
    with pytest.raises(IncompatibleError, match=refusal):
        read_tokenizer(sp, 420)
    (sp / "first.json").rename(sp / "tokenizer.json")  # which puts the space elsewhere
    with pytest.raises(IncompatibleError, match=refusal):
        read_tokenizer(sp, 420)
    theirs.from_pretrained(sp).backend_tokenizer.save(str(sp / "tokenizer.json"))
    files = read_tokenizer(sp, 420)
    assert files.source_file.name == "tokenizer.json"
    for text in ["the house", "[INST] a [/INST] b </s><s>c", "a</s>b"]:
        assert load_files(files).encode(text, parse_special=True) == theirs.from_pretrained(sp).encode(text)


def test_legacy_changes_nothing_without_a_chat_template(sp):
    theirs = pytest.importorskip("transformers").AutoTokenizer
    edit_json(sp, "tokenizer_config.json", legacy=True)
    files = read_tokenizer(sp, 420)
    assert files.source_file.name == "tokenizer.model"
    for text in ["the house", "a  b", "12 o'clock"]:
        assert load_files(files).encode(text) == theirs.from_pretrained(sp).encode(text)


def write_json_of_transformers_4(folder, theirs):
    theirs.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    spaces = [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    edit_json(folder, "tokenizer.json", normalizer={"type": "Sequence", "normalizers": spaces}, pre_tokenizer=None)


@pytest.mark.parametrize("legacy", [None, False, True])
@pytest.mark.parametrize("model_type", ["mistral", "ministral", "mistral3", "ministral3"])
def test_the_tokenizer_json_of_a_mistral_is_used_as_it_is(model_type, legacy, sp):
    theirs = pytest.importorskip("transformers").AutoTokenizer
    write_json_of_transformers_4(sp, theirs)
    edit_json(sp, "config.json", model_type=model_type)
    edit_json(sp, "tokenizer_config.json", chat_template="{{ messages[0].content }}", legacy=legacy)
    files = read_tokenizer(sp, 420)
    assert files.source_file.name == "tokenizer.json"
    for text in ["<s>[INST] a [/INST] b </s><s>[INST] c", "  the  house", " a"]:
        ids = load_files(files).encode(text, add_bos=False, parse_special=True)
        assert ids == theirs.from_pretrained(sp).encode(text, add_special_tokens=False)


def test_a_tokenizer_json_as_transformers_4_wrote_it_puts_the_space_of_legacy(sp):
    theirs = pytest.importorskip("transformers").AutoTokenizer
    write_json_of_transformers_4(sp, theirs)
    edit_json(sp, "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    text = "<s>[INST] a [/INST] b </s><s>[INST] c"
    for legacy, name in [(None, "tokenizer.model"), (False, "tokenizer.model"), (True, "tokenizer.json")]:
        edit_json(sp, "tokenizer_config.json", legacy=legacy)
        files = read_tokenizer(sp, 420)
        assert files.source_file.name == name
        ids = load_files(files).encode(text, add_bos=False, parse_special=True)
        assert ids == theirs.from_pretrained(sp).encode(text, add_special_tokens=False)


def test_a_tokenizer_model_that_puts_no_space_before_words_may_say_so(tmp_path):
    theirs = pytest.importorskip("transformers").AutoTokenizer
    train_sentencepiece(tmp_path, add_dummy_prefix=False)
    edit_json(tmp_path, "tokenizer_config.json", add_prefix_space=False)
    ours, text = load_files(read_tokenizer(tmp_path, 420)), "the house</s>a"
    assert ours.encode(text, parse_special=True) == theirs.from_pretrained(tmp_path).encode(text)


def test_added_tokens_that_are_not_special_need_tokenizer_json(sp):
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(sp)
    theirs.add_tokens(["<tool>"])
    theirs.backend_tokenizer.save(str(sp / "tokenizer.json"))
    files = read_tokenizer(sp, 421)
    assert files.kind == "tokenizers"
    assert "<tool>" not in files.special_tokens


@pytest.mark.parametrize("vocab_size", [380, 440])
def test_a_tokenizer_model_of_another_vocabulary_gives_way_to_tokenizer_json(vocab_size, sp):
    theirs = pytest.importorskip("transformers").AutoTokenizer
    before = theirs.from_pretrained(sp).encode("the house")
    theirs.from_pretrained(sp).backend_tokenizer.save(str(sp / "tokenizer.json"))
    (sp / "other").mkdir()
    train_sentencepiece(sp / "other", vocab_size=vocab_size, user_defined_symbols=["\n"])
    shutil.copy(sp / "other/tokenizer.model", sp)
    files = read_tokenizer(sp, 440)
    assert files.source_file.name == "tokenizer.json"
    assert load_files(files).encode("the house") == theirs.from_pretrained(sp).encode("the house") == before


def test_a_byte_level_tokenizer_json_goes_before_the_tokenizer_model_that_it_replaced(sp):
    train_byte_level(sp)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(sp)
    before = theirs.encode("the house")
    document = json.loads((sp / "tokenizer.json").read_text("utf-8"))
    added = [token for token in document["added_tokens"] if token["special"]]
    edit_json(sp, "tokenizer.json", added_tokens=added)
    edit_json(sp, "tokenizer_config.json", tokenizer_class="LlamaTokenizerFast")
    assert load_files(read_tokenizer(sp, 500)).encode("the house") == before


def test_a_tokenizer_model_that_is_not_sentencepiece_s_gives_way_to_tokenizer_json(bl):
    (bl / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    edit_json(bl, "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    assert read_tokenizer(bl, 500).kind == "tokenizers"


@pytest.mark.parametrize(
    "names",
    [
        ("merges.txt", "vocab.json"),
        ("tekken.json",),
        ("qwen.tiktoken",),
        ("tiktoken.model",),
        ("spiece.model",),
        ("tokenizer.model.v3",),
    ],
    ids=str,
)
def test_a_tokenizer_of_another_kind_is_refused(names, tmp_path):
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(IncompatibleError, match=rf"found '{names[0]}', expected a tokenizer\.json.*save_pretrained"):
        read_tokenizer(tmp_path, 100)
    train_byte_level(tmp_path)
    assert read_tokenizer(tmp_path, 500).kind == "tokenizers"


def test_a_lone_tokenizer_model_of_tiktoken_is_refused_as_such(tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(
        IncompatibleError, match=r"tokenizer\.model: found words in base64 \(tiktoken\).*save_pretrained"
    ):
        read_tokenizer(tmp_path, 500)


def test_eos_is_what_the_first_file_names_and_the_tokenizer_s_own(sp):
    def eos():
        in_files = read_generation(sp, 420).eos_token_ids
        found = read_tokenizer(sp, 420)
        assert found.eos_token == "</s>"
        assert found.eos_token_ids[: len(in_files)] == in_files
        return found.eos_token_ids, found.notes

    assert eos() == ((2,), ())
    edit_json(sp, "config.json", eos_token_id=7)
    assert eos() == (
        (7, 2),
        (
            "'</s>' (id 2), the tokenizer's eos_token: ends answers too, beside the ids that the configuration names (7)",
        ),
    )
    edit_json(sp, "generation_config.json", eos_token_id=[9, 2, 9])
    assert eos() == ((9, 2), ())
    edit_json(sp, "generation_config.json", eos_token_id=[9, 5])
    assert eos()[0] == (9, 5, 2)
    edit_json(sp, "generation_config.json", eos_token_id=None)
    assert eos()[0] == (7, 2)
    edit_json(sp, "tokenizer_config.json", eos_token=None)
    assert read_tokenizer(sp, 420).eos_token_ids == (7,)


def test_bos_of_the_tokenizer_comes_before_that_of_the_configs(bl):
    edit_json(bl, "config.json", bos_token_id=1)
    assert read_tokenizer(bl, 500).bos_token == "<|begin_of_text|>"
    edit_json(bl, "tokenizer_config.json", bos_token=None)
    edit_json(bl, "tokenizer.json", post_processor=None)
    files = read_tokenizer(bl, 500)
    assert (files.bos_token, files.bos_token_id, files.add_bos_token) == (None, None, False)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_link_to_nothing_is_not_the_absence_of_a_file(sp, name):
    (sp / name).unlink(missing_ok=True)
    (sp / name).symlink_to("../blobs/gone")
    with pytest.raises(IntegrityError, match=rf"{name}: a link to a file that is missing"):
        read_tokenizer(sp, 420)


@pytest.mark.parametrize("kind", ["sp", "bl"])
def test_ids_beyond_the_model_are_refused(kind, request):
    with pytest.raises(IncompatibleError, match=r"tokenizer\.(model|json): found ids up to .*vocab_size is 300.*Use"):
        read_tokenizer(request.getfixturevalue(kind), 300)


def test_eos_beyond_the_model_is_refused(sp):
    edit_json(sp, "config.json", eos_token_id=128001)
    with pytest.raises(IncompatibleError, match="eos_token_id: found 128001"):
        read_tokenizer(sp, 420)


def test_a_bos_that_the_tokenizer_does_not_have_is_refused(sp):
    edit_json(sp, "tokenizer_config.json", bos_token="<nosuch>")
    with pytest.raises(IncompatibleError, match="<nosuch>"):
        read_tokenizer(sp, 420)


def test_an_id_that_means_two_things_is_refused(sp):
    edit_json(sp, "tokenizer_config.json", added_tokens_decoder={"300": {"content": "<x>", "special": True}})
    with pytest.raises(IncompatibleError, match=r"id 300: found .* expected '<x>'"):
        read_tokenizer(sp, 420)


def test_an_unknown_decoder_is_refused(bl):
    edit_json(bl, "tokenizer.json", decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
    with pytest.raises(IncompatibleError, match="decoder: found WordPiece"):
        read_tokenizer(bl, 500)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 499723\n"


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)
def test_git_lfs_pointers_are_refused(sp, name):
    (sp / name).write_bytes(POINTER)
    with pytest.raises(IntegrityError, match=f"{name}.*git lfs pull"):
        read_tokenizer(sp, 420)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
def test_json_that_is_no_object_is_refused(bl, name, data):
    if name == "special_tokens_map.json":
        (bl / "tokenizer_config.json").unlink()
    (bl / name).write_bytes(data)
    with pytest.raises(IntegrityError, match=name):
        read_tokenizer(bl, 500)


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x00" * 100])
def test_a_damaged_tokenizer_model_is_refused(sp, data):
    (sp / "tokenizer.model").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"tokenizer\.model"):
        read_tokenizer(sp, 420)


@pytest.mark.parametrize(
    "changes",
    [
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"5": "a"}},
        {"added_tokens_decoder": []},
        {"added_tokens_decoder": {"-7": {"content": "<x>"}}},
        {"bos_token": 5},
        {"eos_token": ["</s>"]},
        {"chat_template": [{"name": "default", "template": 5}]},
        {"chat_template": {"default": "x"}},
        {"add_bos_token": "yes"},
        {"extra_special_tokens": "<x>"},
        {"additional_special_tokens": ["</s>", 5]},
        {"extra_special_tokens": {"x_token": None}},
    ],
    ids=str,
)
def test_malformed_tokenizer_configs_are_refused(sp, changes):
    edit_json(sp, "tokenizer_config.json", **changes)
    with pytest.raises(LlmpackError, match=r"model"):
        read_tokenizer(sp, 420)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": None},
        {"model": {"type": "Nope"}},
        {"added_tokens": 5},
        {"added_tokens": [{"id": "5", "content": "<x>", "special": True}]},
        {"decoder": 5},
        {"decoder": {"type": "Sequence", "decoders": 5}},
    ],
    ids=str,
)
def test_malformed_tokenizer_jsons_are_refused(bl, changes):
    edit_json(bl, "tokenizer.json", **changes)
    with pytest.raises(LlmpackError, match=r"model"):
        read_tokenizer(bl, 500)
