"""Train a small Llama: the demo checkpoint of this folder (5.5M parameters, grouped queries), or another shape.

--model demo is what is committed. --model tied has tied embeddings, wider heads and no grouped queries, and learns the
plays alone: a second model for tests/benchmarks/quality.py, made when it is wanted (5 to 10 minutes):

    python train_demo.py --model tied --plays input.txt --steps 400 --out DIR

Inputs: two public-domain texts.
  --plays  tinyshakespeare, 40,000 lines of Shakespeare's plays: data/tinyshakespeare/input.txt of
           https://github.com/karpathy/char-rnn
           sha256 86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
  --novel  War and Peace, Leo Tolstoy, translated by Louise and Aylmer Maude: Project Gutenberg's text, from
           CHAPTER I on: tokenizer/testdata/war-and-peace.txt of https://github.com/ollama/ollama
           sha256 eaecfcb30408e2bc35ffe69b297127e3a6ca75548c033df4d2e703b5ff711f8d
Without --novel the plays are all there is. The novel's hard line breaks are joined; the plays keep their verse lines. One
contiguous slice of each text is held out: neither the tokenizer nor the model is trained on it.

Outputs, in --out (this script's folder), for --model demo:
  heldout.txt            the held-out slices, for validation and perplexity
  demo/                  tokenizer.model, tokenizer_config.json, config.json, generation_config.json and
                         model.safetensors (float16): the best model so far by validation loss
  training-log.jsonl     one line per evaluation
Each evaluation also stores the optimiser's state in --state; the same command resumes from there.

Cost: about 45 minutes of one AVX512-BF16 CPU core and 2 GB of memory. Needs torch, transformers 5,
sentencepiece, safetensors. Runs agree if seed, package versions and kind of CPU do.
"""

from __future__ import annotations

import argparse
import copy
import functools
import io
import json
import math
import re
import tempfile
import time
from pathlib import Path

import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

BOS, EOS, MAX_LENGTH = 1, 2, 512
ARCHITECTURES = {
    "demo": LlamaConfig(
        vocab_size=3072, hidden_size=256, intermediate_size=768, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=MAX_LENGTH, rms_norm_eps=1e-5,
        bos_token_id=BOS, eos_token_id=EOS, tie_word_embeddings=False
    ),
    "tied": LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=MAX_LENGTH, rms_norm_eps=1e-5,
        bos_token_id=BOS, eos_token_id=EOS, tie_word_embeddings=True
    ),
}  # fmt: skip
BATCH_TOKENS, WARMUP, EVAL_EVERY = 4096, 100, 50  # tokens in a step; steps
SHORT_PART = 0.6  # of the steps, the first ones, whose rows hold 256 tokens: these cost less than rows of 512
HELDOUT_AT, HELDOUT_CHARS = 0.7, 26_000  # of each text: where the held-out slice begins, and its length
# Turns in the plays' own layout: the speaker's name and a colon, the speech on the next lines, a blank line.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User:\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant:\\n' }}{% endif %}"
    "{{ message['content'] + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
SAMPLE_PROMPTS = ("ROMEO:\n", "Prince Andrew looked at Pierre and")


def read_corpus(plays: Path, novel: Path | None) -> tuple[list[str], str]:
    """The documents to train on (pieces of the plays, chapters of the novel) and the held-out text."""
    documents, heldout = [], []
    for path in (plays, novel):
        if path is None:
            continue
        text = path.read_text(encoding="utf-8")
        if path == novel:
            text = "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n{2,}", text))
        start = text.index("\n\n", int(HELDOUT_AT * len(text)))
        end = text.index("\n\n", start + HELDOUT_CHARS)
        heldout.append(text[start:end].strip("\n"))
        for part in (text[:start], text[end:]):
            documents += [piece.strip("\n") for piece in re.split(r"\n\n(?=CHAPTER )", part)]
    return documents, "\n\n".join(heldout) + "\n"


