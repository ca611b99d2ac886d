"""What the packager finds in a model directory, and what it refuses."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from tokenizer_makers import (
    BYTE_LEVEL_SPECIAL,
    CORPUS,
    make_artifact,
    train_byte_level,
    train_sentencepiece,
    train_unigram,
)

from llmpack.generation import read_generation
from llmpack.pack import Options, pack
from llmpack.tokenizer_files import GOLDEN_TEXTS, read_tokenizer
from llmrun.artifact import GenerationDefaults, IncompatibleError, IntegrityError, LlmpackError, TokenizerSpec
from llmrun.chat import encode_chat, extend_chat
from llmrun.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in ("sp", "bl")}
    train_sentencepiece(folders["sp"])
    train_byte_level(folders["bl"])
    return folders


@pytest.fixture
def sp(originals, tmp_path):
    return Path(shutil.copytree(originals["sp"], tmp_path / "model"))


@pytest.fixture
def bl(originals, tmp_path):
    return Path(shutil.copytree(originals["bl"], tmp_path / "model"))


def _edit(folder, name, **changes):
    path = folder / name
    members = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(members | changes), "utf-8")


def _load(files):
    """Open the tokenizer as the runtime will."""
    names = {field.name for field in dataclasses.fields(TokenizerSpec)} - {"kind", "file", "chat_template", "golden"}
    spec = {name: getattr(files, name) for name in names}
    folder, template = files.source_file.parent, files.chat_template
    return load_tokenizer(make_artifact(folder, files.kind, files.source_file.name, chat_template=template, **spec))


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
    _edit(bl, "tokenizer.json", post_processor=None)
    assert not read_tokenizer(bl, 500).add_bos_token


@pytest.mark.parametrize("kind", ["sp", "bl"])
def test_the_runtime_gives_the_golden_ids(kind, request):
    files = read_tokenizer(request.getfixturevalue(kind), 500)
    ours = _load(files)
    assert len(files.golden) == len(GOLDEN_TEXTS) == 24
    for vector in files.golden:
        assert ours.encode(vector["text"], add_bos=False) == vector["ids"], vector
        expected = vector["text"].replace("\u2581", " ") if kind == "sp" else vector["text"]
        assert ours.decode(vector["ids"]) == expected


@pytest.mark.parametrize("kind", ["sp", "bl"])
def test_the_runtime_begins_a_text_as_transformers_does(kind, request):
    folder = request.getfixturevalue(kind)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    assert _load(read_tokenizer(folder, 500)).encode("Hello house") == theirs.encode("Hello house")


def test_of_both_files_the_one_that_gives_transformers_ids_is_taken(sp):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(sp)
    theirs.backend_tokenizer.save(str(sp / "tokenizer.json"))
    files = read_tokenizer(sp, 420)
    assert files.kind == "sentencepiece"
    theirs = transformers.AutoTokenizer.from_pretrained(sp)
    text = "<s>[INST] a [/INST] b </s><s> c"
    ours = _load(files).encode(text, add_bos=False, parse_special=True)
    assert ours == theirs.encode(text, add_special_tokens=False)

    _edit(sp, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert read_tokenizer(sp, 420).kind == "tokenizers"


def test_added_tokens_that_are_not_special_need_tokenizer_json(sp):
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(sp)
    theirs.add_tokens(["<tool>"])
    theirs.backend_tokenizer.save(str(sp / "tokenizer.json"))
    files = read_tokenizer(sp, 421)
    assert files.kind == "tokenizers"
    assert "<tool>" not in files.special_tokens


def test_a_tokenizer_model_that_is_not_sentencepiece_s_gives_way_to_tokenizer_json(bl):
    (bl / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    _edit(bl, "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    assert read_tokenizer(bl, 500).kind == "tokenizers"


def test_added_tokens_of_sentencepiece_get_ids_after_its_pieces(sp):
    added = {"420": {"content": "<|im_end|>", "special": True}, "421": {"content": "<|im_start|>", "special": True}}
    _edit(sp, "tokenizer_config.json", added_tokens_decoder=added, eos_token={"content": "<|im_end|>"})
    files = read_tokenizer(sp, 422)
    assert files.vocab_size == 422
    assert (files.eos_token, files.eos_token_ids) == ("<|im_end|>", (420,))
    ours = _load(files)
    assert ours.encode("a<|im_end|>", add_bos=False, parse_special=True)[-1] == 420
    assert 420 not in ours.encode("a<|im_end|>")
    assert ours.decode([420, 421]) == ""
    with pytest.raises(IncompatibleError, match=r"'<\|im_end\|>'.*none within the model's vocabulary of 420"):
        read_tokenizer(sp, 420)


@pytest.mark.parametrize("kind", ["sp", "sp json", "bl"])
def test_added_tokens_beyond_the_model_are_text(kind, request):
    transformers = pytest.importorskip("transformers")
    folder = request.getfixturevalue(kind[:2])
    if kind == "sp json":
        transformers.AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer.model").unlink()
    before = read_tokenizer(folder, 500)
    size = before.vocab_size
    if kind == "sp":
        _edit(folder, "added_tokens.json", **{"<pad>": size})
    else:
        library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
        library.add_special_tokens(["<pad>"])
        library.add_tokens(["<extra>"])  # the library would find it in plain text
        library.save(str(folder / "tokenizer.json"))
    assert read_tokenizer(folder, 500).vocab_size > size  # where the model has such ids, they stay

    files = read_tokenizer(folder, size)
    assert (files.vocab_size, files.special_tokens) == (size, before.special_tokens)
    assert files.golden == before.golden
    left_out = "'<pad>'" if kind == "sp" else "'<pad>', '<extra>'"
    assert files.notes == (f"{left_out}: added beyond vocab_size {size}, therefore left out",)
    assert before.notes == ()
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), _load(files)
    assert ours.encode("Hello house") == theirs.encode("Hello house")
    for text in ["a<pad>b", "<extra> x"]:
        for parse_special in (False, True):
            ids = ours.encode(text, add_bos=False, parse_special=parse_special)
            assert max(ids) < size
            assert ours.decode(ids) == text
        assert ours.decode(ours.encode_segments([ours.bos_token_id, text])) == text


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_tokens_that_swallow_white_space_do_so_in_every_turn(side, sp):
    transformers = pytest.importorskip("transformers")
    template = "{% for m in messages %}<|x|>\n{{ m['content'] }}\n{% endfor %}<|x|>{{ '\n' }}"
    _edit(sp, "tokenizer_config.json", chat_template=template)
    _edit(sp, "tokenizer_config.json", added_tokens_decoder={"420": {"content": "<|x|>", "special": True, side: True}})
    with pytest.raises(
        IncompatibleError, match=r"tokenizer\.model: '<\|x\|>': found lstrip or rstrip.*save_pretrained"
    ):
        read_tokenizer(sp, 421)
    theirs = transformers.AutoTokenizer.from_pretrained(sp)
    theirs.save_pretrained(sp)
    files = read_tokenizer(sp, 421)
    assert (files.source_file.name, files.notes) == ("tokenizer.json", ())
    ours = _load(files)

    turns = [{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "shells"}]
    prompt = encode_chat(ours, turns[:1])
    assert prompt == theirs.apply_chat_template(turns[:1])["input_ids"]
    answer = ours.encode_segments([prompt[-1], "shells"])[1:]
    assert (
        extend_chat(ours, [*turns, turns[0]], prompt, answer)
        == theirs.apply_chat_template([*turns, turns[0]])["input_ids"]
    )
    # The text of a special token in a message is text; what the template wrote around it stays as it was.
    marked = encode_chat(ours, [{"role": "user", "content": "</s>"}])
    assert marked == [token for token in marked if token != 2]
    assert [token for token in marked if token in (13, 420)] == [token for token in prompt if token in (13, 420)]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("added_tokens.json", {"<new>": 405}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"405": {"content": "<new>", "special": True}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"401": {"content": "<|eot_id|>", "rstrip": True}}}),
    ],
)
def test_added_tokens_that_tokenizer_json_does_not_know_so_are_refused(name, changes, bl):
    theirs, text = pytest.importorskip("transformers").AutoTokenizer, "a<new><|eot_id|> b"
    before = theirs.from_pretrained(bl).encode(text)
    _edit(bl, name, **changes)
    assert theirs.from_pretrained(bl).encode(text) != before
    with pytest.raises(
        IncompatibleError, match=r"tokenizer\.json: '<(new|\|eot_id\|)>': found otherwise.*save_pretrained"
    ):
        read_tokenizer(bl, 500)
    theirs.from_pretrained(bl).save_pretrained(bl)
    (bl / "added_tokens.json").unlink(missing_ok=True)
    assert _load(read_tokenizer(bl, 500)).encode(text, parse_special=True) == theirs.from_pretrained(bl).encode(text)


def test_a_user_defined_piece_that_is_not_special_stays_text(tmp_path):
    theirs = pytest.importorskip("transformers").AutoTokenizer
    newline = train_sentencepiece(tmp_path, user_defined_symbols=["\n"]).piece_to_id("\n")
    _edit(tmp_path, "tokenizer_config.json", added_tokens_decoder={newline: {"content": "\n", "special": False}})
    files = read_tokenizer(tmp_path, 420)
    assert files.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    ours, text = _load(files), "the sea\nthe shore"
    assert ours.encode(text) == theirs.from_pretrained(tmp_path).encode(text)
    assert ours.decode(ours.encode(text)) == text


def test_eos_comes_from_the_first_file_that_names_it(sp):
    def eos():
        assert read_generation(sp, 420).eos_token_ids in ((), read_tokenizer(sp, 420).eos_token_ids)
        return read_tokenizer(sp, 420).eos_token_ids

    assert eos() == (2,)
    _edit(sp, "config.json", eos_token_id=7)
    assert eos() == (7,)
    _edit(sp, "generation_config.json", eos_token_id=[9, 2, 9])
    assert eos() == (9, 2)
    _edit(sp, "generation_config.json", eos_token_id=None)
    assert eos() == (7,)


def test_the_artifact_ends_answers_at_the_tokenizer_s_eos_where_no_config_names_one(tiny_text_checkpoint, tmp_path):
    folder = Path(shutil.copytree(tiny_text_checkpoint, tmp_path / "model"))
    _edit(folder, "config.json", eos_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)

    def ends():
        pack(folder, tmp_path / "artifact", Options(scheme="f32", force=True))
        return json.loads((tmp_path / "artifact/manifest.json").read_text("utf-8"))["eos_token_ids"]

    assert ends() == [theirs.eos_token_id]
    _edit(folder, "config.json", eos_token_id=[7, 9])
    assert ends() == [7, 9]


def test_what_was_left_out_is_told(tiny_text_checkpoint, tmp_path):
    folder = Path(shutil.copytree(tiny_text_checkpoint, tmp_path / "model"))
    size = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
    _edit(folder, "added_tokens.json", **{f"<{i}>": size + i for i in range(5)})
    (note,) = pack(folder, None, Options(scheme="f32"))["notes"]
    assert note == f"'<0>', '<1>', '<2>', 2 more tokens: added beyond vocab_size {size}, therefore left out"


def test_bos_of_the_tokenizer_comes_before_that_of_the_configs(bl):
    _edit(bl, "config.json", bos_token_id=1)
    assert read_tokenizer(bl, 500).bos_token == "<|begin_of_text|>"
    _edit(bl, "tokenizer_config.json", bos_token=None)
    _edit(bl, "tokenizer.json", post_processor=None)
    files = read_tokenizer(bl, 500)
    assert (files.bos_token, files.bos_token_id, files.add_bos_token) == (None, None, False)


def _from_scratch(folder, special=(), begins_with=None, **config):
    """Train a byte-level tokenizer.json that names no BOS and no EOS, as models trained from scratch have."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(list(special))
    if begins_with is not None:
        begin = (begins_with, tokenizer.token_to_id(begins_with))
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{begins_with} $A", special_tokens=[begin]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    _edit(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    _edit(folder, "config.json", **{"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2} | config)
    return tokenizer


