"""Runs compiled PTX without a GPU: all threads of a program in step, a register being an array of theirs.

For kernels whose jumps are the same for all threads. It knows the instructions that they have here; another is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any  # of any type, one number a thread
_NAME = re.compile(r"[%$]?[A-Za-z_][\w.$]*")
_PIECES = re.compile(r"(;|:\s*\n|\{(?=\s*\.reg)|(?<=[;\s])\}(?=\s*\n))")
_COMPARISONS = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip
_OPERATIONS: dict[str, Callable[..., Array]] = {
    "mov": lambda a: a, "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c, "shl": lambda a, b: a << b, "shr": lambda a, b: a >> b,
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    "min": np.minimum, "max": np.maximum, "fma": lambda a, b, c: a.astype("f8") * b + c,
}  # fmt: skip


class Machine:
    """A launch of the only kernel of `text`; `memory`: arrays by address."""

    def __init__(self, text: str, threads: int, memory: dict[int, np.ndarray], shared_bytes: int) -> None:
        self._threads = threads
        self._memory = {at: array.reshape(-1).view(np.uint8) for at, array in memory.items()}
        self._shared = np.zeros(shared_bytes, np.uint8)
        head, _, body = re.sub(r"//[^\n]*", "", text[text.index(".entry") :]).partition(".reqntid")
        self._parameters = re.findall(r"\.param [^\n]*?(\w+)[,\n)]", head)
        self._program = _parse(body)
        self._labels = {item: at for at, item in enumerate(self._program) if isinstance(item, str)}
        self._values: dict[str, Array] = {}

    def run(self, program: int, arguments: list[int]) -> None:
        """Run one program of a grid of one dimension."""
        thread = np.arange(self._threads, dtype=np.uint32)
        self._values = {"%tid.x": thread, "%laneid": thread % 32, "global_smem": thread * 0}
        self._values["%ctaid.x"] = np.full_like(thread, program)
        given = dict(zip(self._parameters, arguments, strict=True))
        at = 0
        while at < len(self._program):
            item = self._program[at]
            at += 1
            if isinstance(item, str):
                continue
            guard, operation, operands = item
            active = np.ones(self._threads, bool)
            if guard:
                active = self._values[guard.lstrip("!")] ^ guard.startswith("!")
            if operation.startswith("bra"):
                assert active.all() or not active.any(), "threads part"
                at = self._labels[operands[0]] if active[0] else at
            elif operation == "ret":
                return
            elif operation.startswith("ld.param"):
                self._values[operands[0]] = np.full(self._threads, given[operands[1][1:-1]], f"u{_size(operation)}")
            elif operation.startswith(("ld.", "st.")):
                self._move(operation, operands, active)
            elif operation.startswith("ldmatrix"):
                self._load_matrices(operands)
            elif operation.startswith("mma"):
                self._multiply(operands)
            elif not operation.startswith("bar."):
                assert not guard, operation
                self._compute(operation, operands)

    def _addresses(self, operand: str) -> Array:
        base, _, offset = operand.strip("[] ").partition("+")
        return self._values[base.strip()].astype(np.int64) + int(offset or 0)

    def _move(self, operation: str, operands: list[str], active: Array) -> None:
        kind, space = operation.split(".")[:2]
        size = _size(operation)
        pointer, registers = operands[::-1] if kind == "ld" else operands
        names = _names(registers)
        addresses = self._addresses(pointer)
        assert (addresses[active] % (size * len(names)) == 0).all(), f"{operation}: not aligned"
        for i, name in enumerate(names):
            numbers = self._values.get(name, np.zeros(self._threads, f"u{size}")).copy()
            for thread in np.flatnonzero(active):
                piece = self._piece(int(addresses[thread]) + i * size, size, space)
                if kind == "ld":
                    numbers[thread] = piece.view(f"u{size}")[0]
                else:
                    piece[:] = numbers[thread : thread + 1].view(np.uint8)[:size]
            self._values[name] = numbers

    def _piece(self, address: int, size: int, space: str) -> np.ndarray:
        if space == "shared":
            return self._shared[address : address + size]
        start = max(a for a in self._memory if a <= address)
        piece = self._memory[start][address - start : address - start + size]
        assert piece.size == size, f"beyond the array at {start:#x}"
        return piece

    def _load_matrices(self, operands: list[str]) -> None:
        thread, addresses = np.arange(self._threads), self._addresses(operands[1])
        for i, name in enumerate(_names(operands[0])):
            at = addresses[thread // 32 * 32 + 8 * i + thread % 32 // 4] + thread % 4 * 4
            self._values[name] = self._shared.view("u4")[at // 4]

    def _multiply(self, operands: list[str]) -> None:
        """m16n8k16 (PTX ISA, "Matrix Fragments"): sums in float64, rounded once."""
        results, of_a, of_b, of_c = (_names(operand) for operand in operands)
        a, b = ([self._values[name].view("f2").reshape(-1, 32, 2) for name in names] for names in (of_a, of_b))
        c = [self._source(name, "f4").reshape(-1, 32) for name in of_c]
        g, t = np.arange(32) // 4, np.arange(32) % 4
        first = np.zeros((len(c[0]), 16, 16))
        second, total = np.zeros((len(c[0]), 16, 8)), np.zeros((len(c[0]), 16, 8))
        for j in range(2):
            for i in range(4):
                first[:, g + i % 2 * 8, 2 * t + i // 2 * 8 + j] = a[i][:, :, j]
            for i in range(2):
                second[:, 2 * t + 8 * i + j, g] = b[i][:, :, j]
                total[:, g + 8 * i, 2 * t + j] = c[2 * i + j]
        total += first @ second
        for i, name in enumerate(results):
            number = total[:, g + i // 2 * 8, 2 * t + i % 2].astype("f4")
            self._values[name] = number.reshape(-1).view("u4")

    def _compute(self, operation: str, operands: list[str]) -> None:
        if operation.startswith("mov") and "{" in operands[0]:
            names = _names(operands[0])
            whole = np.ascontiguousarray(self._values[operands[1]])
            parts = whole.view(f"u{_size(operation) // len(names)}").reshape(-1, len(names))
            self._values |= {name: parts[:, i].copy() for i, name in enumerate(names)}
            return
        kinds, function = _function(operation)
        sources = [self._source(o, kind) for o, kind in zip(operands[1:], kinds[1:], strict=False)]
        with np.errstate(over="ignore"):
            result = np.asarray(function(*sources)).astype(kinds[0])
        self._values[operands[0]] = result if kinds[0] == "?" else result.view(f"u{result.dtype.itemsize}")

    def _source(self, text: str, kind: str) -> Array:
        """Return an operand as numbers of a type."""
        if text in self._values:
            value = self._values[text]
        else:
            number = int(text[2:], 16) if text.startswith("0f") else int(text, 0)
            width = max(1, np.dtype(kind).itemsize)
            value = np.full(self._threads, number & ((1 << 8 * width) - 1), f"u{width}")
        if kind == "?" or value.dtype.itemsize != np.dtype(kind).itemsize:
            return value.astype(kind)
        return value.view(kind)


def _size(operation: str) -> int:
    return int(re.findall(r"\.[usbf](\d+)", operation)[-1]) // 8


def _names(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{} ").split(",")]


def _parse(body: str) -> list[str | tuple[str, str, list[str]]]:
    """Return labels, and instructions as (guard, operation, operands). Registers declared in a block get names of their own."""
    program: list[str | tuple[str, str, list[str]]] = []
    block, own = 0, set[str]()
    for piece in _PIECES.split(body[body.index("{") + 1 :]):
        text = piece.strip()
        if text in ("{", "}"):
            block, own = block + 1, set()
        elif text.startswith(".reg") and "%" not in text:
            for name, count in re.findall(r"(\w+)(?:<(\d+)>)?\s*(?:,|$)", text.split(None, 2)[2]):
                own |= {f"{name}{i}" for i in range(int(count))} if count else {name}
        elif text.startswith("$L"):
            program.append(text)
        elif text and text not in (";", ":") and not text.startswith("."):
            text = _rename(text, own, block)
            guard, rest = text[1:].split(None, 1) if text.startswith("@") else ("", text)
            operation, operands = [*rest.split(None, 1), ""][:2]
            program.append((guard, operation, [o.strip() for o in re.findall(r"(?:\{[^}]*\}|[^,{])+", operands)]))
    return program


def _rename(text: str, own: set[str], block: int) -> str:
    return _NAME.sub(lambda found: f"{found[0]}@{block}" if found[0] in own else found[0], text)


def _function(operation: str) -> tuple[tuple[str, ...], Callable[..., Array]]:
    """Return the types of the result and the operands, and what an operation does."""
    name, *parts = operation.split(".")
    kinds = [
        p[0].replace("b", "u").replace("s", "i") + str(int(p[1:]) // 8) for p in parts if re.fullmatch(r"[usbf]\d+", p)
    ]
    kind = kinds[0] if kinds else "?"
    bits = 8 * np.dtype(kind).itemsize
    if parts[-1] == "f16x2":
        return ("u4",) * 3, lambda a, b: _OPERATIONS[name](a.view("f2"), b.view("f2")).view("u4")
    if name in ("mul", "mad") and "wide" in parts:
        wide = f"{kind[0]}8"
        return (wide, kind, kind, wide), lambda a, b, c=0: a.astype(wide) * b.astype(wide) + c
    special: dict[str, tuple[tuple[str, ...], Callable[..., Array]]] = {
        "prmt": (("u4",) * 4, _prmt),
        "dp2a": (("u4",) * 4, lambda a, b, c: (a & 0xFFFF) * (b & 255) + (a >> 16) * (b >> 8 & 255) + c),
        "setp": (("?", kind, kind), _COMPARISONS.get(parts[0], np.equal)),
        "selp": ((kind, kind, kind, "?"), lambda a, b, p: np.where(p, a, b)),
        "cvt": ((kind, kinds[-1] if kinds else kind), lambda a: a),
        "bfe": ((kind,) * 4, lambda a, at, n: a << (bits - at - n) >> (bits - n)),
    }
    return special[name] if name in special else ((kind,) * 4, _OPERATIONS[name])


def _prmt(low: Array, high: Array, selector: Array) -> Array:
    pool = high.astype("u8") << np.uint64(32) | low
    result = np.zeros_like(low)
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = (pool >> (8 * (nibble & 7)).astype("u8") & 255).astype("u4")
        result |= np.where(nibble & 8, (byte >> 7) * 255, byte).astype("u4") << 8 * i
    return result
