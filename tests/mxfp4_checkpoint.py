"""Makes of a random checkpoint of gpt-oss one whose experts are stored in MXFP4, as it is published."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def store_in_mxfp4(folder: Path) -> Path:
    """Replace the experts' matrices by blocks and scales; return the folder."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        matrices = tensors.pop(name).transpose(0, 2, 1)  # [experts, out_features, in_features]
        groups = matrices.reshape(*matrices.shape[:2], -1, 32)
        exponents = np.floor(np.log2(np.abs(groups).max(axis=3))) - 2
        scaled = groups / 2.0 ** exponents[..., None]
        codes = np.abs(np.abs(scaled)[..., None] - MAGNITUDES).argmin(axis=4) + 8 * (scaled < 0)
        tensors[f"{name}_blocks"] = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
        tensors[f"{name}_scales"] = (exponents + 127).astype(np.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
