"""Whatever is typed or piped in, the answer is an exit code of the documented set and one sentence, before weights are read."""

import os
import signal
import subprocess
import sys

import pytest

import llmrun.requests
from hostile.bad_input import assert_refused
from llmrun.errors import UsageError
from llmrun.requests import check_prompt
from mpi.harness import RunningJob, llmrun_command, run_alone

pytestmark = pytest.mark.timeout(60)
DEADLINE_S = 30


@pytest.fixture(scope="module")
def artifact(packed_tiny):
    return packed_tiny(1, "q4")


@pytest.fixture(scope="module")
def pair(packed_tiny):
    return packed_tiny(2, "q4")


def refused(code, words, *arguments, **options):
    assert_refused(run_alone(*arguments, deadline_s=DEADLINE_S, **options), code, words)


# The command line itself: refused before the artifact is looked at

GENERATE = [
    (["-n", "0"], "max-tokens 0"), (["-n", "-1"], "max-tokens -1"), (["-n", "x"], "invalid int"), (["-n", "1.5"], "invalid"),
    (["--temperature", "nan"], "temperature is nan"), (["--temperature=-1"], "temperature is -1"),
    (["--temperature", "inf"], "temperature is inf"), (["--temperature", "1e9"], "temperature"),
    (["--top-p", "0"], "top_p is 0"), (["--top-p", "2"], "top_p is 2"), (["--top-p=-1"], "top_p"),
    (["--top-p", "nan"], "top_p"),
    (["--top-k", "-1"], "top_k is -1"), (["--top-k", "1.5"], "invalid int"), (["--min-p", "1"], "min_p"),
    (["--min-p", "nan"], "min_p"), (["--repeat-penalty", "0"], "repeat_penalty"), (["--repeat-penalty", "nan"], "repeat"),
    (["--seed", "-1"], "seed is -1"), (["--seed", str(1 << 63)], "seed"), (["--seed", "9" * 5000], "seed"),
    (["--isa", "nonsense"], "--isa"), (["--provider", "tpu"], "--provider"), (["--verify", "maybe"], "--verify"),
    (["--nonsense"], "--nonsense"), (["--max-tok", "3"], "--max-tok"), (["-p"], "-p"), (["more", "words"], "more words"),
    (["-f", "x"], "-p and -f"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), GENERATE, ids=[" ".join(options)[:30] for options, _ in GENERATE])
def test_bad_options(artifact, options, words):
    refused(2, words, artifact, "-p", "x", *options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense", "artifact"], "artifact"), (["verify"], "ARTIFACT"), (["show"], "ARTIFACT"), (["generate"], "ARTIFACT"),
        (["--nonsense"], "ARTIFACT"), (["verify", "x", "--prompt", "y"], "--prompt"), ([""], "no manifest.json"),
        (["perplexity", "x"], "FILE"), (["bench", "x", "-r", "0"], "-r"), (["bench", "x", "-p", "-1"], "-p"),
        (["chat", "x", "--temperature", "nan"], "temperature"),
    ],
    ids=lambda value: " ".join(value)[:30] or "nothing" if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_commands(arguments, words):
    refused(2, words, *arguments)


# What is given instead of an artifact


@pytest.mark.parametrize("command", ["generate", "verify", "show", "bench"])
def test_no_artifact(tmp_path, command):
    refused(2, "no such directory", command, tmp_path / "absent")


def test_something_else_than_an_artifact(tmp_path, tiny_text_checkpoint):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "two\nlines").mkdir()
    for name, words in (
        ("file", "not a directory"), ("file/inside", "no such directory"), ("empty", "no manifest.json"),
        ("loop", "loop"), ("x" * 300, "too long"), ("two\nlines", "two\\nlines"),
    ):  # fmt: skip
        refused(2, words, "show", tmp_path / name)
    refused(2, f"pack {tiny_text_checkpoint}", tiny_text_checkpoint, "-p", "x")


