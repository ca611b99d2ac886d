"""The command line on one rank: what goes to standard output, what is refused and how."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from llmrun import stdin
from llmrun.cli import build_parser
from llmrun.commands.generate import _Generate
from llmrun.commands.show import _in_words as in_words
from llmrun.errors import UsageError
from models import DEMO

Packed = Callable[..., Path]


def llmrun(*arguments: object, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "llmrun", *(os.fsencode(str(argument)) for argument in arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, env={**os.environ, **environment}, timeout=120)


def refused(done: subprocess.CompletedProcess[bytes], exit_code: int, message: str) -> None:
    assert done.returncode == exit_code, done.stderr
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"llmrun: error[E{exit_code}")
    assert message in lines[0]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["bench", "--help"], ["generate", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from llmrun.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as error: assert error.code == 0\n"
        "print([m for m in ('numpy', 'onnxruntime', 'mpi4py', 'jinja2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_help_takes_less_than_a_seventh_of_a_second_of_processor_time(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    seconds = []
    for _ in range(5):  # the first writes bytecode; the fastest was disturbed least
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "llmrun", "--help"], env=environment, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.15


def test_a_greedy_start_loads_no_more_than_it_needs(packed_tiny: Packed) -> None:
    spared = ("concurrent.futures", "logging", "numpy.random", "socket", "subprocess")  # 2 to 10 ms each
    program = (
        f"import sys; from llmrun.cli import main; main(sys.argv[1:]); print([m for m in {spared} if m in sys.modules])"
    )
    arguments = [packed_tiny(1, "f32"), "--ids", "-p", "[1]", "-n", 1, "--temperature", 0, "--verify", "size"]
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize(("where", "shown"), [("stdin,stdout", "a\u241b[2Jb\n"), ("stdin", "a\x1b[2Jb\n")])
def test_a_model_commands_no_terminal(
    where: str, shown: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    request = SimpleNamespace(stream=object(), finish_reason=None)

    def step() -> list[SimpleNamespace]:
        request.finish_reason = "stop"
        return [SimpleNamespace(text="a\x1b[2Jb", token_id=1)]

    monkeypatch.setenv("LLMRUN_TTY", where)
    engine: Any = SimpleNamespace(submit=lambda *_, **__: request, step=step)
    arguments = build_parser(["generate"]).parse_args(["generate", "artifact", "-p", "x"])
    assert _Generate(arguments).generate(engine, cast("Any", None)) == 0
    assert capfd.readouterr().out == shown


def test_ids_without_a_list_are_no_chat(packed_tiny: Packed) -> None:
    done = llmrun(packed_tiny(1, "f32"), "--ids", LLMRUN_TTY="stdin,stdout,stderr")
    assert (done.returncode, b"--ids: give the list" in done.stderr) == (2, True)


def test_standard_output_is_the_text_and_nothing_else(packed_tiny: Packed) -> None:
    path = packed_tiny(1, "f32")
    plain = llmrun(path, "-p", "The king", "-n", 8, "--temperature", 0)
    assert (plain.returncode, plain.stderr) == (0, b"")
    answer = json.loads(llmrun(path, "-p", "The king", "-n", 8, "--temperature", 0, "--json").stdout)
    assert plain.stdout.decode() == answer["text"] + "\n"
    assert set(answer) == {"text", "prompt_ids", "ids", "finish_reason", "timings"}
    assert set(answer["timings"]) == {"prompt_n", "prompt_ms", "predicted_n", "predicted_ms", "load_ms"}
    assert answer["timings"]["prompt_n"] == len(answer["prompt_ids"])


def test_the_prompt_may_come_from_anywhere(packed_tiny: Packed, tmp_path: Path) -> None:
    path = packed_tiny(1, "f32")
    (tmp_path / "prompt").write_text("The king\n")
    options = ("-n", 4, "--temperature", 0)
    outputs = {
        llmrun(path, "-p", "The king", *options).stdout,
        llmrun("generate", path, "-f", tmp_path / "prompt", *options).stdout,
        llmrun(path, *options, stdin=b"The king\n").stdout,
    }
    assert len(outputs) == 1


def test_texts_of_the_command_line_are_utf8_whatever_the_locale(packed_tiny: Packed) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0"}
    arguments = (packed_tiny(1, "f32"), "-p", "König", "-n", 1, "--json")
    found = [json.loads(llmrun(*arguments, **locale).stdout)["prompt_ids"] for locale in ({}, plain)]
    assert found[0] == found[1]
    program = (
        "import sys\n"
        "from llmrun.cli import build_parser\n"
        "chosen = vars(build_parser().parse_args(sys.argv[2:]))\n"
        "print(ascii(chosen[sys.argv[1]]))"
    )
    for command, option, expected in (
        ("chat", "--stop", ["König"]),
        ("chat", "--system", "König"),
        ("serve", "--served-model-name", ["König"]),
    ):
        typed = [sys.executable, "-c", program, option[2:].replace("-", "_"), command, "A", option, "König"]
        done = subprocess.run(typed, capture_output=True, text=True, check=True, env={**os.environ, **plain})
        assert done.stdout == ascii(expected) + "\n"


def test_a_seed_repeats_and_another_does_not(packed_tiny: Packed) -> None:
    path = packed_tiny(1, "f32")
    runs = [llmrun(path, "-p", "a", "-n", 20, "--temperature", 1, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_ids_in_ids_out_without_a_tokenizer(packed: Packed, tiny_checkpoint: Path) -> None:
    path = packed(tiny_checkpoint, 1, "f32")
    done = llmrun("generate", path, "--ids", "-p", "[1, 5, 6]", "-n", 4, "--temperature", 0)
    answer = json.loads(
        llmrun("generate", path, "--ids", "-p", "[1, 5, 6]", "-n", 4, "--temperature", 0, "--json").stdout
    )
    assert [int(i) for i in done.stdout.split()] == answer["ids"]
    assert answer["text"] is None
    refused(llmrun(path, "-p", "text"), 2, "no tokenizer: give token ids with --ids.")
    refused(llmrun("chat", path, stdin=b"hello\n"), 2, "no tokenizer")


@pytest.mark.parametrize(
    ("arguments", "data", "exit_code", "message"),
    [
        (["-p", ""], b"", 2, "empty"),
        ([], b"", 2, "empty"),
        (["-p", "word " * 400], b"", 2, "context of 128"),
        (["-p", "a", "-n", "1000"], b"", 2, "Use 12"),
        (["-p", "a", "-n", "0"], b"", 2, "expected 1 or more"),
        (["-p", "a", "--top-p", "2"], b"", 2, "top_p"),
        (["-p", "a", "--stop", ""], b"", 2, "stop"),
        (["-p", "a\udcff"], b"", 2, "-p: not UTF-8: byte 0xff at offset 1"),
        (["-p", "a", "--stop", "\udcff"], b"", 2, "--stop: not UTF-8: byte 0xff at offset 0"),
        ([], b"abc\xe2\x82", 2, "not UTF-8: byte 0xe2 at offset 3"),
        (["-f", "/nonexistent"], b"", 2, "/nonexistent"),
        (["--ids", "-p", "[1, 99999]"], b"", 2, "99999 is not in the vocabulary"),
        (["--ids", "-p", "{}"], b"", 2, "JSON list"),
        (["-p", "a", "--bogus"], b"", 2, "--bogus"),
        (["-p", "a", "--provider", "cuda"], b"", 4, "holds code for cpu only"),
        (["-p", "a", "--max-seq-len", "100000"], b"", 2, "packed for 128"),
        (["-p", "a", "--threads", "0"], b"", 2, "threads 0"),
    ],
)
def test_bad_input_is_one_sentence_and_no_output(
    arguments: list[str], data: bytes, exit_code: int, message: str, packed_tiny: Packed
) -> None:
    done = llmrun("generate", packed_tiny(1, "f32"), *arguments, stdin=data)
    refused(done, exit_code, message)
    assert done.stdout == b""


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("{", "--chat-template-kwargs: not JSON"),
        ("[1]", "--chat-template-kwargs: found a JSON list, expected an object."),
        ('{"tools": []}', "tools is not free"),
        ('{"x": ' + "[" * 900 + "]" * 900 + "}", "chat_template_kwargs: nested more than 64 deep"),
    ],
)
@pytest.mark.parametrize("command", ["chat", "serve"])
def test_variables_of_a_template_are_an_object(command: str, given: str, says: str, packed_tiny: Packed) -> None:
    refused(llmrun(command, packed_tiny(1, "f32"), "--chat-template-kwargs", given), 2, says)


def test_a_chats_template_gets_its_variables(packed: Packed, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").write_text("{{ mood }}{% for m in messages %} {{ m.content }}{% endfor %}")
    path = packed(folder, 1, "q8")
    asked = [
        json.loads(llmrun("chat", path, "--json", "-n", 1, *more, stdin=b"Hello\n").stdout)["prompt_ids"]
        for more in ((), ("--chat-template-kwargs", '{"mood": "Sad"}'))
    ]
    tokens = json.loads(llmrun("generate", path, "--json", "-n", 1, "-p", "Sad Hello").stdout)["prompt_ids"]
    assert asked[0] != asked[1]
    assert asked[1] == tokens[1:]  # a template writes the BOS itself


def test_no_artifact_is_one_sentence(tmp_path: Path) -> None:
    refused(llmrun(tmp_path / "nothing", "-p", "a"), 2, "no such directory")
    refused(llmrun("show", tmp_path), 2, "expected an artifact")


def test_a_mistyped_command_is_named(packed_tiny: Packed) -> None:
    refused(
        llmrun("gen", packed_tiny(1, "f32"), "-p", "a"), 2, "gen: found neither an artifact nor a command (generate, "
    )


def test_a_reader_that_leaves_ends_it_quietly(packed_tiny: Packed) -> None:
    command = [sys.executable, "-m", "llmrun", str(packed_tiny(1, "f32")), "-p", "a", "-n", "100", "--ignore-eos"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (0, b"")
    process.stderr.close()


def test_an_interrupt_that_is_ignored_from_the_start_stays_ignored(packed_tiny: Packed) -> None:
    """As a shell without job control has it for `llmrun ... &`."""
    command = [sys.executable, "-m", "llmrun", str(packed_tiny(1, "f32")), "-n", "4", "--json"]
    shell = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]
    with subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not _signals(process.pid, "SigCgt") >> signal.SIGTERM - 1 & 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(b"The king", timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert json.loads(out)["ids"]


def _signals(pid: int, kind: str) -> int:
    """Return the bits of the signals that a process catches or ignores."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith(kind))


