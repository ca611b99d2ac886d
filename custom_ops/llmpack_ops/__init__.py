"""The operators of domain ai.llmpack, in numpy: what the compiled kernels are tested against."""

DOMAIN = "ai.llmpack"
VERSION = 9
