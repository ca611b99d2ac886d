"""Find a checkpoint's tokenizer.

In: a Hugging Face model directory. Out: `TokenizerFiles`, all that an artifact says about the tokenizer. The tokenizer's
file itself goes into the artifact verbatim; nothing is converted.

Which file. A `tokenizer.json` is used as it is. If there is a sentencepiece `tokenizer.model` too, transformers 5
takes only the vocabulary from `tokenizer.json` where the class is LlamaTokenizer, and rebuilds the rules of the
sentencepiece model: then `tokenizer.model` is the one that gives its ids. Of any other class (PreTrainedTokenizerFast:
Llama 3) it uses `tokenizer.json`, and so do we, and also when the vocabulary of `tokenizer.model` is another (it was
left from the base model), and when it cannot hold what the other files say: added tokens that are not special or
swallow the white space beside them, a space put elsewhere than sentencepiece puts it (`legacy`, `add_prefix_space`).
With a `tokenizer.model` alone, all added tokens are taken as special, and the rest of these is refused.

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

import itertools
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llmpack.chat_template import read_chat_template
from llmpack.generation import read_eos_ids
from llmpack.model_files import ModelFiles, list_names
from llmpack.tokenizer_libraries import Library, open_sentencepiece, open_tokenizers
from llmrun.artifact import IncompatibleError, IntegrityError

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

_LLAMA_CLASSES = (None, "LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
_SAVE_ONE = "Let transformers write one: AutoTokenizer's save_pretrained."
# Files of tokenizers that are neither; vocab.json without merges.txt may be anything.
_OTHER_KINDS = ("merges.txt", "tekken.json", "*.tiktoken", "tiktoken.model", "*spiece*.model", "tokenizer.model.v*")
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\s")
# Whatever tokens have these names in tokenizer_config.json are special, whether they are marked so or not.
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What tokenizer_config.json may say of the space before words, and no tokenizer.model knows: {key: (the value with which it
# does, what a tokenizer.json's Metaspace calls that, in words)}. The first that is said counts.
_PREFIXES = {
    "add_prefix_space": (False, "never", "can put no space before a text"),
    "legacy": (True, "always", "can put a space after every special token"),
}


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
    added = _added_tokens(files)
    beyond = [text for text, (token_id, _) in added.items() if token_id >= vocab_size]
    library = _open_library(files, {text: added[text] for text in added if text not in beyond}, vocab_size)
    if library is None:
        return None
    path = library.path
    for text, token_id in sorted(library.special_tokens.items()):
        if library.text(token_id) not in (None, text):
            raise IncompatibleError(f"{path}: id {token_id}: found {library.text(token_id)!r}, expected {text!r}.")
    first_id = -1 if library.first_id is None else library.first_id
    size = max(library.highest_id, first_id, *library.special_tokens.values()) + 1
    if size > vocab_size:
        raise IncompatibleError(
            f"{path}: found ids up to {size - 1}, but the model's vocab_size is {vocab_size}. "
            f"Use the {path.name} that the model was trained with."
        )

    bos_token = _named_token(files, library, "bos_token")
    eos_token = _named_token(files, library, "eos_token")
    special = dict(library.special_tokens)
    special.update((text, library.id(text)) for text in (bos_token, eos_token) if text is not None)
    next_id = max(size, *(token_id + 1 for token_id, _ in added.values()), 0)
    for text in _extra_tokens(files):
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
    bos_id = library.first_id
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
    notes = [f"{_some(beyond)}: added beyond vocab_size {vocab_size}, therefore left out"] if beyond else []
    if in_config and in_config != eos_ids:
        notes.append(
            f"{eos_token!r} (id {eos_ids[-1]}), the tokenizer's eos_token: ends answers too, beside the ids that the "
            f"configuration names ({', '.join(map(str, in_config))})"
        )
    if library.last_id is not None:
        notes.append(
            f"{library.text(library.last_id)!r}: left out, which {path.name} puts after every text: an answer goes on"
        )
    template, template_notes = read_chat_template(files, _named_tokens(files))
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
        golden=_golden(library, set(special.values()) - {library.unknown_id}),
        sources=files.names(path.name),
        notes=(*notes, *template_notes),
    )


def _open_library(files: ModelFiles, added: dict[str, tuple[int, bool]], vocab_size: int) -> Library | None:
    path, has_json = files.model_dir / "tokenizer.model", files.exists("tokenizer.json")
    config = files.json("tokenizer_config.json")
    if not files.exists("tokenizer.model"):
        if has_json:
            return _open_json(files, added, vocab_size)
        others = [name for name in list_names(files.model_dir) if any(fnmatchcase(name, kind) for kind in _OTHER_KINDS)]
        if others:
            raise IncompatibleError(
                f"{files.model_dir}: found {_some(others)}, expected a tokenizer.json, or sentencepiece's tokenizer.model. "
                f"{_SAVE_ONE}"
            )
        return None
    are_special = all(special for _, special in added.values())
    if has_json and (config.get("tokenizer_class") not in _LLAMA_CLASSES or not are_special):
        return _open_json(files, added, vocab_size)
    swallowing = [text for text in added if any(text in tokens for tokens in _swallowing_tokens(files))]
    if swallowing:
        if has_json:
            return _open_json(files, added, vocab_size)
        raise IncompatibleError(
            f"{path}: {_some(swallowing)}: found lstrip or rstrip in tokenizer_config.json, expected a tokenizer.json, which "
            f"can say that a token swallows white space. {_SAVE_ONE}"
        )
    try:
        library = open_sentencepiece(path, files.bytes("tokenizer.model"), added, vocab_size)
    except IntegrityError:
        # Meta's Llama 3 has a tokenizer.model of another format, a list of base64 words, beside
        # tokenizer.json.
        if has_json:
            return _open_json(files, added, vocab_size)
        if _TIKTOKEN.match(files.bytes(path.name)):
            raise IncompatibleError(
                f"{path}: found words in base64 (tiktoken), expected sentencepiece's format, or a tokenizer.json. {_SAVE_ONE}"
            ) from None
        raise
    if has_json and not _has_pieces(files.json("tokenizer.json"), library):
        return _open_json(files, added, vocab_size)
    said = next(((key, *of_key) for key, of_key in _PREFIXES.items() if config.get(key) is of_key[0]), None)
    if said is None:
        return library
    key, value, prefix, says = said
    if prefix == "never" and not (library.text(library.encode("a")[0]) or "").startswith("\u2581"):
        return library
    if has_json:
        in_json = _open_json(files, added, vocab_size)
        if _prefix(files.json("tokenizer.json")) == prefix:
            return in_json
    raise IncompatibleError(
        f"{path}: tokenizer_config.json: {key}: found {value!r}, expected a tokenizer.json, which {says}. {_SAVE_ONE}"
    )


def _has_pieces(document: dict[str, Any], library: Library) -> bool:
    """Tell whether the vocabulary of a tokenizer.json is that of a tokenizer.model: texts, ids and number."""
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # of a Unigram model: [text, score]
        vocab = {str(entry[0]): i for i, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    if not isinstance(vocab, dict) or len(vocab) <= library.highest_id:
        return False
    # A token that was added may be there too, and is unknown to the library if the model has no id for it.
    return all(library.find(text) in (i, None if i >= library.vocab_size else i) for text, i in vocab.items())


def _prefix(document: dict[str, Any]) -> str:
    """Return where a tokenizer.json puts a space of its own before text: "always", "first" (where a text begins), "never"."""
    steps = []
    for name, several in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        step = document.get(name) or {}
        steps += step.get(several, []) if step.get("type") == "Sequence" else [step]
    for step in steps:
        if step.get("type") == "Prepend":
            return "always"
        if step.get("type") == "Metaspace":
            return step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    return "never"


def _added_tokens(files: ModelFiles) -> dict[str, tuple[int, bool]]:
    """Return {text: (id, is special)} of tokens that were added to the tokenizer's own."""
    added: dict[str, tuple[int, bool]] = {}
    try:
        for text, token_id in files.json("added_tokens.json").items():
            added[text] = int(token_id), True
        for entry in files.json("tokenizer.json").get("added_tokens", []):
            added[entry["content"]] = int(entry["id"]), bool(entry.get("special", False))
        for token_id, entry in files.json("tokenizer_config.json").get("added_tokens_decoder", {}).items():
            added[entry["content"]] = int(token_id), bool(entry.get("special", False))
        if any(not text or token_id < 0 for text, (token_id, _) in added.items()):
            raise ValueError("an empty text or a negative id")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{files.model_dir}: the list of added tokens is malformed: {error!r}.") from error
    return added


