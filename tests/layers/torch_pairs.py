"""torch.nn's layers beside ours with the same weights, and how outputs and gradients are compared."""

from __future__ import annotations

import warnings

import torch
from torch import nn

import fastattn.layers

TOLERANCE = 1e-5


def pair(name, *args, **kwargs):
    """torch.nn's layer and ours of that name, weights equal and none of them zero or one."""
    torch.manual_seed(0)
    reference = getattr(nn, name)(*args, **kwargs)
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = getattr(fastattn.layers, name)(*args, **kwargs)
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def stacks(layer, decoder=False, norm=False, layers=2, **kwargs):
    """A stack of torch.nn's layers and one of ours, with different weights in every layer."""
    kind = "Decoder" if decoder else "Encoder"
    d_model = layer.setdefault("d_model", 24)
    built = []
    for namespace in (nn, fastattn.layers):
        torch.manual_seed(1)
        each = getattr(namespace, f"Transformer{kind}Layer")(**{"nhead": 4, "dim_feedforward": 40, **layer})
        last = nn.LayerNorm(d_model) if norm else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="enable_nested_tensor")
            built.append(getattr(namespace, f"Transformer{kind}")(each, layers, last, **kwargs))
    reference, ours = built
    torch.manual_seed(2)
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def assert_close(found, expected, context=""):
    assert found.shape == expected.shape and found.dtype == expected.dtype, context
    if expected.numel() == 0:
        return
    scale = expected.abs().max().clamp(min=1e-6)
    error = (found - expected).abs().max()
    assert error <= TOLERANCE * scale, (
        f"error {error:.2e}, scale {scale:.2e}, {tuple(found.shape)}; {context}"
    )


def gradients(module, loss):
    """Gradients of every parameter, by name, and the loss's others are left alone."""
    module.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def varied_sum(out):
    return (out * torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)).sum()


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] is None) == (grad is None), name
        if grad is not None:
            assert_close(found[name], grad, f"gradient of {name}")


def padding(lengths, width):
    return torch.arange(width) >= torch.tensor(lengths)[:, None]
