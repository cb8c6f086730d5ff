"""`ops.attention` on the PyTorch path: right for every mask, length, head size and layout it accepts."""

from __future__ import annotations

import itertools

import pytest
import torch
from tolerance import assert_close
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastattn import ops
from fastattn.ops import attention_reference as reference_module
from fastattn.ops.attention_reference import attention_reference
from fastattn.ops.attention_terms import AttentionTerms
from fastattn.ops.dropout import keep_mask


def inputs(batch=2, heads=4, kv_heads=4, queries=5, keys=7, head_dim=16, value_dim=None, dtype=torch.float32):
    query = torch.randn(batch, heads, queries, head_dim, dtype=dtype)
    key = torch.randn(batch, kv_heads, keys, head_dim, dtype=dtype)
    value = torch.randn(batch, kv_heads, keys, value_dim or head_dim, dtype=dtype)
    return query, key, value


def visible_matrix(query, key, mask=None, causal=False, starts=None, key_lengths=None) -> Tensor:
    """The keys each query sees, bool [B, H, Sq, Sk], one loop a position: nothing shared with the
    implementation.
    """
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    visible = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    for b, i, j in itertools.product(range(batch), range(queries), range(keys)):
        start = keys - queries if starts is None else starts[b]
        if causal and j > i + start:
            visible[b, :, i, j] = False
        if key_lengths is not None and j >= key_lengths[b]:
            visible[b, :, i, j] = False
        if mask is not None and mask.dim() == 2 and not mask[b, j]:
            visible[b, :, i, j] = False
    if mask is not None and mask.dim() == 4:
        visible &= mask
    return visible


