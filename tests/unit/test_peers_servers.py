"""`make bench-server`: rounds in turn, the same work for every server, and a vocabulary for random checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import sentencepiece

from benchmarks.peers import servers
from benchmarks.peers.programs import DEMO
from benchmarks.peers.report import OURS, PEERS, format_table
from benchmarks.peers.vocabulary import with_vocabulary

# A server of OpenAI's protocol that streams as many tokens as it is asked for, or fewer; writes down that it was started.
STAND_IN = """
import http.server, json, sys
log, name, missing = sys.argv[1], sys.argv[2], int(sys.argv[3])
with open(log, "a") as file: file.write(name + chr(10))
if name == "dead": sys.exit("no such model")
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments): pass
    def reply(self, data):
        self.send_response(200); self.end_headers(); self.wfile.write(data)
    def do_GET(self): self.reply(json.dumps({"data": [{"id": "m"}]}).encode())
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        count = body["max_tokens"] - missing
        events = [{"choices": [{"text": "a"}]}] * count
        usage = {"completion_tokens": count, "prompt_tokens": len(body["prompt"])}
        events.append({"choices": [], "usage": usage})
        self.reply(b"".join(b"data: " + json.dumps(event).encode() + b"\\n\\n" for event in events))
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def test_servers_take_turns_and_do_the_same_work_or_are_missing(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def command(name: str, missing: int = 0) -> list[object]:
        return [sys.executable, "-c", STAND_IN, log, name, missing]

    commands = {OURS[0]: command("ours"), OURS[1]: command("short", 1), PEERS[0]: command("peer"), "x": command("dead")}
    typed = ["--rounds", "2", "--clients", "1,3", "--requests", "2", "--tokens", "5", "--prompt-ids", "7"]
    rows = servers.measure(servers.arguments_of(typed), commands)  # pyright: ignore[reportArgumentType]
    assert log.read_text().split() == ["ours", "short", "peer", "dead", "ours", "peer"]
    for row in rows:
        assert len(row.figures[OURS[0]].samples) == len(row.figures[PEERS[0]].samples) == 2
        assert row.ratio(PEERS[0]) is not None
        assert "not the same work" in row.figures[OURS[1]].reason
        assert "no such model" in row.figures["x"].reason
    table = format_table(rows, servers.NAMES)
    assert "x llama.cpp" in table
    assert "genai" not in table


@pytest.mark.parametrize("typed", [["--clients", "0"], ["--rounds", "0"], ["--tokens", "500"], ["--shape", "gpt-5"]])
def test_bad_arguments_are_refused(typed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        servers.arguments_of(typed)
    assert stop.value.code == 2
    assert typed[0] in capsys.readouterr().err


def test_a_padded_vocabulary_reads_text_as_the_one_it_was_made_from(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps({"vocab_size": 4000}))
    folder = with_vocabulary(checkpoint, tmp_path / "more")
    padded = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    plain = sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))
    text = "In the evening the prince said: ~3100, ünïcode 漢字."
    assert padded.encode(text) == plain.encode(text)
    pieces = json.loads((folder / "vocabulary.json").read_text())
    assert len(pieces) == padded.vocab_size() == 4000
    assert [piece["text"] for piece in pieces] == [padded.id_to_piece(i) for i in range(4000)]
    assert (folder / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()