def test_ids_that_only_the_configs_name_leave_characters_characters(tmp_path):
    library = _from_scratch(tmp_path)  # 1 and 2 are the defaults of LlamaConfig, named or not
    assert [library.id_to_token(i) for i in (1, 2)] == ['"', "#"]
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    files = read_tokenizer(tmp_path, 300)
    assert files.special_tokens == {}
    assert (files.bos_token, files.bos_token_id, files.eos_token, files.eos_token_ids) == (None, 1, None, (2,))
    assert len(files.golden) == len(GOLDEN_TEXTS)
    ours, text = _load(files), 'say "hello" # note'
    assert ours.encode(text) == theirs.encode(text)
    assert ours.encode(text, parse_special=True) == theirs.encode(text)
    assert ours.decode(theirs.encode(text)) == text


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize(
    ("special", "begins_with", "bos"),
    [
        ([], None, '"'),
        ([], None, "a"),
        ([], '"', '"'),
        ([], '"', "a"),
        (["<s>"], None, "<s>"),
        (["<s>"], "<s>", "<s>"),
        (["<s>"], "<s>", "a"),
    ],
)
def test_a_bos_that_only_the_configs_name_is_added_where_transformers_adds_it(
    tmp_path, special, begins_with, bos, add_bos_token
):
    library = _from_scratch(tmp_path, special, begins_with)
    _edit(tmp_path, "config.json", bos_token_id=library.token_to_id(bos))
    _edit(tmp_path, "tokenizer_config.json", add_bos_token=add_bos_token)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    files = read_tokenizer(tmp_path, 301)
    assert files.bos_token == ("<s>" if special else None)
    for text in ["a", '"a"']:
        assert _load(files).encode(text) == theirs.encode(text)


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast"])
@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("begins_with", ["<s>", None])
def test_a_tokenizer_json_decides_alone_whether_a_bos_comes_first(
    begins_with, add_bos_token, tokenizer_class, tmp_path
):
    _from_scratch(tmp_path, ["<s>"], begins_with)
    changes = {"bos_token": "<s>", "add_bos_token": add_bos_token, "tokenizer_class": tokenizer_class}
    _edit(tmp_path, "tokenizer_config.json", **changes)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert _load(read_tokenizer(tmp_path, 301)).encode("a") == theirs.encode("a")


