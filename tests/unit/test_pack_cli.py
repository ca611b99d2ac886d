"""`pack` as people and programs use it: what goes to stdout, what to stderr, memory, dry runs."""

import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import time

import numpy as np
import pytest

from llmpack import cli, kernels, write
from llmpack.checkpoint import Checkpoint
from llmpack.pack import Options, pack
from llmpack.weights import source_shape, weight_rows
from llmrun import Engine
from llmrun.artifact import IncompatibleError, IntegrityError, open_artifact
from models import DEMO

PACK = [sys.executable, "-m", "llmpack.cli"]


def run(*arguments, **keywords):
    return subprocess.run([*PACK, *map(str, arguments)], capture_output=True, text=True, timeout=240, **keywords)


def test_dry_run_reads_no_weights_and_tells_the_truth(tmp_path, monkeypatch):
    out = tmp_path / "a"
    pack(DEMO, out, Options(shards=2, scheme="q8"))

    def read(*_):
        raise AssertionError("a dry run read weights")

    monkeypatch.setattr(Checkpoint, "read_rows", read)  # whatever is read of a weight goes through it
    with pytest.raises(AssertionError, match="read weights"):
        pack(DEMO, tmp_path / "b", Options(shards=2, scheme="q8"))
    summary = pack(DEMO, None, Options(shards=2, scheme="q8"))
    manifest = open_artifact(out).manifest
    for rank, entry in zip(summary["ranks"], manifest.ranks, strict=True):
        assert rank["weight_bytes"] == entry.weight_bytes == manifest.files[entry.weights].size
        assert rank["weight_bytes_per_token"] == entry.weight_bytes_per_token
        assert rank["weight_bytes_by_role"] == entry.weight_bytes_by_role
        assert rank["kv_cache_bytes"] == manifest.kv_cache.bytes_per_token * manifest.max_seq_len
        parts = ("weight_bytes", "kv_cache_bytes", "activation_bytes")
        assert rank["total_bytes"] == sum(rank[part] for part in parts)
    assert summary["bits_per_weight"] == 8.25


def test_group_size_falls_back_where_64_does_not_divide_and_an_explicit_one_is_refused(tmp_path):
    from models import make_checkpoint

    folder = make_checkpoint(tmp_path / "m", intermediate_size=544)  # 17 * 32
    assert pack(folder, None, Options())["group_size"] == 32
    assert pack(DEMO, None, Options())["group_size"] == 64
    result = run(folder, "--dry-run")
    assert "group_size 64 does not divide every in_features per rank" in result.stdout
    assert "projections" in result.stdout
    assert "biases" not in result.stdout  # there are none
    for chosen in (run(folder, "--dry-run", "--group-size", "32"), run(DEMO, "--dry-run")):
        assert "does not divide" not in chosen.stdout
    assert pack(folder, None, Options(scheme="f16"))["group_size"] is None
    refused = run(folder, "--dry-run", "--group-size", "64")
    assert refused.returncode == 2
    assert "--group-size 32 works" in refused.stderr


