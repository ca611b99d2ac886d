"""Both tokenizer backends against transformers and against the libraries themselves."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_makers import byte_level_spec, make_artifact, train_byte_level, train_sentencepiece, train_unigram

from llmrun.errors import IncompatibleError, IntegrityError, UsageError
from llmrun.text_stream import TextStream
from llmrun.tokenizer import load_tokenizer

TEXTS = [
    "",
    "a",
    "Hello house",
    "the  sea \n\n shore\t\r\n",
    "trailing  ",
    "12 + 345 = 357",
    "é漢🦙 naïve",
    "\x00\x7f\ufeff",
    "User: x",
]


@pytest.fixture(scope="module")
def sp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    library = train_sentencepiece(folder)
    artifact = make_artifact(folder, "sentencepiece", "tokenizer.model", vocab_size=420)
    return SimpleNamespace(folder=folder, library=library, ours=load_tokenizer(artifact))


@pytest.fixture(scope="module")
def bl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("byte_level")
    library = train_byte_level(folder)
    artifact = make_artifact(folder, "tokenizers", "tokenizer.json", **byte_level_spec(library))
    return SimpleNamespace(folder=folder, library=library, ours=load_tokenizer(artifact))


@pytest.fixture(params=["sp", "bl"])
def either(request):
    return request.getfixturevalue(request.param)


def _theirs(case):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(case.folder)


def test_an_artifact_without_tokenizer_has_none():
    assert load_tokenizer(SimpleNamespace(manifest=SimpleNamespace(tokenizer=None))) is None


@pytest.mark.parametrize("parse_special", [False, True])
def test_ordinary_text_has_the_ids_of_transformers(either, parse_special):
    theirs = _theirs(either)
    for text in TEXTS:
        expected = theirs.encode(text, add_special_tokens=True)
        assert either.ours.encode(text, parse_special=parse_special) == expected, text
        assert either.ours.encode(text, add_bos=False, parse_special=parse_special) == expected[1:], text


def test_parsed_special_tokens_have_the_ids_of_transformers_sentencepiece(sp):
    theirs = _theirs(sp)
    for text in [
        "<s>a",
        "<s> a",
        "x <s> y",
        "<s>",
        "</s><s>",
        "a</s>\n<s>b </s> ",
        "<s>[INST] x [/INST] y </s><s>z",
        "<unk>z",
    ]:
        assert sp.ours.encode(text, add_bos=False, parse_special=True) == theirs.encode(text, add_special_tokens=False)


def test_parsed_special_tokens_have_the_ids_of_transformers_byte_level(bl):
    theirs = _theirs(bl)
    for text in [
        "<|eot_id|>a",
        "x <|eot_id|> <tool>\n\n",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
    ]:
        assert bl.ours.encode(text, add_bos=False, parse_special=True) == theirs.encode(text, add_special_tokens=False)


def test_sentencepiece_text_has_the_ids_of_the_library(sp):
    for text in [*TEXTS, " a", "  a", "\u2581a", "<s>", "a</s>b <unk>"]:
        assert sp.ours.encode(text, add_bos=False) == sp.library.encode(text)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_special_tokens_in_text_are_text(sp, bl, data):
    for case in (sp, bl):
        special = case.ours.special_tokens
        parts = st.one_of(st.sampled_from(sorted(special)), st.text("<s>|/ a\n", max_size=4), st.text(max_size=3))
        text = "".join(data.draw(st.lists(parts, max_size=6)))
        ids = case.ours.encode(text, add_bos=False)
        assert (set(special.values()) - {0 if case is sp else None}).isdisjoint(ids)
        expected = text.replace("\u2581", " ") if case is sp else text
        assert case.ours.decode(ids) == expected


def test_byte_level_special_tokens_in_text_merge_with_what_is_around(bl):
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(bl.folder / "tokenizer.json"))
    library.encode_special_tokens = True
    for text in ["the<|eot_id|>.", "a <|start_header_id|>user<|end_header_id|>\n\n", "<|begin_of_text|>"]:
        expected = library.encode(text, add_special_tokens=False).ids
        assert bl.ours.encode(text, add_bos=False) == bl.ours.encode_segments([text]) == expected


def test_user_defined_pieces_that_are_special_are_text_too(tmp_path):
    chatml = ["<|im_start|>", "<|im_end|>"]
    library = train_sentencepiece(tmp_path, user_defined_symbols=chatml)
    special = {text: library.piece_to_id(text) for text in ["<unk>", "<s>", "</s>", *chatml]}
    assert special["<|im_end|>"] in library.encode("a<|im_end|>")  # the library alone would not keep it out
    ours = load_tokenizer(
        make_artifact(tmp_path, "sentencepiece", "tokenizer.model", vocab_size=420, special_tokens=special)
    )
    text = "a<|im_end|>\n<|im_start|>system"
    ids = ours.encode(text, add_bos=False)
    assert set(special.values()).isdisjoint(ids)
    assert ours.decode(ids) == text
    assert special["<|im_end|>"] in ours.encode(text, parse_special=True)
    # A template's own special tokens make no room for one of the text, not even the unknown token.
    for own in special.values():
        ids = ours.encode_segments([own, "a<|im_end|>"])
        assert [token_id for token_id in ids if token_id in special.values()] == [own]


def test_an_unknown_character_of_a_unigram_model_has_the_ids_of_transformers(tmp_path):
    theirs = train_unigram(tmp_path)
    ours = load_tokenizer(make_artifact(tmp_path, "tokenizers", "tokenizer.json", vocab_size=300, add_bos_token=False))
    for text in ["the 🦙 sea", "🦙", "漢字 a"]:
        assert 0 in theirs.encode(text)
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, parse_special=True) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert {1, 2}.isdisjoint(ours.encode("<s> 🦙 </s>"))


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_from_vocab_size_on_are_text(bl, tmp_path, special):
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer.from_file(str(bl.folder / "tokenizer.json"))
    library.add_tokens([tokenizers.AddedToken("<beyond>", special=special)])
    assert library.token_to_id("<beyond>") == bl.ours.vocab_size
    library.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(make_artifact(tmp_path, "tokenizers", "tokenizer.json", **byte_level_spec(bl.library)))
    for text in ["a<beyond>b", "the sea"]:
        for parse_special in (False, True):
            assert ours.encode(text, parse_special=parse_special) == bl.ours.encode(text, parse_special=parse_special)
        assert ours.encode_segments(["x", 1, text]) == bl.ours.encode_segments(["x", 1, text])


def test_without_special_tokens_all_text_is_ordinary(sp):
    ours = load_tokenizer(
        make_artifact(sp.folder, "sentencepiece", "tokenizer.model", vocab_size=420, special_tokens={})
    )
    text = "the sea </s>"
    assert ours.encode(text, parse_special=True) == ours.encode(text)
    assert (ours.split_special(text), ours.mark_special(text, "[", "]")) == ([text], text)


def test_bos_comes_once(either):
    ours = either.ours
    bos = ours.bos_token_id
    assert ours.encode("a")[0] == bos
    assert ours.encode("a").count(bos) == 1
    assert ours.encode(f"{ours.bos_token}a", parse_special=True).count(bos) == 1
    assert bos not in ours.encode("a", add_bos=False)
    assert ours.encode("") == [bos]


def test_a_bos_that_is_an_ordinary_character_comes_before_that_character_too(bl):
    quote = bl.library.token_to_id('"')
    spec = byte_level_spec(bl.library, bos_token=None, bos_token_id=quote)
    ours = load_tokenizer(make_artifact(bl.folder, "tokenizers", "tokenizer.json", **spec))
    assert ours.encode('"a"') == [quote, *bl.library.encode('"a"', add_special_tokens=False).ids]
    assert ours.decode(ours.encode("a")) == '"a'


def test_without_a_bos_none_is_added(sp):
    spec = {"bos_token_id": None, "bos_token": None, "vocab_size": 420}
    ours = load_tokenizer(make_artifact(sp.folder, "sentencepiece", "tokenizer.model", **spec))
    assert ours.encode("a") == ours.encode("a", add_bos=False)
    with pytest.raises(UsageError, match="BOS"):
        ours.encode("a", add_bos=True)


def test_decode_leaves_special_tokens_out(either):
    ours = either.ours
    ids = [ours.bos_token_id, *ours.encode("a b", add_bos=False), *ours.eos_token_ids]
    assert ours.decode(ids) == "a b"
    assert ours.decode([]) == ""


def test_decode_is_that_of_transformers(either):
    theirs = _theirs(either)
    for text in TEXTS:
        ids = either.ours.encode(text)
        assert either.ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_byte_level_decode_is_the_library_s_for_every_sequence(bl, data):
    ids = data.draw(st.lists(st.integers(0, bl.ours.vocab_size - 1), max_size=20))
    assert bl.ours.decode(ids) == bl.library.decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text(sp, bl, data):
    for case in (sp, bl):
        ids = data.draw(st.lists(st.integers(0, case.ours.vocab_size - 1), max_size=25))
        stream = TextStream(case.ours)
        assert "".join([*map(stream.push, ids), stream.finish()]) == case.ours.decode(ids)


def test_segments_are_encoded_where_they_stand(either):
    ours = either.ours
    (eos,) = ours.eos_token_ids
    whole = f"ab{ours.eos_token} c\n\n{ours.eos_token}\nd"
    segments = ours.split_special(whole)
    assert segments == ["ab", eos, " c\n\n", eos, "\nd"]
    assert ours.encode_segments(segments) == ours.encode(whole, add_bos=False, parse_special=True)
    ids = ours.encode_segments([eos, f"x{ours.eos_token}"])
    assert ids.count(eos) == 1
    assert ours.decode(ids[1:]) == f"x{ours.eos_token}"
    assert ours.decode(ours.encode_segments(["a", "b"])) == "ab"


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_lone_surrogates_are_refused(either, text):
    for call in (either.ours.encode, lambda text: either.ours.encode_segments([text])):
        with pytest.raises(UsageError, match="lone surrogate"):
            call(text)


@pytest.mark.parametrize("text", [None, 1, b"a", ["a"]])
def test_what_is_no_text_is_refused(either, text):
    with pytest.raises(UsageError, match="expected str"):
        either.ours.encode(text)


@pytest.mark.parametrize("token_id", [-1, 10**6])
def test_ids_outside_are_refused(either, token_id):
    with pytest.raises(UsageError, match="there is no token"):
        either.ours.decode([token_id])


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b"\xff\x00" * 50, b"[1]"])
@pytest.mark.parametrize(("kind", "file"), [("sentencepiece", "tokenizer.model"), ("tokenizers", "tokenizer.json")])
def test_a_damaged_file_is_an_integrity_error(tmp_path, kind, file, data):
    (tmp_path / file).write_bytes(data)
    with pytest.raises(IntegrityError, match=file):
        load_tokenizer(make_artifact(tmp_path, kind, file, vocab_size=420))


def test_a_missing_file_is_an_integrity_error(tmp_path):
    with pytest.raises(IntegrityError):
        load_tokenizer(make_artifact(tmp_path, "tokenizers", "tokenizer.json", vocab_size=420))


def test_a_file_that_disagrees_with_the_manifest_is_an_integrity_error(sp, bl):
    for case, kind, file in ((sp, "sentencepiece", "tokenizer.model"), (bl, "tokenizers", "tokenizer.json")):
        with pytest.raises(IntegrityError, match="manifest"):
            load_tokenizer(make_artifact(case.folder, kind, file, vocab_size=100))
        spec = {"vocab_size": 1000, "special_tokens": {"<no>": 5}}
        with pytest.raises(IntegrityError, match="special token"):
            load_tokenizer(make_artifact(case.folder, kind, file, **spec))


def test_an_unknown_kind_or_decoder_is_incompatible(bl, tmp_path):
    with pytest.raises(IncompatibleError, match="kind"):
        load_tokenizer(make_artifact(bl.folder, "tiktoken", "tokenizer.json", vocab_size=420))
    document = json.loads((bl.folder / "tokenizer.json").read_text("utf-8"))
    for decoder in ({"type": "WordPiece", "prefix": "##", "cleanup": True}, None):
        (tmp_path / "tokenizer.json").write_text(json.dumps(document | {"decoder": decoder}))
        with pytest.raises(IncompatibleError, match="decoder"):
            load_tokenizer(make_artifact(tmp_path, "tokenizers", "tokenizer.json", **byte_level_spec(bl.library)))


def test_a_panic_of_the_library_is_one_of_our_errors(bl, tmp_path):
    class PanicException(BaseException):
        pass

    def panic(*_args, **_kwargs):
        raise PanicException("regex")

    ours = load_tokenizer(make_artifact(bl.folder, "tokenizers", "tokenizer.json", **byte_level_spec(bl.library)))
    ours._backend._tokenizer = SimpleNamespace(encode=panic)
    with pytest.raises(UsageError, match="PanicException: regex"):
        ours.encode("a")


def test_llama_2_s_tokenizer_json_has_the_ids_of_transformers(sp, tmp_path):
    theirs = _theirs(sp)
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(make_artifact(tmp_path, "tokenizers", "tokenizer.json", vocab_size=420))
    assert ours.strips_leading_space
    for text in [*TEXTS, "<s>[INST] a [/INST]</s>"]:
        ids = ours.encode(text, add_bos=False, parse_special=True)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.encode_segments(["ab", 2, " c", 2, "d"]) == ours.encode(
        "ab</s> c</s>d", add_bos=False, parse_special=True
    )
    assert set(ours.encode("a</s>", add_bos=False)).isdisjoint([1, 2])


class Yielding:
    """tokenizers' Tokenizer, after each of whose settings another thread gets its turn."""

    def __init__(self, library):
        self.__dict__["library"] = library

    def __setattr__(self, name, value):
        setattr(self.library, name, value)
        time.sleep(1e-4)

    def __getattr__(self, name):
        return getattr(self.library, name)


def test_threads_do_not_disturb_each_other(bl, monkeypatch):
    monkeypatch.setattr(bl.ours._backend, "_tokenizer", Yielding(bl.ours._backend._tokenizer))
    text = "x<|eot_id|>" * 5
    expected = {flag: bl.ours.encode(text, parse_special=flag) for flag in (False, True)}

    def count_wrong(flag):
        return sum(bl.ours.encode(text, parse_special=flag) != expected[flag] for _ in range(50))

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(count_wrong, [False, True] * 2)) == 0