def train_tokenizer(documents: list[str], vocab_size: int, directory: Path) -> None:
    """Write a SentencePiece BPE model like Llama 2's: byte fallback (newlines too), no normalization."""
    lines = [line for document in documents for line in document.split("\n") if line]
    trained = io.BytesIO()
    # Dummy prefix only for encoding: where the model meets a line's first word, no space comes before it.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=trained, num_threads=1, minloglevel=2,
        model_type="bpe", vocab_size=vocab_size, character_coverage=0.99995, byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False, max_sentence_length=1 << 16
    )  # fmt: skip
    proto = sentencepiece_model_pb2.ModelProto.FromString(trained.getvalue())
    proto.normalizer_spec.add_dummy_prefix = True
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(proto.SerializeToString())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "legacy": False}
    config |= {
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_model(model: LlamaForCausalLM, directory: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors, the weights rounded to float16."""
    half = copy.deepcopy(model).half()
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    half.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, **sampling)
    half.save_pretrained(directory)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, ids: list[int]) -> float:
    """Mean cross-entropy (nats) over the tokens of `ids`.

    `ids`, without BOS, are cut into successive runs of 511 tokens (the last can be shorter); BOS before a run
    makes a window of 512; each token of the run is predicted from what is before it in its window.
    """
    total = 0.0
    for start in range(0, len(ids), MAX_LENGTH - 1):
        window = torch.tensor([BOS, *ids[start : start + MAX_LENGTH - 1]])
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        total += cross_entropy(logits, window[1:], reduction="sum").item()
    return total / len(ids)


@functools.lru_cache(maxsize=2)
def window_starts(tokens: int, length: int, epoch: int, seed: int) -> list[int]:
    """Where the windows of an epoch begin: back to back from a random shift on, in random order."""
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    shift = int(torch.randint(length, (1,), generator=generator))
    return (torch.randperm((tokens - shift) // length, generator=generator) * length + shift).tolist()


def batch(stream: torch.Tensor, length: int, rows: int, step: int, seed: int) -> torch.Tensor:
    """The rows of a step: BOS and `length` tokens each; every epoch passes over the whole stream."""
    places = [divmod(row, len(stream) // length - 1) for row in range(step * rows, (step + 1) * rows)]
    starts = [window_starts(len(stream), length, epoch, seed)[index] for epoch, index in places]
    windows = torch.stack([stream[start : start + length] for start in starts])
    return torch.cat([torch.full((rows, 1), BOS), windows], dim=1)


def train(args: argparse.Namespace) -> None:
    """Train from the start, or from --state where it exists; keep the best model."""
    torch.manual_seed(args.seed)
    directory, architecture = args.out / args.model, ARCHITECTURES[args.model]
    documents, heldout = read_corpus(args.plays, args.novel)
    (args.out / "heldout.txt").write_text(heldout, encoding="utf-8")
    train_tokenizer(documents, architecture.vocab_size, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    stream_ids: list[int] = []
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        if tokenizer.decode(ids) != document:
            raise ValueError("the tokenizer does not give the text back")
        stream_ids += [BOS, *ids, EOS]
    stream = torch.tensor(stream_ids)
    heldout_ids = tokenizer(heldout, add_special_tokens=False)["input_ids"]

    model = LlamaForCausalLM(architecture)
    matrices = {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1}
    norms = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, norms], betas=(0.9, 0.95), fused=True)
    log: list[dict[str, float]] = []
    if args.state.exists():
        state = torch.load(args.state)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log = state["log"]
    first, seconds = (int(log[-1]["step"]), log[-1]["seconds"]) if log else (0, 0)
    began = time.monotonic() - seconds
    best = min((record["val_loss"] for record in log), default=math.inf)
    print(f"{len(stream)} training tokens, {len(heldout_ids)} held out; from step {first}", flush=True)
    losses: list[float] = []
    for step in range(first, args.steps):
        warm = min(1.0, (step + 1) / WARMUP)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * decay
        length = MAX_LENGTH // 2 if step < SHORT_PART * args.steps else MAX_LENGTH
        ids = batch(stream, length, BATCH_TOKENS // length, step, args.seed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (done := step + 1) % EVAL_EVERY and done != args.steps:
            continue
        val_loss = mean_loss(model, heldout_ids)
        train_loss, seconds = sum(losses) / len(losses), time.monotonic() - began
        record = {"step": done, "train_loss": round(train_loss, 4), "val_loss": round(val_loss, 4)}
        record |= {"tokens": done * BATCH_TOKENS, "seconds": round(seconds)}
        losses.clear()
        log.append(record)
        print(json.dumps(record), flush=True)
        if val_loss < best:
            best = val_loss
            save_model(model, directory)
        (args.out / "training-log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
        partial = args.state.with_suffix(".partial")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log}, partial)
        partial.replace(args.state)


def evaluate(args: argparse.Namespace) -> None:
    """Print the perplexity of the model on heldout.txt (float32 arithmetic on the saved weights) and samples."""
    tokenizer = AutoTokenizer.from_pretrained(args.out / args.model)
    model = LlamaForCausalLM.from_pretrained(args.out / args.model, dtype=torch.float32)
    text = (args.out / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    loss = mean_loss(model, ids)
    bits = loss * len(ids) / math.log(2) / len(text.encode())
    print(f"loss {loss:.4f}  perplexity {math.exp(loss):.3f}  bits/byte {bits:.4f}  tokens {len(ids)}")
    for prompt in SAMPLE_PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        for do_sample in (False, True):
            torch.manual_seed(args.seed)
            options = {} if do_sample else {"temperature": None, "top_p": None}
            output = model.generate(**inputs, max_new_tokens=120, do_sample=do_sample, **options)
            print(f"--- {'sampled' if do_sample else 'greedy'}\n{tokenizer.decode(output[0][1:])}")


def main() -> None:
    """Parse the command line; train or evaluate."""
    parser = argparse.ArgumentParser(description="Train or evaluate the demo checkpoint.")
    add = parser.add_argument
    add("--model", choices=ARCHITECTURES, default="demo")
    add("--plays", type=Path, help="tinyshakespeare's text file")
    add("--novel", type=Path, help="War and Peace's text file; always needed for --model demo")
    add("--evaluate", action="store_true", help="measure the model instead of training")
    add("--out", type=Path, default=Path(__file__).resolve().parent, help="folder for the outputs")
    add("--state", type=Path, help="to resume from (default: train-MODEL.pt in the system's temporary folder)")
    add("--steps", type=int, default=1800)
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--seed", type=int, default=1)
    add("--threads", type=int, default=1)
    args = parser.parse_args()
    args.state = args.state or Path(tempfile.gettempdir()) / f"train-{args.model}.pt"
    torch.set_num_threads(args.threads)
    if args.evaluate:
        evaluate(args)
    elif args.plays and (args.novel or args.model != "demo"):
        train(args)
    else:
        parser.error("--plays is needed to train, and --novel for --model demo")


if __name__ == "__main__":
    main()
