"""Norms, activations, rotary positions, softmax and linears against the PyTorch they replace and their peers,
at BERT-base's shapes: batch 8 x 128; fp32 on a CPU, bf16 on a GPU. Attention is in test_ops_attention.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contenders import (
    BATCH,
    EAGER,
    FASTATTN,
    HEADS,
    LIGER,
    PYTORCH,
    REFERENCE,
    Randn,
    contenders,
    liger,
)
from torch import Tensor
from torch.nn import functional

from fastattn import ops
from fastattn.bench import MissingError
from fastattn.ops.activation import bias_gelu_reference, gated_activation_reference
from fastattn.ops.linear import packed_linear_reference
from fastattn.ops.norm_reference import (
    add_layer_norm_reference,
    add_rms_norm_reference,
    layer_norm_reference,
    rms_norm_reference,
)
from fastattn.ops.quantized_linear_reference import quantized_linear_reference
from fastattn.ops.rotary import rotary_reference
from fastattn.ops.softmax import softmax_reference

HIDDEN, FFN = 768, 3072


def eager_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-12) * weight + bias


def eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


@contenders(PYTORCH, EAGER, LIGER, REFERENCE, FASTATTN)
def test_layer_norm(compared: Any, randn: Randn) -> None:
    x, weight, bias = randn(BATCH.batch, BATCH.seq, HIDDEN), randn(HIDDEN), randn(HIDDEN)
    compared(
        "layer_norm",
        {
            PYTORCH: lambda: functional.layer_norm(x, (HIDDEN,), weight, bias, 1e-12),
            EAGER: lambda: eager_layer_norm(x, weight, bias),
            REFERENCE: lambda: layer_norm_reference(x, weight, bias, 1e-12),
            FASTATTN: lambda: ops.layer_norm(x, weight, bias, eps=1e-12),
        },
        {LIGER: liger("layer_norm", "LigerLayerNormFunction", x, weight, bias, 1e-12)},
    )


@contenders(PYTORCH, EAGER, LIGER, REFERENCE, FASTATTN)
def test_rms_norm(compared: Any, randn: Randn) -> None:
    x, weight = randn(BATCH.batch, BATCH.seq, HIDDEN), randn(HIDDEN)
    compared(
        "rms_norm",
        {
            PYTORCH: lambda: functional.rms_norm(x, (HIDDEN,), weight, 1e-6),
            EAGER: lambda: eager_rms_norm(x, weight),
            REFERENCE: lambda: rms_norm_reference(x, weight, 1e-6, 0.0),
            FASTATTN: lambda: ops.rms_norm(x, weight, eps=1e-6),
        },
        {LIGER: liger("rms_norm", "LigerRMSNormFunction", x, weight, 1e-6)},
    )


@contenders(PYTORCH, EAGER, REFERENCE, FASTATTN)
def test_add_layer_norm(compared: Any, randn: Randn) -> None:
    x, residual = randn(BATCH.batch, BATCH.seq, HIDDEN), randn(BATCH.batch, BATCH.seq, HIDDEN)
    weight, bias = randn(HIDDEN), randn(HIDDEN)
    compared(
        "add_layer_norm",
        {
            PYTORCH: lambda: functional.layer_norm(x + residual, (HIDDEN,), weight, bias, 1e-12),
            EAGER: lambda: eager_layer_norm(x + residual, weight, bias),
            REFERENCE: lambda: add_layer_norm_reference(x, residual, weight, bias, 1e-12)[0],
            FASTATTN: lambda: ops.add_layer_norm(x, residual, weight, bias, 1e-12)[0],
        },
    )


@contenders(PYTORCH, EAGER, LIGER, REFERENCE, FASTATTN)
def test_add_rms_norm(compared: Any, randn: Randn) -> None:
    x, residual = randn(BATCH.batch, BATCH.seq, HIDDEN), randn(BATCH.batch, BATCH.seq, HIDDEN)
    weight = randn(HIDDEN)
    fused = liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction", x, residual, weight, 1e-6)

    def first() -> Callable[[], Tensor]:
        run = fused()
        return lambda: run()[0]

    compared(
        "add_rms_norm",
        {
            PYTORCH: lambda: functional.rms_norm(x + residual, (HIDDEN,), weight, 1e-6),
            EAGER: lambda: eager_rms_norm(x + residual, weight),
            REFERENCE: lambda: add_rms_norm_reference(x, residual, weight, 1e-6)[0],
            FASTATTN: lambda: ops.add_rms_norm(x, residual, weight, 1e-6)[0],
        },
        {LIGER: first},
    )


@contenders(PYTORCH, EAGER, REFERENCE, FASTATTN)
def test_softmax(compared: Any, randn: Randn, mask: Tensor) -> None:
    x, keep = randn(BATCH.batch, HEADS, BATCH.seq, BATCH.seq), mask[:, None, None]

    def eager() -> Tensor:
        scores = (0.125 * x).masked_fill(~keep, -math.inf)
        powers = (scores - scores.amax(-1, keepdim=True)).exp()
        return powers / powers.sum(-1, keepdim=True)

    compared(
        "softmax, padding mask",
        {
            PYTORCH: lambda: torch.softmax((0.125 * x).masked_fill(~keep, -math.inf), -1),
            EAGER: eager,
            REFERENCE: lambda: softmax_reference(x, keep, 0.125, False),
            FASTATTN: lambda: ops.softmax(x, keep, scale=0.125),
        },
    )


@contenders(PYTORCH, EAGER, REFERENCE, FASTATTN)
def test_bias_gelu(compared: Any, randn: Randn) -> None:
    x, bias = randn(BATCH.batch, BATCH.seq, FFN), randn(FFN)

    def eager() -> Tensor:
        shifted = x + bias
        return 0.5 * shifted * (1 + torch.erf(shifted * 2**-0.5))

    compared(
        "bias_gelu",
        {
            PYTORCH: lambda: functional.gelu(x + bias),
            EAGER: eager,
            REFERENCE: lambda: bias_gelu_reference(x, bias, "none"),
            FASTATTN: lambda: ops.bias_gelu(x, bias),
        },
    )


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@contenders(PYTORCH, LIGER, REFERENCE, FASTATTN)
def test_gated_activation(compared: Any, randn: Randn, kind: str) -> None:
    """Both halves of one projection's output."""
    gate, up = randn(BATCH.batch, BATCH.seq, 2 * FFN).chunk(2, -1)
    activations = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }

    def none() -> Callable[[], Any]:
        raise MissingError("Liger has no kernel of GELU with the error function")

    names = {"silu": ("swiglu", "LigerSiLUMulFunction"), "gelu_tanh": ("geglu", "LigerGELUMulFunction")}
    compared(
        f"gated_activation, {kind}",
        {
            PYTORCH: lambda: activations[kind](gate) * up,
            REFERENCE: lambda: gated_activation_reference(gate, up, kind),
            FASTATTN: lambda: ops.gated_activation(gate, up, kind=kind),
        },
        {LIGER: liger(*names[kind], gate, up) if kind in names else none},
    )


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@contenders(PYTORCH, REFERENCE, FASTATTN)
def test_rotary(compared: Any, randn: Randn, interleaved: bool) -> None:
    query, key = (randn(BATCH.batch, BATCH.seq, heads, 64).transpose(1, 2) for heads in (HEADS, 4))
    angles = randn(BATCH.seq, 32)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    cos, sin = angles.cos(), angles.sin()

    def turned(x: Tensor) -> Tensor:
        if interleaved:
            return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return torch.cat([-x[..., 32:], x[..., :32]], -1)

    compared(
        f"rotary, {'interleaved' if interleaved else 'half'}",
        {
            PYTORCH: lambda: [x * cos + turned(x) * sin for x in (query, key)],
            REFERENCE: lambda: list(rotary_reference(query, key, cos, sin, interleaved)),
            FASTATTN: lambda: list(ops.rotary(query, key, cos, sin, interleaved=interleaved)),
        },
    )