def test_a_tied_embedding_is_held_once_and_the_head_lies_in_it_on_any_number_of_ranks(tmp_path):
    from models import make_checkpoint

    folder = make_checkpoint(tmp_path / "m", tie_word_embeddings=True, vocab_size=512)
    summary = pack(folder, None, Options())
    (one,) = summary["ranks"]
    two = pack(folder, None, Options(shards=2))["ranks"][1]
    embedding = 512 * 256 * 6 // 8 + 512 * 2 * 2
    assert (one["weight_bytes_by_role"]["embedding"], one["weight_bytes_by_role"]["head"]) == (embedding, 0)
    assert (two["weight_bytes_by_role"]["embedding"], two["weight_bytes_by_role"]["head"]) == (embedding, 0)
    assert two["weight_bytes_per_token"] == two["weight_bytes"] - embedding // 2
    assert one["weight_bytes_per_token"] == one["weight_bytes"]
    read = sum(
        one["weight_bytes_by_role"][role] for role in ("linear", "embedding")
    )  # each token reads the embedding as head
    assert summary["bits_per_weight"] == pytest.approx(8 * read / (summary["parameters"] - 5 * 256), abs=1e-4)
    bits = 8 * sum(one["weight_bytes_by_role"].values())
    assert summary["bits_per_weight_of_file"] == pytest.approx(bits / summary["parameters"], abs=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        *("tiny", "tied", "tied-in-name-only", "biased", "qwen2", "qwen3", "phi3", "granite-hybrid", "smollm3"),
        *("qwen3-moe", "granite-moe", "gpt-oss"),
    ],
)
def test_parameters_are_those_that_torch_counts(name, tmp_path, tiny_checkpoint):
    from transformers import AutoModelForCausalLM

    from models import GPT_OSS, GRANITE_MOE, HYBRID_GRANITE, QWEN_MOE, SMOLLM, make_checkpoint, store_a_head

    options = {
        "tied": {"tie_word_embeddings": True},
        "biased": {"attention_bias": True, "mlp_bias": True},
        "qwen2": {"model_type": "qwen2"},
        "qwen3": {"model_type": "qwen3"},
        "phi3": {"model_type": "phi3", "pad_token_id": 0},
        "granite-hybrid": HYBRID_GRANITE,
        "smollm3": SMOLLM,
        "qwen3-moe": QWEN_MOE,
        "granite-moe": GRANITE_MOE,
        "gpt-oss": GPT_OSS,
    }
    folder = make_checkpoint(tmp_path / "m", **options[name]) if name in options else tiny_checkpoint
    if name == "tied-in-name-only":
        folder = store_a_head(make_checkpoint(tmp_path / "m", tie_word_embeddings=True))
    truth = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert pack(folder, None, Options())["parameters"] == truth


def test_what_was_not_done_as_the_files_say_is_told(tmp_path):
    from models import make_checkpoint, store_a_head

    folder = store_a_head(make_checkpoint(tmp_path / "m", tie_word_embeddings=True))
    result = run(folder, "--dry-run")
    assert "note: tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight" in result.stdout
    assert json.loads(run(folder, "--dry-run", "--json").stdout)["notes"][0] in result.stdout
    assert "note: no tokenizer: llmrun takes token ids only\n" in result.stdout
    assert "no tokenizer" not in run(DEMO, "--dry-run").stdout


def test_json_is_all_there_is_on_stdout_and_nothing_on_stderr(tmp_path):
    result = run(DEMO, "-o", tmp_path / "a", "--shards", "2", "--json")
    assert json.loads(result.stdout)["shards"] == 2
    assert result.stderr == ""


def test_without_a_terminal_progress_is_plain_lines_on_stderr(tmp_path):
    result = run(DEMO, "-o", tmp_path / "a")
    assert "\r" not in result.stderr
    assert "pack: weights 100%" in result.stderr.splitlines()
    assert result.stdout.splitlines()[-1] == f"packed {tmp_path / 'a'}"


