"""What the packager may create or replace, and what it refuses to touch."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from llmpack.pack import Options, pack
from llmrun.artifact import UsageError, open_artifact

PACK = [sys.executable, "-m", "llmpack.cli"]


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_existing_artifact_needs_force_and_is_then_swapped(tmp_path, tiny_checkpoint):
    out = tmp_path / "a"
    pack(tiny_checkpoint, out, Options(scheme="q4"))
    before = tree(out)
    with pytest.raises(UsageError, match="--force"):
        pack(tiny_checkpoint, out, Options(scheme="q8"))
    assert tree(out) == before
    pack(tiny_checkpoint, out, Options(scheme="q8", force=True))
    assert open_artifact(out).manifest.quantization["scheme"] == "q8"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_read_only_artifact_is_replaced_and_nothing_of_it_stays(tmp_path, tiny_checkpoint):
    command = [*PACK, str(tiny_checkpoint), "-o", str(tmp_path / "a"), "--force"]
    if os.geteuid() == 0:  # root as an ordinary owner
        if shutil.which("setpriv") is None:
            pytest.skip("root, and no setpriv")
        command[:0] = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner,-chown"]
    for _ in range(2):
        subprocess.run(command, check=True, capture_output=True)
        for path in [tmp_path / "a", *(tmp_path / "a").rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    for path in [tmp_path / "a", *(tmp_path / "a").rglob("*")]:
        path.chmod(0o755)


@pytest.mark.parametrize("name", ["a", "a/b"])
def test_no_artifact_is_made_below_a_file(tmp_path, tiny_checkpoint, name):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match=r"notes\.txt is a file, not a directory"):
        pack(tiny_checkpoint, tmp_path / "notes.txt" / name, Options())


def test_force_does_not_wipe_what_is_not_an_artifact(tmp_path, tiny_checkpoint):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not an artifact"):
        pack(tiny_checkpoint, tmp_path / "a", Options(force=True))
    assert (tmp_path / "a" / "thesis.txt").exists()


@pytest.mark.parametrize(
    "manifest",
    ['{"name": "my app", "icons": []}', '["llmpack"]', '"llmpack"', '{"format": "llmpack"', "[" * 100_000, "\xff"],
)
def test_force_does_not_wipe_a_folder_with_another_programs_manifest(tmp_path, tiny_checkpoint, manifest):
    (tmp_path / "a" / "src").mkdir(parents=True)
    (tmp_path / "a" / "manifest.json").write_bytes(manifest.encode("latin-1"))
    (tmp_path / "a" / "src" / "app.js").write_text("years of work")
    with pytest.raises(UsageError, match="not an artifact"):
        pack(tiny_checkpoint, tmp_path / "a", Options(force=True))
    assert (tmp_path / "a" / "src" / "app.js").exists()


@pytest.mark.parametrize("name", ["thesis.txt", "thesis/chapter-1.txt", "rank-0/thesis.txt", ".git/HEAD"])
def test_force_does_not_wipe_what_somebody_put_into_an_artifact(tmp_path, tiny_checkpoint, name):
    out = tmp_path / "a"
    pack(tiny_checkpoint, out, Options())
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("years of work")
    named = name if name.startswith("rank-0") else name.partition("/")[0]
    with pytest.raises(UsageError, match=rf"holds {named}, which is not of the artifact"):
        pack(tiny_checkpoint, out, Options(force=True))
    assert (out / name).exists()


def test_force_replaces_an_artifact_of_another_format_that_is_damaged(tmp_path, tiny_checkpoint):
    out = tmp_path / "a"
    pack(tiny_checkpoint, out, Options())
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "format_version": [0, 9], "shards": "one"}))
    (out / "rank-0" / "weights.bin").unlink()
    pack(tiny_checkpoint, out, Options(force=True))
    open_artifact(out)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("models/llama", "is the model's own directory"),
        ("link/llama", "is the model's own directory"),
        ("models", "contains the model"),
        ("models/llama/out/a", "lies inside the model"),
        ("link/llama/out/../a", "lies inside the model"),
    ],
)
def test_a_target_that_would_replace_or_change_the_model_is_refused(tmp_path, tiny_checkpoint, target, words, force):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "models" / "llama")
    (tmp_path / "link").symlink_to("models")
    for place in (folder, folder.parent):  # as if an artifact were there
        (place / "manifest.json").write_text('{"format": "llmpack", "files": {}}')
    (folder / "config.json").write_text("not read")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=rf"{words}.*choose another -o"):
        pack(folder, tmp_path / target, Options(force=force))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("target", ["a/rank-1", "a/rank-0/new/b", "link/b", "link/../link/b"])
def test_a_target_inside_another_artifact_is_refused(tmp_path, tiny_checkpoint, target):
    """An artifact with a folder that its manifest does not list is one that llmrun refuses."""
    pack(tiny_checkpoint, tmp_path / "a", Options())
    (tmp_path / "link").symlink_to("a")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=rf"lies inside the artifact {tmp_path}/a, .*choose another -o"):
        pack(tiny_checkpoint, tmp_path / target, Options())
    assert sorted(tmp_path.rglob("*")) == before
    open_artifact(tmp_path / "a")


def in_a_namespace(script, *arguments):
    """Run a shell script that may mount what it likes, seen by nobody else."""
    command = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], check=False).returncode != 0:
        pytest.skip("needs unshare (Debian package util-linux) and the permission to use it")
    return subprocess.run([*command, "sh", "-ec", script, "sh", *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("mount", ["mount -t tmpfs none", 'mount --bind "$1"'])
def test_a_mount_point_is_refused_before_any_work(tmp_path, tiny_checkpoint, mount):
    """A container's volume: what is mounted cannot be renamed. A bind mount of the same disk does not differ by device."""
    target = tmp_path / "my volume"
    target.mkdir()
    script = f'{mount} "$1"; target=$1; shift; "$@" || code=$?; ls -A "$target" ..; exit $code'
    result = in_a_namespace(f"cd {tmp_path}; {script}", target, *PACK, tiny_checkpoint, "-o", target, "--force")
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"pack: error[E201]: {target}: is a mount point")
    assert result.stderr.count("\n") == 1
    assert f"-o {target}/artifact" in result.stderr
    assert ".partial-" not in result.stdout


def test_a_model_that_is_mounted_at_the_target_too_is_known_by_its_inode(tmp_path, tiny_checkpoint):
    folder, target = shutil.copytree(tiny_checkpoint, tmp_path / "m"), tmp_path / "seen"
    target.mkdir()
    result = in_a_namespace('mount --bind "$1" "$2"; shift 2; "$@"', folder, target, *PACK, folder, "-o", target / "a")
    assert result.returncode == 2, result.stderr
    assert "lies inside the model" in result.stderr
    assert not (folder / "a").exists()


@pytest.mark.parametrize("kind", ["file", "link", "root", "cwd", "cwd-by-name"])
def test_strange_targets_are_refused(tmp_path, tiny_checkpoint, monkeypatch, kind):
    target = tmp_path / "a"
    if kind == "file":
        target.write_text("x")
    elif kind == "link":
        (tmp_path / "b").mkdir()
        target.symlink_to(tmp_path / "b")
    elif kind == "root":
        target = type(tmp_path)("/")
    else:
        target.mkdir()
        monkeypatch.chdir(target)
        target = target if kind == "cwd" else type(target)("../a")
    with pytest.raises(UsageError):
        pack(tiny_checkpoint, target, Options(force=True))