@pytest.mark.parametrize(("frame", "bos"), [("<x> $A", "<s>"), ("<s> $A <x>", "<s>"), ("<x> $A", None)])
def test_what_a_post_processor_puts_before_a_text_is_put_there(frame, bos, tmp_path):
    library = _from_scratch(tmp_path, ["<s>", "<x>"])
    ids = [(text, library.token_to_id(text)) for text in ("<s>", "<x>")]
    library.post_processor = pytest.importorskip("tokenizers").processors.TemplateProcessing(frame, special_tokens=ids)
    library.save(str(tmp_path / "tokenizer.json"))
    _edit(tmp_path, "tokenizer_config.json", bos_token=bos)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    files = read_tokenizer(tmp_path, 302)
    assert (files.bos_token or "") == (theirs.bos_token or "<x>")  # what a chat template gets
    ends = frame.endswith("<x>")
    assert _load(files).encode("a") == theirs.encode("a")[: -1 if ends else None]
    assert files.notes == (
        ("'<x>': left out, which tokenizer.json puts after every text: an answer goes on",) if ends else ()
    )


def test_two_tokens_before_every_text_are_refused(tmp_path):
    library = _from_scratch(tmp_path, ["<s>", "<x>"])
    ids = [(text, library.token_to_id(text)) for text in ("<s>", "<x>")]
    library.post_processor = pytest.importorskip("tokenizers").processors.TemplateProcessing(
        "<s> <x> $A", special_tokens=ids
    )
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(IncompatibleError, match=r"tokenizer\.json: post_processor: found 2 tokens before every text"):
        read_tokenizer(tmp_path, 302)


