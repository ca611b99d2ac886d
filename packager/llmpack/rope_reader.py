"""RoPE's settings in config.json -> one dictionary, whichever spelling says them; what is not supported is refused.

Both spellings (`rope_scaling` with `rope_theta`; transformers 5's `rope_parameters`) become one, with every default filled in.
"""

from __future__ import annotations

import math
from typing import Any

from llmpack.families import Family
from llmpack.model_reader import Reader
from llmrun.artifact import IncompatibleError, IntegrityError

# May stand beside rope_scaling, and transformers 5 takes that; 4 the one within.
_OUTSIDE = "original_max_position_embeddings"
_ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _OUTSIDE),
    "yarn": ("factor", _OUTSIDE),
    "longrope": (_OUTSIDE,),
}
_BETA = "llama_4_scaling_beta"
_ALL, _SLIDING = "full_attention", "sliding_attention"  # kinds of layers
_LOCAL_THETA = 10000.0  # rope_local_base_freq where config.json does not say it
_OLD_LONGROPE = ("su", "yarn")  # what Phi 3 called it


def read_ropes(
    reader: Reader, family: Family, head_dim: int, max_position_embeddings: int
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return what `read_rope` does for layers that see all, and for those that slide; None: they have the same.

    Gemma 3 has `rope_scaling` and `rope_theta` for the former and `rope_local_base_freq` for the latter, or `rope_parameters`
    for each kind of layer.
    """
    if not family.has_local_rope:
        return read_rope(reader, family, head_dim, max_position_embeddings), None
    raw = reader.raw
    by_kind = {} if raw.get("rope_parameters") is None else raw["rope_parameters"]
    if not isinstance(by_kind, dict) or not set(by_kind) <= {_ALL, _SLIDING}:
        raise IncompatibleError(
            f"{reader.path}: rope_parameters is {by_kind!r:.100}; expected an object for {_ALL}, and one for {_SLIDING}."
        )
    local_theta = reader.positive("rope_local_base_freq", _LOCAL_THETA)
    own = ({"rope_parameters": by_kind.get(_ALL)}, {"rope_parameters": by_kind.get(_SLIDING), "rope_scaling": None})
    of_all, of_sliding = (Reader({**raw, **settings}, reader.path, reader.prefix) for settings in own)
    of_sliding.raw["rope_theta"] = local_theta
    rope, local = (read_rope(r, family, head_dim, max_position_embeddings) for r in (of_all, of_sliding))
    return rope, local


def read_rope(reader: Reader, family: Family, head_dim: int, max_position_embeddings: int) -> dict[str, Any]:
    """Return {"rope_type", "rope_theta", ...the type's numbers}, whichever spelling config.json uses.

    And `rotary_dim`, if it is less than `head_dim`: the features of each head that are rotated, the first ones.
    """
    raw, path = reader.raw, reader.path
    original = family.original_max_position_embeddings if raw.get(_OUTSIDE) is None else raw[_OUTSIDE]
    spellings = []
    for key in ("rope_parameters", "rope_scaling"):
        given = raw.get(key)
        if given is None:
            continue
        if not isinstance(given, dict):
            raise IncompatibleError(f"{path}: {key} is {given!r}; expected an object or null.")
        kind = given.get("rope_type", given.get("type", "default"))
        if family.architecture == "Phi3ForCausalLM" and kind in _OLD_LONGROPE:
            kind = "longrope"
        if not isinstance(kind, str) or kind not in _ROPE_NUMBERS:
            raise IncompatibleError(f"{path}: {key}.rope_type is {kind!r}; supported: {', '.join(_ROPE_NUMBERS)}.")
        inner = Reader(given, path, f"{key}.")
        rope: dict[str, Any] = {"rope_type": kind}
        rope["rope_theta"] = inner.positive("rope_theta", reader.positive("rope_theta", family.rope_theta))
        for number in _ROPE_NUMBERS[kind]:
            outside = original if number == _OUTSIDE else None
            # As transformers 5.
            default = max_position_embeddings if number == _OUTSIDE and outside is None else outside
            rope[number] = inner.positive(number, default)
            if given.get(number) is not None and outside not in (None, rope[number]):
                other = f"{number} {outside!r}" + " (the default)" * (raw.get(number) is None)
                raise IncompatibleError(f"{path}: {key}.{number} {given[number]} and {other} contradict each other.")
        if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
            raise IntegrityError(
                f"{path}: {key}.high_freq_factor is {rope['high_freq_factor']:g}; expected more than low_freq_factor"
                f" {rope['low_freq_factor']:g}.",
                code="E310",
            )
        if kind == "yarn":
            _read_yarn(inner, rope)
        if family.has_growing_queries and given.get(_BETA):
            rope[_BETA] = inner.positive(_BETA)
            rope.setdefault(_OUTSIDE, inner.positive(_OUTSIDE, original))
        is_outside = given.get("partial_rotary_factor") is None
        rotary_dim = _read_rotary_dim(reader if is_outside else inner, family, head_dim)
        if kind == "longrope":
            _read_longrope(inner, rope, rotary_dim, max_position_embeddings)
        spellings.append({**rope, **_part(rotary_dim, head_dim)})
    if len(spellings) == 2 and spellings[0] != spellings[1]:
        one, other = spellings
        differing = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        found = ", ".join(f"{name} {one.get(name)!r:.60} and {other.get(name)!r:.60}" for name in differing)
        raise IncompatibleError(f"{path}: rope_parameters and rope_scaling contradict each other: {found}.")
    if spellings:
        return spellings[0]
    rotary_dim = _read_rotary_dim(reader, family, head_dim)
    rope_theta = reader.positive("rope_theta", family.rope_theta)
    return {"rope_type": "default", "rope_theta": rope_theta, **_part(rotary_dim, head_dim)}


def _part(rotary_dim: int, head_dim: int) -> dict[str, int]:
    return {} if rotary_dim == head_dim else {"rotary_dim": rotary_dim}


def _read_rotary_dim(reader: Reader, family: Family, head_dim: int) -> int:
    """Return how many features of each head are rotated."""
    share = reader.positive("partial_rotary_factor", family.partial_rotary_factor)
    where = f"{reader.path}: {reader.prefix}partial_rotary_factor is {share:g}"
    if share != 1 and not family.has_partial_rotary:
        raise IncompatibleError(f"{where}, which is not supported; supported: 1.0.")
    rotary_dim = int(head_dim * min(share, 2.0))
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise IntegrityError(
            f"{where} of head_dim {head_dim}; expected a share that is an even number of features, from 2 to {head_dim}.",
            code="E310",
        )
    return rotary_dim


def _read_longrope(reader: Reader, rope: dict[str, Any], rotary_dim: int, max_position_embeddings: int) -> None:
    """Add LongRoPE's other numbers to `rope`: short_factor and long_factor, of each pair, and attention_factor."""
    for name in ("short_factor", "long_factor"):
        given = reader.raw.get(name)
        if not isinstance(given, list) or len(given) != rotary_dim // 2:
            found = f"a list of {len(given)}" if isinstance(given, list) else f"{given!r:.60}"
            raise IntegrityError(
                f"{reader.path}: {reader.prefix}{name} is {found}; expected {rotary_dim // 2} numbers.", code="E310"
            )
        own = Reader({f"{name}[{i}]": number for i, number in enumerate(given)}, reader.path, reader.prefix)
        rope[name] = [own.positive(key) for key in own.raw]
    original = rope[_OUTSIDE]
    factor = reader.positive("factor", max_position_embeddings / original)
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    rope["attention_factor"] = reader.positive("attention_factor", grown)


def _read_yarn(reader: Reader, rope: dict[str, Any]) -> None:
    """Add YaRN's other numbers to `rope`: attention_factor, which may follow from others, beta_fast, beta_slow, truncate."""
    for beta, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        rope[beta] = reader.positive(beta, default)
    if rope["rope_theta"] <= 1:
        raise IntegrityError(
            f"{reader.path}: rope_theta is {rope['rope_theta']:g}; expected more than 1 where rope_type is yarn.",
            code="E310",
        )
    rope["truncate"] = reader.flag("truncate", default=True)
    shares = [reader.positive(name, 0.0) if reader.raw.get(name) else 0.0 for name in ("mscale", "mscale_all_dim")]
    share, of_all = shares if all(shares) else (1.0, 0.0)
    growth = 0.1 * math.log(max(rope["factor"], 1.0))
    rope["attention_factor"] = reader.positive("attention_factor", (share * growth + 1) / (of_all * growth + 1))
