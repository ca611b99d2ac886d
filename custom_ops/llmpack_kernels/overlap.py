"""A kernel begins while the one before it ends (programmatic dependent launch; FORMAT.md 8.6): sm_90 and later.

Every kernel calls `wait` before it reads or writes memory, outside of every branch and loop: from there on all is as if it had
been launched after the kernel before it. After that, products late, it calls `release`: the next kernel's programs then take
the places that get free, and wait there.

Where the compiler's option `launch_pdl` is not set (`llmpack.kernel_compiler`: older chips, AMD) and in Triton's interpreter
they are nothing.
"""

import triton
from triton.language import core

from llmpack_kernels.decode import INTERPRETED

# Triton's own functions for these clobber no memory.
_WAIT = "griddepcontrol.wait; mov.b32 $0, 0;"
_RELEASE = "griddepcontrol.launch_dependents; mov.b32 $0, 0;"


def _is_on(semantic):
    return getattr(semantic.builder.options, "launch_pdl", False)


@core.builtin
def _wait(_semantic=None):
    if _is_on(_semantic):
        core.inline_asm_elementwise(_WAIT, "=r,~{memory}", [], core.int32, False, 1, _semantic=_semantic)


@core.builtin
def _release(_semantic=None):
    if _is_on(_semantic):
        core.inline_asm_elementwise(_RELEASE, "=r,~{memory}", [], core.int32, False, 1, _semantic=_semantic)


@triton.jit
def wait():
    """Wait until all kernels launched before have ended, and what they wrote is there."""
    if not INTERPRETED:
        _wait()


@triton.jit
def release():
    """Let the programs of the next kernel have the places that get free, once all of this one's have said so."""
    if not INTERPRETED:
        _release()


@triton.jit
def begin():
    """`wait`, then `release`."""
    wait()
    release()