def test_a_window_of_no_tokens_is_refused(packed_tiny: Packed, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("To be, or not to be")
    refused(
        llmrun("perplexity", packed_tiny(1, "f32"), tmp_path / "text", "--window", 0), 2, "--window 0: expected 2 to"
    )


def test_logits_that_cannot_be_written_are_refused_before_anything_is_computed(
    packed_tiny: Packed, tmp_path: Path
) -> None:
    path = packed_tiny(1, "f32")
    (tmp_path / "text").write_text("To be, or not to be")
    for out, words in (
        (tmp_path / "no/l.npy", "No such file or directory"),
        (tmp_path, "Is a directory"),
        ("", "No such"),
    ):
        done = llmrun("perplexity", path, tmp_path / "text", "--logits-out", out, LLMRUN_FAULT="0:prefill:raise")
        refused(done, 2, f"--logits-out {out}: {words}")


def test_perplexity_is_that_of_its_logits(packed_tiny: Packed, tmp_path: Path) -> None:
    ids = [1, 20, 30, 40, 50, 60, 70]
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    done = llmrun(
        "perplexity",
        packed_tiny(1, "f32"),
        tmp_path / "ids.json",
        "--ids",
        "--json",
        "--logits-out",
        tmp_path / "l.npy",
    )
    logits = np.load(tmp_path / "l.npy").astype(np.float64)
    assert logits.shape[0] == len(ids)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    nll = -np.mean([log_probabilities[i, ids[i + 1]] for i in range(len(ids) - 1)])
    result = json.loads(done.stdout)
    assert result["tokens"] == len(ids) - 1
    assert result["nll"] == pytest.approx(nll, rel=1e-6)
    assert result["perplexity"] == pytest.approx(np.exp(nll), rel=1e-6)


def test_windows_of_a_text_begin_with_bos(packed_tiny: Packed, tmp_path: Path) -> None:
    path = packed_tiny(1, "f32")
    (tmp_path / "text").write_text("To be, or not to be, that is the question: whether it is nobler in the mind")
    ids = json.loads(llmrun("generate", path, "-f", tmp_path / "text", "-n", 1, "--json").stdout)["prompt_ids"]
    one = json.loads(llmrun("perplexity", path, tmp_path / "text", "--json", "--logits-out", tmp_path / "a.npy").stdout)
    many = json.loads(
        llmrun(
            "perplexity", path, tmp_path / "text", "--window", 4, "--json", "--logits-out", tmp_path / "b.npy"
        ).stdout
    )
    assert one["tokens"] == many["tokens"] == len(ids) - 1  # BOS predicts the first token of each window
    assert len(np.load(tmp_path / "b.npy")) == len(ids) - 1 + -(-(len(ids) - 1) // 3)


def test_show_and_verify_and_doctor(packed_tiny: Packed) -> None:
    path = packed_tiny(2, "q8")
    facts = json.loads(llmrun("show", path, "--json").stdout)
    assert (facts["shards"], facts["quantization"]["scheme"]) == (2, "q8")
    assert json.loads(llmrun("verify", path, "--json").stdout)["ok"] is True
    refused(llmrun("verify", path, "--threads", "0"), 2, "--threads is for --deep")
    assert json.loads(llmrun("doctor", path, "--json").stdout)["ok"] is True


def test_show_names_the_first_of_many_special_tokens() -> None:
    shown = in_words({"special_tokens": {f"<{i}>": i for i in reversed(range(1000))}, "vocab_size": 1100})
    assert shown.startswith("special_tokens=<0>=0; <1>=1; ")
    assert shown.endswith("; <11>=11; 988 more (--json has all)  vocab_size=1100")
    assert in_words({"special_tokens": {"</s>": 2, "<s>": 1}}) == "special_tokens=<s>=1; </s>=2"


def test_verify_on_a_host_with_its_own_ranks_only(packed_tiny: Packed, tmp_path: Path) -> None:
    path = tmp_path / "a"
    shutil.copytree(packed_tiny(2, "q8"), path)
    both = json.loads(llmrun("verify", path, "--json").stdout)
    shutil.rmtree(path / "rank-0")
    done = json.loads(llmrun("verify", path, "--ranks", "1", "--json").stdout)
    assert both["files"] - done["files"] == 2
    assert done["bytes"] == sum(file.stat().st_size for file in path.rglob("*.*") if file.name != "manifest.json")
    for ranks, code, words in (
        (None, 3, "rank-0/"),
        ("0,1", 3, "rank-0/"),
        ("2", 4, "no rank 2"),
        ("a", 2, "as in 0,1"),
    ):
        refused = llmrun("verify", path, *([] if ranks is None else ["--ranks", ranks]))
        assert (refused.returncode, words in refused.stderr.decode()) == (code, True), refused.stderr
    with open(path / "rank-1/weights.bin", "r+b") as file:
        file.write(b"\xff\xff")
    assert llmrun("verify", path, "--ranks", "1").returncode == 3
    assert llmrun("verify", path, "--ranks", "1", "--deep").returncode == 2


def test_verify_deep_replays_the_packagers_examples(packed_tiny: Packed) -> None:
    done = json.loads(llmrun("verify", packed_tiny(1, "f32"), "--deep", "--json").stdout)
    assert done["max_logit_difference"] <= done["tolerance"]
    assert done["golden_texts"] > 0


def test_bench_speaks_llama_benchs_language(packed_tiny: Packed) -> None:
    results = json.loads(llmrun("bench", packed_tiny(1, "f32"), "-p", 16, "-n", 8, "-r", 2, "--json").stdout)
    assert [(r["n_prompt"], r["n_gen"]) for r in results] == [(16, 0), (0, 8)]
    for result in results:
        assert result["avg_ts"] == pytest.approx(sum(result["samples_ts"]) / 2)
        assert result["weight_bytes_per_token"] > 0
    assert results[1]["roofline_fraction"] > 0


def test_bench_measures_what_fits_where_nothing_is_asked_for(packed_tiny: Packed) -> None:
    path = packed_tiny(1, "f32")  # a context of 128
    results = json.loads(llmrun("bench", path, "-r", 1, "--json").stdout)
    assert [(r["n_prompt"], r["n_gen"]) for r in results] == [(127, 0), (0, 127)]
    results = json.loads(llmrun("bench", path, "-p", 3, "-d", 100, "-b", 2, "-r", 1, "--json").stdout)
    assert results[0]["n_prompt"] == 3
    assert 0 < results[1]["n_gen"] < 28
    refused(llmrun("bench", path, "-p", 128), 2, "129 tokens do not fit the context of 128")
    refused(llmrun("bench", path, "-n", 128), 2, "129 tokens do not fit the context of 128")
    refused(llmrun("bench", path, "-d", 128), 2, "do not fit the context of 128")


def test_chat_answers_line_by_line(packed_tiny: Packed) -> None:
    done = llmrun(
        "chat", packed_tiny(1, "f32"), "-n", 4, "--temperature", 0, "--json", stdin=b"hello\nagain\n\nnever\n"
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, len(answers)) == (0, 2)
    first, second = (answer["prompt_ids"] for answer in answers)
    assert len(second) > len(first)  # the second prompt holds the first turn and its answer


@pytest.mark.parametrize(("data", "offset"), [(b"\xff", 0), (b"ab\xc3(", 2), ("é".encode()[:1], 0)])
def test_the_offset_of_a_bad_byte_is_named(data: bytes, offset: int) -> None:
    with pytest.raises(UsageError, match=f"offset {offset}"):
        stdin.decode_utf8(data, "here")
