"""PagedAttention with sinks in a GPU's graph, on the stand-in driver: what is launched for it, and what is refused."""

from __future__ import annotations

import checks
import pytest
import shapes
import standin
from test_gpu_launcher import run  # noqa: F401

from llmpack.kernel_plan import attention

SIZES = dict(zip(("num_heads", "num_kv_heads", "head_dim"), checks.SINKING, strict=True))


def write_kernels(path, *, has_sinks: bool):
    standin.write_kernels(path, list(attention(*checks.SINKING, shapes.BLOCK_SIZE, has_sinks=has_sinks)))
    return path


def node(num_inputs: int) -> str:
    attributes = {"num_inputs": num_inputs, "scale": 1.0, "window": 9, **SIZES, "block_size": shapes.BLOCK_SIZE}
    return f'checks.ort.node("PagedAttention", name="a", **{attributes})'


def test_it_is_right_with_sinks(run, tmp_path):  # noqa: F811
    """Of a prompt, of decoded tokens, whose keys several programs share, and of mixed steps."""
    standin.write_kernels(tmp_path / "k.bin", checks.extra_specs())
    assert run(tmp_path / "k.bin", "checks.sinks()") == "0 \n"


@pytest.mark.parametrize("has_sinks", [True, False])
def test_a_node_without_sinks_and_one_with_them_has_its_own_kernels(run, tmp_path, has_sinks):  # noqa: F811
    """The other's would read sinks that there are not, or leave them out."""
    kernels = write_kernels(tmp_path / "k.bin", has_sinks=has_sinks)
    wanted = f"block_size 16, {'' if has_sinks else 'has_sinks 1, '}head_dim 64, num_heads 64, num_kv_heads 8"
    assert f"has no attention with {wanted}: it belongs to another model" in run(kernels, node(8 if has_sinks else 9))


def test_sinks_of_other_heads_are_named(run, tmp_path):  # noqa: F811
    body = f"""
    cache, some = (10, (2, 16, 8, 64)), checks.device.allocate(1 << 16)
    shapes_of = [(10, (1, 80 * 64)), (1, (1, 64)), cache, cache, (6, (1,)), (6, (2,)), (6, (1,)), (6, (1, 3)), (1, (63,))]
    given = [(kind, shape, some) for kind, shape in shapes_of]
    checks.ort.call({node(9)}, given, [(10, (1, 64 * 64), some)], checks.device.stream)"""
    expected = "PagedAttention 'a': input sinks has shape [63], expected [64] = [num_heads]"
    assert expected in run(write_kernels(tmp_path / "k.bin", has_sinks=True), body)
