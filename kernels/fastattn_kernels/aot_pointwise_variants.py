"""The pointwise and norm kernels' forms compiled ahead of time: launches over meta tensors, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ._launch import Launch
from .activation import plan_bias_gelu, plan_gated_activation
from .norm_plan import QUANTIZED_DTYPES, plan_norm
from .rotary import plan_rotary
from .softmax import plan_softmax

__all__ = ["VARIANTS"]

ROWS = 64
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _norm(
    width: int, dtype: torch.dtype, architecture: str, *, residual: bool = True, dropout: bool = False,
    quantize: str | None = None, **flags: Any,
) -> Launch:  # fmt: skip
    x, weight = _empty(ROWS, width, dtype=dtype), _empty(width, dtype=dtype)
    out_dtype = dtype if quantize is None else QUANTIZED_DTYPES[quantize]
    return plan_norm(
        x,
        x if residual else None,
        weight,
        None if flags.get("rms") else weight,
        _empty(ROWS, width, dtype=out_dtype),
        x if residual else None,
        None if quantize is None else _empty(ROWS, 1, dtype=FP32),
        eps=1e-5,
        architecture=architecture,
        dropout_p=0.1 if dropout else 0.0,
        seed=_empty(1, dtype=torch.int64) if dropout else None,
        quantize=quantize,
        **flags,
    )


def _gelu(approximate: str, architecture: str) -> Launch:
    x, bias = _empty(ROWS, 3072, dtype=FP16), _empty(3072, dtype=FP16)
    return plan_bias_gelu(x, bias, x, approximate, architecture)


def _gated(kind: str, dtype: torch.dtype, architecture: str) -> Launch:
    gate, up = _empty(ROWS, 2 * 11008, dtype=dtype).chunk(2, -1)
    return plan_gated_activation(gate, up, _empty(ROWS, 11008, dtype=dtype), kind, architecture)


def _softmax(keys: int, dtype: torch.dtype, mask: bool, causal: bool, architecture: str) -> Launch:
    x = _empty(2, 8, ROWS, keys, dtype=dtype)
    padding = _empty(2, 1, 1, keys, dtype=torch.bool) if mask else None
    return plan_softmax(x, padding, x, 0.125, causal, architecture)


def _rotary(head_dim: int, width: int, interleaved: bool, dtype: torch.dtype, architecture: str) -> Launch:
    # As models have them: [B, S, H, D] seen as [B, H, S, D].
    query = _empty(2, ROWS, 32, head_dim, dtype=dtype).transpose(1, 2)
    key = _empty(2, ROWS, 8, head_dim, dtype=dtype).transpose(1, 2)
    angles = _empty(ROWS, width, dtype=FP32)
    return plan_rotary(query, key, angles, angles, query, key, interleaved, architecture)


VARIANTS: dict[str, Callable[[str], Launch]] = {
    "layer_norm-768-fp16": partial(_norm, 768, FP16, residual=False),
    "rms_norm-128-bf16": partial(_norm, 128, BF16, residual=False, rms=True),
    "rms_norm-65536-fp16": partial(_norm, 65536, FP16, residual=False, rms=True),
    "add_layer_norm-768-fp16": partial(_norm, 768, FP16),
    "add_layer_norm-8192-fp32-dropout": partial(_norm, 8192, FP32, dropout=True),
    "add_layer_norm-16384-bf16-dropout": partial(_norm, 16384, BF16, dropout=True),
    "add_layer_norm-65536-bf16": partial(_norm, 65536, BF16),
    "add_layer_norm-1024-fp16-int8": partial(_norm, 1024, FP16, quantize="int8"),
    "add_rms_norm-4096-bf16": partial(_norm, 4096, BF16, rms=True),
    "add_rms_norm-4096-bf16-int8": partial(_norm, 4096, BF16, rms=True, quantize="int8"),
    "add_rms_norm-4096-bf16-fp8": partial(_norm, 4096, BF16, rms=True, quantize="fp8"),
    "add_rms_norm-8192-fp32-fp8-dropout": partial(_norm, 8192, FP32, rms=True, quantize="fp8", dropout=True),
    "add_rms_norm-65536-fp16-fp8": partial(_norm, 65536, FP16, rms=True, quantize="fp8"),
    "bias_gelu-none": partial(_gelu, "none"),
    "bias_gelu-tanh": partial(_gelu, "tanh"),
    "gated_activation-silu-bf16": partial(_gated, "silu", BF16),
    "gated_activation-gelu-fp32": partial(_gated, "gelu", FP32),
    "gated_activation-gelu_tanh-fp16": partial(_gated, "gelu_tanh", FP16),
    "softmax-512-fp16-mask": partial(_softmax, 512, FP16, True, False),
    "softmax-1001-fp32-mask-causal": partial(_softmax, 1001, FP32, True, True),
    "softmax-8192-bf16-causal": partial(_softmax, 8192, BF16, False, True),
    "softmax-16384-fp16-mask-causal": partial(_softmax, 16384, FP16, True, True),
    "softmax-65536-fp16-mask-causal": partial(_softmax, 65536, FP16, True, True),
    "rotary-128-bf16": partial(_rotary, 128, 128, False, BF16),
    "rotary-128-fp32-interleaved": partial(_rotary, 128, 128, True, FP32),
    "rotary-80-fp16-partial": partial(_rotary, 80, 32, False, FP16),
    "rotary-256-fp16-interleaved-partial": partial(_rotary, 256, 64, True, FP16),
}
