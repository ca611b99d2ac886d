"""Ahead-of-time packager: a Hugging Face Llama checkpoint goes in, an artifact comes out (offline, on the build machine)."""

__version__ = "0.1.0"
