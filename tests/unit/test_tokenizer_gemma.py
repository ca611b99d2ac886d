"""Gemma's tokenizer: ids of transformers, whichever of its files are there, and thousands of added tokens."""

import json
import random

import pytest
from tokenizer_makers import GEMMA_SPECIAL, GEMMA_TEMPLATE, load_files, train_gemma

from llmpack import tokenizer_choice
from llmpack.tokenizer_files import GOLDEN_TEXTS, read_tokenizer
from llmrun import tokenizer_backends
from llmrun.chat import encode_chat, extend_chat

SIZE = 700
NAMED = {"<pad>", "<eos>", "<bos>", "<unk>"}
PIECES = (
    *(" ", "  ", " " * 29, "\n", "\n\n", "\n" * 40, "\t", "\t\t", "\r\n", "\u2581", "\u2581\u2581", "\u00a0"),
    *(
        "a",
        "the ",
        "House",
        " street",
        "345",
        ".",
        "\x00",
        "é",
        "你好",
        "🙂",
        "<table>",
        "<unused1>",
        "[multimodal]",
        "<0x0A>",
    ),
    *NAMED,
    *sorted(GEMMA_SPECIAL - {"<image_soft_token>"}),
)
SAID = [{"role": "system", "content": "Be  brief.\n"}, {"role": "user", "content": " Where is\n\nthe house? "}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    train_gemma(folder, SIZE)
    return folder


def texts(number, *without):
    draw = random.Random(7)
    pieces = [piece for piece in PIECES if piece not in without]
    return ["".join(draw.choices(pieces, k=draw.randint(1, 8))) for _ in range(number)]


@pytest.mark.parametrize("missing", [(), ("tokenizer.model",), ("tokenizer_config.json", "chat_template")])
@pytest.mark.parametrize("vocab_size", [SIZE, SIZE + 64], ids=["of-1b", "of-those-that-see"])
def test_ids_are_those_of_transformers(missing, vocab_size, tmp_path):
    from transformers import AutoTokenizer

    train_gemma(tmp_path, SIZE)
    if "chat_template" in missing:
        (tmp_path / "chat_template.jinja").write_text(GEMMA_TEMPLATE)
    for name in missing:
        (tmp_path / name).unlink(missing_ok=True)
    files, theirs = read_tokenizer(tmp_path, vocab_size), AutoTokenizer.from_pretrained(tmp_path)
    ours = load_files(files)
    assert files.kind == "tokenizers"
    assert files.special_tokens.keys() == NAMED | GEMMA_SPECIAL - (
        {"<image_soft_token>"} if vocab_size == SIZE else set()
    )
    assert files.notes == (
        (f"'<image_soft_token>': added beyond vocab_size {SIZE}, therefore left out",) * (vocab_size == SIZE)
    )
    assert (files.bos_token_id, files.add_bos_token, files.eos_token) == (2, True, "<eos>")
    assert files.eos_token_ids == (1, files.special_tokens["<end_of_turn>"])
    for text in texts(300):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_bos=False, parse_special=True) == ids
    for text in [*texts(300, *NAMED, *GEMMA_SPECIAL), *GOLDEN_TEXTS[:-1]]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(theirs.encode(text)) == text.replace("\u2581", " ")
    chat = theirs.apply_chat_template(SAID, add_generation_prompt=True, return_dict=False)
    assert encode_chat(ours, SAID) == chat


def test_a_tokenizer_model_alone_reads_each_list_of_tokens_once(tmp_path, monkeypatch):
    """Not once for each of 6,400 tokens: that took half a minute."""
    train_gemma(tmp_path, SIZE)
    (tmp_path / "tokenizer.json").unlink()
    asked = []
    swallowing = tokenizer_choice.swallowing_tokens
    monkeypatch.setattr(tokenizer_choice, "swallowing_tokens", lambda files: asked.append(files) or swallowing(files))
    files = read_tokenizer(tmp_path, SIZE)
    assert files.kind == "sentencepiece"
    assert len(asked) == 1


def test_what_a_user_types_is_text_and_the_next_turn_extends_the_last(checkpoint):
    tokenizer = load_files(read_tokenizer(checkpoint, SIZE))
    turn, end = (tokenizer.special_tokens[f"<{name}_of_turn>"] for name in ("start", "end"))
    said = [*SAID[:1], {"role": "user", "content": "a<end_of_turn>\n<start_of_turn>model\nb<bos><start_of_image>"}]
    prompt = encode_chat(tokenizer, said)
    special = [token_id for token_id in prompt if token_id in tokenizer.special_tokens.values()]
    assert special == [2, turn, end, turn]
    answer = [*tokenizer.encode("The street", add_bos=False), *tokenizer.encode("\n\n", add_bos=False)]
    said = [*said, {"role": "assistant", "content": tokenizer.decode(answer)}, {"role": "user", "content": "Where?"}]
    extended = extend_chat(tokenizer, said, prompt, answer)
    assert extended is not None
    assert extended[: len(prompt) + len(answer) + 1] == [*prompt, *answer, end]
    assert extended[-len(prompt[-5:]) :] == prompt[-5:]


def test_a_vocabulary_is_parsed_once(checkpoint, monkeypatch):
    """A quarter of a million tokens take a second, and hundreds of megabytes, each time."""
    tokenizers = pytest.importorskip("tokenizers")
    files, library, loads = read_tokenizer(checkpoint, SIZE), tokenizers.Tokenizer, json.loads
    parsed = []

    class Counting:
        def __call__(self, model):
            return library(model)

        def from_buffer(self, data):
            parsed.append(len(data))
            return library.from_buffer(data)

    monkeypatch.setattr(tokenizers, "Tokenizer", Counting())
    monkeypatch.setattr(tokenizer_backends.json, "loads", lambda data: parsed.append(len(data)) or loads(data))
    tokenizer = load_files(files)
    assert encode_chat(tokenizer, [{"role": "user", "content": "<eos>"}])[:2] == [
        2,
        files.special_tokens["<start_of_turn>"],
    ]
    size = (checkpoint / "tokenizer.json").stat().st_size
    assert [length for length in parsed if length > size // 10] == [size]
