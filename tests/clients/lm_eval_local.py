"""lm-evaluation-harness itself against `llmrun serve`: `make test-clients`, in an environment of its own (800 MB).

A small local task is made of the demo model's held-out text: which of four lines follows. The harness scores each choice
by log-likelihood (`echo`, `logprobs`, token-id prompts) and continues texts (`stop`, `max_tokens`). Every log-likelihood
that the harness got must be the one that transformers computes from the checkpoint. The accuracy itself says nothing: the
demo model is at chance in this task (0.275 of 40, transformers too).

    python tests/clients/lm_eval_local.py LLMRUN_PYTHON ARTIFACT      ARTIFACT: the demo model, packed with --quant f32
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
NUM_DOCUMENTS = 40
TOLERANCE = 5e-4  # of a sum of up to 20 log-probabilities; measured 2.7e-5

CHOICE = """\
task: llmpack_heldout_choice
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""
CONTINUE = """\
task: llmpack_heldout_continue
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 16, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


def make_task(folder: Path) -> None:
    """Write the documents and the two tasks."""
    lines = [line for line in (CHECKPOINTS / "heldout.txt").read_text().splitlines() if len(line) > 25]
    rng = random.Random(0)
    rows = []
    for i in rng.sample(range(len(lines)), NUM_DOCUMENTS):
        words = lines[i].split(" ")
        half = len(words) // 2
        others = [" " + " ".join(line.split(" ")[half:]) for line in rng.sample(lines, 3)]
        label = rng.randrange(4)
        choices = [*others[:label], " " + " ".join(words[half:]), *others[label:]]
        rows.append({"text": " ".join(words[:half]), "choices": choices, "label": label})
    data = folder / "heldout.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(CHOICE.format(data=data))
    (folder / "continue.yaml").write_text(CONTINUE.format(data=data))


def reference(folder: Path) -> list[list[float]]:
    """Return each document's log-likelihoods by transformers, with the harness's tokens: no BOS."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / "demo")
    model = LlamaForCausalLM.from_pretrained(CHECKPOINTS / "demo", dtype=torch.float32)
    results = []
    for row in map(json.loads, (folder / "heldout.jsonl").read_text().splitlines()):
        start = len(tokenizer(row["text"], add_special_tokens=False).input_ids)
        scores = []
        for choice in row["choices"]:
            ids = tokenizer(row["text"] + choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                rows = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
            scores.append(sum(float(rows[i - 1, ids[i]]) for i in range(start, len(ids))))
        results.append(scores)
    return results


def main() -> int:
    """Serve, evaluate, judge."""
    if sys.argv[1] == "--reference":
        print(json.dumps(reference(Path(sys.argv[2]))))
        return 0
    llmrun_python, artifact = sys.argv[1:]
    command = [llmrun_python, "-m", "llmrun", "serve", artifact, "--port", "0", "--served-model-name", "demo"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        line = server.stderr.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            raise SystemExit(line + server.stderr.read())
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_task(folder)
            model = f"model=demo,base_url={found[0]}/v1/completions,tokenizer={CHECKPOINTS / 'demo'},num_concurrent=4"
            tasks = "llmpack_heldout_choice,llmpack_heldout_continue"
            subprocess.run(
                [
                    *(str(Path(sys.executable).parent / "lm-eval"), "run", "--model", "local-completions"),
                    *("--model_args", f"{model},tokenized_requests=True,max_length=512", "--tasks", tasks),
                    *("--include_path", name, "--output_path", name, "--batch_size", "4", "--log_samples"),
                ],
                check=True,
                timeout=540,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": name, "TOKENIZERS_PARALLELISM": "false"},
            )
            (result,) = folder.rglob("samples_llmpack_heldout_choice*.jsonl")
            samples = sorted(map(json.loads, result.read_text().splitlines()), key=lambda sample: sample["doc_id"])
            found_scores = [[float(reply[0]) for reply in sample["filtered_resps"]] for sample in samples]
            again = [llmrun_python, __file__, "--reference", name]
            expected = json.loads(subprocess.run(again, check=True, stdout=subprocess.PIPE, timeout=300).stdout)
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    pairs = [pair for rows in zip(found_scores, expected, strict=True) for pair in zip(*rows, strict=True)]
    worst = max(abs(ours - theirs) for ours, theirs in pairs)
    print(
        f"{len(pairs)} log-likelihoods, largest difference {worst:.2g}, allowed {TOLERANCE}; server's exit code {code}"
    )
    return int(worst > TOLERANCE or len(pairs) != 4 * NUM_DOCUMENTS or code != 0)


if __name__ == "__main__":
    sys.exit(main())
