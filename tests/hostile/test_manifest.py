"""FORMAT section 2: a manifest is refused unless `pack` could have written it.

Lies are told with a right digest (`manifest_bytes`), so that nothing but the check under test can refuse them. Controls
at the end take a check out and see the lie pass.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmrun.manifest
from hostile import bad_input
from hostile.bad_input import MANIFEST, assert_refused, read_members, refusal, write_members
from llmrun.artifact import (
    IncompatibleError,
    IntegrityError,
    canonical_json,
    manifest_bytes,
    open_artifact,
)
from llmrun.manifest import parse_manifest
from mpi.harness import run_alone

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def sound(packed_tiny):
    return packed_tiny(2, "q4")


@pytest.fixture(scope="module")
def data(sound):
    return (sound / MANIFEST).read_bytes()


@pytest.fixture
def members(sound):
    return read_members(sound)


@pytest.fixture
def artifact(sound, tmp_path):
    return bad_input.copy(sound, tmp_path / "artifact")


def parse(data):
    return parse_manifest(data, Path("a/manifest.json"))[0]


def refused(data, kind=IntegrityError, code=None):
    error = refusal(lambda: parse(data))
    assert type(error) is kind, error
    assert code in (None, error.code), error
    return error


def lie(members, code="E309", kind=IntegrityError):
    return refused(manifest_bytes(members), kind, code)


def at(members, path):
    """The object that holds the last key of `path`, and that key."""
    for key in path[:-1]:
        members = members[key]
    return members, path[-1]


def test_the_sound_manifest_passes(data, members):
    parse(data)
    assert manifest_bytes(members) == data


# 2.1: JSON in UTF-8


def test_2_1_longer_than_4_mib(artifact):
    (artifact / MANIFEST).write_bytes(b" " * (5 << 20))
    assert refusal(lambda: open_artifact(artifact)).code == "E308"


@pytest.mark.parametrize(
    "text",
    [
        b"", b" ", b"\n", b"[]", b"null", b"1", b'"llmpack"', b"{", b"}", b"{}", b'{"format":"llmpack"}', b"\0" * 100,
        b"[" * 200_000, b"[" * (4 << 20), b'{"a":' * 200_000, b'{"format":' * 900 + b"1" + b"}" * 900, b"9" * 5000,
        b"-" * 1000, b"\xff\xfe{\0}\0", b"{} {}", b'{"a" 1}', b"PK\x03\x04", b"\x89PNG", b"#!/bin/sh\n", b"1e999",
    ],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_2_1_not_a_json_object(text):
    refused(text, code="E308")


def test_2_1_keys_that_occur_twice(data):
    for key in (b'"format"', b'"shards"', b'"size"', b'"manifest_sha256"'):
        line = next(line for line in data.splitlines(keepends=True) if key in line)
        twice = data.replace(line, line.rstrip(b",\n") + b",\n" + line, 1)
        assert "twice" in str(refused(twice, code="E308"))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "0x10", "01", ".5"])
def test_2_1_numbers_that_are_none(data, number):
    for key in (b'"shards": 2', b'"temperature": 0.0'):
        assert key in data
        changed = data.replace(key, key.partition(b":")[0] + b": " + number.encode(), 1)
        refused(changed, code="E308")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.decode().encode("utf-16"),
        lambda data: data.decode().encode("utf-32-le"),
        lambda data: data.replace(b"llmpack", b"llmp\xe4ck"),
        lambda data: data.replace(b"cpu.onnx", b"cpu\xed\xa0\x80.onnx"),
        lambda data: data + b"\xff",
    ],
    ids=["bom", "utf-16", "utf-32", "latin-1", "surrogate", "byte-after"],
)
def test_2_1_not_utf_8(data, change):
    refused(change(data), code="E308")


@pytest.mark.parametrize("depth", [20, 300, 900])
def test_2_1_nested_deeply(members, depth):
    value = "x"
    for _ in range(depth):
        value = [value]
    members["producer"]["name"] = value
    text = json.dumps(members, sort_keys=True, indent=None)
    refused(text.encode(), code="E308")
    if depth < 900:
        lie(members, code="E308")


# 2.2: canonical bytes


def test_2_2_flipped_bits_of_every_byte_are_found(data):
    for place in range(len(data)):
        for bit in (place % 8, (place + 3) % 8):  # all eight take ten seconds
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            error = refusal(lambda changed=changed: parse(bytes(changed)))
            assert isinstance(error, IntegrityError | IncompatibleError)


def test_2_2_every_byte_left_out_or_doubled_is_found(data):
    for place in range(0, len(data), 3):
        for changed in (data[:place] + data[place + 1 :], data[:place] + data[place : place + 1] + data[place:]):
            refusal(lambda changed=changed: parse(changed))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: json.dumps(dict(reversed(json.loads(data).items())), indent=1).encode() + b"\n",
        lambda data: json.dumps(json.loads(data), sort_keys=True).encode() + b"\n",
        lambda data: json.dumps(json.loads(data), sort_keys=True, indent=2).encode() + b"\n",
        lambda data: data[:-1],
        lambda data: data + b"\n",
        lambda data: b" " + data,
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.replace(b"/", b"\\/"),
        lambda data: data.replace(b'"shards": 2', b'"shards": 2.0'),
        lambda data: data.replace(b'"rms_norm_eps": 1e-05', b'"rms_norm_eps": 0.00001'),
        lambda data: data.replace(b'"llmpack"', b'"\\u006clmpack"'),
        lambda data: data + data,
    ],
    ids=[
        "order", "compact", "indent", "no-newline", "two-newlines", "leading-space", "crlf", "slashes", "float", "exponent",
        "escape", "twice",
    ],
)  # fmt: skip
def test_2_2_the_same_object_in_other_bytes(data, change):
    assert change(data) != data
    refused(change(data), code="E308")


@pytest.mark.parametrize("digest", [None, 1, "", "0" * 64, ["0" * 64], "missing"])
def test_2_2_own_digest(members, digest):
    value = members if digest == "missing" else {**members, "manifest_sha256": digest}
    refused(canonical_json(value), code="E308")


# 2.3: versions


@pytest.mark.parametrize("version", [[2, 0], [2, 7], [0, 9], [999, 0]])
def test_2_3_another_major_version_says_what_to_do(members, version):
    members["format_version"] = version
    error = lie(members, "E402", IncompatibleError)
    assert f"format {version[0]}.{version[1]}" in str(error)
    assert "Install" in str(error)


def test_2_3_a_newer_major_version_is_told_before_anything_else():
    refused(b'{"format": "llmpack", "format_version": [2, 0], "all else": {"is": "new"}}', IncompatibleError, "E402")


def test_2_3_a_newer_minor_version_may_add_members(artifact, members):
    members["format_version"] = [1, 7]
    members["added"] = {"anything": [1, None, 2.5]}
    members["model"]["added"] = "x"
    members["ranks"][0]["graphs"]["cuda"] = members["ranks"][0]["graphs"]["cpu"]
    members["files"]["selfcheck.json"]["added"] = True
    write_members(artifact, members)
    bad_input.check(artifact)
    assert run_alone("verify", artifact).code == 0


@pytest.mark.parametrize(
    "version",
    [
        None,
        "1.0",
        1,
        [1],
        [1, 0, 0],
        [True, 0],
        [1.0, 0],
        ["1", 0],
        [1, "0\n"],
        [-1, 0],
        [1, -1],
        [1 << 60, 0],
        [1, 1 << 60],
        {},
    ],
)
def test_2_3_malformed_version(members, version):
    members["format_version"] = version
    lie(members)
    del members["format_version"]
    lie(members)


# 2.4: operators


@pytest.mark.parametrize(
    "ops",
    [
        {"domain": "ai.llmpack", "version": 1}, {"domain": "ai.llmpack", "version": 99},
        {"domain": "ai.llmpack", "version": "1"}, {"domain": "ai.llmpack", "version": True},
        {"domain": "ai.llmpack", "version": 2.0}, {"domain": "com.example", "version": 2},
        {"domain": "ai.llmpack"}, {"version": 2}, {}, {"domain": "x" * 100_000, "version": "\n"},
    ],
    ids=repr,
)  # fmt: skip
def test_2_4_other_operators(members, ops):
    members["ops"] = ops
    lie(members, "E403", IncompatibleError)


@pytest.mark.parametrize("version", [2, 3])
def test_2_4_operators_of_versions_before(members, version):
    members["ops"]["version"] = version
    assert parse(manifest_bytes(members)).ops["version"] == version


# 2.5: members

TOP = [
    "format_version",
    "producer",
    "ops",
    "model",
    "max_seq_len",
    "quantization",
    "kv_cache",
    "shards",
    "targets",
    "ranks",
    "tokenizer",
    "eos_token_ids",
    "generation",
    "selfcheck",
    "source",
    "files",
]
MODEL = [
    "architecture",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "rope",
    "dtype",
]
TOKENIZER = [
    "kind",
    "file",
    "vocab_size",
    "bos_token_id",
    "eos_token_ids",
    "add_bos_token",
    "special_tokens",
    "bos_token",
    "eos_token",
    "chat_template",
    "golden",
]
PATHS = [
    *((name,) for name in TOP),
    *(("model", name) for name in MODEL),
    *(("kv_cache", name) for name in ("dtype", "block_size", "num_layers", "num_kv_heads_per_rank", "head_dim")),
    *(("tokenizer", name) for name in TOKENIZER),
    *(("generation", name) for name in ("temperature", "top_k", "top_p", "min_p", "repeat_penalty")),
    *(("source", 0, name) for name in ("path", "size", "sha256")),
    *(("files", "selfcheck.json", name) for name in ("size", "chunks")),
    *(
        ("ranks", rank, name)
        for rank in (0, 1)
        for name in (
            "rank",
            "folder",
            "graphs",
            "weights",
            "weight_bytes",
            "weight_bytes_per_token",
            "weight_bytes_by_role",
        )
    ),
    *(("producer", name) for name in ("name", "version")),
    ("quantization", "scheme"),
]
NULLABLE = {
    ("tokenizer",), ("tokenizer", "bos_token_id"), ("tokenizer", "bos_token"), ("tokenizer", "eos_token"),
    ("tokenizer", "chat_template"),
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_2_5_member_missing(members, path):
    holder, key = at(members, path)
    del holder[key]
    lie(members)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(map(str, path)))
def test_2_5_member_of_another_type(members, path):
    holder, key = at(members, path)
    right = holder[key]
    wrong = [None, True, 7, -7, 1 << 53, 1 << 64, 10**400, 1.5, 7.0, "x", "", [], [[]], {}, {"x": {}}]
    for value in wrong:
        if path == ("ops",) and isinstance(value, dict):
            continue  # another operator library: 2.4
        if type(value) is type(right) or (path in NULLABLE and value is None):
            continue
        if isinstance(right, float) and type(value) is int and abs(value) < 1 << 53:
            continue  # a whole number is a number
        holder[key] = value
        lie(members)


SIZES = [
    ("max_seq_len",),
    *(("model", name) for name in MODEL if name.startswith(("hidden", "inter", "num", "head", "vocab", "max"))),
    *(("kv_cache", name) for name in ("block_size", "num_layers", "num_kv_heads_per_rank", "head_dim")),
    ("tokenizer", "vocab_size"), ("shards",),
]  # fmt: skip


@pytest.mark.parametrize("path", SIZES, ids=lambda path: ".".join(map(str, path)))
@pytest.mark.parametrize("size", [0, -1, 1 << 31, (1 << 53) - 1])
def test_2_5_sizes_that_no_model_has(members, path, size):
    holder, key = at(members, path)
    holder[key] = size
    lie(members)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("eos_token_ids",), [-1]), (("eos_token_ids",), [1 << 40]), (("tokenizer", "bos_token_id"), -1),
        (("tokenizer", "bos_token_id"), 1 << 20), (("tokenizer", "eos_token_ids"), [-5]),
        (("tokenizer", "special_tokens"), {"<s>": 1 << 20}), (("tokenizer", "special_tokens"), {"<s>": 1.0}),
        (("tokenizer", "vocab_size"), 1 << 20), (("generation", "temperature"), -1.0), (("generation", "top_k"), -1),
        (("generation", "top_p"), 0.0), (("generation", "top_p"), 2), (("generation", "min_p"), 1.0),
        (("generation", "repeat_penalty"), 0), (("generation", "temperature"), 1e300),
        (("ranks", 0, "weight_bytes"), -1), (("ranks", 1, "weight_bytes_per_token"), -1), (("kv_cache", "dtype"), "int4"),
        (("ranks", 0, "weight_bytes_by_role", "linear"), -1), (("kv_cache", "num_layers"), 3),
        (("kv_cache", "num_kv_heads_per_rank"), 8), (("targets",), ["cuda"]),
        (("targets",), ["cpu", "x" * 10_000]), (("producer", "version"), None),
    ],
)  # fmt: skip
def test_2_5_values_that_cannot_be(members, path, value):
    holder, key = at(members, path)
    holder[key] = value
    lie(members)


@pytest.mark.parametrize(
    "change",
    [
        lambda ranks: ranks.reverse(),
        lambda ranks: ranks.pop(),
        lambda ranks: ranks.clear(),
        lambda ranks: ranks.append(ranks[1]),
        lambda ranks: ranks[1].update(rank=0),
        lambda ranks: ranks[1].update(rank=2),
        lambda ranks: ranks[1].update(ranks[0], rank=1),
        lambda ranks: ranks[0].update(folder="tokenizer"),
        lambda ranks: ranks[0].update(folder="rank-0/"),
        lambda ranks: ranks[0].update(folder=".."),
        lambda ranks: ranks[0].update(folder=""),
        lambda ranks: ranks[0].update(weights=ranks[1]["weights"]),
        lambda ranks: ranks[0].update(graphs=ranks[1]["graphs"]),
        lambda ranks: ranks[0].update(graphs={}),
        lambda ranks: ranks[0].update(weights="selfcheck.json"),
        lambda ranks: ranks[0].update(weights="rank-0/absent.bin"),
    ],
)
def test_2_5_ranks_that_do_not_fit(members, change):
    change(members["ranks"])
    lie(members)


def test_2_5_common_files_in_a_ranks_folder(members):
    members["files"]["rank-1/selfcheck.json"] = members["files"].pop("selfcheck.json")
    members["selfcheck"] = "rank-1/selfcheck.json"
    lie(members)


def test_2_5_ranks_that_do_not_fit_the_shards(members):
    for shards in (1, 3, 4):
        members["shards"] = shards
        lie(members)


# 1.1: paths

BAD_PATHS = [
    "../x", "/etc/passwd", "a/../../b", "a/..", "..", ".", "./a", "a/./b", "", "/", "a/", "/a", "a//b", "a\\b", "..\\a",
    "a\0b", "a\nb", "a b", "-rf", "a/-rf", "~/x", "a:b", "ä", "a\u0308", "e\u202ee", "x" * 300, "a/" * 150 + "b", "*",
    "$(id)", "file:///etc/passwd", "\ud800", "CON ", "a%2e%2e", "manifest.json", "Manifest.JSON",
]  # fmt: skip


@pytest.mark.parametrize("path", BAD_PATHS, ids=lambda path: repr(path[:20]))
def test_1_1_paths_that_are_not_allowed(members, path):
    entry = members["files"]["selfcheck.json"]
    for name in (path, f"rank-0/{path}" if not path.lower().startswith("manifest") else path):
        lie({**members, "files": {**members["files"], name: entry}})
    for where in (("selfcheck",), ("ranks", 0, "weights"), ("ranks", 0, "graphs", "cpu"), ("ranks", 0, "folder")):
        changed = copy.deepcopy(members)
        holder, key = at(changed, where)
        holder[key] = path
        changed["files"][path] = entry
        lie(changed)
    for key in ("file", "golden", "chat_template"):
        lie({**members, "tokenizer": {**members["tokenizer"], key: path}})


@pytest.mark.parametrize(
    "names", [("a", "A"), ("rank-0/X", "rank-0/x"), ("Rank-0/y", "rank-0/z"), ("Tokenizer", "tokenizer/a")]
)
def test_1_1_names_that_differ_in_case_only(members, names):
    entry = members["files"]["selfcheck.json"]
    lie({**members, "files": {**members["files"], **dict.fromkeys(names, entry)}})


def test_2_5_five_thousand_files(members):
    entry = members["files"]["selfcheck.json"]
    lie({**members, "files": {**members["files"], **{f"f{i}": entry for i in range(5000)}}})


# 1.2: digests


@pytest.mark.parametrize(
    "digest",
    ["", *("0" * n for n in (63, 65)), *(c * 64 for c in "Ag \u0660"), "sha256:" + "0" * 64, "../" + "0" * 61, "0" * 64 + "\n"],
)  # fmt: skip
def test_1_2_malformed_digests(members, digest):
    entry = members["files"]["selfcheck.json"]
    members["files"]["selfcheck.json"] = {**entry, "chunks": [digest]}
    lie(members)


def test_1_2_sizes_and_chunks_that_do_not_agree(members):
    entry = members["files"]["selfcheck.json"]
    (digest,) = entry["chunks"]
    for change in (
        {"chunks": []}, {"chunks": [digest] * 2}, {"size": -1},
        {"size": (64 << 20) + 1}, {"size": 1 << 52}, {"size": 0},
    ):  # fmt: skip
        members["files"]["selfcheck.json"] = {**entry, **change}
        lie(members)


# Fuzz: whatever the bytes or the members, the answer is one of our sentences


def fuzzed(work):
    """A random change may be harmless (another seed for a hash, say), but it never gives anything but our errors."""
    try:
        work()
    except (IntegrityError, IncompatibleError) as error:
        message = str(error)
    else:
        return
    assert len(message) < 2000


EDITS = st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=8), st.integers(0, 8)), min_size=1, max_size=6)


@settings(max_examples=250, deadline=None, database=None)
@given(edits=EDITS)
def test_fuzz_random_edits_of_the_bytes(data, edits):
    for place, inserted, removed in edits:
        place %= len(data)
        data = data[:place] + inserted + data[place + removed :]
    fuzzed(lambda: parse(data))


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-2, 1 << 70), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20), st.sampled_from(BAD_PATHS), st.sampled_from(["cpu", "rank-0", "selfcheck.json", "0" * 64]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@settings(max_examples=250, deadline=None, database=None)
@given(choices=st.lists(st.tuples(st.integers(0, 1 << 30), VALUES, st.integers(0, 3)), min_size=1, max_size=3))
def test_fuzz_random_changes_of_members(sound, choices):
    changed = read_members(sound)
    for choice, value, action in choices:
        holders = [(changed, key) for key in changed]
        for holder, key in holders:
            inner = holder[key]
            if isinstance(inner, dict | list):
                holders += [(inner, k) for k in (inner if isinstance(inner, dict) else range(len(inner)))]
        if not holders:
            return
        holder, key = holders[choice % len(holders)]
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[str(value)[:50]] = holder.pop(key)
        else:
            holder[key] = value
    fuzzed(lambda: parse(manifest_bytes(changed)))


# As a user sees it

LIES = {
    "newer-format": (lambda m: m.update(format_version=[2, 0]), 4, "format 2.0"),
    "other-operators": (lambda m: m["ops"].update(version=99), 4, "99"),
    "path-outside": (lambda m: m["files"].update({"../x": m["files"]["selfcheck.json"]}), 3, "../x"),
    "missing-member": (lambda m: m.pop("ranks"), 3, "ranks"),
    "wrong-type": (lambda m: m.update(shards="2"), 3, "shards"),
    "two-lines": (lambda m: m.update(selfcheck="a\nllmrun: b"), 3, "a\\nllmrun: b"),
    "too-many-ranks": (lambda m: m.update(shards=1 << 40), 3, "2 ranks for"),
    "negative-size": (lambda m: m["kv_cache"].update(head_dim=-1), 3, "kv_cache.head_dim is -1"),
}
RAW = {
    "not-json": (b"[" * 100_000, 3, "not the JSON"),
    "five-mib": (b" " * (5 << 20), 3, "longer than"),
    "binary": (bytes(range(256)), 3, "not the JSON"),
    "empty": (b"", 3, "not the JSON"),
}


def spoil(artifact, case):
    if case in RAW:
        (artifact / MANIFEST).write_bytes(RAW[case][0])
        return RAW[case][1:]
    change, *expected = LIES[case]
    members = read_members(artifact)
    change(members)
    write_members(artifact, members)
    return expected


@pytest.mark.parametrize("case", [*LIES, *RAW])
def test_llmrun_refuses_with_one_sentence(artifact, case):
    code, words = spoil(artifact, case)
    assert_refused(run_alone(artifact, "-p", "x", deadline_s=20), code, words)


@pytest.mark.parametrize("case", ["newer-format", "path-outside", "wrong-type", "not-json"])
def test_optimized_python_refuses_as_well(artifact, case):
    code, words = spoil(artifact, case)
    command = [sys.executable, "-O", "-m", "llmrun", "show", str(artifact)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


# Negative controls


def test_control_without_the_member_checks_a_lie_passes(members, monkeypatch):
    members["files"]["../x"] = members["files"]["selfcheck.json"]
    members["kv_cache"]["head_dim"] = -1
    members["ranks"].reverse()
    monkeypatch.setattr(llmrun.manifest, "_check_members", lambda *_: None)
    parse(manifest_bytes(members))


def test_control_without_canonical_bytes_changed_ones_pass(data, monkeypatch):
    changed = data.replace(b'"max_seq_len": 128', b'"max_seq_len":127').replace(b'"shards"', b'"shards": 2, "shards"')
    assert changed != data

    class Anything(bytes):
        __eq__ = lambda *_: True  # noqa: E731
        __hash__ = bytes.__hash__

    monkeypatch.setattr(llmrun.manifest, "manifest_bytes", lambda _: Anything())
    assert "twice" in str(refused(changed))
    monkeypatch.setattr(llmrun.manifest, "_unique", dict)
    assert parse(changed).max_seq_len == 127


def test_control_without_types_a_wrong_one_passes(members, monkeypatch):
    members["shards"] = 2.0
    lie(members)
    build = llmrun.manifest._build
    monkeypatch.setattr(llmrun.manifest, "_build", lambda k, v, p, w: v if k is int else build(k, v, p, w))
    parse(manifest_bytes(members))
