"""What a rank keeps in memory beside mapped weights and the KV cache: Python, libraries, activations."""

from __future__ import annotations

import subprocess
import sys

# What is promised of a rank, at any model's size; of it libraries' files take 50 to 60, as the system maps ahead.
ALLOWED_MB = 150
# Measured 43 for this model, of which the interpreter with numpy and ONNX Runtime takes about 25.
ALLOWED_ANONYMOUS_MB = 55

SCRIPT = """
import sys
from llmrun import Engine

with Engine(sys.argv[1]) as engine:
    num_tokens = min(512, engine.max_seq_len - 8)
    prompt = [3 + i % 100 for i in range(num_tokens)]
    assert len(list(engine.generate_ids(prompt, max_tokens=8, ignore_eos=True))) == 8
    sizes, anonymous, name, ways = {}, 0, "", []
    for line in open("/proc/self/smaps"):
        key, *rest = line.split()
        if not key.endswith(":"):
            name = rest[-1] if len(rest) == 5 else ""
            if name.endswith("weights.bin"):
                ways.append(rest[0])
        elif key == "Rss:":
            sizes[name] = sizes.get(name, 0) + 1024 * int(rest[0])
        elif key == "Anonymous:":
            anonymous += 1024 * int(rest[0])
    weights = sum(size for name, size in sizes.items() if name.endswith("weights.bin"))
    cache = engine.manifest.kv_cache.bytes_per_token * (num_tokens + 8)
    print(sum(sizes.values()) - weights - cache, anonymous - cache, weights, *ways)
"""


def test_a_rank_holds_little_beside_weights_and_cache(packed_demo):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(packed_demo(1, "q4"))],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    beside, anonymous, weights, *ways = done.stdout.split()
    assert ways == ["r--s"]  # mapped once, whole, and nothing can write to it
    assert int(weights) > 0  # and that is what runs
    beside, anonymous = int(beside), int(anonymous)
    assert beside <= ALLOWED_MB * 10**6
    assert anonymous <= ALLOWED_ANONYMOUS_MB * 10**6
