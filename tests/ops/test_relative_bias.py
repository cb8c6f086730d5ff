"""`RelativeBias`: transformers' buckets at every distance, and gradients that reach the table."""

from __future__ import annotations

import pytest
import torch
from attention_formula import attention_formula, transformers_buckets

from fastattn import ops
from fastattn.ops.relative_bias import KINDS, bucket_of_distance

SIZES = [
    (32, 128), (32, 64), (32, 20), (16, 128), (8, 16), (8, 1000), (64, 256), (320, 800), (7, 50), (4, 3),
    (4, 9),
]  # fmt: skip


@pytest.mark.parametrize(("num_buckets", "max_distance"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_buckets_are_those_of_transformers_at_every_distance(kind, num_buckets, max_distance):
    distance = torch.arange(-100_000, 100_001)
    bucket = torch.tensor(bucket_of_distance(kind, num_buckets, max_distance))
    found = bucket[distance.clamp(-max_distance, max_distance) + max_distance]
    expected = transformers_buckets(kind, distance, num_buckets, max_distance)
    wrong = distance[found != expected]
    assert wrong.numel() == 0, f"{wrong.numel()} distances, the first {wrong[:5].tolist()}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("query_start", [None, 300, torch.tensor([0, 700])], ids=["last", "300", "each"])
def test_long_distances(kind, query_start):
    """Far past max_distance, the whole row in the last bucket but for its end."""
    query, key = torch.randn(2, 2, 20, 16), torch.randn(2, 2, 600, 16)
    relative_bias = ops.RelativeBias(torch.randn(32, 2), kind, 128)
    found = ops.attention(query, key, key, relative_bias=relative_bias, query_start=query_start)
    exact, _ = attention_formula(
        query, key, key, torch.float64, relative_bias=relative_bias, query_start=query_start
    )
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize("table_dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_table_may_have_another_dtype_than_the_queries(table_dtype):
    query = torch.randn(1, 2, 6, 16)
    relative_bias = ops.RelativeBias(torch.randn(32, 2).to(table_dtype))
    exact, _ = attention_formula(query, query, query, torch.float64, relative_bias=relative_bias)
    found = ops.attention(query, query, query, relative_bias=relative_bias)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)


def test_the_bias_is_a_view_on_the_models_parameter():
    """The gradient arrives where transformers' embedding would have got it."""
    query, key, value = (torch.randn(1, 2, 9, 8, dtype=torch.float64) for _ in range(3))
    ours = torch.nn.Embedding(32, 2, dtype=torch.float64)
    theirs = torch.nn.Embedding(32, 2, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    ops.attention(query, key, value, relative_bias=ops.RelativeBias(ours.weight)).sin().sum().backward()
    distance = torch.arange(9) - torch.arange(9)[:, None]
    bias = theirs(transformers_buckets("t5", distance, 32, 128)).permute(2, 0, 1)[None]
    scores = query @ key.mT * 8**-0.5 + bias
    (torch.softmax(scores, -1) @ value).sin().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[0.0]],), TypeError, "table is list"),
        ((torch.zeros(32, 2, dtype=torch.int64),), TypeError, "table is torch.int64"),
        ((torch.zeros(32),), ValueError, r"table must be \[num_buckets, query heads\]; got \[32\]"),
        ((torch.zeros(32, 2), "T5"), ValueError, "kind is 'T5'; accepted are t5, t5-causal, mpnet"),
        ((torch.zeros(3, 2),), ValueError, "table has 3 buckets; kind 't5' needs at least 4"),
        ((torch.zeros(1, 2), "t5-causal"), ValueError, "table has 1 buckets.*at least 2"),
        ((torch.zeros(32, 2), "t5", 8), ValueError, "max_distance is 8.*more than 8"),
        ((torch.zeros(32, 2), "t5", 128.0), TypeError, "max_distance is 128.0"),
        ((torch.zeros(32, 2), "t5", True), TypeError, "max_distance is True"),
    ],
)
def test_what_cannot_be_a_relative_bias_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.RelativeBias(*arguments)
