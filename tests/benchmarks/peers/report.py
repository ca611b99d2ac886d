"""The arithmetic of a comparison, and its table. Runs nothing.

A figure is the median of its rounds, or missing with a reason. A ratio is one of medians, and above 1 means that llmpack
is better, whether the figure is a speed or a duration.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

OURS = ("llmpack 2 ranks x 1 thread", "llmpack 1 rank x 2 threads")
PEERS = ("llama.cpp Q4_0", "onnxruntime-genai int4")
PROGRAMS = (*OURS, *PEERS)


class Missing(Exception):
    """A figure that this machine did not give; the text is the reason."""


@dataclass
class Figure:
    """What one program gave in each round."""

    samples: list[float] = field(default_factory=list)
    reason: str = ""  # why there is none

    @property
    def median(self) -> float | None:
        """None: missing."""
        return None if self.reason or not self.samples else statistics.median(self.samples)

    def add(self, value: float) -> None:
        """Take a round's value; one that is no positive number makes the figure missing."""
        if math.isfinite(value) and value >= 0:
            self.samples.append(value)
        else:
            self.reason = f"a round gave {value}"


@dataclass
class Row:
    """One line of the table: the same figure of several programs."""

    shape: str
    what: str
    unit: str
    figures: dict[str, Figure] = field(default_factory=dict)
    is_speed: bool = True  # more is better
    goal: str = ""

    def median(self, program: str) -> float | None:
        """Return a program's median, None if it is missing."""
        figure = self.figures.get(program)
        return None if figure is None else figure.median

    def ratio(self, peer: str, ours: str | None = None) -> float | None:
        """Return how many times better ours is than a peer; ours is the first of `OURS` that has a figure."""
        mine = self.median(ours) if ours else next((m for name in OURS if (m := self.median(name)) is not None), None)
        theirs = self.median(peer)
        if mine is None or theirs is None or mine == 0 or theirs == 0:
            return None
        return mine / theirs if self.is_speed else theirs / mine


def depth_cost(near: float, far: float, kv_bytes: float, read_bytes_per_s: float) -> float:
    """Return how many times longer a step takes with more context, its further KV bytes' own time subtracted.

    Args:
        near, far: tokens/s at the two depths.
        kv_bytes: keys and values between the two depths, read once a step.
        read_bytes_per_s: measured.
    """
    return (1 / far - kv_bytes / read_bytes_per_s) * near


def format_table(rows: list[Row], names: Sequence[str] = PROGRAMS) -> str:
    """Return the table of these programs, and below it why figures are missing."""
    reasons: list[str] = []
    peers = [name for name in names if name in PEERS]
    head = ["shape", "what", *names, *(f"x {peer.split()[0]}" for peer in peers), "to reach"]
    lines = [head]
    for row in rows:
        cells = [_cell(row, row.figures.get(program), reasons) for program in names]
        ratios = ["" if (r := row.ratio(peer)) is None else f"{r:.2f}" for peer in peers]
        lines.append([row.shape, f"{row.what}, {row.unit}" if row.unit else row.what, *cells, *ratios, row.goal])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    notes = [f"({number}) missing: {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*text, "", *notes]) + "\n"


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """Return the rows with every sample."""
    return [
        {
            "shape": row.shape,
            "what": row.what,
            "unit": row.unit,
            "is_speed": row.is_speed,
            "goal": row.goal,
            "figures": {
                name: {"median": figure.median, "samples": figure.samples, "missing": figure.reason or None}
                for name, figure in row.figures.items()
            },
            "ratios": {peer: row.ratio(peer) for peer in PEERS},
        }
        for row in rows
    ]


def _cell(row: Row, figure: Figure | None, reasons: list[str]) -> str:
    """Return median and range; a number in brackets where the figure is missing."""
    if figure is None:
        return ""
    if figure.median is None:
        reason = f"{figure.reason or 'no round ran'}"
        if reason not in reasons:
            reasons.append(reason)
        return f"missing ({reasons.index(reason) + 1})"
    low, high = min(figure.samples), max(figure.samples)
    return f"{_short(figure.median)}" + (f" ({_short(low)} to {_short(high)})" if len(figure.samples) > 1 else "")


def _short(value: float) -> str:
    """Return three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"
