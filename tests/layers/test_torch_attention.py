"""layers.MultiheadAttention against torch.nn's: constructor options, masks and layouts, with gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch_pairs import assert_close, assert_same_gradients, gradients, padding, pair, varied_sum

import fastattn
from fastattn.layers import MultiheadAttention

E, H = 24, 4
CONSTRUCTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "both appended": {"add_bias_kv": True, "add_zero_attn": True},
    "other sizes": {"kdim": 10, "vdim": 14},
    "other sizes, no bias": {"kdim": 10, "bias": False},
    "odd heads": {"num_heads": 3},
}


def masks(kind, batch, length, keys, heads):
    """(key_padding_mask, attn_mask) of a kind, no query left without a key."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.rand(batch, keys, generator=generator) < 0.4
    hidden[:, 0] = False
    two = torch.rand(length, keys, generator=generator) < 0.4
    three = torch.rand(batch * heads, length, keys, generator=generator) < 0.4
    two[:, 0] = three[:, :, 0] = False

    def added(mask):
        return torch.where(mask, float("-inf"), torch.randn(mask.shape, generator=generator))

    return {
        "none": (None, None),
        "padding": (hidden, None),
        "padding float": (added(hidden), None),
        "2-D": (None, two),
        "2-D float": (None, added(two)),
        "3-D": (None, three),
        "3-D float": (None, added(three)),
        "padding and 2-D": (hidden, two),
        "padding and 3-D float": (added(hidden), added(three)),
    }[kind]


def inputs(construction, batch_first, sources, batch=3, length=5, keys=7):
    torch.manual_seed(4)
    kdim, vdim = construction.get("kdim", E), construction.get("vdim", E)

    def make(size, features):
        shape = (batch, size, features) if batch_first else (size, batch, features)
        return torch.randn(shape, requires_grad=True)

    if sources == "self":
        x = make(length, E)
        return (x, x, x), length
    query, key = make(length, E), make(keys, kdim)
    value = key if sources == "memory" else make(keys, vdim)
    return (query, key, value), keys


def cases():
    for name, construction in CONSTRUCTIONS.items():
        other_sizes = "kdim" in construction
        for sources in ["apart"] if other_sizes else ["self", "memory", "apart"]:
            yield pytest.param(construction, sources, id=f"{name}, {sources}")


KINDS = [
    "none",
    "padding",
    "padding float",
    "2-D",
    "2-D float",
    "3-D",
    "3-D float",
    "padding and 2-D",
    "padding and 3-D float",
]


@pytest.mark.parametrize("construction, sources", cases())
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
def test_every_mask_gives_torchs_output_weights_and_gradients(construction, sources, batch_first):
    arguments = {"embed_dim": E, "num_heads": H, "batch_first": batch_first, **construction}
    reference, ours = pair("MultiheadAttention", **arguments)
    (query, key, value), keys = inputs(construction, batch_first, sources)
    for kind in KINDS:
        key_padding_mask, attn_mask = masks(kind, 3, 5, keys, arguments["num_heads"])
        options = {"key_padding_mask": key_padding_mask, "attn_mask": attn_mask}
        found, nothing = ours(query, key, value, need_weights=False, **options)
        expected, _ = reference(query, key, value, need_weights=False, **options)
        assert nothing is None
        assert_close(found, expected, kind)
        for average in (True, False):
            again, weights = ours(query, key, value, average_attn_weights=average, **options)
            _, expected_weights = reference(query, key, value, average_attn_weights=average, **options)
            assert_close(again, expected, f"{kind}, with weights")
            assert_close(weights, expected_weights, f"{kind}, weights")
        if kind in ("none", "padding and 2-D", "3-D float"):
            wanted = [query] if query is key else [query, key, value]
            found_inputs = torch.autograd.grad(varied_sum(found), wanted, retain_graph=True)
            expected_inputs = torch.autograd.grad(varied_sum(expected), wanted, retain_graph=True)
            for got, want in zip(found_inputs, expected_inputs, strict=True):
                assert_close(got, want, f"{kind}, input gradient")
            assert_same_gradients(
                gradients(ours, varied_sum(found)), gradients(reference, varied_sum(expected))
            )


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched_inputs(batch_first):
    reference, ours = pair("MultiheadAttention", E, H, batch_first=batch_first, add_bias_kv=True)
    x, memory = torch.randn(5, E), torch.randn(7, E)
    hidden = torch.tensor([False, True, False, False, True, False, False])
    three = torch.rand(H, 5, 7) < 0.3
    three[:, :, 0] = False
    for options in ({}, {"key_padding_mask": hidden}, {"attn_mask": three}, {"average_attn_weights": False}):
        for got, want in zip(
            ours(x, memory, memory, **options), reference(x, memory, memory, **options), strict=True
        ):
            assert_close(got, want, str(options))
    assert_close(ours(x, x, x)[0], reference(x, x, x)[0])