def test_an_artifact_at_a_path_that_is_not_utf_8(artifact, tmp_path):
    """ONNX Runtime's own words would be three lines of C++ signatures."""
    (tmp_path / "caf\udce9").symlink_to(artifact)
    refused(2, "the path is not UTF-8", tmp_path / "caf\udce9", "-p", "x")


@pytest.mark.parametrize("provider", ["cuda", "rocm"])
def test_provider_that_the_artifact_has_no_graph_for(artifact, provider):
    refused(4, "Use --provider cpu", artifact, "-p", "x", "--provider", provider)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--threads", "0"], 2, "threads 0"), (["--threads", "-3"], 2, "threads -3"),
        (["--max-seq-len", "0"], 2, "max-seq-len 0"),
        (["--max-seq-len", "129"], 2, "128"), (["--max-seq-len", "9" * 30], 2, "max-seq-len"),
    ],
)  # fmt: skip
def test_bad_sizes(artifact, options, code, words):
    refused(code, words, artifact, "-p", "x", *options)


# The prompt


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-p", ""], "empty"), (["-p", "a " * 500], "context of 128"), (["-p", "x", "-n", "128"], "or shorten the prompt"),
        (["-p", "x", "-n", str(1 << 62)], "or shorten the prompt"), (["-p", "x", "--stop", ""], "stop"),
        (["--ids", "-p", "[]"], "empty"), (["--ids", "-p", "[1, 99999]"], "99999"), (["--ids", "-p", "[-1]"], "-1"),
        (["--ids", "-p", "[1.5]"], "list of token ids"), (["--ids", "-p", "[true]"], "list of token ids"),
        (["--ids", "-p", '["a"]'], "list of token ids"), (["--ids", "-p", "{}"], "list of token ids"),
        (["--ids", "-p", "1 2 3"], "not JSON"), (["--ids", "-p", "[" * 10_000], "not JSON"),
        (["--ids", "-p", "[" + "9" * 5000 + "]"], "not JSON"), (["--ids", "-p", f"[{1 << 70}]"], str(1 << 70)),
        (["--ids", "-p", str([1] * 128)], "context of 128"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_prompts(artifact, options, words):
    refused(2, words, artifact, *options)


@pytest.mark.mpi
def test_bad_prompt_on_two_ranks(pair):
    refused(2, "context of 128", pair, "-p", "a " * 500)
    refused(2, "empty", pair, "-p", "")


@pytest.mark.parametrize("data", [b"\xff", b"abc\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf5\x80\x80\x80"])
def test_text_that_is_not_utf_8(artifact, tmp_path, data):
    (tmp_path / "prompt").write_bytes(data)
    refused(2, "not UTF-8", artifact, "-f", tmp_path / "prompt")


def test_text_that_is_not_utf_8_in_arguments_and_standard_input(artifact):
    command = [os.fsencode(argument) for argument in llmrun_command(artifact)]
    job = RunningJob([*command, b"-p", b"caf\xe9"])
    assert_refused(job.finish(DEADLINE_S), 2, "not UTF-8")
    refused(2, "not UTF-8", artifact, stdin="caf\udce9")


def test_file_that_cannot_be_read(artifact, tmp_path):
    refused(2, "absent: No such file", artifact, "-f", tmp_path / "absent")
    refused(2, "Is a directory", artifact, "-f", tmp_path)
    refused(2, "absent: No such file", "perplexity", artifact, tmp_path / "absent")


def test_empty_standard_input(artifact):
    refused(2, "empty", artifact)
    refused(2, "empty", artifact, stdin="")


@pytest.mark.parametrize(("text", "words"), [("", "too short"), ("\0", None), ("[1, 2", None)])
def test_perplexity_of_nothing(artifact, tmp_path, text, words):
    (tmp_path / "text").write_text(text)
    outcome = run_alone("perplexity", artifact, tmp_path / "text", deadline_s=DEADLINE_S)
    if words is not None:
        assert_refused(outcome, 2, words)
    else:
        assert outcome.code in (0, 2), outcome


def test_odd_but_good_prompts_are_answered(artifact):
    for prompt in ("\0", "\ufeffx", "\u202e\u0627", "\U0001f600" * 5, "<s></s>", "\r\n"):
        outcome = RunningJob(llmrun_command(artifact, "-n", "2"), stdin=prompt).finish(DEADLINE_S)
        assert (outcome.code, outcome.stderr) == (0, ""), (prompt, outcome)


def test_standard_output_that_cannot_be_written(artifact):
    with open("/dev/full", "wb") as full:
        for command in (("show", artifact), (artifact, "-p", "x", "-n", "2")):
            done = subprocess.run(
                llmrun_command(*command),
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                timeout=DEADLINE_S,
                check=False,
            )
            assert done.returncode == 5, done
            assert len(done.stderr.splitlines()) == 1, done.stderr
            assert "No space left" in done.stderr


def test_closed_standard_streams(artifact):
    for stream in ("0<&-", "2>&-"):
        command = ["sh", "-c", f'exec "$@" {stream}', "sh", *llmrun_command("show", artifact)]
        assert RunningJob(command).finish(DEADLINE_S).code == 0


def test_output_of_two_ranks_that_cannot_be_written(packed_tiny):
    command = llmrun_command(packed_tiny(2, "q4"), "-p", "x", "-n", "2")
    for redirect, words in ((">/dev/full", "No space left"), (">&-", "Bad file descriptor")):
        outcome = RunningJob(["sh", "-c", f'exec "$@" {redirect}', "sh", *command]).finish(DEADLINE_S)
        assert outcome.code == 5, outcome
        assert len(outcome.errors) == 1
        assert words in outcome.errors[0]


def test_a_closed_standard_output_is_not_lent_to_another_file(artifact):
    outcome = RunningJob(["sh", "-c", 'exec "$@" >&-', "sh", *llmrun_command("show", artifact)]).finish(DEADLINE_S)
    assert outcome.code == 5
    assert "standard output: Bad file descriptor" in outcome.errors[0]


def test_interrupted_while_it_starts(artifact):
    job = RunningJob(llmrun_command(artifact, "-p", "x", "-n", "100"))
    job.process.send_signal(signal.SIGINT)
    outcome = job.finish(DEADLINE_S)
    # Before any of our code runs, Python itself may answer, by a code of its own and with a traceback; none of it is ours.
    is_pythons = outcome.code == 1 and outcome.stderr.startswith("Could not import runpy module\n")
    assert outcome.code in (130, -signal.SIGINT, 0) or is_pythons
    places = [line for line in outcome.stderr.splitlines() if line.lstrip().startswith('File "')]
    assert places or "Traceback" not in outcome.stderr
    assert not [line for line in places if "llmrun" in line]


@pytest.mark.parametrize("module", ["argparse", "llmrun.commands.generate", "numpy"])
def test_interrupted_while_it_imports(module, artifact):
    """Ended by the signal itself: an exception would be a traceback, or numpy's failure."""
    program = (
        "import signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, module, *_):\n"
        f"        if module == {module!r}:\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from llmrun.__main__ import main\n"
        "sys.exit(main())"
    )
    outcome = RunningJob([sys.executable, "-c", program, str(artifact), "-p", "x"]).finish(DEADLINE_S)
    assert (outcome.code, outcome.stdout, outcome.stderr) == (-signal.SIGINT, "", "")


def test_optimized_python_refuses_as_well(artifact):
    for arguments in (["-p", ""], ["--ids", "-p", "[99999]"], ["-p", "x", "-n", "0"], ["-p", "x", "--top-p", "nan"]):
        command = [sys.executable, "-O", "-m", "llmrun", str(artifact), *arguments]
        assert_refused(RunningJob(command).finish(DEADLINE_S), 2)


# Negative control


def test_control_without_the_check_an_id_beyond_the_vocabulary_passes(monkeypatch):
    with pytest.raises(UsageError):
        check_prompt([1, 99], 1, None, 50, 10, 10)
    monkeypatch.setattr(llmrun.requests, "check_ids", lambda ids, _: list(ids))
    assert check_prompt([1, 99], 1, None, 50, 10, 10) == ([1, 99], 1)
