"""Manifests that lie, and what their reader says of them.

Lies are told with a right digest (`manifest_bytes`), so that nothing but the check under test can refuse them.
"""

from pathlib import Path

from hostile.bad_input import refusal
from llmrun.artifact import IncompatibleError, IntegrityError, manifest_bytes
from llmrun.manifest import parse_manifest


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


def fuzzed(work):
    """A random change may be harmless (another seed for a hash, say), but it never gives anything but our errors."""
    try:
        work()
    except (IntegrityError, IncompatibleError) as error:
        message = str(error)
    else:
        return
    assert len(message) < 2000
