"""Checkpoints that see images: written as transformers saves them and as it calls its modules, and what is packed of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from llmrun import Engine


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_seeing(model: Any, folder: Path, ids: list[int], norm: float) -> Path:
    """Save a model with random weights, norms about `norm`, and `logits.npy` of ids."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(norm if "norm" in name else 0, 0.08)
        logits = model(torch.tensor([ids])).logits[0].numpy()
    model.save_pretrained(folder)
    np.save(folder / "logits.npy", logits)
    return folder


def named_as_modules(seeing: Path, folder: Path) -> Path:
    """Write a checkpoint with its tensors named as transformers calls its modules."""
    tensors = load_file(seeing / "model.safetensors")
    write_config(folder, json.loads((seeing / "config.json").read_text()))
    renamed = {
        "lm_head.weight"
        if name == "language_model.lm_head.weight"
        else "model." + name.replace("language_model.model.", "language_model."): tensor
        for name, tensor in tensors.items()
    }
    assert not renamed.keys() & tensors.keys()
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    return folder


def check_language_model(folder: Path, truth: Path, ids: list[int], packed: Callable[..., Path]) -> None:
    with Engine(packed(folder, 1, "f32")) as engine:
        logits = np.load(truth / "logits.npy")
        assert np.abs(logits).max() > 1
        np.testing.assert_allclose(engine.logits(ids), logits, rtol=0, atol=2e-4)
