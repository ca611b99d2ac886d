"""Find a checkpoint's tokenizer.

In: a Hugging Face model directory. Out: `TokenizerFiles`, all that an artifact says about the tokenizer. The tokenizer's
file itself goes into the artifact verbatim; nothing is converted.

Which file: `tokenizer_choice.py`.

Which ids. EOS: those of generation_config.json, else of config.json, and the tokenizer's own beside them. BOS: the
tokenizer's files, by post-processor or by name, else generation_config.json, else config.json, since
transformers' tokenizer puts its own BOS before a prompt. What only the config files name is an id and no more: special is
what the tokenizer says is (transformers writes the ids 1 and 2 for every Llama, whatever they stand for).

Added tokens beyond the model's vocabulary are left out, as if the files did not have them: the model cannot
read them, so they are ordinary text. Special tokens that the tokenizer's config lists and the tokenizer lacks
are those that transformers would add: beyond the vocabulary they are left out too, within it they are refused.

Golden vectors are computed with the tokenizer libraries directly, not with llmrun, so that they check it.
"""

# ruff: noqa: RUF001 - golden texts hold characters that look like others on purpose
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpack.chat_template import read_chat_template
from llmpack.generation import read_eos_ids
from llmpack.model_files import ModelFiles
from llmpack.token_lists import added_tokens, extra_tokens, named_token, named_tokens, some
from llmpack.tokenizer_choice import open_library
from llmpack.tokenizer_libraries import Library
from llmrun.artifact import IncompatibleError

__all__ = ["GOLDEN_TEXTS", "TokenizerFiles", "read_tokenizer"]

GOLDEN_TEXTS = (
    "",
    "a",
    "Hello world",
    "Hello, world! It's 5 o'clock.",
    "The quick brown fox jumps over the lazy dog.",
    " leading and trailing ",
    "two  spaces,   three    four",
    "   ",
    "\n",
    "\n\n",
    "line one\nline two\r\n\r\n\tindented\n",
    "0123456789 3.14159 1,000,000 2^64",
    "def f(x):\n    return {'a': [x ** 2, \"b\"]}  # note\n",
    "I'll we've DON'T it’s “quoted” — dash…",
    "Grüße, déjà vu, naïve, Ærø, Łódź, ı̇",
    "Добрый день, мир",
    "Γειά σου Κόσμε",
    "你好，世界。こんにちは世界、안녕하세요",
    "مرحبا بالعالم שלום עולם",
    "नमस्ते दुनिया สวัสดีชาวโลก",
    "🙂👩‍👩‍👧‍👦🇪🇺🦙",
    "\u2581 \u00a0\u200b\ufeff\u3000",
    "\x00\x01\x7f",
    "<s> </s> <unk> [INST] <<SYS>> <|im_start|>user<|im_end|> <|begin_of_text|><|eot_id|> <0x0A>",
)


@dataclass(frozen=True)
class TokenizerFiles:
    """What goes into the artifact; the fields from vocab_size on are those of `TokenizerSpec`.

    Attributes:
        kind: "sentencepiece" or "tokenizers".
        source_file: tokenizer.model or tokenizer.json, to be copied.
        chat_template: Jinja source, None if the checkpoint has none.
        golden: `{"text": ..., "ids": [...]}`, special tokens in the text being text, without BOS.
        sources: names of all files that were read.
        notes: what was not done as the files say, for a person.
    """

    kind: str
    source_file: Path
    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    add_bos_token: bool
    special_tokens: dict[str, int]
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None
    prefix_token_ids: tuple[int, ...]
    golden: list[dict[str, Any]]
    sources: tuple[str, ...]
    notes: tuple[str, ...]


