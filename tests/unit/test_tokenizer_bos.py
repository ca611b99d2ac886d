"""Which BOS the packager finds, and where it has the runtime put one: as transformers does."""

import pytest
from tokenizer_makers import (
    CORPUS,
    edit_json,
    load_files,
    train_unigram,
)

from llmpack.tokenizer_files import GOLDEN_TEXTS, read_tokenizer
from llmrun.artifact import IncompatibleError


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
    edit_json(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    edit_json(folder, "config.json", **{"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2} | config)
    return tokenizer


def test_ids_that_only_the_configs_name_leave_characters_characters(tmp_path):
    library = _from_scratch(tmp_path)  # 1 and 2 are the defaults of LlamaConfig, named or not
    assert [library.id_to_token(i) for i in (1, 2)] == ['"', "#"]
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    files = read_tokenizer(tmp_path, 300)
    assert files.special_tokens == {}
    assert (files.bos_token, files.bos_token_id, files.eos_token, files.eos_token_ids) == (None, 1, None, (2,))
    assert len(files.golden) == len(GOLDEN_TEXTS)
    ours, text = load_files(files), 'say "hello" # note'
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
    edit_json(tmp_path, "config.json", bos_token_id=library.token_to_id(bos))
    edit_json(tmp_path, "tokenizer_config.json", add_bos_token=add_bos_token)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    files = read_tokenizer(tmp_path, 301)
    assert files.bos_token == ("<s>" if special else None)
    for text in ["a", '"a"']:
        assert load_files(files).encode(text) == theirs.encode(text)


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast"])
@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("begins_with", ["<s>", None])
def test_a_tokenizer_json_decides_alone_whether_a_bos_comes_first(
    begins_with, add_bos_token, tokenizer_class, tmp_path
):
    _from_scratch(tmp_path, ["<s>"], begins_with)
    changes = {"bos_token": "<s>", "add_bos_token": add_bos_token, "tokenizer_class": tokenizer_class}
    edit_json(tmp_path, "tokenizer_config.json", **changes)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert load_files(read_tokenizer(tmp_path, 301)).encode("a") == theirs.encode("a")


@pytest.mark.parametrize(("frame", "bos"), [("<x> $A", "<s>"), ("<s> $A <x>", "<s>"), ("<x> $A", None)])
def test_what_a_post_processor_puts_before_a_text_is_put_there(frame, bos, tmp_path):
    library = _from_scratch(tmp_path, ["<s>", "<x>"])
    ids = [(text, library.token_to_id(text)) for text in ("<s>", "<x>")]
    library.post_processor = pytest.importorskip("tokenizers").processors.TemplateProcessing(frame, special_tokens=ids)
    library.save(str(tmp_path / "tokenizer.json"))
    edit_json(tmp_path, "tokenizer_config.json", bos_token=bos)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    files = read_tokenizer(tmp_path, 302)
    assert (files.bos_token or "") == (theirs.bos_token or "<x>")  # what a chat template gets
    ends = frame.endswith("<x>")
    assert load_files(files).encode("a") == theirs.encode("a")[: -1 if ends else None]
    assert files.notes == (
        ("'<x>': left out, which tokenizer.json puts after every text: an answer goes on",) if ends else ()
    )


@pytest.mark.parametrize("named", [None, "<x>"])
def test_two_tokens_before_every_text_come_both(tmp_path, named):
    """As [gMASK] and <sop> of a GLM, which names no bos_token."""
    library = _from_scratch(tmp_path, ["<s>", "<x>"])
    both = [library.token_to_id(text) for text in ("<s>", "<x>")]
    library.post_processor = pytest.importorskip("tokenizers").processors.TemplateProcessing(
        "<s> <x> $A", special_tokens=list(zip(("<s>", "<x>"), both, strict=True))
    )
    library.save(str(tmp_path / "tokenizer.json"))
    edit_json(tmp_path, "tokenizer_config.json", bos_token=named)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    files = read_tokenizer(tmp_path, 302)
    ours = load_files(files)
    for text in ("a", "", " b"):
        assert ours.encode(text) == theirs.encode(text) == [*both, *ours.encode(text, add_bos=False)]
    assert ours.prefix == both
    assert ours.encode("<s><x>a", parse_special=True) == ours.encode("a")  # a chat template has them already
    assert ours.encode("<s>a", parse_special=True) == [*both, both[0], *ours.encode("a", add_bos=False)]
    assert (files.bos_token_id, files.bos_token) == (both[0], named or "<s>")


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
    assert load_files(files).decode(load_files(files).encode("he sees the sea")) == "he sees the sea"


def test_a_character_that_a_unigram_model_does_not_know_has_its_unknown_id(tmp_path):
    theirs = train_unigram(tmp_path)
    files = read_tokenizer(tmp_path, 300)
    assert len(files.golden) == len(GOLDEN_TEXTS) - 1  # the last one spells special tokens out
    ours = load_files(files)
    for vector in files.golden:
        assert ours.encode(vector["text"], add_bos=False) == vector["ids"]
    assert ours.encode("the 🦙") == theirs.encode("the 🦙")