def test_on_a_terminal_progress_is_a_bar_that_is_cleared(tmp_path):
    parent, child = pty.openpty()
    process = subprocess.Popen([*PACK, str(DEMO), "-o", str(tmp_path / "a")], stdout=subprocess.DEVNULL, stderr=child)
    os.close(child)
    shown = b""
    while True:
        try:
            data = os.read(parent, 4096)
        except OSError:
            break
        if not data:
            break
        shown += data
    os.close(parent)
    assert process.wait(60) == 0
    assert b"[##############################] 100%" in shown
    assert shown.endswith(b"\r\x1b[K")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shards", "0"], "--shards 0"),
        (["--quant", "q3"], "--quant q3"),
        (["--group-size", "48"], "--group-size 48"),
        (["--max-seq-len", "100000"], "--max-seq-len 100000"),
        (["--kv-dtype", "f64"], "--kv-dtype f64"),
        (["--max-seq-len", "0"], "--max-seq-len 0"),
        (["--shards", "3"], "--shards 3"),
    ],
)
def test_bad_options_are_one_sentence_and_exit_2(tmp_path, arguments, words):
    result = run(DEMO, "-o", tmp_path / "a", *arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert not (tmp_path / "a").exists()


def test_a_name_of_any_bytes_is_one_sentence(tmp_path):
    for arguments in (
        [DEMO, "-o", os.fsencode(tmp_path) + b"/caf\xe9"],
        [os.fsencode(tmp_path) + b"/caf\xe9", "--dry-run"],
        [tmp_path / "two\nlines\x1b[2J", "--dry-run"],
    ):
        result = subprocess.run([*PACK, *arguments], capture_output=True, timeout=60)
        assert result.returncode == 2
        assert result.stdout == b""
        assert result.stderr.startswith(b"pack: error[E2")
        assert result.stderr.count(b"\n") == 1
        assert b"\x1b" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_without_pieces_is_one_sentence(tmp_path, tiny_checkpoint):
    """The library logs to standard error what it raises."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "m")
    for data in (b"", b"\x12\x00"):
        (folder / "tokenizer.model").write_bytes(data)
        result = run(folder, "--dry-run")
        assert result.returncode == 3
        assert result.stderr.count("\n") == 1, result.stderr
        assert "tokenizer.model: not a sentencepiece model" in result.stderr


def test_names_with_spaces_and_letters_of_any_script_work(tmp_path, tiny_text_checkpoint):
    folder = shutil.copytree(tiny_text_checkpoint, tmp_path / "ein Modell 模型")
    out = tmp_path / "sp ace" / "выход"
    assert run(folder, "-o", out).returncode == 0
    with Engine(out) as engine:
        assert len(list(engine.generate_ids([1, 2], max_tokens=2, ignore_eos=True))) == 2


def test_standard_output_that_takes_nothing_is_one_sentence():
    for redirect, words in ((">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")):
        command = ["sh", "-c", f'exec "$@" {redirect}', "sh", *PACK, str(DEMO), "--dry-run"]
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60)
        assert (result.returncode, result.stderr) == (5, f"pack: error[E503]: standard output: {words}.\n")


def test_closed_streams_become_none_of_the_artifacts_files(tmp_path):
    run(DEMO, "-o", tmp_path / "a")
    for redirect in ("<&- 2>&-", "2>&-"):
        command = ["sh", "-c", f'exec "$@" {redirect}', "sh", *PACK, str(DEMO), "-o", str(tmp_path / "b"), "--force"]
        assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60).returncode == 0
        assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()


def test_progress_that_nobody_reads_ends_nothing(tmp_path):
    for redirect in ("2>/dev/full", "2>&1 | true"):
        shell = ["bash", "-o", "pipefail", "-c", f'"$@" {redirect}', "bash"]
        command = [*shell, *PACK, str(DEMO), "-o", str(tmp_path / "a")]
        result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60)
        assert (result.returncode, result.stderr) == (0, b"")
        open_artifact(tmp_path / "a")
        shutil.rmtree(tmp_path / "a")
    command = ["sh", "-c", 'exec "$@" 2>/dev/full', "sh", *PACK, str(tmp_path / "no"), "-o", str(tmp_path / "a")]
    assert subprocess.run(command, timeout=60).returncode == 2


def test_an_interrupt_after_the_last_rename_says_what_is_there(tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "_sync", interrupt)
    assert cli.main([str(DEMO), "-o", str(tmp_path / "a"), "--json"]) == 130
    assert capsys.readouterr().err == "pack: interrupted; nothing was written.\n"
    monkeypatch.undo()
    monkeypatch.setattr(write.Staging, "__exit__", interrupt)
    assert cli.main([str(DEMO), "-o", str(tmp_path / "a"), "--json"]) == 130
    assert capsys.readouterr().err == f"pack: interrupted; {tmp_path / 'a'} is complete.\n"
    open_artifact(tmp_path / "a").verify(open_artifact(tmp_path / "a").manifest.files)


def test_unknown_targets_are_refused_with_those_that_are_known(tmp_path):
    result = run(DEMO, "-o", tmp_path / "a", "--targets", "cpu,sm_88")
    assert result.returncode == 2
    assert "--targets sm_88: unknown; choose from cpu, sm_80" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--quant", "f32"), "--quant f32 has no GPU kernels"), (("--kv-dtype", "f32"), "read a float16 cache")],
)
def test_what_gpus_cannot_run_is_refused_before_anything_is_compiled(tmp_path, arguments, words):
    result = run(DEMO, "-o", tmp_path / "a", "--targets", "sm_89", *arguments)
    assert result.returncode == 4
    assert words in result.stderr
    assert not (tmp_path / "a").exists()


def test_a_dry_run_says_that_gpu_code_cannot_be_compiled_here(monkeypatch):
    monkeypatch.setattr(kernels, "triton_version", lambda: None)
    with pytest.raises(IncompatibleError, match="compiled by Triton, which is not installed here"):
        pack(DEMO, None, Options(targets=("sm_89",)))


def test_an_error_does_not_wait_for_the_hashing_of_the_checkpoint(tmp_path, monkeypatch):
    ended_early = []

    def hash_for_long(_checkpoint, _names, is_over):
        until = time.monotonic() + 20
        while time.monotonic() < until and not is_over():
            time.sleep(0.01)
        ended_early.append(is_over())

    def fail(*_):
        raise IncompatibleError("a weight that does not fit")

    monkeypatch.setattr(Checkpoint, "hash_sources", hash_for_long)
    monkeypatch.setattr("llmpack.pack.write_weights", fail)
    with pytest.raises(IncompatibleError, match="does not fit"):
        pack(DEMO, tmp_path / "a", Options())
    assert ended_early == [True]


def test_help_needs_neither_numpy_nor_onnx():
    code = (
        "import sys; sys.modules['numpy'] = sys.modules['onnx'] = None\n"
        "from llmpack.cli import main\nsys.exit(main(['--help']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "usage: pack" in result.stdout


def test_without_the_packager_extra_it_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['onnx'] = None\nfrom llmpack.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(DEMO), "-o", str(tmp_path / "a")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 4
    assert "llmpack[packager]" in result.stderr
    assert result.stderr.count("\n") == 1


def sparse_checkpoint(folder):
    """A checkpoint of Llama-2-7B's widths, one layer, whose weights are a hole in a file: 0.9 GB to read, none on disk.

    Its head and embedding are tied, and both are stored.
    """
    folder.mkdir()
    config = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 1,
        "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    from llmpack.config import read_config

    model = read_config(folder)
    header, offset = {}, 0
    for row in weight_rows(model):
        for source in row.sources:
            shape = source_shape(model, source)
            size = 2 * int(np.prod(shape))
            header[source] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return folder, offset


@pytest.mark.slow
def test_peak_memory_is_below_0_6_gb_for_widths_of_a_7b(tmp_path):
    folder, size = sparse_checkpoint(tmp_path / "m")
    assert size > 900e6
    # getrusage would count the memory of this process too, as it was before exec.
    code = (
        "import sys\nfrom llmpack.cli import main\ncode = main()\n"
        "print(*[line for line in open('/proc/self/status') if line.startswith('VmHWM')], file=sys.stderr)\nsys.exit(code)"
    )
    command = [sys.executable, "-c", code, str(folder), "-o", str(tmp_path / "a"), "--shards", "2", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    assert 1024 * int(result.stderr.split()[1]) < 600e6


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.model"])
@pytest.mark.parametrize("how", ["touched", "written", "replaced"])
def test_input_that_changes_while_it_is_packed_is_noticed(tmp_path, tiny_text_checkpoint, name, how):
    """Else `source` would name bytes that are not those that were packed."""
    folder = tmp_path / "m"
    folder.mkdir()
    for path in tiny_text_checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    file, times, changed = folder / name, (folder / name).stat(), []

    def change(step, *_):
        if step == "self-check" and not changed:
            time.sleep(0.01)
            changed.append(how)
            if how == "touched":
                file.touch()
            elif how == "written":
                file.write_bytes(file.read_bytes() + b" ")
            else:  # by a program that keeps times, as rsync -t does
                (tmp_path / "new").write_bytes(file.read_bytes())
                os.utime(tmp_path / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
                (tmp_path / "new").rename(file)

    with pytest.raises(IntegrityError, match=rf"{re.escape(name)}: changed while it was being packed"):
        pack(folder, tmp_path / "a", Options(), change)
    assert not (tmp_path / "a").exists()
