"""Every rank's graph is valid ONNX, holds only allowed operators, and its slices put together are the checkpoint."""

from collections import Counter
from itertools import product

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from llmpack.checkpoint import open_checkpoint
from llmpack.export import export
from llmpack.gpu_graph import gpu_graph
from llmpack.layout import untile_rows
from llmpack.pack import Options, pack
from llmpack.split import split
from llmpack.split_check import check_split
from llmpack.weights import Quantization, check_options, plan_rank, weight_rows
from llmrun.artifact import IntegrityError, KvCacheSpec, ModelConfig, UsageError, open_artifact
from models import TINY, make_checkpoint

ALLOWED = {
    "ai.llmpack": {
        "MatMulF32", "MatMulF16", "MatMulQ8", "MatMulQ6", "MatMulQ4", "EmbeddingQ8",
        "EmbeddingQ6", "RMSNorm", "AddRMSNorm", "SwiGLU", "QKNorm", "PagedAttention",
        "AllReduce", "AllGather", "AllReduceAddRMSNorm",
        *(
            f"MatMul{storage}{following}"
            for storage in ("F32", "F16", "Q8", "Q4")
            for following in (
                *("SwiGLU", "GeGLU", "AddRMSNorm", "AllReduceAddRMSNorm"),
                *("RMSNormAddRMSNorm", "AllReduceRMSNormAddRMSNorm"),
            )
        ),
    },
    "": {"Gather", "Cast", "Mul", "Add", "Cos", "Sin", "Concat", "Unsqueeze"},
}  # fmt: skip


def graphs_of(artifact):
    manifest = open_artifact(artifact).manifest
    return [artifact / entry.graphs["cpu"] for entry in manifest.ranks]


@pytest.fixture(scope="module")
def biased_checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("bias") / "m", attention_bias=True, mlp_bias=True)


@pytest.mark.parametrize(("shards", "quant"), list(product([1, 2, 4, 8], ["f32", "f16", "q8", "q4"])))
def test_every_graph_passes_checker_and_shape_inference(packed, tiny_checkpoint, shards, quant):
    for rank, path in enumerate(graphs_of(packed(tiny_checkpoint, shards, quant))):
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        for node in model.graph.node:
            assert node.op_type in ALLOWED[node.domain], node.name
            assert node.name.startswith(("/model/", "/lm_head")), node.name
        assert not {value.name for value in model.graph.input} & {tensor.name for tensor in model.graph.initializer}
        typed = {value.name for value in [*model.graph.value_info, *model.graph.output]}
        assert not [name for node in model.graph.node for name in node.output if name not in typed]
        assert {p.key: p.value for p in model.metadata_props} == {"rank": str(rank), "shards": str(shards)}


def test_names_are_those_of_the_modules(packed, tiny_checkpoint):
    model = onnx.load(graphs_of(packed(tiny_checkpoint, 2, "q4"))[0], load_external_data=False)
    names = {node.name for node in model.graph.node}
    assert {
        "/model/layers.0/self_attn/qkv_proj",
        "/model/layers.1/mlp/down_proj",
        "/lm_head/all_gather",
    } <= names


def test_biases_are_added_once(packed, biased_checkpoint):
    model = onnx.load(graphs_of(packed(biased_checkpoint, 2, "f32"))[1], load_external_data=False)
    order = [node.name for node in model.graph.node if "layers.0/self_attn/o_proj" in node.name]
    assert order == [f"/model/layers.0/self_attn/o_proj{s}" for s in ("", "/all_reduce", "/bias")]


def test_collectives_appear_only_between_ranks(packed, tiny_checkpoint):
    one = onnx.load(graphs_of(packed(tiny_checkpoint, 1, "f32"))[0], load_external_data=False)
    two = onnx.load(graphs_of(packed(tiny_checkpoint, 2, "f32"))[0], load_external_data=False)
    count = lambda model, op: sum(node.op_type == op for node in model.graph.node)  # noqa: E731
    reductions = lambda model: sum("AllReduce" in node.op_type for node in model.graph.node)  # noqa: E731
    assert (reductions(one), count(one, "AllGather")) == (0, 0)
    assert (reductions(two), count(two, "AllGather")) == (2 * TINY["num_hidden_layers"], 1)


