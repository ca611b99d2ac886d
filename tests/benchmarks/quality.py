"""What a way of storing weights costs in quality and in bits: perplexity and divergence from float32, on trained models.

    python tests/benchmarks/quality.py --ggml .../libggml-base.so [--checkpoint DIR --text FILE]...

Each --checkpoint takes the --text at the same place; without any, the demo checkpoint and its held-out text. --ggml is a shared
library of llama.cpp, whose own functions quantize the rows "llama.cpp"; without it, these are left out. A second model:
tests/checkpoints/train_demo.py --model tied. Needs torch, transformers, sentencepiece.

Weights are quantized and dequantized in place of the model's own; activations stay float32. "KL" is the mean divergence of the
next token's distribution from float32's, times 1000. Perplexity ratios of 0.1 % are within luck on such models; KL decides.
Bits count everything that is stored of the matrices, scales included: of all of them ("file"), and of those that a token
reads ("token": a row of the embedding is next to nothing, unless it is tied and so also the head). RMS is the error of the
projections, relative.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from transformers import LlamaForCausalLM

from llmpack.quantize import quantize_q4, quantize_q6, quantize_q8
from llmpack_ops.reference import dequantize

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
WINDOW = 256  # tokens of one sequence
_GGML_TYPES = {"Q4_0": (2, "dequantize_row_q4_0", 18, 32), "Q6_K": (14, "dequantize_row_q6_K", 210, 256)}

Matrix = torch.Tensor


@dataclass(frozen=True)
class Storage:
    """A way to store a matrix: what its weights become, and the bits of one."""

    restore: Callable[[Matrix], Matrix]
    bits: float
    group_size: int = 1  # divides in_features


FLOAT16 = Storage(lambda weight: weight.half().float(), 16)


def ours(storage: str, group_size: int) -> Storage:
    """Return what `pack` does."""
    quantize = {"q4": quantize_q4, "q6": quantize_q6, "q8": quantize_q8}[storage]

    def restore(weight: Matrix) -> Matrix:
        return torch.from_numpy(dequantize(*quantize(weight.numpy(), group_size), storage).astype(np.float32))

    return Storage(restore, int(storage[1]) + 16 / group_size, group_size)


def llama_cpp(library: ctypes.CDLL, name: str) -> Storage:
    """Return what llama.cpp's quantize program does, by its own functions."""
    kind, dequantizer, block_bytes, block = _GGML_TYPES[name]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t

    def restore(weight: Matrix) -> Matrix:
        source = np.ascontiguousarray(weight.numpy(), np.float32)
        rows, columns = source.shape
        packed = np.zeros(source.size // block * block_bytes, np.uint8)
        pointer = ctypes.c_void_p
        library.ggml_quantize_chunk(
            ctypes.c_int(kind), pointer(source.ctypes.data), pointer(packed.ctypes.data), ctypes.c_int64(0),
            ctypes.c_int64(rows), ctypes.c_int64(columns), None,
        )  # fmt: skip
        restored = np.empty_like(source)
        getattr(library, dequantizer)(
            pointer(packed.ctypes.data), pointer(restored.ctypes.data), ctypes.c_int64(source.size)
        )
        return torch.from_numpy(restored)

    return Storage(restore, 8 * block_bytes / block, block)


class Judge:
    """A model, its text, and what float32 says of it."""

    def __init__(self, checkpoint: Path, text: Path, num_tokens: int) -> None:
        self.model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.is_tied = self.model.config.tie_word_embeddings
        pieces = sentencepiece.SentencePieceProcessor(str(checkpoint / "tokenizer.model"))
        ids = [1, *pieces.encode(text.read_text())][:num_tokens]
        self.windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
        if self.is_tied:  # apart, so that each can be stored its own way
            self.model.lm_head.weight = torch.nn.Parameter(self.model.model.embed_tokens.weight.detach().clone())
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.dim() == 2}
        self.original = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.reference: list[Matrix] = []
        self.base, _ = self._measure()

    def _measure(self) -> tuple[float, float]:
        """Return (nats per token, divergence from float32 per token)."""
        loss = divergence = count = 0.0
        is_first = not self.reference
        with torch.no_grad():
            for i, windows in enumerate(self.windows.split(8)):
                logs = self.model(windows).logits[:, :-1].log_softmax(-1)
                if is_first:
                    self.reference.append(logs)
                divergence += (self.reference[i].exp() * (self.reference[i] - logs)).sum().item()
                loss -= logs.gather(2, windows[:, 1:, None]).double().sum().item()
                count += windows[:, 1:].numel()
        return loss / count, divergence / count

    def fits(self, linear: Storage, head: Storage, embedding: Storage) -> bool:
        """Tell whether the groups divide every in_features; llama.cpp takes other types where its own do not."""
        storages = {"embed_tokens": embedding, "lm_head": head}
        sizes = [
            (weight.shape[1], next((s for part, s in storages.items() if part in name), linear).group_size)
            for name, weight in self.original.items()
        ]
        return all(columns % group_size == 0 for columns, group_size in sizes)

    def row(self, name: str, linear: Storage, head: Storage, embedding: Storage) -> str:
        """Measure one setting. A tied embedding is stored once where head and embedding are stored alike."""
        file_bits = file_weights = token_bits = token_weights = error = energy = 0.0
        with torch.no_grad():
            for key, original in self.original.items():
                role = "embedding" if "embed_tokens" in key else "head" if "lm_head" in key else "linear"
                storage = {"embedding": embedding, "head": head, "linear": linear}[role]
                self.parameters[key].copy_(storage.restore(original))
                if role == "linear":
                    error += float((self.parameters[key] - original).square().sum())
                    energy += float(original.square().sum())
                if role != "embedding":
                    token_bits += storage.bits * original.numel()
                    token_weights += original.numel()
                if role != "head" or not self.is_tied or head is not embedding:
                    file_bits += storage.bits * original.numel()
                    file_weights += original.numel()
        loss, divergence = self._measure()
        bits = f"{file_bits / file_weights:.3f} | {token_bits / token_weights:.3f}"
        return f"| {name} | {bits} | {(error / energy) ** 0.5:.4f} | {np.exp(loss - self.base):.4f} | {1e3 * divergence:.3f} |"


