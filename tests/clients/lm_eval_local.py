"""lm-evaluation-harness itself against `llmrun serve`: `make test-clients`, in an environment of its own (800 MB).

A small local task is made of the demo model's held-out text: which of four lines follows. The harness scores each choice
by log-likelihood (`echo`, `logprobs`, token-id prompts) and continues texts (`stop`, `max_tokens`). The demo model must
do clearly better than chance, and answer everything; that the log-probabilities are right to 2e-4 is shown by
`tests/server/test_openai_client.py`.

    python tests/clients/lm_eval_local.py LLMRUN_PYTHON ARTIFACT
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
LEAST_ACCURACY = 0.4  # by chance: 0.25

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


def main() -> int:
    """Serve, evaluate, judge."""
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
                    *("--include_path", name, "--output_path", name, "--batch_size", "4"),
                ],
                check=True,
                timeout=540,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": name, "TOKENIZERS_PARALLELISM": "false"},
            )
            (result,) = folder.rglob("results*.json")
            results = json.loads(result.read_text())["results"]
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    accuracy = results["llmpack_heldout_choice"]["acc,none"]
    print(f"accuracy {accuracy} (chance 0.25), server's exit code {code}")
    return int(accuracy < LEAST_ACCURACY or code != 0)


if __name__ == "__main__":
    sys.exit(main())