@torch.no_grad()
@pytest.mark.parametrize("float_mask", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("with_padding", [False, True])
def test_the_causal_hint(float_mask, need_weights, with_padding):
    reference, ours = pair("MultiheadAttention", E, H, batch_first=True)
    reference.train(), ours.train()  # torch.nn's evaluation fast path takes no hint
    x = torch.randn(3, 6, E)
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    if float_mask:
        causal = nn.Transformer.generate_square_subsequent_mask(6)
    hidden = None
    if with_padding:
        hidden = padding([6, 4, 1], 6)
        hidden = torch.where(hidden, float("-inf"), 0.0) if float_mask else hidden
    options = {
        "attn_mask": causal,
        "key_padding_mask": hidden,
        "need_weights": need_weights,
        "is_causal": True,
    }
    for got, want in zip(ours(x, x, x, **options), reference(x, x, x, **options), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert_close(got, want)


def test_a_causal_hint_without_a_mask_is_refused():
    x = torch.randn(2, 3, E)
    with pytest.raises(ValueError, match="is_causal"):
        MultiheadAttention(E, H)(x, x, x, is_causal=True)


@torch.no_grad()
def test_a_query_that_sees_nothing_gets_zeros():
    _, ours = pair("MultiheadAttention", E, H, batch_first=True)
    nn.init.zeros_(ours.out_proj.bias)
    x = torch.randn(2, 5, E)
    hidden = padding([5, 0], 5)
    out, weights = ours(x, x, x, key_padding_mask=hidden)
    assert (out[1] == 0).all() and (weights[1] == 0).all() and out[0].isfinite().all()
    direct, _ = ours(x, x, x, key_padding_mask=hidden, need_weights=False)
    assert_close(direct, out)


@torch.no_grad()
@pytest.mark.parametrize("batch, length", [(0, 4), (1, 1), (4, 4), (3, 1)])
def test_sizes_that_break_implementations(batch, length):
    reference, ours = pair("MultiheadAttention", E, H, batch_first=True)
    x = torch.randn(batch, length, E)
    hidden = torch.zeros(batch, length, dtype=torch.bool)
    hidden[:, 1:] = True
    assert_close(ours(x, x, x, need_weights=False)[0], reference(x, x, x, need_weights=False)[0])
    if batch:
        found, expected = ours(x, x, x, key_padding_mask=hidden), reference(x, x, x, key_padding_mask=hidden)
        assert_close(found[0], expected[0])
        assert_close(found[1], expected[1])


@torch.no_grad()
def test_inputs_that_are_not_contiguous():
    reference, ours = pair("MultiheadAttention", E, H, batch_first=True)
    x = torch.randn(E, 6, 3).transpose(0, 2)[:, ::2]
    assert not x.is_contiguous()
    assert_close(ours(x, x, x)[0], reference(x, x, x)[0])


def test_dropout_is_drawn_in_training_only_and_shows_in_the_weights():
    attention = MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    x = torch.randn(2, 30, E)
    _, weights = attention(x, x, x, average_attn_weights=False)
    assert 0.3 < (weights == 0).float().mean() < 0.7
    first = attention(x, x, x, need_weights=False)[0]
    assert not torch.equal(first, attention(x, x, x, need_weights=False)[0])
    first.sum().backward()
    torch.manual_seed(5)
    again = attention(x, x, x, need_weights=False)[0]
    torch.manual_seed(5)
    assert torch.equal(again, attention(x, x, x, need_weights=False)[0])
    attention.eval()
    assert (attention(x, x, x)[1] > 0).all()


@torch.no_grad()
def test_autocast_gives_torchs_dtype_and_values():
    reference, ours = pair("MultiheadAttention", E, H, batch_first=True, add_bias_kv=True)
    x, hidden = torch.randn(3, 6, E), padding([6, 4, 1], 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for need_weights in (False, True):
            found = ours(x, x, x, key_padding_mask=hidden, need_weights=need_weights)[0]
            expected = reference(x, x, x, key_padding_mask=hidden, need_weights=need_weights)[0]
            assert found.dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_a_nested_tensor_runs_as_in_torch():
    reference, ours = pair("MultiheadAttention", E, H, batch_first=True)
    reference.eval(), ours.eval()
    with torch.no_grad():
        nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
        found = ours(nested, nested, nested, need_weights=False)[0].to_padded_tensor(0.0)
        assert_close(found, reference(nested, nested, nested, need_weights=False)[0].to_padded_tensor(0.0))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, x: m(x[0, 0], x, x), "query, key and value"),
        (lambda m, x: m(x, x[..., :5], x), "features"),
        (lambda m, x: m(x, x[:1], x[:1]), "batch size"),
        (lambda m, x: m(x, x, x, key_padding_mask=torch.zeros(2, 9, dtype=torch.bool)), "key_padding_mask"),
        (lambda m, x: m(x, x, x, attn_mask=torch.zeros(4, 3, dtype=torch.bool)), "attn_mask"),
        (lambda m, x: m(x, x, x, attn_mask=torch.zeros(3, 3, 3)), "attn_mask"),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(MultiheadAttention(E, H, batch_first=True), torch.randn(2, 3, E))


def test_a_mask_of_integers_is_refused():
    x = torch.randn(2, 3, E)
    with pytest.raises(TypeError, match="bool"):
        MultiheadAttention(E, H, batch_first=True)(
            x, x, x, key_padding_mask=torch.zeros(2, 3, dtype=torch.long)
        )


def test_it_is_torchs_by_type_and_state():
    reference, ours = pair("MultiheadAttention", E, H)
    assert isinstance(ours, nn.MultiheadAttention) and type(ours).__name__ == "MultiheadAttention"
    assert list(ours.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(ours.state_dict())
    assert fastattn.layers.MultiheadAttention is MultiheadAttention
