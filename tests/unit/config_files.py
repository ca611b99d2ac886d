"""A config.json of few numbers, and what is read of it."""

import json

from llmpack.config import read_config

BASE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
HYBRID = {
    "model_type": "granitemoehybrid",
    "num_local_experts": 0,
    "position_embedding_type": "rope",
    "layer_types": ["attention"],
    "shared_intermediate_size": 96,
}


def read(tmp_path, **changes):
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **changes}))
    return read_config(tmp_path)
