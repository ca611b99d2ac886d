"""Added tokens, special ones, and those that swallow white space: what the files of a tokenizer say of single tokens."""

import dataclasses
import json

import pytest
from tokenizer_makers import (
    edit_json,
    load_files,
    train_sentencepiece,
)

from llmpack.tokenizer_files import read_tokenizer
from llmrun.artifact import IncompatibleError
from llmrun.chat import encode_chat, extend_chat


def test_added_tokens_of_sentencepiece_get_ids_after_its_pieces(sp):
    added = {"420": {"content": "<|im_end|>", "special": True}, "421": {"content": "<|im_start|>", "special": True}}
    edit_json(sp, "tokenizer_config.json", added_tokens_decoder=added, eos_token={"content": "<|im_end|>"})
    files = read_tokenizer(sp, 422)
    assert files.vocab_size == 422
    assert (files.eos_token, files.eos_token_ids) == ("<|im_end|>", (420,))
    ours = load_files(files)
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
        edit_json(folder, "added_tokens.json", **{"<pad>": size})
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
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_files(files)
    assert ours.encode("Hello house") == theirs.encode("Hello house")
    for text in ["a<pad>b", "<extra> x"]:
        for parse_special in (False, True):
            ids = ours.encode(text, add_bos=False, parse_special=parse_special)
            assert max(ids) < size
            assert ours.decode(ids) == text
        assert ours.decode(ours.encode_segments([ours.bos_token_id, text])) == text


EXTRA_TOKENS = [
    {"additional_special_tokens": ["<|x|>", {"__type": "AddedToken", "content": "<|y|>"}]},
    {"extra_special_tokens": ["<|x|>", "<|y|>"]},
    {"extra_special_tokens": {"x_token": "<|x|>", "y_token": "<|y|>"}},
]


@pytest.mark.parametrize("extra", EXTRA_TOKENS, ids=str)
@pytest.mark.parametrize("kind", ["sp", "bl"])
def test_special_tokens_that_only_a_list_of_them_names_are_refused_or_noted(kind, extra, request):
    folder = request.getfixturevalue(kind)
    before = read_tokenizer(folder, 500)
    edit_json(folder, "tokenizer_config.json", **extra)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    size = before.vocab_size
    assert theirs.convert_tokens_to_ids(["<|x|>", "<|y|>"]) == [size, size + 1]
    with pytest.raises(
        IncompatibleError, match=r"token '<\|x\|>', which tokenizer_config\.json names: found none within"
    ):
        read_tokenizer(folder, size + 1)
    files = read_tokenizer(folder, size)
    assert files.notes == (f"'<|x|>', '<|y|>': added beyond vocab_size {size}, therefore left out",)
    assert dataclasses.replace(files, notes=()) == before
    theirs.save_pretrained(folder)
    assert load_files(read_tokenizer(folder, size + 2)).encode("a<|y|>", parse_special=True)[-1] == size + 1