def test_a_character_that_is_marked_as_special_is_refused(tmp_path):
    _from_scratch(tmp_path, ['"'])
    with pytest.raises(
        IncompatibleError, match=r"tokenizer\.json: special token '\"' \(id 1\): found .* tokenizer_config.json\."
    ):
        read_tokenizer(tmp_path, 300)
    _from_scratch(tmp_path, ["~"])  # in no golden text
    with pytest.raises(IncompatibleError, match="special token '~'"):
        read_tokenizer(tmp_path, 300)
    library = _from_scratch(tmp_path, ["he"])  # of several characters it can be kept out of text
    files = read_tokenizer(tmp_path, 300)
    assert files.special_tokens == {"he": library.token_to_id("he")}
    assert 0 < len(files.golden) < len(GOLDEN_TEXTS)
    assert _load(files).decode(_load(files).encode("he sees the sea")) == "he sees the sea"


def test_a_character_that_a_unigram_model_does_not_know_has_its_unknown_id(tmp_path):
    theirs = train_unigram(tmp_path)
    files = read_tokenizer(tmp_path, 300)
    assert len(files.golden) == len(GOLDEN_TEXTS) - 1  # the last one spells special tokens out
    ours = _load(files)
    for vector in files.golden:
        assert ours.encode(vector["text"], add_bos=False) == vector["ids"]
    assert ours.encode("the 🦙") == theirs.encode("the 🦙")


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
    ],
)
def test_sampling_defaults(tmp_path, config, expected):
    _edit(tmp_path, "generation_config.json", **config)
    assert read_generation(tmp_path, 100).defaults == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("temperature", "0.6"),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_k", float("inf")),
        ("top_k", float("nan")),
        ("top_p", 0),
        ("min_p", 1),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("nan")),
        ("eos_token_id", -1),
        ("eos_token_id", "2"),
        ("eos_token_id", [2, None]),
        ("eos_token_id", True),
    ],
)
def test_bad_generation_settings_are_refused_by_file_and_key(tmp_path, key, value):
    _edit(tmp_path, "generation_config.json", do_sample=True, **{key: value})
    with pytest.raises(IncompatibleError, match=rf"generation_config.json: {key}: found .*, expected"):
        read_generation(tmp_path, 100)


