"""Hugging Face directory -> a lazy reader of its safetensors files (never the whole model in memory).

In: a model directory with `model.safetensors`, or else `model.safetensors.index.json` and the files it names. Out:
`Checkpoint`, which reads rectangular blocks of named tensors with `pread`: mapping the files would count every page touched
as this process's memory. Headers are checked by the safetensors library first. Pickle files (`.bin`) are refused: they can
run code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import safetensors

from llmpack import expert_tensors
from llmpack.config import read_config
from llmpack.model_files import list_names
from llmpack.model_reader import EXPECTED, open_regular, read_json, refuse_pointer
from llmpack.tensor_info import TensorInfo
from llmrun.artifact import MANIFEST_NAME, IncompatibleError, IntegrityError, ModelConfig, SourceEntry, UsageError

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_ELEMENTS_AT_ONCE = 1 << 20
_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_DTYPES[expert_tensors.MXFP4] = np.dtype("<f4")


class Checkpoint:
    """An open checkpoint; use as a context manager."""

    def __init__(
        self, model_dir: Path, config: ModelConfig, tensors: dict[str, TensorInfo], stamps: dict[str, tuple[int, ...]]
    ) -> None:
        self.model_dir = model_dir
        self.config = config
        self.tensors = tensors
        self._files = {name: open_regular(model_dir / name) for name in {t.file for t in tensors.values()}}
        self._stamps = stamps  # of the directory's files, before any was read
        self.notes: list[str] = []  # what was done otherwise than the files say
        if _SINGLE in self._files and (model_dir / _INDEX).exists():
            self.notes.append(f"{_INDEX} is ignored, as by transformers: {_SINGLE} is there")

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def read(self, name: str, rows: slice, columns: slice) -> np.ndarray:
        """Read a block of a matrix; a vector counts as a matrix of one column, and stacked matrices as one.

        Args:
            name: a tensor of shape [num_rows, num_columns] or [num_rows], or [.., num_columns], whose other axes count rows.
            rows: range of rows; may have a step.
            columns: range of columns; of a vector: 0 to 1.
        Returns:
            [rows, columns], float32 (exact for bfloat16 and MXFP4) or float16, as the file has it.
        Raises:
            IntegrityError: the file ends early, or a value is NaN or infinite; names the tensor.
        """
        info = self.tensors[name]
        width, item = self.layout(name)
        raw = np.empty((len(_range(rows)), width), item)
        self.read_rows(name, rows, raw)
        block = raw[:, columns]
        if info.dtype == "BF16":
            block = (block.astype(np.uint32) << 16).view(np.float32)
        if not np.isfinite(block).all():
            raise IntegrityError(
                f"{self.model_dir / info.file}: {name}: holds NaN or infinity; it cannot be packed.", code="E312"
            )
        return block

    def layout(self, name: str) -> tuple[int, np.dtype]:
        """Return the width of a tensor's rows and their type in the file (uint16 for bfloat16; float32 for MXFP4)."""
        info = self.tensors[name]
        return info.shape[-1] if len(info.shape) > 1 and not info.is_vector else 1, _DTYPES[info.dtype]

    def read_rows(self, name: str, rows: slice, raw: np.ndarray) -> None:
        """Read whole rows of a matrix as they are in the file, but for MXFP4, which is decoded; unchecked.

        Args:
            name: a tensor.
            rows: range of rows; may have a step.
            raw: contiguous [rows, width] of the type that `layout` says; filled.
        Raises:
            IntegrityError: the file ends early; names the tensor.
        """
        info, wanted, width = self.tensors[name], _range(rows), raw.shape[1]

        def read(tensor: TensorInfo, first: int, array: np.ndarray) -> None:
            self._read(name, tensor, first, array)

        def of_all(tensor: TensorInfo, width: int, item: np.dtype) -> np.ndarray:
            every = np.empty((wanted[-1] + 1 - wanted[0], width), item)
            read(tensor, wanted[0] * width, every)
            return every[:: wanted.step]

        if not wanted:
            return
        if info.scales is not None:
            blocks = of_all(info, width // 2, np.dtype("u1"))
            scales = of_all(info.scales, width // expert_tensors.GROUP_SIZE, np.dtype("u1"))
            expert_tensors.decode(blocks, scales, raw)
        elif info.is_transposed:
            expert_tensors.read_transposed(info, wanted, raw, read)
        elif wanted.step > 1:
            raw[:] = of_all(info, width, raw.dtype)
        else:
            read(info, wanted[0] * width, raw)

    def _read(self, name: str, info: TensorInfo, first: int, array: np.ndarray) -> None:
        """Fill an array with a tensor's elements from number `first` on."""
        view, position = array.data.cast("B"), info.offset + first * array.itemsize
        while len(view):
            try:
                count = os.preadv(self._files[info.file], [view], position)
            except OSError as error:
                raise IntegrityError(
                    f"{self.model_dir / info.file}: {name}: cannot be read: {error.strerror}.", code="E311"
                ) from None
            if count <= 0:
                raise IntegrityError(
                    f"{self.model_dir / info.file}: {name}: the file ends early. Fetch it again.", code="E311"
                )
            view, position = view[count:], position + count

    def are_equal(self, first: str, second: str) -> bool:
        """Tell whether two tensors of one shape hold the same values; reads some rows of each at a time."""
        if first == second:
            return True
        num_rows, (width, _) = self.tensors[first].shape[0], self.layout(first)
        columns, step = slice(0, width), max(1, _ELEMENTS_AT_ONCE // width)
        runs = (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))
        return all(np.array_equal(self.read(first, rows, columns), self.read(second, rows, columns)) for rows in runs)

    def check_unchanged(self, others: Iterable[str]) -> None:
        """Make sure that what `hash_sources` hashes has been the same since the checkpoint was opened."""
        for name in self._sources(others):
            if _stamp(self.model_dir / name) != self._stamps.get(name):
                raise IntegrityError(
                    f"{self.model_dir / name}: changed while it was being packed. Start again.", code="E303"
                )

    def hash_sources(
        self, others: Iterable[str], is_cancelled: Callable[[], bool] = lambda: False
    ) -> list[SourceEntry]:
        """Hash config.json, every weight file and `others` (sequential reads; releases the interpreter's lock).

        `is_cancelled` is asked now and then; once it says yes, the result is incomplete.
        """
        entries = []
        piece = bytearray(1 << 20)
        for name in self._sources(others):
            digest, size = hashlib.sha256(), 0
            with open(open_regular(self.model_dir / name), "rb", buffering=0) as file:
                while (count := file.readinto(piece)) and not is_cancelled():
                    digest.update(memoryview(piece)[:count])
                    size += count
            entries.append(SourceEntry(name, size, digest.hexdigest()))
        return entries

    def _sources(self, others: Iterable[str]) -> list[str]:
        names = {"config.json", *self._files, *others}
        if _SINGLE not in self._files and (self.model_dir / _INDEX).exists():
            names.add(_INDEX)
        return sorted(names)


def open_checkpoint(model_dir: Path) -> Checkpoint:
    """Read config.json and the headers of all weight files.

    Raises:
        UsageError: not a model directory, or one without safetensors files.
        IntegrityError: a file is missing, truncated or not safetensors; names the file, and the tensor where one is known.
        IncompatibleError: a model or a data type that llmpack does not support.
    """
    if not os.path.isdir(model_dir):
        found = "not a directory" if os.path.exists(model_dir) else "no such directory"
        raise UsageError(f"{model_dir}: {found}; {EXPECTED}.", code="E202")
    try:
        names = list_names(model_dir)
    except OSError as error:
        raise UsageError(f"{model_dir}: cannot be read: {error.strerror}.", code="E202") from None
    if "config.json" not in names:
        _explain(model_dir, names)
    stamps = {name: _stamp(model_dir / name) for name in names}
    config = read_config(model_dir)
    tensors: dict[str, TensorInfo] = {}
    for name in _weight_files(model_dir):
        for tensor, info in _read_header(model_dir, name).items():
            if tensor in tensors:
                raise IntegrityError(
                    f"{model_dir}: {tensor} occurs in {tensors[tensor].file} and in {name}.", code="E311"
                )
            tensors[tensor] = info
    if config.has_expert_biases:
        tensors = expert_tensors.as_matrices(tensors)
    tensors = expert_tensors.as_vectors(tensors)
    for name, info in tensors.items():
        if info.dtype not in _DTYPES:
            supported = ", ".join(dtype for dtype in _DTYPES if dtype != expert_tensors.MXFP4)
            raise IncompatibleError(
                f"{model_dir / info.file}: {name} has dtype {info.dtype}; supported: {supported}. If the model is a"
                " quantized one, take the one that it was made from; else convert it."
            )
    return Checkpoint(model_dir, config, tensors, stamps)


def _range(rows: slice) -> range:
    return range(rows.start, rows.stop, rows.step or 1)


def _explain(model_dir: Path, names: list[str]) -> None:
    """Raise the error for a directory of another program, if it is one that people have; it holds no config.json."""
    if MANIFEST_NAME in names:
        raise UsageError(f"{model_dir}: an artifact already, which `llmrun` runs; {EXPECTED}.", code="E202")
    if any(name.endswith(".gguf") for name in names):
        raise UsageError(
            f"{model_dir}: weights for llama.cpp (.gguf), which `pack` does not read; {EXPECTED}.", code="E202"
        )


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what changes when a file is written or replaced; empty if it is not there."""
    try:
        info = path.stat()
    except OSError:
        return ()
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns


def _weight_files(model_dir: Path) -> list[str]:
    if os.path.isfile(model_dir / _SINGLE):
        return [_SINGLE]
    if (model_dir / _INDEX).exists():
        weight_map = read_json(model_dir / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise IntegrityError(f"{model_dir / _INDEX}: no weight_map.", code="E310")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if "/" in name or not os.path.isfile(model_dir / name):
                raise IntegrityError(
                    f"{model_dir / name}: named by {_INDEX}, but missing. Fetch it again.", code="E311"
                )
        return names
    # Beside it some publishers put the same weights in the form of another program.
    names = sorted(path.name for path in model_dir.glob(_SINGLE)) or sorted(
        path.name for path in model_dir.glob("*.safetensors")
    )
    if names:
        return names
    if any(model_dir.glob("*.bin")):
        raise UsageError(
            f"{model_dir}: found pickled weights (.bin) only, which can run code when loaded. Convert them to safetensors.",
            code="E202",
        )
    raise UsageError(f"{model_dir}: no *.safetensors; {EXPECTED}.", code="E202")


def _read_header(model_dir: Path, name: str) -> dict[str, TensorInfo]:
    path = model_dir / name
    with open(open_regular(path), "rb") as file:
        start = file.read(64)
        refuse_pointer(path, start)
        file.seek(8)
        header_bytes = int.from_bytes(start[:8], "little")
        try:
            header = json.loads(file.read(header_bytes)) if header_bytes < 100_000_000 else None
        except (ValueError, RecursionError):
            header = None
    if isinstance(header, dict):
        header.pop("__metadata__", None)
    size = path.stat().st_size
    try:
        # The library checks what we rely on below: unique names, and offsets that neither overlap nor leave holes.
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except Exception as error:  # the library raises its own type, and OSError for empty files
        raise IntegrityError(
            f"{path}: {_first_beyond(header, 8 + header_bytes, size)}{error}. Fetch it again.", code="E311"
        ) from None
    if not isinstance(header, dict):
        raise IntegrityError(f"{path}: the header is not a JSON object.", code="E311")
    tensors = {}
    for tensor, entry in header.items():
        tensors[tensor] = TensorInfo(
            name, entry["dtype"], tuple(entry["shape"]), 8 + header_bytes + entry["data_offsets"][0]
        )
    return tensors


def _first_beyond(header: object, data_start: int, size: int) -> str:
    """Name the first tensor that a truncated file does not hold, for the message."""
    if not isinstance(header, dict):
        return ""
    try:
        beyond = [(e["data_offsets"][1], n) for n, e in header.items() if data_start + e["data_offsets"][1] > size]
    except (KeyError, TypeError, IndexError):
        return ""
    return f"{min(beyond)[1]} ends beyond the file's {size} bytes: " if beyond else ""
