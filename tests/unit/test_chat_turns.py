"""The next turn of a conversation extends the ids of the turns before, where the template allows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmrun.artifact import open_artifact
from llmrun.chat import encode_chat, extend_chat
from llmrun.tokenizer import Tokenizer, load_tokenizer

PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
CLOSED = (  # every turn between special tokens, contents trimmed, as Llama 2 and 3 do
    "{% for m in messages %}{{ bos_token + m['role'] + ' ' + m['content'] | trim + ' ' + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant ' }}{% endif %}"
)
FORGETFUL = (  # earlier answers are shortened once another turn follows
    "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}{{ '...' }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(packed_tiny: Callable[..., Path]) -> Tokenizer:
    found = load_tokenizer(open_artifact(packed_tiny(1, "f32"), ranks=[]))
    assert found is not None
    return found


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text as no tokenizer would: a token for each character, so that encoding it anew gives other ids."""
    return [tokenizer.encode_segments([tokenizer.bos_token_id, char])[1] for char in text]  # type: ignore[list-item]


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


@pytest.mark.parametrize("template", [PLAIN, CLOSED])
@pytest.mark.parametrize("answer", ["The king", " The king", "The king\n", "a </s> b"])
def test_the_answers_own_tokens_stay(template: str, answer: str, tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = template
    before = encode_chat(tokenizer, turns("Who?"))
    written = letters(tokenizer, answer)
    messages = turns("Who?", answer.strip(), "Why </s>?")
    ids = extend_chat(tokenizer, messages, before, written)
    assert ids is not None
    assert ids[: len(before) + len(written)] == [*before, *written]
    anew = encode_chat(tokenizer, messages)
    assert ids != anew
    special = {tokenizer.bos_token_id, *tokenizer.eos_token_ids}
    assert [i for i in ids if i in special] == [i for i in anew if i in special]  # and none of those that were typed
    assert text_of(tokenizer, ids).split() == text_of(tokenizer, anew).split()


@pytest.mark.parametrize(
    ("template", "answer", "content"),
    [
        (FORGETFUL, "The king", "The king"),
        (PLAIN, "", ""),
        (PLAIN, "The king", "Another"),
        (PLAIN, "The kin", "The king"),
    ],
)
def test_what_the_template_does_not_allow_is_encoded_anew(
    template: str, answer: str, content: str, tokenizer: Tokenizer
) -> None:
    tokenizer.chat_template = template
    before = encode_chat(tokenizer, turns("Who?"))
    assert extend_chat(tokenizer, turns("Who?", content, "Why?"), before, letters(tokenizer, answer)) is None
