"""FORMAT 2.1 to 2.4: a manifest's bytes and versions are those that `pack` could have written, or it is refused.

Controls at the end take a check out and see the lie pass.
"""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmrun.manifest
import llmrun.strict_json
from hostile import bad_input
from hostile.bad_input import MANIFEST, refusal, write_members
from hostile.manifests import fuzzed, lie, parse, refused
from llmrun.artifact import IncompatibleError, IntegrityError, canonical_json, manifest_bytes, open_artifact
from mpi.harness import run_alone

pytestmark = pytest.mark.timeout(120)


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


@pytest.mark.parametrize("number", [1 << 53, -(1 << 53), 10**400], ids=["large", "negative", "huge"])
@pytest.mark.parametrize("where", [(), ("model", "rope"), ("quantization",)])
def test_2_1_integers_that_not_every_reader_holds(members, where, number):
    """In a member that this reader does not know, too."""
    place = members
    for key in where:
        place = place[key]
    place["later"] = [(1 << 53) - 1, 1 - (1 << 53), 1e300]
    parse(manifest_bytes(members))
    place["later"] = [number]
    lie(members, code="E308")


@pytest.mark.parametrize("innermost", [[], [1], {}, {"a": "b"}])
def test_2_1_nested_sixteen_deep_and_no_deeper(members, innermost):
    for _ in range(14):
        innermost = [innermost]
    members["later"] = innermost
    parse(manifest_bytes(members))
    members["later"] = [innermost]
    lie(members, code="E308")


# 2.2: canonical bytes


def test_2_2_the_digest_is_that_of_the_file_without_its_line(data):
    (line,) = (line for line in data.splitlines(keepends=True) if line.startswith(b' "manifest_sha256": '))
    assert hashlib.sha256(data.replace(line, b"")).hexdigest() in line.decode()


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


# Fuzz: whatever the bytes, the answer is one of our sentences

EDITS = st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=8), st.integers(0, 8)), min_size=1, max_size=6)


@settings(max_examples=250, deadline=None, database=None)
@given(edits=EDITS)
def test_fuzz_random_edits_of_the_bytes(data, edits):
    for place, inserted, removed in edits:
        place %= len(data)
        data = data[:place] + inserted + data[place + removed :]
    fuzzed(lambda: parse(data))


# Negative control


def test_control_without_canonical_bytes_changed_ones_pass(data, monkeypatch):
    changed = data.replace(b'"max_seq_len": 128', b'"max_seq_len":127').replace(b'"shards"', b'"shards": 2, "shards"')
    assert changed != data

    class Anything(bytes):
        __eq__ = lambda *_: True  # noqa: E731
        __hash__ = bytes.__hash__

    monkeypatch.setattr(llmrun.manifest, "manifest_bytes", lambda _: Anything())
    assert "twice" in str(refused(changed))
    monkeypatch.setattr(llmrun.strict_json, "_unique", dict)
    assert parse(changed).max_seq_len == 127
