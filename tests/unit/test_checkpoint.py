"""Reading checkpoints: every dtype and layout of files, and damage that names the tensor."""

import errno
import json
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import llmpack.checkpoint
from llmpack.checkpoint import open_checkpoint
from llmpack.pack import Options, pack
from llmrun.artifact import IncompatibleError, IntegrityError, LlmpackError, UsageError, open_artifact
from models import DEMO, make_checkpoint

NO_TOKENIZER = "no tokenizer: llmrun takes token ids only"


@pytest.fixture
def model_dir(tmp_path, tiny_checkpoint):
    for path in tiny_checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_blocks_equal_the_tensors_bit_for_bit(tmp_path, dtype):
    folder = make_checkpoint(tmp_path / "m", dtype=dtype)
    with open_checkpoint(folder) as checkpoint, safe_open(folder / "model.safetensors", "pt") as truth:
        for name in ("model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
            whole = truth.get_tensor(name).to(torch.float32).numpy()
            block = checkpoint.read(name, slice(3, 40), slice(8, 72))
            assert np.array_equal(block.astype(np.float32), whole[3:40, 8:72])
        norm = checkpoint.read("model.norm.weight", slice(0, 256), slice(0, 1))
        assert np.array_equal(norm[:, 0].astype(np.float32), truth.get_tensor("model.norm.weight").float().numpy())


def test_many_files_with_an_index_give_the_same_artifact_weights(tmp_path, tiny_checkpoint):
    from transformers import LlamaForCausalLM

    many = tmp_path / "many"
    LlamaForCausalLM.from_pretrained(tiny_checkpoint).save_pretrained(many, max_shard_size="1MB")
    assert len(list(many.glob("*.safetensors"))) > 2
    pack(tiny_checkpoint, tmp_path / "a", Options(shards=2))
    pack(many, tmp_path / "b", Options(shards=2))
    for rank in (0, 1):
        name = f"rank-{rank}/weights.bin"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("shards", ["stale", "gone"])
def test_model_safetensors_wins_over_an_index_as_in_transformers(tmp_path, tiny_checkpoint, shards):
    """What saving a model in one file leaves in a folder where it was in many."""
    from transformers import LlamaForCausalLM

    folder = tmp_path / "m"
    LlamaForCausalLM.from_pretrained(make_checkpoint(tmp_path / "old", seed=1)).save_pretrained(
        folder, max_shard_size="1MB"
    )
    (folder / "model.safetensors").write_bytes((tiny_checkpoint / "model.safetensors").read_bytes())
    for path in folder.glob("model-*.safetensors") if shards == "gone" else ():
        path.unlink()
    with open_checkpoint(folder) as checkpoint:
        ours = checkpoint.read("lm_head.weight", slice(0, 259), slice(0, 256))
        sources = [entry.path for entry in checkpoint.hash_sources([])]
    assert np.array_equal(ours, LlamaForCausalLM.from_pretrained(folder).lm_head.weight.detach().numpy())
    assert sources == ["config.json", "model.safetensors"]
    assert pack(folder, None, Options())["notes"] == [
        "model.safetensors.index.json is ignored, as by transformers: model.safetensors is there",
        NO_TOKENIZER,
    ]


def test_an_index_that_is_used_is_a_source(tmp_path, tiny_checkpoint):
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path / "m", max_shard_size="1MB")
    with open_checkpoint(tmp_path / "m") as checkpoint:
        sources = {entry.path for entry in checkpoint.hash_sources([])}
    assert sources == {path.name for path in (tmp_path / "m").iterdir()} - {"generation_config.json"}
    assert pack(tmp_path / "m", None, Options())["notes"] == [NO_TOKENIZER]


def test_truncated_file_names_the_first_tensor_it_does_not_hold(model_dir):
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4096])
    data = path.read_bytes()
    header_bytes = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    ends = {name: 8 + header_bytes + entry["data_offsets"][1] for name, entry in header.items()}
    first = min((name for name in ends if ends[name] > len(data)), key=ends.__getitem__)
    with pytest.raises(IntegrityError, match=first.replace(".", r"\.")):
        open_checkpoint(model_dir)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100])
