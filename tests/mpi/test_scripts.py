"""A user's own script on every rank: it sees the same everywhere, whatever happens on one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import (
    llmrun_command,
    run_script,
)

from llmrun import launcher

Packed = Callable[..., Path]

SCRIPT = """
import os, sys
from llmrun import Engine, UsageError
from llmrun.errors import UsageError
log = []
with Engine(sys.argv[1], max_num_seqs=2) as engine:
    options = dict(max_tokens=8, temperature=0.0, ignore_eos=True)
    log.append("".join(engine.generate("The king", **options)))
    for piece in engine.generate("The king", **options):
        log.append(piece)
        if engine.rank == int(sys.argv[2]): break
    log.append([c.ids for c in engine.generate_batch(["O", "War"], **options)])
    try: list(engine.generate(""))
    except UsageError as error: log.append(error.code)
    log.append(float(engine.logits([1, 2, 3]).sum()))
    log.append(engine.selfcheck()[0])
os.write(1, f"rank {engine.rank}: {log}\\n".encode())  # one call: mpirun mixes what ranks write
""".replace("Engine, UsageError", "Engine")


@pytest.mark.parametrize("who_stops", [0, -1], ids=["rank 0 stops early", "nobody stops early"])
def test_a_script_sees_the_same_on_every_rank(who_stops: int, packed_tiny: Packed, tmp_path: Path) -> None:
    outcome = run_script(SCRIPT, tmp_path, packed_tiny(2, "f32"), who_stops)
    assert (outcome.code, outcome.leftovers) == (0, []), outcome.stderr
    first, second = (line.partition(": ")[2] for line in sorted(outcome.stdout.splitlines()))
    assert first == second


def test_another_ranks_stopping_early_disturbs_nobody(packed_tiny: Packed, tmp_path: Path) -> None:
    outcome = run_script(SCRIPT, tmp_path, packed_tiny(2, "f32"), 1)
    assert (outcome.code, outcome.leftovers) == (0, []), outcome.stderr


@pytest.mark.parametrize("ends", ["in order", "at its end"])
def test_a_generator_that_is_left_open_outlives_its_engine(ends: str, packed_tiny: Packed, tmp_path: Path) -> None:
    opening = "with Engine(sys.argv[1]) as engine:" if ends == "in order" else "engine = Engine(sys.argv[1])\nif True:"
    outcome = run_script(
        f"import os, sys\nfrom llmrun import Engine\n{opening}\n"
        "    pieces = engine.generate('The king', max_tokens=50, ignore_eos=True)\n"
        "    os.write(1, f'{len(next(pieces)) > 0}\\n'.encode())\n",
        tmp_path,
        packed_tiny(2, "f32"),
    )
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, "True\nTrue\n", "")


def test_other_errors_of_rank_0_than_ours_are_those_of_every_rank(packed_tiny: Packed, tmp_path: Path) -> None:
    outcome = run_script(
        "import os, sys\nfrom llmrun import Engine\nwith Engine(sys.argv[1]) as engine:\n"
        "    prepare = engine.core.prepare\n"
        "    for error in (ZeroDivisionError('mine'), KeyboardInterrupt('mine'), UnicodeDecodeError('a', b'', 0, 1, 'mine')):\n"
        "        def fail(*_, **__): raise error\n"
        "        engine.core.prepare = fail\n"
        "        try: engine.complete([1])\n"
        "        except BaseException as found: os.write(1, f'{type(found).__name__} {found}\\n'.encode())\n"
        "    engine.core.prepare = prepare\n"
        "    os.write(1, f'{engine.complete([1], max_tokens=3, temperature=0).ids}\\n'.encode())\n",
        tmp_path,
        packed_tiny(2, "f32"),
    )
    assert (outcome.code, outcome.leftovers) == (0, []), outcome.stderr
    lines = sorted(outcome.stdout.splitlines())
    assert [line for line in lines if line[0] in "KZ"] == 2 * ["KeyboardInterrupt mine"] + 2 * [
        "ZeroDivisionError mine"
    ]
    assert [line.split()[0] for line in lines if line[0] in "IU"] == ["InternalError", "UnicodeDecodeError"]
    ids = [line for line in lines if line[0] == "["]
    assert len(ids) == 2
    assert ids[0] == ids[1]


def test_a_forked_child_of_a_rank_leaves_mpi_to_its_parent(packed_tiny: Packed, tmp_path: Path) -> None:
    outcome = run_script(
        "import os, sys\nfrom llmrun import Engine\nengine = Engine(sys.argv[1])\n"
        "if (child := os.fork()) == 0: sys.exit(5)\n"
        "code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
        "engine.logits([1])\nos.write(1, f'{code}\\n'.encode())\n",
        tmp_path,
        packed_tiny(2, "f32"),
    )
    assert (outcome.code, outcome.stdout, outcome.leftovers) == (0, "5\n5\n", []), outcome.stderr


@pytest.mark.parametrize(("kind", "shards"), [("llmrun", 1), ("llmrun", 2), ("script", 1)])
def test_a_program_that_a_rank_starts_is_no_rank(kind: str, shards: int, packed_tiny: Packed, tmp_path: Path) -> None:
    """It inherits the variables of MPICH's launcher, and not its descriptor."""
    if launcher.library_family() != launcher.MPICH:
        pytest.skip("Open MPI's launcher is found by an address, which a program inherits")
    inner = packed_tiny(shards, "f32")
    if kind == "llmrun":
        command = llmrun_command(inner, "-p", "The king", "-n", 4, "--temperature", 0, "--ignore-eos")
    else:
        program = (
            "import sys; from llmrun import Engine; print(Engine(sys.argv[1]).complete('The king', max_tokens=4).ids)"
        )
        command = [sys.executable, "-c", program, str(inner)]
    outcome = run_script(
        "import json, subprocess, sys\nfrom llmrun import Engine\nengine = Engine(sys.argv[1])\n"
        "done = subprocess.run(json.loads(sys.argv[2]), capture_output=True, text=True, timeout=40)\n"
        "engine.logits([1])\n"
        "if engine.rank == 0: print(json.dumps([done.returncode, done.stdout, done.stderr]))\n",
        tmp_path,
        packed_tiny(2, "f32"),
        json.dumps(command),
    )
    assert (outcome.code, outcome.leftovers) == (0, []), outcome.stderr
    code, text, complaints = json.loads(outcome.stdout)
    assert (code, complaints) == (0, "")
    assert text.strip()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["between", "inside"])
def test_an_exception_in_a_script_ends_the_job(rank: int, where: str, packed_tiny: Packed, tmp_path: Path) -> None:
    body = "for piece in engine.generate('a', max_tokens=50, ignore_eos=True):\n        " if where == "inside" else ""
    outcome = run_script(
        "import sys\nfrom llmrun import Engine\nwith Engine(sys.argv[1]) as engine:\n"
        f"    {body}if engine.rank == {rank}: raise ValueError('mine')\n"
        "    list(engine.generate('b', max_tokens=9))\n",
        tmp_path,
        packed_tiny(2, "f32"),
    )
    assert outcome.code != 0
    assert outcome.leftovers == []
    assert "ValueError: mine" in outcome.stderr
