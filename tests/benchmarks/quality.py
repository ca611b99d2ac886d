"""Quality per byte: what each way of quantizing the demo model (or another checkpoint) costs on text it has not seen.

usage: python tests/benchmarks/quality.py [--checkpoint DIR] [--text FILE] [--tokens N] [--only WORD]

Prints, for each setting: bits per weight of the projections and the head, the weights' relative RMS error, the ratio of the
perplexity to float32's, and the mean Kullback-Leibler divergence of the next token's distribution from float32's. The last is
the sharper judge: it compares distributions, not luck with 15,000 words. Weights are quantized and put back as float32; the
model is transformers'. Nothing of the packer is under test here but `quantize_q4`, the row "packed as it is".

Codebooks have 16 integer levels of at most 7 bits, -64..63: offset to unsigned they fit the u8 x s8 dot products of every
instruction set without saturation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from transformers import LlamaForCausalLM

from llmpack.quantize import CANDIDATES, quantize_q4

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
WINDOW = 256  # tokens of one sequence
WIDE = tuple(6.0 + 0.15 * i for i in range(24))  # largest entry / step
EIGHT = tuple(-float(c) for c in CANDIDATES)
SHARES = tuple(0.7 + 0.05 * i for i in range(9))  # of the outermost level, for codebooks
# llama.cpp's IQ4_NL (ggml-common.h, kvalues_iq4nl), and the same scaled to 7 bits.
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
IQ4_NL_7 = tuple(round(level / 2) for level in IQ4_NL)

Matrix = torch.Tensor
Quantizer = Callable[[Matrix], Matrix]


def exact(weight: Matrix) -> Matrix:
    """Leave a matrix as it is."""
    return weight


def _half(scales: Matrix) -> Matrix:
    return scales.to(torch.float16).to(torch.float32)


def _inverse(scales: Matrix) -> Matrix:
    return torch.where(scales != 0, 1 / scales, torch.zeros_like(scales))


def _extreme(groups: Matrix) -> Matrix:
    low, high = groups.amin(1, True), groups.amax(1, True)
    return torch.where(-low >= high, low, high)


def integers(group_size: int, largest: int = 127) -> Quantizer:
    """Symmetric rounding to -largest..largest, one float16 scale per group; group_size 0: one per row."""

    def quantize(weight: Matrix) -> Matrix:
        groups = weight.reshape(-1, group_size or weight.shape[1])
        scales = _half(groups.abs().amax(1, True) / largest)
        return ((groups * _inverse(scales)).round().clamp(-largest, largest) * scales).reshape(weight.shape)

    return quantize


def q4_0(group_size: int) -> Quantizer:
    """llama.cpp's Q4_0: the entry of largest magnitude becomes -8."""

    def quantize(weight: Matrix) -> Matrix:
        groups = weight.reshape(-1, group_size)
        scales = _half(_extreme(groups) / -8)
        return ((groups * _inverse(scales)).round().clamp(-8, 7) * scales).reshape(weight.shape)

    return quantize


def as_packed(group_size: int) -> Quantizer:
    """What `pack` does."""

    def quantize(weight: Matrix) -> Matrix:
        quantized, scales = quantize_q4(weight.numpy(), group_size)
        return torch.from_numpy(
            (quantized.astype(np.float32) - 8) * np.repeat(scales.astype(np.float32), group_size, 1)
        )

    return quantize


def searched(
    group_size: int,
    levels: Sequence[int],
    shares: Sequence[float],
    *,
    power: float = 0,
    signs: tuple[int, ...] = (1, -1),
) -> Quantizer:
    """Choose a step per group by squared error among candidates, each refitted by least squares.

    Args:
        group_size: input features that share a scale.
        levels: the 16 values in units of the scale, rising.
        shares: candidates: the largest entry / (levels[0] * step).
        power: errors are weighted by |weight| ** power.
        signs: 1: the largest entry lies at levels[0]; -1: on the other side.
    """
    values = torch.tensor(levels, dtype=torch.float32)
    middles = (values[1:] + values[:-1]) / 2

    def quantize(weight: Matrix) -> Matrix:
        groups = weight.reshape(-1, group_size)
        scales, _ = best_scales(groups, values, middles, shares, power, signs)
        scales = _half(scales)
        return (values[torch.bucketize(groups * _inverse(scales), middles)] * scales).reshape(weight.shape)

    return quantize


