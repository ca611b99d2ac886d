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
    if num_experts > _MAX_EXPERTS:
        raise IncompatibleError(f"{reader.path}: {key} {num_experts}; llmpack packs up to {_MAX_EXPERTS} experts.")
    num_experts_per_tok = reader.size("num_experts_per_tok", per_token)
    if num_experts_per_tok > num_experts:
        raise IntegrityError(
            f"{reader.path}: num_experts_per_tok is {num_experts_per_tok}; expected at most {key}, {num_experts}.",
            code="E310",
        )
    kinds = _layer_types(reader, num_hidden_layers) if experts.has_dense_layers else None
    if kinds is not None and "sparse" not in kinds:
        return {}  # a dense model
    is_normed = experts.norm_topk_prob
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "moe_intermediate_size": reader.size(experts.size, size),
        "norm_topk_prob": reader.flag("norm_topk_prob") if is_normed is None else is_normed,
        "mlp_layer_types": kinds,
    }


def _layer_types(reader: Reader, num_hidden_layers: int) -> tuple[str, ...] | None:
    """Return mlp_layer_types of ModelConfig, from the keys that Qwen's configurations have for it; None: all are sparse."""
    step = reader.size("decoder_sparse_step", 1)
    dense = reader.raw.get("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or any(type(i) is not int for i in dense):
        raise IntegrityError(
            f"{reader.path}: mlp_only_layers is {dense!r:.100}; expected a list of layers' numbers.", code="E310"
        )
    kinds = tuple("dense" if i in dense or (i + 1) % step else "sparse" for i in range(num_hidden_layers))
    return kinds if "dense" in kinds else None