def test_pieces_that_only_a_list_of_special_tokens_names_are_special(sp):
    edit_json(sp, "tokenizer_config.json", additional_special_tokens=["</s>", "st"])
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(sp)
    files = read_tokenizer(sp, 420)
    assert "st" in files.special_tokens
    ours, text = load_files(files), "the first street</s>stand"
    ids = theirs.encode(text)
    assert ours.encode(text, parse_special=True) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_tokens_that_swallow_white_space_do_so_in_every_turn(side, sp):
    transformers = pytest.importorskip("transformers")
    template = "{% for m in messages %}<|x|>\n{{ m['content'] }}\n{% endfor %}<|x|>{{ '\n' }}"
    edit_json(sp, "tokenizer_config.json", chat_template=template)
    edit_json(
        sp, "tokenizer_config.json", added_tokens_decoder={"420": {"content": "<|x|>", "special": True, side: True}}
    )
    with pytest.raises(
        IncompatibleError, match=r"tokenizer\.model: '<\|x\|>': found lstrip or rstrip.*save_pretrained"
    ):
        read_tokenizer(sp, 421)
    theirs = transformers.AutoTokenizer.from_pretrained(sp)
    theirs.save_pretrained(sp)
    files = read_tokenizer(sp, 421)
    assert (files.source_file.name, files.notes) == ("tokenizer.json", ())
    ours = load_files(files)

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
        ("tokenizer_config.json", {"additional_special_tokens": ["st"]}),  # a piece of the vocabulary
    ],
)
def test_added_tokens_that_tokenizer_json_does_not_know_so_are_refused(name, changes, bl):
    theirs, text = pytest.importorskip("transformers").AutoTokenizer, "a<new><|eot_id|> b first"
    before = theirs.from_pretrained(bl).encode(text)
    edit_json(bl, name, **changes)
    assert theirs.from_pretrained(bl).encode(text) != before
    with pytest.raises(
        IncompatibleError, match=r"tokenizer\.json: '(<new>|<\|eot_id\|>|st)': found otherwise.*save_pretrained"
    ):
        read_tokenizer(bl, 500)
    theirs.from_pretrained(bl).save_pretrained(bl)
    (bl / "added_tokens.json").unlink(missing_ok=True)
    assert load_files(read_tokenizer(bl, 500)).encode(text, parse_special=True) == theirs.from_pretrained(bl).encode(
        text
    )


def _mark(folder, text, special):
    """Say in tokenizer_config.json whether an added token is special; return transformers' word on it."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    token_id = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(text)
    edit_json(folder, "tokenizer_config.json", added_tokens_decoder={token_id: {"content": text, "special": special}})
    return transformers.AutoTokenizer.from_pretrained(folder).added_tokens_decoder[token_id].special


@pytest.mark.parametrize(("text", "special"), [("<tool>", True), ("<|start_header_id|>", False)])
def test_a_token_that_one_file_alone_calls_special_is_refused(text, special, bl):
    assert _mark(bl, text, special) == special
    with pytest.raises(IncompatibleError, match=rf"{text[1:-1].replace('|', '.')}.*found otherwise.*save_pretrained"):
        read_tokenizer(bl, 500)
    pytest.importorskip("transformers").AutoTokenizer.from_pretrained(bl).save_pretrained(bl)
    assert (text in read_tokenizer(bl, 500).special_tokens) == special


def test_a_token_that_has_a_name_is_special_whether_it_is_marked_so_or_not(bl):
    assert _mark(bl, "<|eot_id|>", special=False)
    assert "<|eot_id|>" in read_tokenizer(bl, 500).special_tokens


def test_a_user_defined_piece_that_is_not_special_stays_text(tmp_path):
    theirs = pytest.importorskip("transformers").AutoTokenizer
    newline = train_sentencepiece(tmp_path, user_defined_symbols=["\n"]).piece_to_id("\n")
    edit_json(tmp_path, "tokenizer_config.json", added_tokens_decoder={newline: {"content": "\n", "special": False}})
    files = read_tokenizer(tmp_path, 420)
    assert files.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    ours, text = load_files(files), "the sea\nthe shore"
    assert ours.encode(text) == theirs.from_pretrained(tmp_path).encode(text)
    assert ours.decode(ours.encode(text)) == text


def test_a_vocabulary_with_gaps_gives_its_ids_beside_special_tokens_too(tmp_path):
    """A token that is added gets the number of entries as its id, which another may have where ids were left out."""
    tokenizers = pytest.importorskip("tokenizers")
    entries = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "<s>", "</s>"]
    vocab = {text: i for i, text in enumerate(entries)} | {"e": 260}
    assert len(vocab) == 260
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = load_files(read_tokenizer(tmp_path, 300))
    assert ours.encode_segments([257, "bee", 258]) == [257, 1 + ord("b"), 260, 260, 258]