def test_generation_settings_that_nothing_honours_are_told(tiny_text_checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = Path(shutil.copytree(tiny_text_checkpoint, tmp_path / "model"))
    off = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": [], "stop_strings": None}
    transformers.GenerationConfig(**off, max_new_tokens=9).save_pretrained(folder)
    _edit(folder, "generation_config.json", **off)
    assert pack(folder, None, Options(scheme="f32"))["notes"] == []
    transformers.GenerationConfig(no_repeat_ngram_size=3, stop_strings=["User:"]).save_pretrained(folder)
    (note,) = pack(folder, None, Options(scheme="f32"))["notes"]
    assert note == (
        "generation_config.json: stop_strings ['User:'], no_repeat_ngram_size 3: not supported, therefore left out"
    )


def test_an_eos_id_beyond_the_vocabulary_is_refused_without_a_tokenizer_too(tmp_path):
    _edit(tmp_path, "config.json", eos_token_id=[99, 100])
    with pytest.raises(IncompatibleError, match="eos_token_id: found 100, but the model's vocab_size is 100"):
        read_generation(tmp_path, 100)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_link_to_nothing_is_not_the_absence_of_a_file(sp, name):
    (sp / name).unlink(missing_ok=True)
    (sp / name).symlink_to("../blobs/gone")
    with pytest.raises(IntegrityError, match=rf"{name}: a link to a file that is missing"):
        read_tokenizer(sp, 420)


def test_chat_template_from_each_place(sp):
    _edit(sp, "tokenizer_config.json", chat_template="{{ 'config' }}")
    assert read_tokenizer(sp, 420).chat_template == "{{ 'config' }}"
    several = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    _edit(sp, "tokenizer_config.json", chat_template=several)
    assert read_tokenizer(sp, 420).chat_template == "d"
    (sp / "chat_template.jinja").write_text("{{ 'é' }}{% for m in messages %}{% break %}{% endfor %}", "utf-8")
    files = read_tokenizer(sp, 420)
    assert files.chat_template.startswith("{{ 'é' }}")
    assert "chat_template.jinja" in files.sources
    (sp / "chat_template.jinja").write_text(
        "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% endfor %}"
    )
    assert "{% generation %}" in read_tokenizer(sp, 420).chat_template


@pytest.mark.parametrize("template", ["{% if %}", "{{ x", "{% nosuchtag %}", "{{ " + "(" * 5000 + "}}"])
def test_a_template_that_does_not_parse_is_refused(sp, template):
    (sp / "chat_template.jinja").write_text(template)
    with pytest.raises(IncompatibleError, match=r"chat_template.jinja: chat template"):
        read_tokenizer(sp, 420)


def test_a_template_of_another_type_is_refused(sp):
    _edit(sp, "tokenizer_config.json", chat_template=5)
    with pytest.raises(IncompatibleError, match=r"chat_template: found int"):
        read_tokenizer(sp, 420)


@pytest.mark.parametrize("kind", ["sp", "bl"])
def test_ids_beyond_the_model_are_refused(kind, request):
    with pytest.raises(IncompatibleError, match=r"tokenizer\.(model|json): found ids up to .*vocab_size is 300.*Use"):
        read_tokenizer(request.getfixturevalue(kind), 300)


def test_eos_beyond_the_model_is_refused(sp):
    _edit(sp, "config.json", eos_token_id=128001)
    with pytest.raises(IncompatibleError, match="eos_token_id: found 128001"):
        read_tokenizer(sp, 420)


def test_a_bos_that_the_tokenizer_does_not_have_is_refused(sp):
    _edit(sp, "tokenizer_config.json", bos_token="<nosuch>")
    with pytest.raises(IncompatibleError, match="<nosuch>"):
        read_tokenizer(sp, 420)


def test_an_id_that_means_two_things_is_refused(sp):
    _edit(sp, "tokenizer_config.json", added_tokens_decoder={"300": {"content": "<x>", "special": True}})
    with pytest.raises(IncompatibleError, match=r"id 300: found .* expected '<x>'"):
        read_tokenizer(sp, 420)


def test_an_unknown_decoder_is_refused(bl):
    _edit(bl, "tokenizer.json", decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
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
    ],
    ids=str,
)
def test_malformed_tokenizer_configs_are_refused(sp, changes):
    _edit(sp, "tokenizer_config.json", **changes)
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
    _edit(bl, "tokenizer.json", **changes)
    with pytest.raises(LlmpackError, match=r"model"):
        read_tokenizer(bl, 500)
