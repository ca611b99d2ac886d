"""Drive onnxruntime-genai. Runs in the peers' environment; prints one number.

python genai.py prompt DIR THREADS N
python genai.py generate DIR THREADS N DEPTH BATCH
python genai.py first DIR THREADS
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import onnxruntime_genai as og


def load(folder: str, threads: int) -> Any:
    config = og.Config(folder)
    options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    config.overlay(json.dumps(options))
    return og.Model(config)


def generator(model: Any, positions: int, batch: int) -> Any:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=positions, min_length=positions, batch_size=batch, do_sample=False)
    return og.Generator(model, params)


def tokens(length: int, run: int) -> np.ndarray:
    return np.array([3 + (7919 * i + 31 * run) % 30000 for i in range(length)], np.int32)


def prompt(model: Any, length: int, run: int) -> float:
    made = generator(model, length + 8, 1)
    ids = tokens(length, run)
    began = time.perf_counter()
    made.append_tokens(ids)
    made.get_logits()
    return length / (time.perf_counter() - began)


def generate(model: Any, steps: int, depth: int, batch: int, run: int) -> float:
    made = generator(model, max(depth, 1) + steps + 8, batch)
    made.append_tokens(np.stack([tokens(max(depth, 1), run + i) for i in range(batch)]).squeeze())
    made.generate_next_token()
    began = time.perf_counter()
    for _ in range(steps):
        made.generate_next_token()
    return steps * batch / (time.perf_counter() - began)


def main() -> None:
    mode, folder, threads, *rest = sys.argv[1:]
    numbers = [int(text) for text in rest]
    model = load(folder, int(threads))
    if mode == "first":
        made = generator(model, 8, 1)
        made.append_tokens(np.array([1], np.int32))
        made.generate_next_token()
        print(made.get_next_tokens()[0], flush=True)
    elif mode == "prompt":
        prompt(model, *numbers, run=1)
        print(prompt(model, *numbers, run=2))
    else:
        generate(model, 4, 1, numbers[2], run=1)
        print(generate(model, *numbers, run=2))


if __name__ == "__main__":
    main()
