"""Granite's multipliers -> the numbers of a graph whose residual stream has none.

The stream is held divided by `residual_multiplier`, m: what is added to it then needs no factor, the embedding's rows have
`embedding_multiplier` / m, and a norm divides m away, if its epsilon is divided by m squared.
"""

from __future__ import annotations

import numpy as np

from llmrun.artifact import IncompatibleError, ModelConfig


def embedding_scale(config: ModelConfig) -> float:
    """Return what the embedding's rows are multiplied by; IncompatibleError, here and below: not a number of float32."""
    return _in_float32(
        "embedding_multiplier / residual_multiplier", config.embedding_multiplier / config.residual_multiplier
    )


def norm_epsilon(config: ModelConfig) -> float:
    """Return what the norms of the residual stream add to the mean square."""
    if config.residual_multiplier == 1:
        return config.rms_norm_eps
    epsilon = config.rms_norm_eps / config.residual_multiplier / config.residual_multiplier
    return _in_float32("rms_norm_eps / residual_multiplier^2", epsilon)


def logit_scale(config: ModelConfig) -> float:
    """Return what the head's input is multiplied by."""
    return _in_float32("1 / logits_scaling", 1 / config.logits_scaling)


def _in_float32(what: str, number: float) -> float:
    limits = np.finfo(np.float32)
    if not float(limits.tiny) <= number <= float(limits.max):
        raise IncompatibleError(f"config.json: {what} is {number:g}, beyond float32.")
    return number