def _open_json(files: ModelFiles, added: dict[str, tuple[int, bool]], vocab_size: int) -> Library:
    """Open tokenizer.json, if it has the added tokens that the other files have: nothing is added to it."""
    path, document = files.model_dir / "tokenizer.json", files.json("tokenizer.json")
    config = files.json("tokenizer_config.json")
    listed = {entry["content"]: bool(entry.get("special")) for entry in document.get("added_tokens", [])}
    in_config = {
        entry["content"]: bool(entry.get("special")) for entry in config.get("added_tokens_decoder", {}).values()
    }
    in_config.update((text, True) for text in map(_text, map(config.get, _NAMES)) if text in tuple(in_config))
    sides, sides_in_config = _swallowing_tokens(files)
    other = [text for text in added if text not in listed]
    other += [
        text
        for text, special in in_config.items()
        if text in listed and (special, sides_in_config.get(text)) != (listed[text], sides.get(text))
    ]
    library = open_tokenizers(path, files.bytes("tokenizer.json"), document, vocab_size)
    other += [text for text in _extra_tokens(files) if text not in added and library.find(text) is not None]
    if other:
        raise IncompatibleError(
            f"{path}: {_some(other)}: found otherwise in tokenizer_config.json or added_tokens.json, expected the same among"
            f" added_tokens. {_SAVE_ONE}"
        )
    return library