def best_scales(
    groups: Matrix, values: Matrix, middles: Matrix, shares: Sequence[float], power: float, signs: tuple[int, ...]
) -> tuple[Matrix, Matrix]:
    """Return (scale, gain) of each group: gain = <w, q>^2 / <q, q>, the squared error that the scale saves."""
    extreme = _extreme(groups)
    weights = groups.abs() ** power if power else torch.ones_like(groups)
    best, scales = torch.full_like(extreme, -1), torch.zeros_like(extreme)
    for share in shares:
        for sign in signs:
            q = values[torch.bucketize(groups * _inverse(extreme) * (sign * share * values[0]), middles)]
            products, squares = (weights * groups * q).sum(1, True), (weights * q * q).sum(1, True)
            gain = products * products * _inverse(squares)
            scales = torch.where(gain > best, products * _inverse(squares), scales)
            best = torch.maximum(best, gain)
    return scales, best


def fit_levels(matrices: Sequence[Matrix], group_size: int, rounds: int = 12, sample: int = 400_000) -> tuple[int, ...]:
    """Fit 16 levels of 7 bits to a model: k-means over groups in units of their best scale, weighted by its square."""
    groups = torch.cat([matrix.reshape(-1, group_size) for matrix in matrices])
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))
    groups = groups[order[: sample // group_size]]
    values = torch.tensor(IQ4_NL_7, dtype=torch.float32)
    for _ in range(rounds):
        middles = (values[1:] + values[:-1]) / 2
        scales, _ = best_scales(groups, values, middles, SHARES, 0, (1, -1))
        index = torch.bucketize(groups * _inverse(scales), middles).flatten()
        sums = torch.zeros(16).index_add_(0, index, (groups * scales).flatten())
        counts = torch.zeros(16).index_add_(0, index, (scales * scales).expand_as(groups).flatten())
        values = torch.sort(sums / counts).values
        values *= -64 / values[0] if -values[0] >= values[-1] else 63 / values[-1]
    return tuple(int(v) for v in values.round())


class Judge:
    """A model, its text, and what float32 says of it."""

    def __init__(self, checkpoint: Path, text: Path, num_tokens: int) -> None:
        self.model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        pieces = sentencepiece.SentencePieceProcessor(str(checkpoint / "tokenizer.model"))
        ids = [1, *pieces.encode(text.read_text())][:num_tokens]
        self.windows = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
        self.parameters = dict(self.model.named_parameters())
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

    def matrices(self) -> list[Matrix]:
        """Return the projections and the head."""
        return [p for name, p in self.original.items() if p.dim() == 2 and "embed_tokens" not in name]

    def row(
        self,
        name: str,
        linear: tuple[Quantizer, float],
        head: tuple[Quantizer, float] | None = None,
        embedding: Quantizer = exact,
    ) -> str:
        """Measure one setting; linear and head are (quantizer, bits per weight)."""
        start = time.monotonic()
        bits = weights = error = energy = 0.0
        with torch.no_grad():
            for key, original in self.original.items():
                if original.dim() != 2:
                    continue
                if "embed_tokens" in key:
                    self.parameters[key].copy_(embedding(original))
                    continue
                quantizer, cost = (head or linear) if "lm_head" in key else linear
                self.parameters[key].copy_(quantizer(original))
                bits, weights = bits + cost * original.numel(), weights + original.numel()
                error += float((self.parameters[key] - original).square().sum())
                energy += float(original.square().sum())
        loss, divergence = self._measure()
        figures = f"{bits / weights:6.3f} | {(error / energy) ** 0.5:.4f} | {np.exp(loss - self.base):.4f}"
        return f"| {name:46} | {figures} | {1e3 * divergence:6.3f} | {time.monotonic() - start:5.1f} s |"


def settings(judge: Judge) -> list[tuple[str, Callable[[], str]]]:
    """Return (name, measurement) of every setting of the table."""
    uniform = tuple(range(-8, 8))
    rows: list[tuple[str, Callable[[], str]]] = []

    def add(name: str, *arguments: tuple[Quantizer, float], embedding: Quantizer = exact) -> None:
        rows.append((name, lambda: judge.row(name, *arguments, embedding=embedding)))

    for size in (32, 64, 128):
        bits = 4 + 16 / size
        add(f"Q4_0's rule, group {size}", (q4_0(size), bits))
        add(f"q4 as packed (8 steps), group {size}", (as_packed(size), bits))
        wide = [c / 8 for c in WIDE]
        for power in (0, 0.5, 1, 2):
            add(
                f"24 steps, error x |w|^{power}, group {size}",
                (searched(size, uniform, wide, power=power, signs=(1,)), bits),
            )
        add(f"24 steps, both signs, group {size}", (searched(size, uniform, wide), bits))
    for size in (32, 64):
        bits = 4 + 16 / size
        fitted = fit_levels(judge.matrices(), size)
        add(f"IQ4_NL, 8-bit levels, group {size}", (searched(size, IQ4_NL, SHARES), bits))
        add(f"IQ4_NL, 7-bit levels, group {size}", (searched(size, IQ4_NL_7, SHARES), bits))
        add(f"fitted 7-bit levels, group {size}", (searched(size, fitted, SHARES), bits))
        add(f"fitted, one sign, group {size}", (searched(size, fitted, SHARES, signs=(1,)), bits))
    q4, book = (as_packed(32), 4.5), (searched(64, fit_levels(judge.matrices(), 64), SHARES), 4.25)
    add("q4 group 32, head q8 group 32", q4, (integers(32), 8.5))
    add("q4 group 32, head q8 group 64", q4, (integers(64), 8.25))
    add("q4 group 32, head q8 group 128", q4, (integers(128), 8.125))
    add("q4 group 32, head q6 group 32", q4, (integers(32, 31), 6.5))
    add("q4 group 32, head f16", q4, (exact, 16))
    add("Q4_0 group 32, head q6 (a llama.cpp file, nearly)", (q4_0(32), 4.5), (integers(32, 31), 6.5625))
    add("q4 group 64, head q8 group 64", (as_packed(64), 4.25), (integers(64), 8.25))
    add("fitted group 64, head q8 group 64", book, (integers(64), 8.25))
    add("q4 group 32, embedding q8 group 32", q4, embedding=integers(32))
    add("f16, embedding q8 group 32", (exact, 16), embedding=integers(32))
    add("f16, embedding q8, one scale per row", (exact, 16), embedding=integers(0))
    add("f16, embedding q4 group 32", (exact, 16), embedding=as_packed(32))
    add("f16, head q8 group 32", (exact, 16), (integers(32), 8.5))
    add("f16, head q4 group 32", (exact, 16), q4)
    add("q8 group 32", (integers(32), 8.5))
    add("q8 group 128", (integers(128), 8.125))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINTS / "demo")
    parser.add_argument("--text", type=Path, default=CHECKPOINTS / "heldout.txt")
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--only", default="", help="settings whose name contains this")
    args = parser.parse_args()
    judge = Judge(args.checkpoint, args.text, args.tokens)
    print(f"float32: {np.exp(judge.base):.4f} on {judge.windows.numel()} tokens in windows of {WINDOW}\n")
    print(f"| {'setting':46} | bits/w | RMS    | ppl ratio | 1000 KL | time |\n|---|---|---|---|---|---|")
    for name, measure in settings(judge):
        if args.only in name:
            print(measure(), flush=True)


if __name__ == "__main__":
    main()
