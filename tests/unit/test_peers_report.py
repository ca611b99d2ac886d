"""The arithmetic of `make bench`: ratios, missing figures, and what it measures itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from benchmarks.peers import __main__ as bench
from benchmarks.peers import report
from benchmarks.peers.programs import resident_beside
from benchmarks.peers.report import OURS, PEERS, Figure, Missing, Row
from benchmarks.peers.shapes import SHAPES, Shape, write_checkpoint


def test_a_ratio_above_one_is_better_for_speeds_and_for_durations() -> None:
    speed = Row("s", "decode", "tokens/s", {OURS[0]: Figure([60, 10, 50]), PEERS[0]: Figure([40, 25])})
    assert speed.ratio(PEERS[0]) == pytest.approx(50 / 32.5)
    time = Row("s", "start", "s", {OURS[0]: Figure([2.0]), PEERS[0]: Figure([3.0])}, is_speed=False)
    assert time.ratio(PEERS[0]) == pytest.approx(1.5)


def test_a_missing_figure_has_no_ratio_and_keeps_its_reason_in_the_table() -> None:
    row = Row("s", "decode", "tokens/s", {OURS[0]: Figure([10.0]), PEERS[0]: Figure([5.0, 6.0], "no compiler")})
    assert row.ratio(PEERS[0]) is None
    text = report.format_table([row])
    assert "missing (1)" in text
    assert "(1) missing: no compiler" in text
    assert report.as_json([row])[0]["figures"][PEERS[0]]["missing"] == "no compiler"


def test_one_rank_stands_in_where_two_ranks_failed() -> None:
    row = Row("s", "d", "", {OURS[0]: Figure(reason="x"), OURS[1]: Figure([9.0]), PEERS[1]: Figure([3.0])})
    assert row.ratio(PEERS[1]) == pytest.approx(3.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_an_impossible_value_makes_the_figure_missing(value: float) -> None:
    figure = Figure()
    figure.add(1.0)
    figure.add(value)
    assert figure.median is None


def test_the_cost_of_depth_leaves_out_the_time_of_the_bytes() -> None:
    # 20 ms a step near; 26 ms far, of which 0.2 GB at 40 GB/s are 5 ms: 21 ms, 1.05 times as long.
    assert report.depth_cost(50, 1 / 0.026, 0.2e9, 40e9) == pytest.approx(1.05)


def test_rounds_go_in_turn_and_a_failed_program_is_left_out() -> None:
    calls: list[str] = []

    def way(name: str, fails: bool = False) -> float:
        calls.append(name)
        if fails:
            raise Missing("no memory")
        return 1.0

    row = bench.in_turn(Row("s", "w", ""), {"a": lambda: way("a"), "b": lambda: way("b", True)}, 3)
    assert calls == ["a", "b", "a", "a"]
    assert (len(row.figures["a"].samples), row.figures["b"].reason) == (3, "no memory")


def test_resident_memory_leaves_out_the_weights() -> None:
    smaps = """7f00-7f10 r--p 00000000 fd:00 12 /models/a b/rank-0/weights.bin
Size:  900 kB
Rss:   800 kB
7f20-7f30 rw-p 00000000 00:00 0 [heap]
Rss:   30 kB
Pss:   30 kB
7f40-7f50 r-xp 00000000 fd:00 13 /usr/lib/libc.so.6
Rss:   7 kB
"""
    assert resident_beside(smaps) == 37 * 1024


def test_shapes_have_the_published_number_of_parameters() -> None:
    assert SHAPES["tinyllama-1.1b"].num_parameters == 1_100_048_384
    assert SHAPES["llama-2-7b"].num_parameters == 6_738_415_616
    assert SHAPES["gemma-3-1b"].num_parameters == 999_885_952
    ernie = replace(SHAPES["ernie-4.5-21b-a3b-4-layers"], num_hidden_layers=28)
    assert round(ernie.num_parameters / 1e8) == 218


def test_a_checkpoint_holds_the_tensors_of_its_shape(tmp_path: Path) -> None:
    shape = Shape(64, 96, 2, 4, 2, 50, 128)
    write_checkpoint(shape, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == {name for name, _ in shape.tensors()}
    with safe_open(tmp_path / index["model.norm.weight"], "np") as file:
        query = file.get_tensor("model.layers.0.self_attn.q_proj.weight")
        other = file.get_tensor("model.layers.1.self_attn.q_proj.weight")
    assert query.shape == (64, 64)
    assert 0.01 < query.astype(np.float64).std() < 0.03
    assert not np.array_equal(query, other)


@pytest.mark.parametrize("typed", [["--shapes", "gpt-5"], ["--rounds", "0"], ["--shapes", ""]])
def test_bad_arguments_are_refused(typed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.arguments_of(typed)
    assert stop.value.code == 2
    assert "--" in capsys.readouterr().err
