"""Runs on every rank: load an artifact, answer the questions of a JSON file, save the answers (rank 0).

usage: answers_ranks.py ARTIFACT QUESTIONS.json ANSWERS.npz
QUESTIONS: {"sequences": [[id, ...], ...], "chunks": [n or null, ...], "greedy": [[id, ...], ...], "max_tokens": n}
ANSWERS: "logits.S.C" for sequence S alone in chunks of size number C, "batch.S" for all sequences together,
"greedy.G": ids of the continuation of prompt G; "collectives.R": how many rank R ran (rank 0 only).
"""

import json
import sys

import numpy as np

from llmrun import Engine


def main() -> None:
    artifact, questions_file, answers_file = sys.argv[1:]
    with open(questions_file) as file:
        questions = json.load(file)
    answers = {}
    with Engine(artifact, verify="size") as engine:
        for s, ids in enumerate(questions["sequences"]):
            for c, chunk in enumerate(questions["chunks"]):
                answers[f"logits.{s}.{c}"] = engine.logits(ids, chunk=chunk)
        for s, logits in enumerate(engine.logits_batch(questions["sequences"])):
            answers[f"batch.{s}"] = logits
        for g, ids in enumerate(questions["greedy"]):
            pieces = engine.generate_ids(ids, max_tokens=questions["max_tokens"], temperature=0.0, ignore_eos=True)
            answers[f"greedy.{g}"] = np.array(list(pieces))
        rank = engine.rank
    if rank == 0:
        np.savez(answers_file, **answers)


if __name__ == "__main__":
    main()
