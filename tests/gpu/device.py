"""One GPU through its driver's C interface, by ctypes: memory, copies, streams, events, graphs. Real or stand-in."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

NAMES = {  # what: (CUDA, HIP)
    "allocate": ("cuMemAlloc_v2", "hipMalloc"),
    "free": ("cuMemFree_v2", "hipFree"),
    "copy_in": ("cuMemcpyHtoDAsync_v2", "hipMemcpyHtoDAsync"),
    "copy_out": ("cuMemcpyDtoHAsync_v2", "hipMemcpyDtoHAsync"),
    "copy_within": ("cuMemcpyDtoDAsync_v2", "hipMemcpyDtoDAsync"),
    "fill": ("cuMemsetD8Async", "hipMemsetD8Async"),
    "stream_create": ("cuStreamCreate", "hipStreamCreateWithFlags"),
    "synchronize": ("cuStreamSynchronize", "hipStreamSynchronize"),
    "event_create": ("cuEventCreate", "hipEventCreateWithFlags"),
    "event_record": ("cuEventRecord", "hipEventRecord"),
    "event_synchronize": ("cuEventSynchronize", "hipEventSynchronize"),
    "event_elapsed": ("cuEventElapsedTime", "hipEventElapsedTime"),
    "begin_capture": ("cuStreamBeginCapture_v2", "hipStreamBeginCapture"),
    "end_capture": ("cuStreamEndCapture", "hipStreamEndCapture"),
    "instantiate": ("cuGraphInstantiateWithFlags", "hipGraphInstantiateWithFlags"),
    "launch_graph": ("cuGraphLaunch", "hipGraphLaunch"),
    "memory_info": ("cuMemGetInfo_v2", "hipMemGetInfo"),
}
POINTER, SIZE, HANDLE = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p


def load_driver(*, is_hip: bool) -> ctypes.CDLL:
    """Open the library that the launcher has opened already."""
    if not is_hip:
        return ctypes.CDLL("libcuda.so.1")
    try:
        return ctypes.CDLL("libamdhip64.so.7")
    except OSError:
        return ctypes.CDLL("libamdhip64.so.6")


class Device:
    """The device that `llmpack_ops_gpu_open` made current on this thread."""

    def __init__(self, *, is_hip: bool = False) -> None:
        self.driver = load_driver(is_hip=is_hip)
        self._is_hip = is_hip
        self.stream = self._made("stream_create", ctypes.c_uint(1))

    def call(self, what: str, *arguments: Any) -> None:
        name = NAMES[what][self._is_hip]
        code = getattr(self.driver, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name}: error {code}")

    def _made(self, what: str, *arguments: Any) -> HANDLE:
        handle = HANDLE()
        self.call(what, ctypes.byref(handle), *arguments)
        return handle

    def allocate(self, num_bytes: int) -> int:
        address = POINTER()
        self.call("allocate", ctypes.byref(address), SIZE(max(num_bytes, 256)))
        return address.value

    def free(self, address: int) -> None:
        self.call("free", POINTER(address))

    def free_bytes(self) -> int:
        free, total = SIZE(), SIZE()
        self.call("memory_info", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def write(self, address: int, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array)
        if data.nbytes:
            self.call("copy_in", POINTER(address), HANDLE(data.ctypes.data), SIZE(data.nbytes), self.stream)
            self.synchronize()

    def read(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        array = np.empty(shape, dtype)
        if array.nbytes:
            self.call("copy_out", HANDLE(array.ctypes.data), POINTER(address), SIZE(array.nbytes), self.stream)
            self.synchronize()
        return array

    def put(self, array: np.ndarray) -> int:
        address = self.allocate(array.nbytes)
        self.write(address, array)
        return address

    def copy_within(self, to: int, source: int, num_bytes: int) -> None:
        self.call("copy_within", POINTER(to), POINTER(source), SIZE(num_bytes), self.stream)

    def clear(self, address: int, num_bytes: int) -> None:
        self.call("fill", POINTER(address), ctypes.c_ubyte(0), SIZE(num_bytes), self.stream)

    def synchronize(self) -> None:
        self.call("synchronize", self.stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` launches; return what launches it again, as one graph."""
        self.call("begin_capture", self.stream, ctypes.c_int(0))
        try:
            work()
        finally:
            graph = HANDLE()
            self.call("end_capture", self.stream, ctypes.byref(graph))
        executable = self._made("instantiate", graph, ctypes.c_uint64(0))
        return lambda: self.call("launch_graph", executable, self.stream)

    def seconds(self, work: Callable[[], None], repeats: int, warm_up: int = 2) -> float:
        """Return the mean seconds of one `work`, by the device's own clock."""
        start, end = (self._made("event_create", ctypes.c_uint(0)) for _ in range(2))
        for _ in range(warm_up):
            work()
        self.call("event_record", start, self.stream)
        for _ in range(repeats):
            work()
        self.call("event_record", end, self.stream)
        self.call("event_synchronize", end)
        milliseconds = ctypes.c_float()
        self.call("event_elapsed", ctypes.byref(milliseconds), start, end)
        return max(milliseconds.value, 1e-6) / 1e3 / repeats
