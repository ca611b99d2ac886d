"""EmbeddingQ8 and EmbeddingQ6 give the rows of their matrix exactly (FORMAT.md 4.3, 5.8)."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Node, random_projection

from llmpack_ops import reference

SCHEMES = ("q8", "q6")


def embed(scheme: str, ids: np.ndarray, num_embeddings: int, hidden_size: int, group_size: int) -> np.ndarray:
    projection = random_projection(scheme, num_embeddings, hidden_size, group_size)
    attributes = {"num_embeddings": num_embeddings, "group_size": group_size}
    inputs = {"ids": ids.astype(np.int32), **projection.initializers}
    (y,) = Node(f"Embedding{scheme.upper()}", inputs, ("y",), ("weight", "scales"), attributes).run(2)
    # A level has at most 8 bits and a scale 11: float32 holds the product.
    np.testing.assert_array_equal(y, reference.embedding(ids, projection.weight))
    return y


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_row(isa: str, scheme: str, group_size: int) -> None:
    embed(scheme, np.arange(37)[::-1], 37, 384, group_size)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_group_and_one_row(isa: str, scheme: str) -> None:
    embed(scheme, np.array([0]), 1, 32, 32)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_many_tokens_and_repeated_ids(isa: str, scheme: str) -> None:
    embed(scheme, np.random.default_rng(3).integers(0, 100, 500), 100, 128, 64)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_token(isa: str, scheme: str) -> None:
    projection = random_projection(scheme, 20, 64)
    node = Node(
        f"Embedding{scheme.upper()}",
        {"ids": np.empty(0, np.int32), **projection.initializers},
        ("y",),
        ("weight", "scales"),
        {"num_embeddings": 20, "group_size": 32},
    )
    assert node.run()[0].shape == (0, 64)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [-1, 20, 2**31 - 1])
def test_an_id_outside_the_vocabulary_is_refused(isa: str, scheme: str, bad: int) -> None:
    projection = random_projection(scheme, 20, 64)
    node = Node(
        f"Embedding{scheme.upper()}",
        {"ids": np.array([3, bad], np.int32), **projection.initializers},
        ("y",),
        ("weight", "scales"),
        {"num_embeddings": 20, "group_size": 32},
    )
    with pytest.raises(Exception, match=f"has {bad} at 1, expected 0 to 19"):
        node.run()
