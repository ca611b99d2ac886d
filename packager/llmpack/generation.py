"""Find a checkpoint's generation settings: how to sample, and the ids that end an answer.

In: a Hugging Face model directory. Out: `Generation`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpack.model_files import ModelFiles
from llmrun.artifact import GenerationDefaults, IncompatibleError

__all__ = ["Generation", "read_eos_ids", "read_generation"]

# Keys of generation_config.json with which transformers gives other tokens, and the values with which it does not.
_IGNORED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("bad_words_ids", "begin_suppress_tokens", "sequence_bias", "stop_strings", "suppress_tokens"), ([],)
    ),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale", "num_beams", "typical_p"), (1,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "min_length", "min_new_tokens", "no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "top_h"), ()),
}


@dataclass(frozen=True)
class Generation:
    """Sampling defaults, the EOS ids that config files name (empty if they name none), and notes as `TokenizerFiles`' are."""

    defaults: GenerationDefaults
    eos_token_ids: tuple[int, ...]
    sources: tuple[str, ...]
    notes: tuple[str, ...]


def read_generation(model_dir: Path, vocab_size: int) -> Generation:
    """Read generation_config.json, and EOS ids from config.json if it has none.

    `do_sample` false or absent means temperature 0; a sampling setting that is absent is off.

    Raises:
        IncompatibleError: a value, or an EOS id, is out of range (names file, key and value).
        IntegrityError: a file is not a JSON object.
    """
    files = ModelFiles(model_dir)
    config = files.json("generation_config.json")

    def number(key: str, default: float, expected: str, holds: Callable[[float], bool]) -> float:
        value = config.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
            raise IncompatibleError(
                f"{model_dir / 'generation_config.json'}: {key}: found {value!r}, expected {expected}. "
                "Correct it, or leave it out."
            )
        return value

    temperature = float(number("temperature", 1.0, "0 to 100", lambda x: 0 <= x <= 100))
    defaults = GenerationDefaults(
        temperature=temperature if config.get("do_sample") is True else 0.0,
        top_k=int(number("top_k", 0, "a whole number from 0", lambda x: 0 <= x < math.inf and x == int(x))),
        top_p=float(number("top_p", 1.0, "above 0, at most 1", lambda x: 0 < x <= 1)),
        min_p=float(number("min_p", 0.0, "0 to below 1", lambda x: 0 <= x < 1)),
        repeat_penalty=float(number("repetition_penalty", 1.0, "above 0, at most 10", lambda x: 0 < x <= 10)),
    )
    eos = read_eos_ids(files, vocab_size)
    ignored = [f"{key} {config[key]!r}"[:80] for key in _IGNORED if config.get(key) not in (None, *_IGNORED[key])]
    notes = (f"generation_config.json: {', '.join(ignored)}: not supported, therefore left out",) if ignored else ()
    return Generation(defaults, eos, files.names(), notes)


def read_eos_ids(files: ModelFiles, vocab_size: int) -> tuple[int, ...]:
    """Return the EOS ids of generation_config.json, else those of config.json; none if neither names one.

    Raises:
        IncompatibleError: an id is not one of the model's.
    """
    ids = files.ids("generation_config.json", "eos_token_id") or files.ids("config.json", "eos_token_id")
    for token_id in ids:
        if token_id >= vocab_size:
            raise IncompatibleError(
                f"{files.model_dir}: eos_token_id: found {token_id}, but the model's vocab_size is {vocab_size}."
            )
    return ids