def naive(query, key, value, visible, bias=None, scale=None) -> Tensor:
    """The formula in the inputs' dtype, a query that sees nothing giving zeros."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    scores = scores.masked_fill(~visible, float("-inf"))
    return torch.nan_to_num(torch.softmax(scores, -1)) @ value


def check(query, key, value, visible, bias=None, scale=None, **arguments) -> None:
    found = ops.attention(query, key, value, bias=bias, scale=scale, **arguments)
    exact = naive(query.double(), key.double(), value.double(), visible, bias, scale)
    own = naive(query, key, value, visible, bias, scale)
    assert found.dtype == query.dtype
    assert_close(found, own, exact, arguments)


MASKS = {
    "right": torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]]).bool(),
    "left": torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]]).bool(),
    "holes": torch.tensor([[1, 0, 1, 0, 0, 1, 0], [0, 1, 1, 0, 1, 1, 1]]).bool(),
    "one row all masked": torch.tensor([[0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]).bool(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", [None, *MASKS.values()], ids=["none", *MASKS])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_padding_masks(mask, causal, dtype):
    query, key, value = inputs(dtype=dtype)
    check(query, key, value, visible_matrix(query, key, mask, causal), mask=mask, causal=causal)


@pytest.mark.parametrize(
    "shape", [(2, 4, 5, 7), (1, 1, 5, 7), (2, 1, 1, 7), (1, 4, 5, 7), (2, 1, 5, 1), (1, 1, 1, 1)]
)
def test_four_dimensional_masks_and_biases_broadcast(shape):
    query, key, value = inputs()
    mask, bias = torch.rand(shape) > 0.3, torch.randn(shape)
    visible = mask.expand(2, 4, 5, 7)
    check(query, key, value, visible, mask=mask)
    check(query, key, value, torch.ones_like(visible), bias=bias)
    check(query, key, value, visible, bias=bias, mask=mask)


@pytest.mark.parametrize("start", [-3, 0, 1, 2, 6, 20])
def test_causal_query_start(start):
    query, key, value = inputs()
    visible = visible_matrix(query, key, causal=True, starts=[start, start])
    check(query, key, value, visible, causal=True, query_start=start)


def test_causal_query_start_per_batch_with_padding_and_bias():
    query, key, value = inputs()
    starts, mask, bias = torch.tensor([-1, 3]), MASKS["left"], torch.randn(1, 4, 5, 7)
    visible = visible_matrix(query, key, mask, True, starts.tolist())
    check(query, key, value, visible, bias, causal=True, query_start=starts, mask=mask)


@pytest.mark.parametrize("lengths", [[7, 7], [3, 3], [0, 7], [1, 5], [0, 0]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_keys_past_their_length_are_not_there(lengths, dtype):
    query, key, value = inputs()
    visible = visible_matrix(query, key, key_lengths=lengths)
    expected = naive(query, key, value, visible)
    for b, length in enumerate(lengths):
        key[b, :, length:] = float("nan")
        value[b, :, length:] = float("nan")
    tensor = torch.tensor(lengths, dtype=dtype)
    torch.testing.assert_close(ops.attention(query, key, value, key_lengths=tensor), expected)
    out, lse = ops.attention(query, key, value, key_lengths=tensor, return_lse=True)
    torch.testing.assert_close(out, expected)
    assert not lse.isnan().any()


def test_key_lengths_with_causal_mask_and_bias():
    query, key, value = inputs()
    lengths, mask, bias = [4, 6], torch.rand(2, 4, 5, 7) > 0.3, torch.randn(2, 1, 5, 7)
    visible = visible_matrix(query, key, mask, True, [2, 2], lengths)
    check(
        query,
        key,
        value,
        visible,
        bias,
        mask=mask,
        causal=True,
        query_start=2,
        key_lengths=torch.tensor(lengths),
    )


@pytest.mark.parametrize("head_dim", [1, 16, 17, 40, 64, 80, 100, 128, 256])
def test_any_head_size(head_dim):
    query, key, value = inputs(head_dim=head_dim)
    check(query, key, value, visible_matrix(query, key, MASKS["right"]), mask=MASKS["right"])


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("value_dim", [16, 24, 8])
def test_grouped_queries_and_value_heads_of_another_size(kv_heads, value_dim):
    query, key, value = inputs(kv_heads=kv_heads, value_dim=value_dim)
    visible = visible_matrix(query, key, MASKS["left"], True)
    check(query, key, value, visible, mask=MASKS["left"], causal=True)


@pytest.mark.parametrize(
    "shape", [dict(queries=1), dict(keys=1), dict(queries=1, keys=1), dict(batch=5, queries=5, keys=5)]
)
def test_one_query_one_key_and_batch_equal_to_length(shape):
    query, key, value = inputs(**shape)
    mask = torch.rand(key.shape[0], key.shape[2]) > 0.4
    check(query, key, value, visible_matrix(query, key, mask), mask=mask)


@pytest.mark.parametrize("shape", [dict(batch=0), dict(queries=0), dict(keys=0)])
@pytest.mark.parametrize("causal", [False, True])
def test_empty_inputs(shape, causal):
    query, key, value = inputs(**shape)
    out, lse = ops.attention(query, key, value, causal=causal, return_lse=True)
    plain = ops.attention(query, key, value, causal=causal)
    assert out.shape == plain.shape == query.shape
    assert (plain == 0).all() and (out == 0).all()
    assert lse.shape == query.shape[:3] and (lse == float("-inf")).all()


def test_scale_and_huge_and_infinite_values():
    query, key, value = inputs()
    visible = visible_matrix(query, key)
    check(query, key, value, visible, scale=0.5)
    check(query, key, value, visible, scale=1e4)
    bias = torch.randn(2, 4, 5, 7)
    bias[0, 0, 0] = float("-inf")
    bias[1, :, :, :3] = -1e30
    bias[1, 0, 1, 2] = 3e38
    check(query, key, value, visible, bias)


def test_any_strides():
    query, key, value = inputs(queries=7)
    visible = visible_matrix(query, key, MASKS["holes"])
    views = (
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)],
        [x.mT.contiguous().mT for x in (query, key, value)],
    )
    for strided in views:
        check(*strided, visible, mask=MASKS["holes"])
    wide = torch.randn(2, 7, 3, 4, 16)
    check(*(wide[:, :, i].transpose(1, 2) for i in range(3)), torch.ones(2, 4, 7, 7, dtype=torch.bool))
    expanded = torch.randn(2, 1, 7, 16).expand(2, 4, 7, 16)
    check(query, expanded, expanded, visible, mask=MASKS["holes"])


def test_logsumexp():
    query, key, value = inputs(kv_heads=2)
    visible = visible_matrix(query, key, MASKS["one row all masked"])
    out, lse = ops.attention(query, key, value, mask=MASKS["one row all masked"], return_lse=True)
    scores = query @ key.repeat_interleave(2, 1).mT / 4
    expected = torch.logsumexp(scores.masked_fill(~visible, float("-inf")), -1)
    torch.testing.assert_close(lse, expected)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out, naive(query, key, value, visible))


def test_default_causal_alignment_is_bottom_right():
    query, key, value = inputs(queries=3, keys=7)
    whole = ops.attention(torch.cat([torch.zeros(2, 4, 4, 16), query], 2), key, value, causal=True)
    torch.testing.assert_close(ops.attention(query, key, value, causal=True), whole[:, :, 4:])


def test_tiling_over_queries_changes_nothing(monkeypatch):
    query, key, value = inputs(queries=33, keys=33)
    bias = torch.randn(1, 4, 33, 33)
    arguments = dict(bias=bias, causal=True, query_start=2)
    expected = ops.attention(query, key, value, **arguments)
    gradients = _gradients(query, key, value, bias)
    monkeypatch.setattr(reference_module, "TILE_BYTES", 2 * 4 * 33 * 4 * 5)
    assert len(reference_module.query_tiles(query, keys=33)) == 7
    torch.testing.assert_close(ops.attention(query, key, value, **arguments), expected)
    for found, wanted in zip(_gradients(query, key, value, bias), gradients, strict=True):
        torch.testing.assert_close(found, wanted)


def _gradients(query, key, value, bias):
    leaves = [x.clone().requires_grad_() for x in (query, key, value, bias)]
    out, lse = ops.attention(*leaves[:3], bias=leaves[3], causal=True, query_start=2, return_lse=True)
    ((out * torch.linspace(0, 1, out.numel()).view(out.shape)).sum() + lse.sin().sum()).backward()
    return [leaf.grad for leaf in leaves]


def test_gradients_match_sdpa():
    query, key, value = inputs(dtype=torch.float64)
    mask = MASKS["left"][:, None, None, :]
    ours = [x.clone().requires_grad_() for x in (query, key, value)]
    theirs = [x.clone().requires_grad_() for x in (query, key, value)]
    ops.attention(*ours, mask=mask).sin().sum().backward()
    scaled_dot_product_attention(*theirs, attn_mask=mask).sin().sum().backward()
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_gradients_numerically_with_every_input():
    small = inputs(heads=2, kv_heads=1, queries=3, head_dim=3, dtype=torch.float64)
    query, key, value = (x.requires_grad_() for x in small)
    bias = torch.randn(1, 2, 3, 7, dtype=torch.float64, requires_grad=True)

    def function(query, key, value, bias):
        return ops.attention(
            query,
            key,
            value,
            bias=bias,
            mask=MASKS["one row all masked"],
            key_lengths=torch.tensor([7, 4]),
            causal=True,
        )

    assert torch.autograd.gradcheck(function, (query, key, value, bias))


def test_rows_that_see_nothing_have_finite_gradients():
    query, key, value = (x.requires_grad_() for x in inputs())
    out, lse = ops.attention(query, key, value, mask=torch.zeros(2, 7, dtype=torch.bool), return_lse=True)
    assert (out == 0).all() and (lse == float("-inf")).all()
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (query, key, value))


def test_dropout_is_reproducible_unbiased_and_the_same_in_backward():
    query, key, value = inputs(batch=4, queries=64, keys=64)
    torch.manual_seed(1)
    first = ops.attention(query, key, value, dropout_p=0.25)
    torch.manual_seed(1)
    assert torch.equal(first, ops.attention(query, key, value, dropout_p=0.25))
    assert not torch.equal(first, ops.attention(query, key, value, dropout_p=0.25))
    assert torch.equal(ops.attention(query, key, value, dropout_p=1.0), torch.zeros_like(query))
    # d(sum of out)/d(value) is the sum over queries of the dropped probabilities: it must be the forward's
    # mask.
    ones = torch.ones(4, 4, 64, 16, requires_grad=True)
    out = ops.attention(query, key, ones, dropout_p=0.25)
    (gradient,) = torch.autograd.grad(out.sum(), ones)
    torch.testing.assert_close(gradient.sum(), out.sum())
    assert abs(out.mean().item() - 1.0) < 0.02


def test_dropout_mask_has_the_asked_rate_and_no_pattern():
    rows = torch.arange(512)
    keep = keep_mask(torch.tensor([123456789012345]), rows, 512, 0.1)
    assert abs(keep.float().mean().item() - 0.9) < 0.005
    assert (keep.float().mean(0) - 0.9).abs().max() < 0.08
    assert (keep.float().mean(1) - 0.9).abs().max() < 0.08
    other = keep_mask(torch.tensor([123456789012346]), rows, 512, 0.1)
    assert abs((keep ^ other).float().mean().item() - 0.18) < 0.01


def test_autocast_computes_in_the_autocast_dtype():
    query, key, value = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attention(query, key, value)
    assert out.dtype == torch.bfloat16
    expected = ops.attention(query.bfloat16(), key.bfloat16(), value.bfloat16())
    assert torch.equal(out, expected)


def test_compiles_into_one_graph_and_few_for_changing_lengths():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=backend)
    def function(query, key, value, mask):
        return ops.attention(query, key, value, mask=mask, causal=True)

    for length in (4, 5, 6, 9, 17):
        query, key, value = inputs(queries=length, keys=length)
        mask = torch.rand(2, length) > 0.2
        torch.testing.assert_close(
            function(query, key, value, mask), ops.attention(query, key, value, mask=mask, causal=True)
        )
    assert len(graphs) <= 2


def test_reference_is_exact_in_float64():
    query, key, value = inputs(dtype=torch.float64)
    mask = MASKS["holes"]
    found, _ = attention_reference(query, key, value, AttentionTerms(mask=mask, scale=0.25))
    torch.testing.assert_close(
        found, naive(query, key, value, visible_matrix(query, key, mask)), rtol=0, atol=1e-15
    )
