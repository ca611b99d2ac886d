"""Tokenizers of both kinds, trained on a few sentences, and what stands for artifacts that hold one."""

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmrun.artifact import TokenizerSpec
from llmrun.tokenizer import load_tokenizer

CORPUS = [
    "It was the best of times, it was the worst of times.",
    "User: Where is the house? Assistant: The house is in the street, system.",
    "She sold 12 shells and 345 stones by the sea shore; he said: 'No!'",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ [INST] <|/|> _",
] * 20


def make_artifact(folder, kind, file, **spec):
    """Stand for an opened artifact: what `load_tokenizer` reads of one."""
    template = spec.pop("chat_template", None)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, "utf-8")
    fields = {
        "bos_token_id": 1,
        "eos_token_ids": (2,),
        "add_bos_token": True,
        "special_tokens": {"<unk>": 0, "<s>": 1, "</s>": 2},
        "bos_token": "<s>",
        "eos_token": "</s>",
    } | spec
    tokenizer = TokenizerSpec(
        kind=kind, file=file, chat_template="chat_template.jinja" if template else None, golden="golden.json", **fields
    )
    return SimpleNamespace(
        manifest=SimpleNamespace(tokenizer=tokenizer), resolve=lambda relative: Path(folder) / relative
    )


def train_sentencepiece(folder, **options):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        **{
            "vocab_size": 420,
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "split_digits": True,
        }
        | options,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "config.json").write_text('{"model_type": "llama"}')
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | tokens))
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


BYTE_LEVEL_SPECIAL = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]


def train_byte_level(folder, special=BYTE_LEVEL_SPECIAL):
    """Train a tokenizer.json like Llama 3's: byte-level BPE, the pattern of tiktoken, BOS from the post-processor."""
    tokenizers = pytest.importorskip("tokenizers")
    split = tokenizers.Regex(
        r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    )
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(split, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    bos = special[0]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": special[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return tokenizer


def train_unigram(folder):
    """Train a tokenizer.json with a Unigram model, whose unknown token has an id and no name; return transformers'."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=300, special_tokens=list(special.values()), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    theirs.save_pretrained(folder)
    assert "unk_token" not in json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    return theirs


# Of the order and the kinds of Gemma 3's; those from <start_of_turn> on are special, and the last is beyond a 1B's vocabulary.
GEMMA_SYMBOLS = [
    *("<mask>", "[multimodal]", "<unused0>", "<unused1>", "<start_of_turn>", "<end_of_turn>"),
    *("\n" * i for i in range(1, 32)),
    *("\u2581" * i for i in range(2, 32)),
    *("<table>", "</table>", "\t", "<start_of_image>", "<end_of_image>", "<unused2>"),
]
GEMMA_SPECIAL = {"<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"}
GEMMA_TEMPLATE = """\
{{ bos_token }}
{%- set offset = 1 if messages[0]['role'] == 'system' else 0 -%}
{%- for message in messages[offset:] -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
    {%- if loop.first and offset -%}
        {{ messages[0]['content'] + '\n\n' }}
    {%- endif -%}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {{ '<start_of_image>' if item['type'] == 'image' else item['text'] | trim }}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
"""


def train_gemma(folder, vocab_size=700):
    """Write the files of Gemma 3's tokenizer: BPE of characters with byte fallback, no space before a text, user's symbols."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers.tokenization_utils_base import generate_merges

    names = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "unk_piece": "<unk>"}
    model = train_sentencepiece(
        folder,
        **names,
        **{"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False},
        user_defined_symbols=GEMMA_SYMBOLS,
        vocab_size=vocab_size,
    )
    vocab = {model.id_to_piece(i): i for i in range(vocab_size)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, generate_merges(vocab), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = {*names.values(), *GEMMA_SPECIAL}
    added = [*names.values(), *GEMMA_SYMBOLS, "<image_soft_token>"]
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False, special=text in special) for text in added])
    ids = {text: tokenizer.token_to_id(text) for text in added}
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    sides = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    named = {name.replace("piece", "token"): text for name, text in names.items()}
    images = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    config = {
        **{"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False, **named, **images},
        "added_tokens_decoder": {ids[text]: {"content": text, "special": text in special, **sides} for text in added},
        "extra_special_tokens": images,
        "chat_template": GEMMA_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({**named, **images}))
    (folder / "added_tokens.json").write_text(json.dumps({"<image_soft_token>": ids["<image_soft_token>"]}))
    ends = {"bos_token_id": ids["<bos>"], "eos_token_id": [ids["<eos>"], ids["<end_of_turn>"]]}
    (folder / "generation_config.json").write_text(json.dumps({**ends, "do_sample": True, "top_k": 64, "top_p": 0.95}))
    (folder / "config.json").write_text('{"model_type": "gemma3_text"}')
    return ids


def byte_level_spec(tokenizer, special=BYTE_LEVEL_SPECIAL, **more):
    ids = {text: tokenizer.token_to_id(text) for text in special}
    return {
        "vocab_size": tokenizer.get_vocab_size(),
        "special_tokens": ids,
        "bos_token": special[0],
        "bos_token_id": ids[special[0]],
        "eos_token": special[1],
        "eos_token_ids": (ids[special[1]],),
    } | more


def edit_json(folder, name, **changes):
    path = folder / name
    members = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(members | changes), "utf-8")


def load_files(files):
    """Open what `read_tokenizer` has found as the runtime will."""
    names = {field.name for field in dataclasses.fields(TokenizerSpec)} - {"kind", "file", "chat_template", "golden"}
    spec = {name: getattr(files, name) for name in names}
    folder, template = files.source_file.parent, files.chat_template
    return load_tokenizer(make_artifact(folder, files.kind, files.source_file.name, chat_template=template, **spec))
