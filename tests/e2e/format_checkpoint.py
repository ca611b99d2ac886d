"""What a second reader found in every rank, as the checkpoint has it; knows artifacts/FORMAT.md and no module of ours."""

from __future__ import annotations

from typing import Any

import numpy as np

from e2e.format_reader import Array, Rank


def _in_own_order(rows: Array, dim: int, rotary_dim: int, *, are_neighbours: bool) -> Array:
    """Return q or k with the features of each head in the order of the checkpoint (4.2)."""
    half, rest = rotary_dim // 2, (dim - rotary_dim) // 2
    heads = rows.reshape(-1, dim, rows.shape[1])
    first, second = np.split(heads, 2, 1)
    pairs = np.stack([first[:, :half], second[:, :half]], 2 if are_neighbours else 1).reshape(
        -1, rotary_dim, heads.shape[2]
    )
    own = [pairs, first[:, half:], second[:, half:]]
    assert first[:, half:].shape[1] == rest
    return np.concatenate(own, 1).reshape(rows.shape)


def stitch(ranks: list[Rank], manifest: dict[str, Any]) -> dict[str, Array]:
    """Return the whole model's matrices and norms, under the checkpoint's names (4.2, 4.5, 4.6)."""
    config, cache, size = manifest["model"], manifest["kv_cache"], len(ranks)
    num_kv_heads, held, dim = config["num_key_value_heads"], cache["num_kv_heads_per_rank"], config["head_dim"]
    query_rows, kv_rows = config["num_attention_heads"] // size * dim, held * dim

    def of_all(name: str) -> list[Array]:
        return [rank.matrices[name] for rank in ranks]

    order = dim, config["rope"].get("rotary_dim", dim)
    are_neighbours = config["architecture"].startswith(("Glm4ForCausalLM", "Ernie4_5"))
    model: dict[str, Array] = {}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        fused = [np.split(m, [query_rows, query_rows + kv_rows]) for m in of_all(f"{prefix}self_attn.qkv_proj.weight")]
        model[f"{prefix}self_attn.q_proj.weight"] = np.concatenate([q for q, _, _ in fused])
        for part, name in enumerate(("k_proj", "v_proj"), 1):
            heads: dict[int, Array] = {}
            for rank, matrices in enumerate(fused):
                first = rank * held if num_kv_heads >= size else rank * num_kv_heads // size
                for i, head in enumerate(np.split(matrices[part], held)):
                    assert np.array_equal(heads.setdefault(first + i, head), head)
            model[f"{prefix}self_attn.{name}.weight"] = np.concatenate([heads[i] for i in range(num_kv_heads)])
        for name in ("q_proj", "k_proj"):
            whole = f"{prefix}self_attn.{name}.weight"
            model[whole] = _in_own_order(model[whole], *order, are_neighbours=are_neighbours)
        model[f"{prefix}self_attn.o_proj.weight"] = np.concatenate(of_all(f"{prefix}self_attn.o_proj.weight"), 1)
        is_sparse = (
            config["num_experts"] and "dense" not in (config["mlp_layer_types"] or ["sparse"] * (layer + 1))[layer]
        )
        if is_sparse:
            model[f"{prefix}mlp.gate.weight"] = ranks[0].matrices[f"{prefix}mlp.gate.weight"]
            number = config["num_experts"] + (config["num_shared_experts"] or 0)
            gate_up, down = (
                [np.split(m, number) for m in of_all(f"{prefix}mlp.experts.{name}.weight")]
                for name in ("gate_up_proj", "down_proj")
            )
            mlps = {f"mlp.experts.{i}": ([m[i] for m in gate_up], [m[i] for m in down]) for i in range(number)}
        else:
            mlps = {"mlp": (of_all(f"{prefix}mlp.gate_up_proj.weight"), of_all(f"{prefix}mlp.down_proj.weight"))}
        for mlp, (gate_up, down) in mlps.items():
            halves = [np.split(m, 2) for m in gate_up]
            model[f"{prefix}{mlp}.gate_proj.weight"] = np.concatenate([gate for gate, _ in halves])
            model[f"{prefix}{mlp}.up_proj.weight"] = np.concatenate([up for _, up in halves])
            model[f"{prefix}{mlp}.down_proj.weight"] = np.concatenate(down, 1)
    for name, tensor in ranks[0].tensors.items():
        if name.endswith(("norm.weight", "e_score_correction_bias")):
            assert all(np.array_equal(rank.tensors[name], tensor) for rank in ranks)
            model[name] = tensor
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            model[name] = _in_own_order(tensor[:, None], *order, are_neighbours=are_neighbours)[:, 0]
    if config["architecture"] == "Phi3ForCausalLM":
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            for whole, parts in (
                ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
            ):
                own = [model.pop(f"{prefix}{part}.weight") for part in parts]
                model[f"{prefix}{whole}.weight"] = np.concatenate(own)
    if config["architecture"] == "GraniteMoeHybridForCausalLM":
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            own = [model.pop(f"{prefix}mlp.{part}_proj.weight") for part in ("gate", "up", "down")]
            model[f"{prefix}shared_mlp.input_linear.weight"] = np.concatenate(own[:2])
            model[f"{prefix}shared_mlp.output_linear.weight"] = own[2]
    model = _named_as_published(model, config)
    embedding = "model.embed_tokens.weight"
    model[embedding] = ranks[0].matrices.get(embedding, ranks[0].tensors[embedding])
    (last,) = {[n for n in rank.nodes if n.op_type.startswith("MatMul")][-1].input[1] for rank in ranks}
    head = np.concatenate(of_all(last))
    assert not head[config["vocab_size"] :].any()
    model["lm_head.weight"] = head[: config["vocab_size"]]
    return model


