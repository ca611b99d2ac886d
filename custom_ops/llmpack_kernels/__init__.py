"""GPU kernels in Triton, written once for NVIDIA and AMD (FORMAT.md 8.4); truth is `llmpack_ops.reference`.

`llmpack.kernels` compiles them ahead of time; Triton's interpreter runs them in the tests. Nothing here is imported on a box.
"""
