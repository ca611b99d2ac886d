"""FORMAT 1 and 2.5: a manifest's members, paths and digests are those that `pack` could have written, or it is refused.

Controls at the end take a check out and see the lie pass.
"""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmrun.manifest
from hostile.bad_input import read_members
from hostile.manifests import at, fuzzed, lie, parse
from llmrun.artifact import manifest_bytes

pytestmark = pytest.mark.timeout(120)


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
    assert ": ." not in str(lie(members))


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
        lie(members, code="E308" if type(value) is int and value >= 1 << 53 else "E309")


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
        (("tokenizer", "prefix_token_ids"), [1, 1 << 20]), (("tokenizer", "prefix_token_ids"), [2, 1]),
        (("tokenizer", "bos_token_id"), 1 << 20), (("tokenizer", "eos_token_ids"), [-5]),
        (("tokenizer", "special_tokens"), {"<s>": 1 << 20}), (("tokenizer", "special_tokens"), {"<s>": 1.0}),
        (("tokenizer", "vocab_size"), 1 << 20), (("generation", "temperature"), -1.0), (("generation", "top_k"), -1),
        (("generation", "top_p"), 0.0), (("generation", "top_p"), 2), (("generation", "min_p"), 1.0),
        (("generation", "repeat_penalty"), 0), (("generation", "temperature"), 1e300),
        (("ranks", 0, "weight_bytes"), -1), (("ranks", 1, "weight_bytes_per_token"), -1), (("kv_cache", "dtype"), "int4"),
        (("ranks", 0, "weight_bytes_by_role", "linear"), -1), (("kv_cache", "num_layers"), 3),
        (("kv_cache", "num_kv_heads_per_rank"), 8), (("kv_cache", "head_dim"), 8), (("targets",), ["cuda"]),
        (("targets",), ["cpu", "x" * 10_000]), (("producer", "version"), None),
    ],
)  # fmt: skip
def test_2_5_values_that_cannot_be(members, path, value):
    holder, key = at(members, path)
    holder[key] = value
    lie(members)


@pytest.mark.parametrize("window", [0, -1, 1 << 31, "128", 128.0, True])
def test_2_5_a_window_that_is_none(members, window):
    members["model"]["sliding_window"] = window
    lie(members)


@pytest.mark.parametrize("window", [1, 128, 129, None])
def test_2_5_a_window_of_any_size(members, window):
    members["model"]["sliding_window"] = window
    assert parse(manifest_bytes(members)).model.sliding_window == window


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
        lambda ranks: ranks[0].update(folder="rank"),
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


def test_2_5_a_ranks_folder_within_a_folder(members):
    def move(name):
        return name.replace("rank-0", "rank-0/a")

    rank = members["ranks"][0]
    rank.update(folder=move(rank["folder"]), weights=move(rank["weights"]), graphs={"cpu": move(rank["graphs"]["cpu"])})
    members["files"] = {move(name): entry for name, entry in members["files"].items()}
    lie(members)


def test_2_5_a_target_without_kernels(members):
    for rank in members["ranks"]:
        rank["graphs"]["gpu"] = rank["graphs"]["cpu"]
    members["targets"] = ["cpu", "sm_89"]
    lie(members)
    members["kernels"] = {"sm_89": members["selfcheck"]}
    parse(manifest_bytes(members))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("targets",), ["cpu", "x" * 10_000]), (("selfcheck",), "x" * 10_000), (("kv_cache", "dtype"), "x" * 10_000),
        (("tokenizer", "special_tokens"), {"x" * 10_000: None}), (("files",), {"x" * 10_000: {}}),
    ],
)  # fmt: skip
def test_2_5_what_is_said_of_a_long_name_is_short(members, path, value):
    holder, key = at(members, path)
    holder[key] = value
    lie(members)


@pytest.mark.parametrize("path", ["kernels/absent.bin", "../kernels.bin", "rank-1/weights.bin"])
def test_2_5_kernels_that_are_no_file_of_all_ranks(members, path):
    members["files"]["kernels/cuda-sm_89.bin"] = members["files"]["selfcheck.json"]
    members["kernels"] = {"sm_89": "kernels/cuda-sm_89.bin"}
    parse(manifest_bytes(members))
    members["kernels"] = {"sm_89": path}
    lie(members)


def test_2_5_ids_end_where_the_vocabulary_does(members):
    members["eos_token_ids"] = [members["model"]["vocab_size"] - 1]
    parse(manifest_bytes(members))
    members["eos_token_ids"] = [members["model"]["vocab_size"]]
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
        {"size": -1, "chunks": []}, {"size": (64 << 20) + 1}, {"size": 1 << 52}, {"size": 0},
    ):  # fmt: skip
        members["files"]["selfcheck.json"] = {**entry, **change}
        lie(members)


# Fuzz: whatever the members, the answer is one of our sentences

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


# Negative controls


def test_control_without_the_member_checks_a_lie_passes(members, monkeypatch):
    members["files"]["../x"] = members["files"]["selfcheck.json"]
    members["kv_cache"]["head_dim"] = -1
    members["ranks"].reverse()
    monkeypatch.setattr(llmrun.manifest, "_check_members", lambda *_: None)
    parse(manifest_bytes(members))


def test_control_without_types_a_wrong_one_passes(members, monkeypatch):
    members["shards"] = 2.0
    lie(members)
    build = llmrun.manifest._build
    monkeypatch.setattr(llmrun.manifest, "_build", lambda k, v, p, w: v if k is int else build(k, v, p, w))
    parse(manifest_bytes(members))
