"""A kernel begins while the one before it ends (programmatic dependent launch; FORMAT.md 8.6): sm_90 and later.

Every kernel calls `begin` before it reads or writes memory, outside of every branch and loop. From there on all is as if it had
been launched after the kernel before it, and the kernel after it may take the places that get free. Before `begin` it may only
ask for weights, which no kernel writes, by `request`: a load there could be moved, and would gain nothing, for x comes out of
the second-level cache as well.

Where the compiler's option `launch_pdl` is not set (`llmpack.kernel_compiler`: older chips, AMD) and in Triton's interpreter
both are nothing.
"""

import triton
import triton.language as tl
from triton.language import core

from llmpack_kernels.decode import INTERPRETED

# Bytes of one piece of weights that a program asks for: the 792 programs that an H200 holds at once, for half of its cache.
MOST_BYTES = 32 << 10
# First: the next kernel's programs may have the places that this one's leave, once each of these has said so.
# Triton's own functions for the two clobber no memory.
_BEGIN = """
    griddepcontrol.launch_dependents;
    griddepcontrol.wait;
    mov.b32 $0, 0;
"""
# By one thread; Triton runs the text of a scalar in all of them.
_PREFETCH = """{
    .reg .pred first;
    .reg .b32 thread;
    mov.u32 thread, %tid.x;
    setp.eq.u32 first, thread, 0;
    @first cp.async.bulk.prefetch.L2.global [$1], BYTES;
    mov.b32 $0, 0;
}"""


def _is_on(semantic):
    return getattr(semantic.builder.options, "launch_pdl", False)


@core.builtin
def _begin(_semantic=None):
    if _is_on(_semantic):
        core.inline_asm_elementwise(_BEGIN, "=r,~{memory}", [], core.int32, False, 1, _semantic=_semantic)


@core.builtin
def _request(address, size, _semantic=None):
    if _is_on(_semantic):
        text = _PREFETCH.replace("BYTES", str(min(size.value // 16 * 16, MOST_BYTES)))
        core.inline_asm_elementwise(text, "=r,l", [address], core.int32, False, 1, _semantic=_semantic)


@triton.jit
def begin():
    """Wait until all kernels launched before have ended, and what they wrote is there."""
    if not INTERPRETED:
        _begin()


@triton.jit
def request(weights, BYTES: tl.constexpr):
    """Ask for the first MOST_BYTES of the bytes at `weights`, a multiple of 16, into the second-level cache."""
    if not INTERPRETED:
        _request(weights.to(tl.int64), BYTES)
