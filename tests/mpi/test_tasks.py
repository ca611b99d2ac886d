"""Many requests at once on several ranks: asyncio on rank 0, the others following, and the bits of each request alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from harness import RunningJob, script_command

Packed = Callable[..., Path]
SCRIPT = """
import asyncio, json, os, sys, time
from llmrun import AsyncEngine
from llmrun.kv_cache import BlockPool

async def main(engine):
    options = dict(max_tokens=30, temperature=0.0, ignore_eos=True, logprobs=1)
    prompts = [[5, 6, 7, 8] * 5 + [5 + i] for i in range(6)]
    async with engine:
        alone = [await engine.complete(p, **options, reuse_prefix=False) for p in prompts]
        core = engine._engine.core
        core._pool = core._scheduler._pool = BlockPool(8, core._pool.block_size)
        together = await engine.complete_batch(prompts, **options, speculate=4)
        async for piece in engine.generate(prompts[0], **options):
            break
        same = [(a.ids, a.logprobs) == (b.ids, b.logprobs) for a, b in zip(alone, together)]
        stats = engine.stats()
        before = time.process_time()
        await asyncio.sleep(0.5)
        idle_s = time.process_time() - before
    facts = {"same": same, "preempted": stats.preemptions > 0, "shared": stats.prefix_hits > 0, "idle_s": idle_s}
    os.write(1, (json.dumps(facts) + "\\n").encode())

engine = AsyncEngine(sys.argv[1])
if engine.rank == 0:
    asyncio.run(main(engine))
else:
    sys.exit(engine.follow())
"""


def test_tasks_on_two_ranks_get_the_bits_of_each_alone(packed_tiny: Packed, tmp_path: Path) -> None:
    command = script_command(SCRIPT, tmp_path, packed_tiny(2, "q4"))
    outcome = RunningJob(command).finish(120)
    assert (outcome.code, outcome.leftovers) == (0, []), outcome.stderr
    facts = json.loads(outcome.stdout)
    assert facts["same"] == [True] * 6
    assert facts["preempted"]
    assert facts["shared"]
    assert facts["idle_s"] < 0.05
