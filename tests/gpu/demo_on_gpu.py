"""The demo model of hardware.py: python demo_on_gpu.py ARTIFACT OPERATORS MINI_ORT CHIP DRY"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

import box  # noqa: E402
from device import Device  # noqa: E402
from executor import GpuModel, MiniOrt  # noqa: E402

BOUND = 1e-2  # float16 between operators, against float64, as a share of the largest logit


def main(artifact: Path, operators: Path, mini: Path, chip: str, dry: str) -> None:
    from llmrun.gpu_choice import choose_kernels

    is_hip = chip.startswith("gfx")
    if int(dry):
        import standin
        from gpu_artifacts import specs_of

        standin.serve_launches(specs_of(artifact), is_hip=is_hip)

    manifest = json.loads((artifact / "manifest.json").read_text())
    target = choose_kernels(chip, manifest["kernels"])
    if target is None:
        raise SystemExit(f"{artifact} holds code for {', '.join(manifest['kernels'])}, not for {chip}")
    box.open_gpu(box.load_operators(operators), artifact / manifest["kernels"][target], vendor=int(is_hip))
    ort = MiniOrt(mini, operators, "ROCMExecutionProvider" if is_hip else "CUDAExecutionProvider")
    device = Device(is_hip=is_hip)
    model = GpuModel(artifact / "rank-0" / "gpu.onnx", ort, device, num_blocks=64)
    check = json.loads((artifact / "selfcheck.json").read_text())
    expected = np.array(check["logits"])
    errors, digest = [], hashlib.sha256()
    for chunk in (1, len(check["ids"])):
        found = box.logits_of(model, check["ids"], chunk)
        errors.append(float(np.abs(found[-1] - expected).max() / np.abs(expected).max()))
        digest.update(found.tobytes())
    for _ in range(2 if int(dry) else 20):
        digest.update(captured(model, device, check["ids"]).tobytes())
    if not max(errors) <= BOUND:
        raise SystemExit(f"logits differ by {max(errors):.2e} of the largest, expected at most {BOUND}")
    print(
        json.dumps(
            {
                "error": max(errors),
                "bound": BOUND,
                "tokens": len(check["ids"]),
                "target": target,
                "sha256": digest.hexdigest(),
            }
        )
    )


def captured(model: GpuModel, device: Device, ids: list[int]) -> np.ndarray:
    """The logits after each id, by one captured step that is replayed."""
    blocks = -(-len(ids) // box.BLOCK_SIZE) + 1
    feeds = [box.feeds([[token]], [n + 1], blocks) for n, token in enumerate(ids)]
    step = model.step(feeds[0])
    replay = device.capture(step.run)
    parts = []
    for own in feeds:
        step.feed(own)
        replay()
        parts.append(step.output("logits"))
    step.close()
    return np.concatenate(parts)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *sys.argv[4:])