def _named_as_published(model: dict[str, Array], config: dict[str, Any]) -> dict[str, Array]:
    """Return the same with routers, experts and norms as in Mixtral's, Granite's, gpt-oss's, GLM's and ERNIE's checkpoints."""
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        if config["architecture"] == "Glm4ForCausalLM":
            names = ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
            own = [model.pop(f"{prefix}{name}.weight") for name in names]
            names = ("post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
            model |= {f"{prefix}{name}.weight": norm for name, norm in zip(names, own, strict=True)}
            gate_up = [model.pop(f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up")]
            model[f"{prefix}mlp.gate_up_proj.weight"] = np.concatenate(gate_up)
        numbers = range(config["num_experts"] or 0, (config["num_experts"] or 0) + (config["num_shared_experts"] or 0))
        for part, axis in (("gate", 0), ("up", 0), ("down", 1)):
            own = [model.pop(f"{prefix}mlp.experts.{i}.{part}_proj.weight", None) for i in numbers]
            if matrices := [matrix for matrix in own if matrix is not None]:
                model[f"{prefix}mlp.shared_experts.{part}_proj.weight"] = np.concatenate(matrices, axis)
        correction = model.pop(f"{prefix}mlp.gate.e_score_correction_bias", None)
        if correction is not None and config["architecture"] == "Ernie4_5_MoeForCausalLM":
            model[f"{prefix}mlp.moe_statics.e_score_correction_bias"] = correction[None]
        elif correction is not None:
            model[f"{prefix}mlp.gate.e_score_correction_bias"] = correction
    if config["architecture"] == "MixtralForCausalLM":
        names = {"mlp.": "block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        return {_replaced(name, names): matrix for name, matrix in model.items()}
    if config["architecture"] == "GraniteMoeForCausalLM":
        for layer in range(config["num_hidden_layers"]):
            prefix, numbers = f"model.layers.{layer}.", range(config["num_experts"])
            own = {
                p: [model.pop(f"{prefix}mlp.experts.{i}.{p}_proj.weight") for i in numbers]
                for p in ("gate", "up", "down")
            }
            pairs = zip(own["gate"], own["up"], strict=True)
            model[f"{prefix}block_sparse_moe.input_linear.weight"] = np.stack([np.concatenate(pair) for pair in pairs])
            model[f"{prefix}block_sparse_moe.output_linear.weight"] = np.stack(own["down"])
            model[f"{prefix}block_sparse_moe.router.layer.weight"] = model.pop(f"{prefix}mlp.gate.weight")
    if config["architecture"] == "GptOssForCausalLM":
        for layer in range(config["num_hidden_layers"]):
            prefix, numbers = f"model.layers.{layer}.mlp.", range(config["num_experts"])
            own = {
                p: np.stack([model.pop(f"{prefix}experts.{i}.{p}_proj.weight") for i in numbers])
                for p in ("gate", "up", "down")
            }
            turns = np.stack([own["gate"], own["up"]], 2).reshape(len(numbers), -1, config["hidden_size"])
            model[f"{prefix}experts.gate_up_proj"] = turns.transpose(0, 2, 1)
            model[f"{prefix}experts.down_proj"] = own["down"].transpose(0, 2, 1)
            model[f"{prefix}router.weight"] = model.pop(f"{prefix}gate.weight")
    return model


def _replaced(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name