def _swallowing_tokens(files: ModelFiles) -> list[dict[str, tuple[bool, bool]]]:
    """Return the added tokens that swallow white space, {text: (before it, after it)}: of tokenizer.json, of the config."""
    found = []
    for entries in (
        files.json("tokenizer.json").get("added_tokens", []),
        files.json("tokenizer_config.json").get("added_tokens_decoder", {}).values(),
    ):
        sides = {entry["content"]: (bool(entry.get("lstrip")), bool(entry.get("rstrip"))) for entry in entries}
        found.append({text: side for text, side in sides.items() if any(side)})
    return found


def _some(tokens: list[str]) -> str:
    """Name the first few of tokens."""
    return ", ".join([*map(repr, tokens[:3]), *([f"{len(tokens) - 3} more tokens"] if len(tokens) > 3 else [])])


def _named_token(files: ModelFiles, library: Library, key: str) -> str | None:
    """Return the text of bos_token or eos_token: a string, or an object with its content; null says that there is none."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        config = files.json(name)
        if key in config:
            value = config[key]
            text = _text(value)
            if text is not None and not isinstance(text, str):
                raise IncompatibleError(f"{files.model_dir / name}: {key}: found {value!r}, expected text.")
            return text
    return library.own.get(key)


def _extra_tokens(files: ModelFiles) -> list[str]:
    """Return the texts of the special tokens that have no name of their own in transformers."""
    for name, key in itertools.product(_token_files(files), ("extra_special_tokens", "additional_special_tokens")):
        value = files.json(name).get(key)
        if value:
            entries = list(value.values()) if isinstance(value, dict) else value
            texts = [_text(entry) for entry in entries] if isinstance(entries, list) else [None]
            if not all(isinstance(text, str) and text for text in texts):
                raise IncompatibleError(f"{files.model_dir / name}: {key}: found {value!r}, expected texts of tokens.")
            return [str(text) for text in dict.fromkeys(texts)]
    return []


def _named_tokens(files: ModelFiles) -> dict[str, str]:
    """Return the texts of all tokens that have a name, as chat templates know them, by that."""
    found: dict[str, Any] = {}
    for name in _token_files(files):
        members = files.json(name)
        extra = members.get("extra_special_tokens")
        found |= {key: value for key, value in members.items() if key.endswith("_token")}
        found |= extra if isinstance(extra, dict) else {}
    return {key: text for key, value in found.items() if isinstance(text := _text(value), str)}


def _token_files(files: ModelFiles) -> tuple[str, ...]:
    """Return the names of the files that name tokens, as transformers reads them."""
    name = "tokenizer_config.json"
    return (name,) if "added_tokens_decoder" in files.json(name) else (name, "special_tokens_map.json")


def _text(entry: Any) -> Any:
    """Return what a file gives as a token's text: it is a string, or in an object."""
    return entry.get("content") if isinstance(entry, dict) else entry


def _golden(library: Library, never_from_text: set[int]) -> list[dict[str, Any]]:
    """Encode the golden texts; one for which the library itself gives a special id says nothing about text."""
    vectors = [{"text": text, "ids": library.encode(text)} for text in GOLDEN_TEXTS]
    return [vector for vector in vectors if never_from_text.isdisjoint(vector["ids"])]
