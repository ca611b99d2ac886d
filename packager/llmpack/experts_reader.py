"""Mixtures of experts in config.json -> those members of ModelConfig that say which layers have experts, and of what kind."""

from __future__ import annotations

from typing import Any

from llmpack.families import Experts
from llmpack.model_reader import Reader
from llmrun.artifact import IncompatibleError, IntegrityError

_MAX_EXPERTS = 1024  # of the operator: custom_ops/ort/stored_weights.h


def read_experts(reader: Reader, experts: Experts, num_hidden_layers: int) -> dict[str, Any]:
    """Return the members of ModelConfig.

    Raises:
        IntegrityError: a number is impossible.
        IncompatibleError: more experts than the operator takes.
    """
    number, size, per_token = experts.sizes
    key = next((key for key in experts.number if reader.raw.get(key) is not None), experts.number[0])
    num_experts = reader.size(key, number)
    num_shared = _number(reader, *experts.shared) if experts.shared is not None else 0
    if num_experts + num_shared > _MAX_EXPERTS:
        with_shared = f" and {experts.shared[0]} {num_shared}" if experts.shared is not None and num_shared else ""
        raise IncompatibleError(
            f"{reader.path}: {key} {num_experts}{with_shared}; llmpack packs up to {_MAX_EXPERTS} experts."
        )
    num_experts_per_tok = reader.size(experts.per_token, per_token)
    if num_experts_per_tok > num_experts:
        raise IntegrityError(
            f"{reader.path}: {experts.per_token} is {num_experts_per_tok}; expected at most {key}, {num_experts}.",
            code="E310",
        )
    kinds = _layer_types(reader, experts, num_hidden_layers)
    if kinds is not None and "sparse" not in kinds:
        return {}  # a dense model
    is_normed = experts.norm_topk_prob
    if experts.has_norm_topk_prob:
        is_normed = reader.flag("norm_topk_prob", default=is_normed)
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "moe_intermediate_size": reader.size(experts.size, size),
        "norm_topk_prob": is_normed,
        "mlp_layer_types": kinds,
        "num_shared_experts": num_shared or None,
        "routed_scaling_factor": reader.positive("routed_scaling_factor", 1.0) if experts.has_scaling_factor else 1.0,
    }


def _layer_types(reader: Reader, experts: Experts, num_hidden_layers: int) -> tuple[str, ...] | None:
    """Return mlp_layer_types of ModelConfig, from the keys that a family's configurations have for it; None: all are sparse."""
    layers = range(num_hidden_layers)
    if experts.dense_layers == "listed":
        step, dense = reader.size("decoder_sparse_step", 1), reader.raw.get("mlp_only_layers")
        dense = [] if dense is None else dense
        if not isinstance(dense, list) or any(type(i) is not int for i in dense):
            raise IntegrityError(
                f"{reader.path}: mlp_only_layers is {dense!r:.100}; expected a list of layers' numbers.", code="E310"
            )
        sparse = {i for i in layers if i not in dense and (i + 1) % step == 0}
    elif experts.dense_layers == "first":
        sparse = {*layers[_number(reader, "first_k_dense_replace", 1) :]}
    elif experts.dense_layers == "outside":
        first, step = _number(reader, "moe_layer_start_index", 1), reader.size("moe_layer_interval", 1)
        last = reader.raw.get("moe_layer_end_index")
        last = num_hidden_layers if last in (None, -1) else _number(reader, "moe_layer_end_index", -1)
        sparse = {i for i in layers if first <= i <= last and (i + 1) % step == 0}
    else:
        return None
    kinds = tuple("sparse" if i in sparse else "dense" for i in layers)
    return kinds if "dense" in kinds else None


def _number(reader: Reader, key: str, default: int) -> int:
    """Return an integer of at least 0."""
    number = reader.raw.get(key)
    number = default if number is None else number
    if type(number) is not int or number < 0:
        raise IntegrityError(f"{reader.path}: {key} is {number!r:.60}; expected an integer of at least 0.", code="E310")
    return number
