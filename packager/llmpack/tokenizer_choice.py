"""Choose and open a checkpoint's tokenizer: the file that gives the ids of transformers.

In: the files, and the tokens that were added. Out: the opened library, or none, or a refusal that says what to do.

A `tokenizer.json` is used as it is. If there is a sentencepiece `tokenizer.model` too, transformers 5 takes only the
vocabulary from `tokenizer.json` where the class is LlamaTokenizer, and rebuilds the rules of the sentencepiece model: then
`tokenizer.model` is the one that gives its ids. Of any other class (PreTrainedTokenizerFast: Llama 3), and of a Mistral
whatever its class, it uses `tokenizer.json`, and so do we, and also when the vocabulary of `tokenizer.model` is another (it
was left from the base model), and when it cannot hold what the other files say: added tokens that are not special or
swallow the white space beside them, a space put elsewhere than sentencepiece puts it (`add_prefix_space`, and `legacy`
with a chat template).
With a `tokenizer.model` alone, all added tokens are taken as special, and the rest of these is refused.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Any

from llmpack.chat_template import has_chat_template
from llmpack.model_files import ModelFiles, list_names
from llmpack.token_lists import NAMES, extra_tokens, some, swallowing_tokens, text_of
from llmpack.tokenizer_libraries import Library, open_sentencepiece, open_tokenizers
from llmrun.artifact import IncompatibleError, IntegrityError

__all__ = ["open_library"]

_MISTRALS = ("mistral", "ministral", "mistral3", "ministral3")
_LLAMA_CLASSES = (None, "LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
_SAVE_ONE = "Let transformers write one: AutoTokenizer's save_pretrained."
# Files of tokenizers that are neither; vocab.json without merges.txt may be anything.
_OTHER_KINDS = ("merges.txt", "tekken.json", "*.tiktoken", "tiktoken.model", "*spiece*.model", "tokenizer.model.v*")
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\s")
# What tokenizer_config.json may say of the space before words, and no tokenizer.model knows: {key: (the value with which it
# does, what a tokenizer.json's Metaspace calls that, in words)}. The first that is said counts.
_PREFIXES = {
    "add_prefix_space": (False, "never", "can put no space before a text"),
    "legacy": (True, "always", "can put a space after every special token"),
}


def open_library(files: ModelFiles, added: dict[str, tuple[int, bool]], vocab_size: int) -> Library | None:
    """Open the tokenizer of a checkpoint.

    Args:
        files: the directory's.
        added: of `added_tokens`, those within the model's vocabulary.
        vocab_size: of the model.
    Returns:
        None if there is no tokenizer of any kind.
    Raises:
        IncompatibleError: it is of another kind, or no file gives the ids of transformers; IntegrityError: it is damaged.
    """
    path, has_json = files.model_dir / "tokenizer.model", files.exists("tokenizer.json")
    config = files.json("tokenizer_config.json")
    if not files.exists("tokenizer.model"):
        if has_json:
            return _open_json(files, added, vocab_size)
        others = [name for name in list_names(files.model_dir) if any(fnmatchcase(name, kind) for kind in _OTHER_KINDS)]
        if others:
            raise IncompatibleError(
                f"{files.model_dir}: found {some(others)}, expected a tokenizer.json, or sentencepiece's tokenizer.model. "
                f"{_SAVE_ONE}"
            )
        return None
    are_special = all(special for _, special in added.values())
    is_mistral = files.json("config.json").get("model_type") in _MISTRALS
    is_rebuilt = config.get("tokenizer_class") in _LLAMA_CLASSES and not is_mistral
    if has_json and not (is_rebuilt and are_special):
        return _open_json(files, added, vocab_size)
    swallowers = {text for tokens in swallowing_tokens(files) for text in tokens}
    swallowing = [text for text in added if text in swallowers]
    if swallowing:
        if has_json:
            return _open_json(files, added, vocab_size)
        raise IncompatibleError(
            f"{path}: {some(swallowing)}: found lstrip or rstrip in tokenizer_config.json, expected a tokenizer.json, which "
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
    if prefix == "always" and not has_chat_template(files):
        return library  # only a template puts special tokens before text, but for the first one, which changes nothing
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


def _open_json(files: ModelFiles, added: dict[str, tuple[int, bool]], vocab_size: int) -> Library:
    """Open tokenizer.json, if it has the added tokens that the other files have: nothing is added to it."""
    path, document = files.model_dir / "tokenizer.json", files.json("tokenizer.json")
    config = files.json("tokenizer_config.json")
    listed = {entry["content"]: bool(entry.get("special")) for entry in document.get("added_tokens", [])}
    in_config = {
        entry["content"]: bool(entry.get("special")) for entry in config.get("added_tokens_decoder", {}).values()
    }
    in_config.update((text, True) for text in map(text_of, map(config.get, NAMES)) if text in tuple(in_config))
    sides, sides_in_config = swallowing_tokens(files)
    other = [text for text in added if text not in listed]
    other += [
        text
        for text, special in in_config.items()
        if text in listed and (special, sides_in_config.get(text)) != (listed[text], sides.get(text))
    ]
    library = open_tokenizers(path, files.bytes("tokenizer.json"), document, vocab_size)
    other += [text for text in extra_tokens(files) if text not in added and library.find(text) is not None]
    if other:
        raise IncompatibleError(
            f"{path}: {some(other)}: found otherwise in tokenizer_config.json or added_tokens.json, expected the same among"
            f" added_tokens. {_SAVE_ONE}"
        )
    return library