def test_stumps_are_refused(model_dir, size):
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        open_checkpoint(model_dir)


def test_a_chat_template_in_its_folder_is_a_file_of_the_checkpoint(model_dir):
    (model_dir / "additional_chat_templates").mkdir()
    name = "additional_chat_templates/tool_use.jinja"
    (model_dir / name).write_text("{{ tools }}")
    with open_checkpoint(model_dir) as checkpoint:
        checkpoint.check_unchanged([name])
        assert name in [entry.path for entry in checkpoint.hash_sources([name])]
        (model_dir / name).write_text("{{ tools }} ")
        with pytest.raises(IntegrityError, match=rf"{name}: changed while"):
            checkpoint.check_unchanged([name])


def test_file_shortened_while_packing_names_the_tensor(model_dir):
    with open_checkpoint(model_dir) as checkpoint:
        name = max(checkpoint.tensors, key=lambda n: checkpoint.tensors[n].offset)
        with open(model_dir / "model.safetensors", "r+b") as file:
            file.truncate(checkpoint.tensors[name].offset)
        with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
            checkpoint.read(name, slice(0, 1), slice(0, 1))
        with pytest.raises(IntegrityError, match="changed while"):
            checkpoint.check_unchanged([])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("quant", ["f32", "q4"])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_written(model_dir, tmp_path_factory, value, quant):
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, model_dir / "model.safetensors")
    out = tmp_path_factory.mktemp("out") / "a"
    with pytest.raises(IntegrityError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN or infinity"):
        pack(model_dir, out, Options(scheme=quant))
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["layers.0.mlp.up_proj", "embed_tokens"])
def test_a_weight_beyond_float16_is_named(model_dir, tmp_path_factory, name):
    tensors = load_file(model_dir / "model.safetensors")
    tensors[f"model.{name}.weight"][0, 0] = 1e6
    save_file(tensors, model_dir / "model.safetensors")
    with pytest.raises(IncompatibleError, match=rf"{name}.*float16.*--quant f32"):
        pack(model_dir, tmp_path_factory.mktemp("out") / "a", Options(scheme="f16"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_of_two_types_in_one_projection_are_packed_as_their_values(model_dir, tmp_path_factory, dtype):
    tensors, packed = load_file(model_dir / "model.safetensors"), []
    name = "model.layers.0.self_attn.k_proj.weight"
    rounded = tensors[name].to(dtype)
    for stored in (rounded, rounded.float()):
        save_file({**tensors, name: stored}, model_dir / "model.safetensors")
        packed.append(tmp_path_factory.mktemp("out") / "a")
        pack(model_dir, packed[-1], Options())
    mixed, plain = ((artifact / "rank-0/weights.bin").read_bytes() for artifact in packed)
    assert mixed == plain


def test_wrong_shape_is_named(model_dir):
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:100].clone()
    save_file(tensors, model_dir / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"model\.norm\.weight: shape \[100\].*\[256\]"):
        pack(model_dir, None, Options())


def test_integer_weights_are_refused(model_dir):
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, model_dir / "model.safetensors")
    with pytest.raises(
        IncompatibleError, match=r"model\.norm\.weight has dtype I32.*take the one that it was made from"
    ):
        open_checkpoint(model_dir)