@contenders(PYTORCH, REFERENCE, FASTATTN)
def test_packed_linear(compared: Any, randn: Randn) -> None:
    """Query, key and value projections, as parameters of a model lie in memory: each on its own."""
    x = randn(BATCH.batch, BATCH.seq, HIDDEN)
    weights, biases = [randn(HIDDEN, HIDDEN) for _ in range(3)], [randn(HIDDEN) for _ in range(3)]
    compared(
        "packed_linear, QKV",
        {
            PYTORCH: lambda: [functional.linear(x, *each) for each in zip(weights, biases, strict=True)],
            REFERENCE: lambda: packed_linear_reference(x, weights, biases),
            FASTATTN: lambda: ops.packed_linear(x, weights, biases),
        },
        budget_s=2.0,
    )


@pytest.mark.parametrize("scheme", ["int8", "int8-weight", "int4-weight"])
@contenders(PYTORCH, REFERENCE, FASTATTN)
def test_quantized_linear(compared: Any, randn: Randn, scheme: str) -> None:
    """A feed-forward layer of a quantized model; the ratio is over the float layer of the same weight.
    `quantized_linears.py` has other sizes and numbers of rows.
    """
    x, bias = randn(BATCH.batch, BATCH.seq, HIDDEN), randn(FFN)
    packed = ops.quantize_absmax(randn(FFN, HIDDEN), scheme)
    weight = packed.dequantize(x.dtype)
    # PyTorch does not round the activations.
    rounded = {"tolerance": 0.02} if scheme == "int8" else {}
    compared(
        f"quantized_linear, {scheme}",
        {
            PYTORCH: lambda: functional.linear(x, weight, bias),
            REFERENCE: lambda: quantized_linear_reference(x, packed, bias, None),
            FASTATTN: lambda: ops.quantized_linear(x, packed, bias),
        },
        **rounded,
    )