def count_operators(artifact):
    model = onnx.load(graphs_of(artifact)[0], load_external_data=False)
    made = {name for node in model.graph.node for name in node.output}
    assert {value.name for value in model.graph.value_info} == made - {"logits"}
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    ("intermediate_size", "is_gated"), [(512, True), (1000, False)], ids=["tiles", "no_whole_tiles"]
)
def test_operators_are_joined_where_they_can_be(packed, tmp_path, shards, intermediate_size, is_gated):
    checkpoint = make_checkpoint(tmp_path / "m", intermediate_size=intermediate_size)
    layers = TINY["num_hidden_layers"]
    counts = count_operators(packed(checkpoint, shards, "f16"))
    assert (counts["MatMulF16SwiGLU"], counts["SwiGLU"]) == ((layers, 0) if is_gated else (0, layers))
    assert (counts["MatMulF16AllReduceAddRMSNorm"], counts["MatMulF16AddRMSNorm"]) == (
        (0, 2 * layers) if shards == 1 else (2 * layers, 0)
    )
    assert not {"AllReduceAddRMSNorm", "AddRMSNorm", "AllReduce"} & counts.keys()
    assert counts["MatMulF16"] == (1 if is_gated else 2) * layers + 1  # qkv_proj, gate and up, and the head


def test_operators_with_a_bias_between_them_stay_apart(packed, biased_checkpoint):
    layers = TINY["num_hidden_layers"]
    counts = count_operators(packed(biased_checkpoint, 2, "f32"))
    assert [counts[op] for op in ("SwiGLU", "AllReduce", "AddRMSNorm")] == [layers, 2 * layers, 2 * layers]