def test_a_folder_that_may_not_be_listed_is_named(model_dir, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("llmpack.checkpoint.os.listdir", refuse)
    with pytest.raises(UsageError, match=f"{model_dir}: cannot be read: Permission denied"):
        open_checkpoint(model_dir)


def test_pickles_are_refused(model_dir):
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    with pytest.raises(UsageError, match="pickled"):
        open_checkpoint(model_dir)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("manifest.json", "an artifact already, which `llmrun` runs"),
        ("model-Q4_0.gguf", r"weights for llama.cpp \(.gguf\)"),
    ],
)
def test_a_directory_of_another_program_is_recognised(name, words, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(UsageError, match=f"{words}.*; expected a Hugging Face model directory"):
        open_checkpoint(tmp_path)


def test_git_lfs_pointer_is_explained(model_dir):
    (model_dir / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(IntegrityError, match="git lfs pull"):
        open_checkpoint(model_dir)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("put", "kind", "words"),
    [
        (lambda path: path.mkdir(), UsageError, "not a regular file"),
        (os.mkfifo, UsageError, "not a regular file"),  # opening one would wait for a writer
        (lambda path: path.symlink_to("../blobs/gone"), IntegrityError, "a link to a file that is missing"),
        (lambda path: path.symlink_to(path.name), UsageError, "symbolic links"),
    ],
    ids=["folder", "fifo", "link-to-nothing", "link-to-itself"],
)
def test_something_else_in_the_place_of_a_file(model_dir, name, put, kind, words):
    (model_dir / name).unlink()
    put(model_dir / name)
    with pytest.raises(kind, match=rf"{name}: .*{words}"):
        open_checkpoint(model_dir)


def test_relative_links_are_followed_as_a_download_cache_has_them(tmp_path, tiny_checkpoint):
    snapshot, blobs = tmp_path / "hub/snapshots/abc", tmp_path / "hub/blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for number, path in enumerate(sorted(tiny_checkpoint.iterdir())):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "model").symlink_to("hub/snapshots/abc")
    pack(tiny_checkpoint, tmp_path / "a", Options())
    pack(tmp_path / "model", tmp_path / "b", Options())
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()


def test_a_disk_that_cannot_read_names_the_tensor(model_dir, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with open_checkpoint(model_dir) as checkpoint:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(IntegrityError, match=r"lm_head\.weight: cannot be read: Input/output error"):
            checkpoint.read("lm_head.weight", slice(0, 1), slice(0, 1))


def test_reads_that_the_system_cuts_short_are_continued(model_dir, monkeypatch):
    whole = load_file(model_dir / "model.safetensors")["lm_head.weight"].float().numpy()
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: preadv(file, [views[0][:1000]], at))
    with open_checkpoint(model_dir) as checkpoint:
        assert np.array_equal(checkpoint.read("lm_head.weight", slice(3, 40), slice(0, 256)), whole[3:40])


def test_another_programs_copy_beside_model_safetensors_is_left_alone(model_dir):
    (model_dir / "consolidated.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes())
    with open_checkpoint(model_dir) as checkpoint:
        assert {tensor.file for tensor in checkpoint.tensors.values()} == {"model.safetensors"}


@pytest.mark.timeout(20)
def test_more_layers_than_tensors_are_refused_before_a_table_of_them_is_made(model_dir):
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2_000_000_000}))
    with pytest.raises(IntegrityError, match="num_hidden_layers 2000000000, but the files hold only 21 tensors"):
        pack(model_dir, None, Options())


