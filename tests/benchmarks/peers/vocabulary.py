"""A vocabulary for the random checkpoints: the demo model's, and pieces that no text holds up to the size that is wanted.

Servers turn every token that they sample into text, so they want a piece for each id.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from benchmarks.peers.programs import DEMO


def with_vocabulary(checkpoint: Path, folder: Path) -> Path:
    """Make a folder of the checkpoint's files, linked, with tokenizer.model and, for convert.py, vocabulary.json."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    folder.mkdir(parents=True, exist_ok=True)
    for path in checkpoint.iterdir():
        link = folder / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(path, folder))
    model = proto.ModelProto()  # pyright: ignore[reportAttributeAccessIssue] - generated classes
    model.ParseFromString((DEMO / "tokenizer.model").read_bytes())
    size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    lowest = min(piece.score for piece in model.pieces)
    for number in range(len(model.pieces), size):
        model.pieces.add(piece=f"\u2581~{number}", score=lowest - number, type=model.SentencePiece.NORMAL)
    model.trainer_spec.vocab_size = size
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    pieces = [{"text": piece.piece, "score": piece.score, "type": piece.type} for piece in model.pieces]
    (folder / "vocabulary.json").write_text(json.dumps(pieces))
    return folder