def settings(ggml: ctypes.CDLL | None, is_tied: bool) -> list[tuple[str, Storage, Storage, Storage]]:
    """Return (name, projections, head, embedding) of every row."""
    q4, q6 = ours("q4", 64), ours("q6", 128)
    rows = []
    if ggml is not None:
        q4_0, q6_k = llama_cpp(ggml, "Q4_0"), llama_cpp(ggml, "Q6_K")
        # llama.cpp stores a tied embedding, which is its head, as it stores a head.
        embedding = q6_k if is_tied else q4_0
        rows.append(("llama.cpp Q4_0: head Q6_K", q4_0, q6_k, embedding))
        rows.append(("llama.cpp Q4_0 --pure", q4_0, q4_0, q4_0))
    rows.append(("**q4 as packed: group 64, head and embedding q6 at 128**", q4, q6, q6))
    for size in (32, 128):
        rows.append((f"q4 group {size}, head and embedding q6 at 128", ours("q4", size), q6, q6))
    for storage, size in (("q6", 64), ("q6", 32), ("q8", 64), ("q4", 64)):
        other = ours(storage, size)
        rows.append((f"q4 group 64, head and embedding {storage} at {size}", q4, other, other))
    rows += [
        ("q4 group 64, the rest f16", q4, FLOAT16, FLOAT16),
        ("head q6 at 128, the rest f16", FLOAT16, q6, FLOAT16),
        ("embedding q6 at 128, the rest f16", FLOAT16, FLOAT16, q6),
        ("**q8 as packed: group 64**", *[ours("q8", 64)] * 3),
        ("q8 group 32", *[ours("q8", 32)] * 3),
        ("q8 group 128", *[ours("q8", 128)] * 3),
    ]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, action="append", default=[])
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--ggml", type=Path, help="libggml-base.so of llama.cpp")
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    args = parser.parse_args(arguments)
    if len(args.checkpoint) != len(args.text):
        parser.error("give one --text for each --checkpoint")
    ggml = ctypes.CDLL(str(args.ggml)) if args.ggml else None
    models = list(zip(args.checkpoint, args.text, strict=True))
    for checkpoint, text in models or [(CHECKPOINTS / "demo", CHECKPOINTS / "heldout.txt")]:
        judge = Judge(checkpoint, text, args.tokens)
        perplexity = np.exp(judge.base)
        print(
            f"\n{checkpoint.name}: float32 {perplexity:.4f} on {judge.windows.numel()} tokens in windows of {WINDOW}\n"
        )
        print("| stored as | bits, file | bits, token | RMS | perplexity / float32's | KL |\n|---|---|---|---|---|---|")
        for name, *storages in settings(ggml, judge.is_tied):
            if args.only in name and judge.fits(*storages):
                print(judge.row(name, *storages), flush=True)


if __name__ == "__main__":
    main()
