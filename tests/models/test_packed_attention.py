"""The attention function given a packed batch, whose mask is its Packing, against the padded batch."""

from __future__ import annotations

import pytest
import torch

from fastattn.ops import RelativeBias
from fastattn.ops.relative_bias import bias_by_distance
from fastattn.packing import Packing

pytest.importorskip("transformers")

from fastattn.models.interface import attention_forward

LENGTH = 11


def padded_batch(side="right"):
    query, key, value = torch.randn(3, 4, 4, LENGTH, 8)
    mask = torch.ones(4, LENGTH, dtype=torch.bool)
    for row, pad in enumerate((0, 3, 10, 6)):
        if pad and side == "right":
            mask[row, -pad:] = False
        elif pad:
            mask[row, :pad] = False
    return query, key[:, :2], value[:, :2], mask


def pack(x, packing):
    """[B, H, S, D] -> [1, H, T, D]."""
    heads, size = x.shape[1], x.shape[3]
    packed = packing.pack(x.transpose(1, 2).flatten(2))
    return packed.view(1, -1, heads, size).transpose(1, 2)


def dense(relative, length=LENGTH):
    by_distance = bias_by_distance(relative.table, relative.kind, relative.max_distance)
    distance = (torch.arange(length) - torch.arange(length)[:, None]).clamp(-16, 16)
    return by_distance[:, distance + relative.max_distance][None]


def terms():
    relative = RelativeBias(torch.randn(8, 4), "t5", max_distance=16)
    return {
        "nothing": {},
        "scale": dict(scaling=0.7),
        "window": dict(sliding_window=4),
        "a window no sequence exceeds": dict(sliding_window=LENGTH),
        "softcap": dict(softcap=0.5),
        "sinks": dict(s_aux=torch.randn(4)),
        "causal": dict(is_causal=True),
        "relative": dict(position_bias=relative),
        "dense": dict(position_bias=torch.randn(1, 4, LENGTH, LENGTH)),
        "dense of each sequence": dict(position_bias=torch.randn(4, 4, LENGTH, LENGTH)),
        "dense and window": dict(position_bias=torch.randn(1, 4, LENGTH, LENGTH), sliding_window=4),
    }


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", terms())
def test_packed_is_padded_without_the_padding(name, side):
    query, key, value, mask = padded_batch(side)
    arguments = terms()[name]
    relative = isinstance(arguments.get("position_bias"), RelativeBias) or "sliding_window" in arguments
    if side == "left" and (relative or "position_bias" in arguments):
        pytest.skip("positions are relative: only padding on the right is packed")
    packing = Packing.from_mask(mask)
    padded_arguments = dict(arguments)
    if isinstance(arguments.get("position_bias"), RelativeBias):
        padded_arguments["position_bias"] = dense(arguments["position_bias"])
    module = torch.nn.Module()
    expected, _ = attention_forward(module, query, key, value, mask, **padded_arguments)
    packed = [pack(x, packing) for x in (query, key, value)]
    found, _ = attention_forward(module, *packed, packing, **arguments)
    unpacked = packing.unpack(found.flatten(2)).view(expected.shape)
    torch.testing.assert_close(unpacked[mask], expected[mask])


@pytest.mark.parametrize("kind", ["relative", "dense"])
def test_gradients_reach_a_learned_bias(kind):
    query, key, value, mask = padded_batch()
    packing = Packing.from_mask(mask)
    grads = []
    for is_packed in (False, True):
        torch.manual_seed(1)
        table = torch.randn(8, 4, requires_grad=True)
        relative = RelativeBias(table, "t5", max_distance=16)
        bias = relative if is_packed and kind == "relative" else dense(relative)
        tensors = [pack(x, packing) if is_packed else x for x in (query, key, value)]
        out, _ = attention_forward(
            torch.nn.Module(), *tensors, packing if is_packed else mask, position_bias=bias
        )
        out = packing.unpack(out.flatten(2)) if is_packed else out.flatten(2)
        out[mask].square().sum().backward()
        grads.append(table.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_dropout_of_a_packed_batch():
    """Drawn from PyTorch's generator; a probability that drops nothing changes nothing."""
    query, key, value, mask = padded_batch()
    packing = Packing.from_mask(mask)
    tensors = [pack(x, packing) for x in (query, key, value)]

    def attend(bias, dropout, seed=0):
        torch.manual_seed(seed)
        return attention_forward(torch.nn.Module(), *tensors, packing, dropout=dropout, position_bias=bias)[0]

    for bias in (None, torch.randn(1, 4, LENGTH, LENGTH), RelativeBias(torch.randn(8, 4), max_distance=16)):
        torch.testing.assert_close(attend(bias, 1e-9), attend(bias, 0.0))
        assert torch.equal(attend(bias, 0.5), attend(bias, 0.5))
        assert not torch.equal(attend(bias, 0.5), attend(bias, 0.5, seed=1))
        assert attend(bias, 1.0).abs().max() == 0.0


def test_what_a_packed_batch_cannot_have_is_refused():
    query, key, value, mask = padded_batch("left")
    packing = Packing.from_mask(mask)
    tensors = [pack(x, packing) for x in (query, key, value)]
    module, bias = torch.nn.Module(), torch.randn(1, 4, LENGTH, LENGTH)
    with pytest.raises(ValueError, match="padding on the right"):
        attention_forward(module, *tensors, packing, position_bias=bias)
    with pytest.raises(ValueError, match="no attention weights of a packed batch"):
        attention_forward(module, *tensors, packing, output_attentions=True)
    with pytest.raises(ValueError, match="does not support packing"):
        attention_forward(module, *tensors, None, packing=packing)