def read_tokenizer(model_dir: Path, vocab_size: int) -> TokenizerFiles | None:
    """Read the tokenizer of a checkpoint; None if it has none.

    Args:
        model_dir: a Hugging Face model directory.
        vocab_size: of the model; the tokenizer may have fewer ids, not more, but for added tokens.
    Raises:
        IncompatibleError: ids beyond vocab_size, a tokenizer of an unknown kind, a character that is special, a
        template that does not parse. IntegrityError: a file is damaged or a Git LFS pointer. UsageError: a
        tokenizer library is not installed.
    """
    files = ModelFiles(model_dir)
    added = added_tokens(files)
    beyond = [text for text, (token_id, _) in added.items() if token_id >= vocab_size]
    library = open_library(files, {text: added[text] for text in added if text not in beyond}, vocab_size)
    if library is None:
        return None
    path = library.path
    for text, token_id in sorted(library.special_tokens.items()):
        if library.text(token_id) not in (None, text):
            raise IncompatibleError(f"{path}: id {token_id}: found {library.text(token_id)!r}, expected {text!r}.")
    size = max([library.highest_id, *library.prefix, *library.special_tokens.values()]) + 1
    if size > vocab_size:
        raise IncompatibleError(
            f"{path}: found ids up to {size - 1}, but the model's vocab_size is {vocab_size}. "
            f"Use the {path.name} that the model was trained with."
        )

    bos_token = named_token(files, library, "bos_token")
    eos_token = named_token(files, library, "eos_token")
    special = dict(library.special_tokens)
    special.update((text, library.id(text)) for text in (bos_token, eos_token) if text is not None)
    next_id = max(size, *(token_id + 1 for token_id, _ in added.values()), 0)
    for text in extra_tokens(files):
        # transformers adds what the tokenizer does not have, behind all that it has.
        if text not in beyond and library.find(text) is None and next_id >= vocab_size:
            beyond.append(text)
            next_id += 1
        elif text not in added:
            special[text] = library.id(text)
    for text, token_id in sorted(special.items()):
        # llmrun keeps a special id out of a prompt by cutting the token's text, which a character does not allow.
        if len(text) == 1 and token_id != library.unknown_id and token_id in library.encode(text):
            raise IncompatibleError(
                f"{path}: special token {text!r} (id {token_id}): found the id that the ordinary character has, "
                "expected a token that text never gives. Take it out of the special tokens of tokenizer.json and "
                "tokenizer_config.json."
            )
    texts = {token_id: text for text, token_id in special.items()}
    in_config = eos_ids = read_eos_ids(files, vocab_size)
    if eos_token is not None and special[eos_token] not in eos_ids:
        eos_ids = (*eos_ids, special[eos_token])
    if eos_token is None and eos_ids:
        eos_token = texts.get(eos_ids[0])

    add_bos = files.json("tokenizer_config.json").get("add_bos_token")
    if add_bos is not None and not isinstance(add_bos, bool):
        raise IncompatibleError(f"{path}: tokenizer_config.json: add_bos_token: found {add_bos!r}, expected a boolean.")
    bos_id = library.prefix[0] if library.prefix else None
    if bos_id is None and bos_token is not None:
        bos_id = special[bos_token]
    if bos_id is None and "bos_token" not in files.json("tokenizer_config.json"):
        for name in ("generation_config.json", "config.json"):
            bos_ids = files.ids(name, "bos_token_id")
            if bos_ids and library.text(bos_ids[0]) is not None:
                bos_id = bos_ids[0]
                break
    # transformers heeds add_bos_token only where a BOS is named, and where no post-processor of a tokenizer.json decides.
    if bos_token is None or add_bos is None or library.kind == "tokenizers":
        add_bos = library.adds(bos_id)
    if bos_token is None and bos_id is not None:
        bos_token = texts.get(bos_id)
    notes = [f"{some(beyond)}: added beyond vocab_size {vocab_size}, therefore left out"] if beyond else []
    if in_config and in_config != eos_ids:
        notes.append(
            f"{eos_token!r} (id {eos_ids[-1]}), the tokenizer's eos_token: ends answers too, beside the ids that the "
            f"configuration names ({', '.join(map(str, in_config))})"
        )
    if library.last_id is not None:
        notes.append(
            f"{library.text(library.last_id)!r}: left out, which {path.name} puts after every text: an answer goes on"
        )
    template, template_notes = read_chat_template(files, named_tokens(files))
    return TokenizerFiles(
        kind=library.kind,
        source_file=path,
        vocab_size=size,
        bos_token_id=bos_id,
        eos_token_ids=eos_ids,
        add_bos_token=add_bos,
        special_tokens=dict(sorted(special.items())),
        bos_token=bos_token,
        eos_token=eos_token,
        chat_template=template,
        prefix_token_ids=library.prefix if len(library.prefix) > 1 else (),
        golden=_golden(library, set(special.values()) - {library.unknown_id}),
        sources=files.names(path.name),
        notes=(*notes, *template_notes),
    )


def _golden(library: Library, never_from_text: set[int]) -> list[dict[str, Any]]:
    """Encode the golden texts; one for which the library itself gives a special id says nothing about text."""
    vectors = [{"text": text, "ids": library.encode(text)} for text in GOLDEN_TEXTS]
    return [vector for vector in vectors if never_from_text.isdisjoint(vector["ids"])]
