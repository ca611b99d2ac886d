"""decode.unpack_half in the assembly that NVIDIA's chips run, which the interpreter does not: here lane by lane."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers import layout_q4
from test_hopper import _halves, _word, run

from llmpack_kernels import decode
from llmpack_ops.reference import LEVELS

ASSEMBLY = {"q4": decode.UNPACK_Q4_HALF, "mxfp4": decode.UNPACK_MXFP4_HALF}


@pytest.mark.parametrize("storage", ASSEMBLY)
def test_every_code_in_every_place_of_a_word(storage: str) -> None:
    # A register of two float16 stands for both: $9 twice, and $0, $2, $4, $6 with the one behind.
    text = re.sub(r"\{(\$\d), \$\d\}", r"\1", ASSEMBLY[storage].value)
    firsts = (decode.negative_levels(storage, 0), decode.negative_levels(storage, 8))
    lasting = dict(zip(("o10", "o11", "o12", "o13"), (*firsts, 0x4240, 0x4341), strict=True))
    codes = np.stack([np.roll(np.arange(16), i)[:8] for i in range(16)]).astype(np.uint8)
    words = layout_q4(codes).view(np.uint32).ravel()
    for row, word in enumerate(words):
        scale = np.float16(0.0123 * (row + 1))
        found = run(text, o8=int(word), o9=_word(np.array([scale, scale])), **lasting)
        exact = LEVELS[storage][codes[row]] * np.float64(scale)
        np.testing.assert_array_equal(
            np.concatenate([_halves(found[f"${2 * i}"]) for i in range(4)]), exact.astype(np.float16)
        )