def test_index_that_names_a_missing_file(model_dir):
    (model_dir / "model.safetensors").unlink()
    for name in ("gone.safetensors", "x" * 300, "a\0b", None):
        (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(IntegrityError, match=f"{name}: named by"):
            open_checkpoint(model_dir)


@pytest.mark.parametrize("weight_map", [{}, ["a"], None])
def test_index_that_names_no_file(model_dir, weight_map):
    (model_dir / "model.safetensors").unlink()
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(IntegrityError, match="no weight_map"):
        open_checkpoint(model_dir)


def test_a_tensor_in_two_files_is_refused(model_dir):
    (model_dir / "model.safetensors").rename(model_dir / "a.safetensors")
    save_file({"lm_head.weight": torch.zeros(2, 2)}, model_dir / "b.safetensors")
    with pytest.raises(IntegrityError, match=r"lm_head.weight occurs in a.safetensors and in b.safetensors"):
        open_checkpoint(model_dir)


def test_what_is_no_model_directory_says_how_to_get_one(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "weightless").mkdir()
    shutil.copy(DEMO / "config.json", tmp_path / "weightless")
    for name in ("meta-llama/Llama-2-7b-hf", "empty", "file", "weightless"):
        with pytest.raises(UsageError, match="as `hf download NAME --local-dir DIR` leaves it"):
            open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd"])
def test_index_cannot_leave_the_directory(model_dir, name):
    (model_dir / "model.safetensors").unlink()
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(LlmpackError, match="named by"):
        open_checkpoint(model_dir)


@pytest.mark.parametrize("keep", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_tied_pair_may_be_stored_under_either_name(tmp_path, keep):
    folder = make_checkpoint(tmp_path / "m", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    weight = next(tensors.pop(n) for n in ("model.embed_tokens.weight", "lm_head.weight") if n in tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if keep in (name, "both"):
            tensors[name] = weight.clone()
    save_file(tensors, folder / "model.safetensors")
    pack(folder, tmp_path / "a", Options(scheme="f32"))
    reference = make_checkpoint(tmp_path / "r", tie_word_embeddings=True)
    pack(reference, tmp_path / "b", Options(scheme="f32"))
    assert (tmp_path / "a/rank-0/weights.bin").read_bytes() == (tmp_path / "b/rank-0/weights.bin").read_bytes()
    assert open_artifact(tmp_path / "a").manifest.model == open_artifact(tmp_path / "b").manifest.model


@pytest.mark.parametrize("where", [(0, 0), (-1, -1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_stored_beside_the_embedding_is_tied_only_if_it_equals_it(tmp_path, monkeypatch, where, dtype):
    monkeypatch.setattr(llmpack.checkpoint, "_ELEMENTS_AT_ONCE", 8 * 256)
    folder = make_checkpoint(tmp_path / "m", tie_word_embeddings=True, dtype=dtype)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[where] += 1
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    summary = pack(folder, tmp_path / "a", Options(scheme="q8"))
    assert not open_artifact(tmp_path / "a").manifest.model.tie_word_embeddings
    held = summary["ranks"][0]["weight_bytes_by_role"]
    assert held["head"] == held["embedding"] > 0
    (note, _) = summary["notes"]
    assert "lm_head.weight" in note


def test_a_tied_head_of_another_shape_is_named(tmp_path):
    folder = make_checkpoint(tmp_path / "m", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"][:100].clone()
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"lm_head\.weight: shape \[100, 256\]"):
        pack(folder, None, Options())


@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
def test_keys_and_values_that_the_cache_cannot_hold_are_refused(projection, model_dir, tmp_path_factory):
    target = tmp_path_factory.mktemp("packed") / "a"
    tensors = load_file(model_dir / "model.safetensors")
    tensors[f"model.layers.1.self_attn.{projection}.weight"] *= 1e6
    save_file(tensors, model_dir / "model.safetensors")
    with pytest.raises(
        IncompatibleError, match=r"layers\.1\.self_attn: its keys or values .* float16's .* --kv-dtype f32"
    ):
        pack(model_dir, target, Options(scheme="f32", kv_dtype="f16"))
    pack(model_dir, target, Options(scheme="f32"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lm_head", r"lm_head: found a logit of .*, expected less than 1e\+30"),
        ("model.embed_tokens", r"layers\.0\.input_layernorm: its input's squares are beyond float32's range"),
        ("model.layers.1.mlp.down_proj", r"model\.norm: its input's squares are beyond float32's range"),
        (
            "model.layers.0.self_attn.v_proj",
            r"layers\.0\.self_attn: its keys or values are beyond float32's range; no machine",
        ),
    ],
)
def test_weights_with_which_float32_computes_nothing_are_refused(name, words, model_dir, tmp_path_factory):
    """Such an artifact would be called damaged, or the machine that runs it."""
    target = tmp_path_factory.mktemp("packed") / "a"
    tensors = load_file(model_dir / "model.safetensors")
    tensors[f"{name}.weight"] = (tensors[f"{name}.weight"].double() * 3e38).clamp(-3e38, 3e38).float()
    save_file(tensors, model_dir / "model.safetensors")
    with pytest.raises(IncompatibleError, match=words):
        pack(model_dir, target, Options(scheme="f32"))
    assert not target.exists()
