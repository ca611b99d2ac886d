"""Writer and reader of a kernel file: the GPU code of one target in one file (FORMAT.md 8.2).

In: `Kernel`s, compiled. Out: bytes, the same for the same kernels. Little-endian records of fixed size, so that the launcher
reads them with no parser. It compiles nothing and knows no kernel.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from llmrun.artifact import IntegrityError

MAGIC, VERSION = b"LLMPKGPU", 1
CODE_KINDS = {"cubin": 1, "ptx": 2, "hsaco": 3}
# What a grid is made of; the launcher knows these numbers of the step (FORMAT.md 8.4).
DIMENSIONS = {"one": 0, "rows": 1, "sequences": 2, "splits": 3, "experts": 4}
COOPERATIVE, WAITS = 1, 2  # flags of a kernel record
CODE_ALIGNMENT = 64

_HEADER = struct.Struct("<8sIIII16s16sII")  # 64 bytes
_KERNEL = struct.Struct("<32s64sQQIIIIIIIIII12IIII12x")  # 224 bytes
_CONSTANT = struct.Struct("<24sq")  # 32 bytes
_PARAMETER = struct.Struct("<24s16sII")  # 48 bytes


@dataclass(frozen=True)
class GridAxis:
    """Programs along one axis: ceil(dimension / divisor) * factor + plus."""

    dimension: str = "one"
    divisor: int = 1
    factor: int = 1
    plus: str | None = None


@dataclass(frozen=True)
class Parameter:
    """One argument of a kernel.

    `type` is Triton's ("*fp16", "i32"); `size` counts bytes; `divisor`: the address, or the number, must be a multiple of it.
    """

    name: str
    type: str
    size: int
    divisor: int = 1


@dataclass(frozen=True)
class Kernel:
    """One compiled variant of an operation; its members are those of the kernel record (FORMAT.md 8.3)."""

    op: str
    constants: dict[str, int]
    function: str
    code: bytes
    num_warps: int
    shared_bytes: int
    grid: tuple[GridAxis, GridAxis, GridAxis]
    parameters: tuple[Parameter, ...]
    num_ctas: int = 1
    cooperative: bool = False
    waits: bool = False  # for the kernels before it, by itself (FORMAT.md 8.6)
    global_scratch_bytes: int = 0
    profile_scratch_bytes: int = 0
    registers: int = 0
    spill_bytes: int = 0
    static_shared_bytes: int = 0


@dataclass(frozen=True)
class KernelFile:
    """The kernels of one target, sorted by op and constants."""

    backend: str  # "cuda", "hip"
    arch: str  # "sm_89", "gfx1100"; for PTX the oldest chip that runs it
    code_kind: str  # "cubin", "ptx", "hsaco"
    warp_size: int
    kernels: tuple[Kernel, ...]


def to_bytes(file: KernelFile) -> bytes:
    """Serialise; equal code is stored once."""
    kernels = sorted(file.kernels, key=lambda k: (k.op, sorted(k.constants.items())))
    num_constants = sum(len(k.constants) for k in kernels)
    num_parameters = sum(len(k.parameters) for k in kernels)
    tables = _HEADER.size + _KERNEL.size * len(kernels) + _CONSTANT.size * num_constants
    tables += _PARAMETER.size * num_parameters
    code, offsets = bytearray(), {}
    for kernel in kernels:
        if kernel.code not in offsets:
            code += bytes(-(tables + len(code)) % CODE_ALIGNMENT)
            offsets[kernel.code] = tables + len(code)
            code += kernel.code
    records, constants, parameters = bytearray(), bytearray(), bytearray()
    for kernel in kernels:
        axes: list[int] = []
        for axis in kernel.grid:
            axes += [DIMENSIONS[axis.dimension], axis.divisor, axis.factor, DIMENSIONS[axis.plus or "one"]]
        records += _KERNEL.pack(
            _text(kernel.op, 32),
            _text(kernel.function, 64),
            offsets[kernel.code],
            len(kernel.code),
            kernel.num_warps,
            kernel.shared_bytes,
            kernel.num_ctas,
            COOPERATIVE * kernel.cooperative | WAITS * kernel.waits,
            kernel.global_scratch_bytes,
            kernel.profile_scratch_bytes,
            len(constants) // _CONSTANT.size,
            len(kernel.constants),
            len(parameters) // _PARAMETER.size,
            len(kernel.parameters),
            *axes,
            kernel.registers,
            kernel.spill_bytes,
            kernel.static_shared_bytes,
        )
        for name, value in sorted(kernel.constants.items()):
            constants += _CONSTANT.pack(_text(name, 24), value)
        for p in kernel.parameters:
            parameters += _PARAMETER.pack(_text(p.name, 24), _text(p.type, 16), p.size, p.divisor)
    header = _HEADER.pack(
        MAGIC,
        VERSION,
        len(kernels),
        num_constants,
        num_parameters,
        _text(file.backend, 16),
        _text(file.arch, 16),
        CODE_KINDS[file.code_kind],
        file.warp_size,
    )
    return bytes(header + records + constants + parameters + code)


def from_bytes(data: bytes, name: str) -> KernelFile:
    """Read a kernel file back.

    Raises:
        IntegrityError: not a kernel file of this version, or a record points outside of it; names `name`.
    """
    try:
        return _read(data)
    except (struct.error, ValueError, LookupError) as error:
        raise IntegrityError(
            f"{name}: not a kernel file of version {VERSION}: {error}. Pack again.", code="E310"
        ) from None


def _read(data: bytes) -> KernelFile:
    magic, version, num_kernels, num_constants, num_parameters, backend, arch, kind, warp_size = _HEADER.unpack_from(
        data
    )
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError(f"found {magic!r} version {version}")
    at = _HEADER.size
    records = [_KERNEL.unpack_from(data, at + i * _KERNEL.size) for i in range(num_kernels)]
    at += num_kernels * _KERNEL.size
    constants = [_CONSTANT.unpack_from(data, at + i * _CONSTANT.size) for i in range(num_constants)]
    at += num_constants * _CONSTANT.size
    parameters = [_PARAMETER.unpack_from(data, at + i * _PARAMETER.size) for i in range(num_parameters)]
    names = {number: name for name, number in DIMENSIONS.items()}
    kernels = []
    for record in records:
        op, function, offset, size, num_warps, shared, num_ctas, flags, scratch, profile = record[:10]
        first_constant, count_constants, first_parameter, count_parameters = record[10:14]
        if offset + size > len(data):
            raise ValueError(f"the code of {_string(function)} ends at {offset + size}, the file at {len(data)}")
        if first_constant + count_constants > num_constants or first_parameter + count_parameters > num_parameters:
            raise ValueError(f"the tables of {_string(function)} end outside of the file's")
        axes = [record[14 + 4 * i : 18 + 4 * i] for i in range(3)]
        kernels.append(
            Kernel(
                op=_string(op),
                constants={_string(n): v for n, v in constants[first_constant : first_constant + count_constants]},
                function=_string(function),
                code=data[offset : offset + size],
                num_warps=num_warps,
                shared_bytes=shared,
                grid=tuple(GridAxis(names[d], v, f, names[p] if p else None) for d, v, f, p in axes),  # type: ignore[arg-type]
                parameters=tuple(
                    Parameter(_string(n), _string(t), s, d)
                    for n, t, s, d in parameters[first_parameter : first_parameter + count_parameters]
                ),
                num_ctas=num_ctas,
                cooperative=bool(flags & COOPERATIVE),
                waits=bool(flags & WAITS),
                global_scratch_bytes=scratch,
                profile_scratch_bytes=profile,
                registers=record[26],
                spill_bytes=record[27],
                static_shared_bytes=record[28],
            )
        )
    kinds = {number: name for name, number in CODE_KINDS.items()}
    return KernelFile(_string(backend), _string(arch), kinds[kind], warp_size, tuple(kernels))


def _text(text: str, size: int) -> bytes:
    data = text.encode("ascii")
    if len(data) >= size:
        raise ValueError(f"{text!r} is longer than {size - 1} bytes")
    return data


def _string(data: bytes) -> str:
    return data.rstrip(b"\0").decode("ascii")