@pytest.mark.parametrize("rank", [0, 1])  # the last one's share of the vocabulary is filled up
def test_values_have_the_widths_of_one_rank(packed, biased_checkpoint, rank):
    model = onnx.load(graphs_of(packed(biased_checkpoint, 2, "q4"))[rank], load_external_data=False)
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]
    }
    found = {node.name: shapes[node.output[0]] for node in model.graph.node}
    hidden, layer = TINY["hidden_size"], "/model/layers.0"
    heads, kv_heads = TINY["num_attention_heads"] // 2, TINY["num_key_value_heads"] // 2
    expected = {
        "/model/embed_tokens": ["T", hidden],
        "/model/rotary_emb/positions": ["T"],
        "/model/rotary_emb/column": ["T", 1],
        "/model/rotary_emb/angles": ["T", 16],
        "/model/rotary_emb/cos_sin": ["T", 32],
        f"{layer}/self_attn/qkv_proj/bias": ["T", (heads + 2 * kv_heads) * 32],
        f"{layer}/self_attn/attention": ["T", heads * 32],
        f"{layer}/self_attn/o_proj/all_reduce": ["T", hidden],
        f"{layer}/mlp/gate_up_proj": ["T", TINY["intermediate_size"]],
        f"{layer}/mlp/act_fn": ["T", TINY["intermediate_size"] // 2],
        "/model/logit_rows": ["R", hidden],
        "/lm_head": ["R", -(-TINY["vocab_size"] // 2)],
        "/lm_head/all_gather": ["R", TINY["vocab_size"]],
    }
    assert {name: found[name] for name in expected} == expected
    assert shapes["key_cache.0"][1] == shapes["value_cache.0"][1] == kv_heads


def load_weights(graph_path):
    """Read initializers through onnx, not through our own plan."""
    model = onnx.load(graph_path)
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quant", ["f32", "f16"])
def test_unquantized_shards_put_together_equal_the_checkpoint(
    packed, tiny_checkpoint, biased_checkpoint, shards, bias, quant
):
    checkpoint = biased_checkpoint if bias else tiny_checkpoint
    source = load_file(checkpoint / "model.safetensors")
    if quant == "f16":
        source = {name: value if value.ndim == 1 else value.astype(np.float16) for name, value in source.items()}
    ranks = [load_weights(path) for path in graphs_of(packed(checkpoint, shards, quant))]
    heads, kv, dim = TINY["num_attention_heads"] // shards, TINY["num_key_value_heads"], 32
    kv_rows = max(1, kv // shards) * dim
    copies = max(1, shards // kv)
    for i in range(TINY["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        qkv = [untile_rows(r[f"{layer}.self_attn.qkv_proj.weight"], heads * dim + 2 * kv_rows) for r in ranks]
        whole = {
            "self_attn.q_proj.weight": np.concatenate([m[: heads * dim] for m in qkv]),
            "self_attn.k_proj.weight": np.concatenate([m[heads * dim : heads * dim + kv_rows] for m in qkv[::copies]]),
            "self_attn.v_proj.weight": np.concatenate([m[heads * dim + kv_rows :] for m in qkv[::copies]]),
        }
        share = TINY["intermediate_size"] // shards
        gate_up = [untile_rows(r[f"{layer}.mlp.gate_up_proj.weight"], 2 * share) for r in ranks]
        whole["mlp.gate_proj.weight"] = np.concatenate([m[:share] for m in gate_up])
        whole["mlp.up_proj.weight"] = np.concatenate([m[share:] for m in gate_up])
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            parts = [untile_rows(r[f"{layer}.{name}.weight"], TINY["hidden_size"]) for r in ranks]
            whole[f"{name}.weight"] = np.concatenate(parts, axis=1)
        if bias:
            biases = [r[f"{layer}.self_attn.qkv_proj.bias"] for r in ranks]
            whole["self_attn.q_proj.bias"] = np.concatenate([b[: heads * dim] for b in biases])
            whole["self_attn.v_proj.bias"] = np.concatenate([b[heads * dim + kv_rows :] for b in biases[::copies]])
            whole["mlp.down_proj.bias"] = ranks[-1][f"{layer}.mlp.down_proj.bias"]
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            whole[name] = ranks[-1][f"{layer}.{name}"]
        for name, value in whole.items():
            assert np.array_equal(value, source[f"{layer}.{name}"]), name
    per_rank = -(-TINY["vocab_size"] // shards)
    head = np.concatenate([untile_rows(r["lm_head.weight"], per_rank) for r in ranks])
    assert np.array_equal(head[: TINY["vocab_size"]], source["lm_head.weight"])
    assert not head[TINY["vocab_size"] :].any()
    assert all(np.array_equal(r["model.embed_tokens.weight"], source["model.embed_tokens.weight"]) for r in ranks)


def config_of(**changes):
    numbers = {**TINY, "head_dim": 32, **changes}
    return ModelConfig(
        architecture="LlamaForCausalLM", attention_bias=False, mlp_bias=False, rope={}, dtype="float32", **numbers
    )


@pytest.mark.parametrize(
    ("changes", "group_size", "shards", "advice"),
    [
        ({}, 32, 3, "--shards 1 or 2 or 4 or 8 works"),
        ({"intermediate_size": 320}, 64, 2, "--group-size 32 works"),
        ({"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 192}, 32, 4, "--shards 1 or 2 works"),
        (
            {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 576},
            64,
            2,
            "--shards 1 or 3 or 9 works",
        ),
        ({"hidden_size": 80, "head_dim": 10}, 32, 1, "--quant f16 or f32"),
        # Shares of whole groups, but not of whole heads; of whole heads, but not of whole groups.
        ({"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 64}, 32, 4, "--shards 1 or 2 works"),
        ({"head_dim": 40}, 32, 8, "--shards 1 or 2 works"),
    ],
)
def test_a_split_that_does_not_divide_names_what_would(changes, group_size, shards, advice):
    with pytest.raises(UsageError, match=advice):
        check_split(config_of(**changes), Quantization("q4", group_size), shards)


@pytest.mark.parametrize("scheme", ["f32", "f16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"intermediate_size": 514},
        {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 1024},
        {"num_attention_heads": 16, "num_key_value_heads": 6, "intermediate_size": 1024},
    ],
    ids=["mlp", "heads", "kv_heads"],
)
def test_a_share_that_is_no_whole_number_is_refused_without_groups_too(changes, scheme):
    with pytest.raises(UsageError, match=r"--shards 4 with group_size none does not divide .* --shards 1 or 2 works"):
        check_split(config_of(**changes), Quantization(scheme, 64), 4)


def test_experts_whose_rows_fill_no_whole_tiles_are_refused_without_groups_too():
    """Tiles of one expert must not hold the rows of the next: down_proj has as many as hidden_size."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    check_split(config_of(hidden_size=264), Quantization("f16", 64), 1)
    check_split(config_of(hidden_size=272, **experts), Quantization("f16", 64), 1)
    with pytest.raises(UsageError, match=r"264 \(hidden\).* It cannot be packed"):
        check_split(config_of(hidden_size=264, **experts), Quantization("f16", 64), 1)


def test_the_size_of_dense_mlps_counts_only_where_a_layer_has_one():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "intermediate_size": 514}
    check_split(config_of(**experts), Quantization("q4", 64), 4)
    with pytest.raises(UsageError, match=r"128\.5 \(down_proj\)"):
        check_split(config_of(**experts, mlp_layer_types=("dense", "sparse")), Quantization("q4", 64), 4)


def test_shards_are_advised_that_fit_with_any_group_size_chosen_by_default():
    config = config_of(intermediate_size=448)
    for is_default, advice in ((True, "shards 1 or 2 works"), (False, "shards 1 works")):
        with pytest.raises(UsageError, match=advice):
            check_split(config, Quantization("q4", 64), 4, is_default=is_default)


def test_every_source_is_used_once_by_every_plan(tiny_checkpoint):
    with open_checkpoint(tiny_checkpoint) as checkpoint:
        used = [source for row in weight_rows(checkpoint.config) for source in row.sources]
        assert sorted(used) == sorted(checkpoint.tensors)
        for weight in plan_rank(checkpoint.config, Quantization("q4", 32), 8, 7):
            assert all(item.offset % 64 == 0 for item in weight.initializers)


def test_missing_and_unknown_tensors_are_both_listed(tmp_path, tiny_checkpoint):
    from safetensors.numpy import save_file

    from llmpack.pack import Options, pack

    tensors = load_file(tiny_checkpoint / "model.safetensors")
    tensors["model.layers.0.self_attn.q_norm.weight"] = tensors.pop("model.norm.weight")
    (tmp_path / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"missing: model\.norm\.weight; .*q_norm"):
        pack(tmp_path, None, Options())


# The newest version of each that the last onnxruntime for ROCm has (1.22.2), and CUDA's of 1.22: one beyond stays on the CPU.
ON_GPUS = {"Cast": 19, "Unsqueeze": 13, "Gather": 13, "Concat": 13, "Mul": 14, "Add": 14, "Cos": 7, "Sin": 7}


@pytest.mark.parametrize("shards", [1, 2])
def test_every_gpu_provider_has_the_standard_operators_of_a_gpu_graph(biased_checkpoint, shards):
    with open_checkpoint(biased_checkpoint) as checkpoint:
        config = checkpoint.config
    logical = export(config, "float16", 16)
    plan = plan_rank(config, Quantization("q8", 32), shards, 0)
    kv_cache = KvCacheSpec(
        "float16", 16, config.num_hidden_layers, config.num_key_value_heads // shards, config.head_dim
    )
    model = gpu_graph(split(logical, config, plan, 0, shards, "weights.bin"), kv_cache)
    (opset,) = (entry.version for entry in model.opset_import if not entry.domain)
    used = {
        node.op_type: onnx.defs.get_schema(node.op_type, opset).since_version
        for node in model.graph.node
        if not node.domain
    }
    assert used.items() <= ON_GPUS.items()
    assert {"Cast", "Unsqueeze", "Add"} <= used.keys()


def test_a_tied_embedding_is_written_and_declared_once(tmp_path, capfd):
    folder, steps = make_checkpoint(tmp_path / "m", tie_word_embeddings=True), []
    capfd.readouterr()
    pack(folder, tmp_path / "a", Options(), lambda *step: steps.append(step))
    assert capfd.readouterr() == ("", "")  # graphsurgeon warns of two values with one name, between the lines of --json
    done, total = next((done, total) for step, done, total in reversed(steps) if step == "weights")
    assert done == total
    graph = onnx.load(tmp_path / "a/rank-0/cpu.onnx", load_external_data=False).graph
    names = [tensor.name for tensor in graph.initializer]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
@pytest.mark.parametrize("scheme", ["f32", "f16", "q8", "q4"])
def test_all_that_the_options_promise_is_taken(scheme, group_size):
    assert check_options(scheme, group_size, 64) == Quantization(scheme, group_size or 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("q4", None, 0), "--shards 0: expected 1 to 64"),
        (("q4", None, 65), "--shards 65: expected 1 to 64"),
        (("q4", 0, 1), "--group-size 0: choose one of 32, 64, 128"),
        (("q4", 16, 1), "--group-size 16: choose one of 32, 64, 128"),
        (("q6", None, 1), "--quant q6: unknown; choose one of f32, f16, q8, q4"),
    ],
)
def test_options_beyond_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        check_options(*options)
