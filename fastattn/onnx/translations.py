"""The ONNX face of every operation: one function each, emitting what the current target runs fastest.

Each takes its operator's arguments, tensors as ONNX values, and is called while `torch.onnx.export` records
nodes, for `targets.current_target()`. Dropout is checked before translation: see
`fastattn.onnx.convert`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import fastattn.onnx.cache_append
import fastattn.ops  # noqa: F401 -- registers the operators
from fastattn.onnx.attention_translations import attention, decode_attention, varlen_attention
from fastattn.onnx.cached_attention import append
from fastattn.onnx.cross_cache import choose
from fastattn.onnx.last_positions import last_positions
from fastattn.onnx.linear_translations import index_copy, linear, packed_linear, select
from fastattn.onnx.norm_translations import (
    add_layer_norm,
    add_layer_norm_quantized,
    add_rms_norm,
    add_rms_norm_quantized,
    layer_norm,
    rms_norm,
)
from fastattn.onnx.pointwise_translations import bias_gelu, gated_activation, rotary, softmax
from fastattn.onnx.quantized_translation import quantized_linear

__all__ = ["TRANSLATIONS"]

# Operator -> its translation. The aten operators are translated again because the exporter's own choice costs
# copies.
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.fastattn.attention.default: attention,
    torch.ops.fastattn.varlen_attention.default: varlen_attention,
    torch.ops.fastattn.decode_attention.default: decode_attention,
    torch.ops.fastattn_graph.append.default: append,
    torch.ops.fastattn.layer_norm.default: layer_norm,
    torch.ops.fastattn.rms_norm.default: rms_norm,
    torch.ops.fastattn.add_layer_norm.default: add_layer_norm,
    torch.ops.fastattn.add_rms_norm.default: add_rms_norm,
    torch.ops.fastattn.add_layer_norm_quantized.default: add_layer_norm_quantized,
    torch.ops.fastattn.add_rms_norm_quantized.default: add_rms_norm_quantized,
    torch.ops.fastattn.softmax.default: softmax,
    torch.ops.fastattn.bias_gelu.default: bias_gelu,
    torch.ops.fastattn.gated_activation.default: gated_activation,
    torch.ops.fastattn.rotary.default: rotary,
    torch.ops.fastattn.packed_linear.default: packed_linear,
    torch.ops.fastattn.quantized_linear.default: quantized_linear,
    torch.ops.aten.linear.default: linear,
    torch.ops.aten.select.int: select,
    torch.ops.aten.index_copy.default: index_copy,
    torch.ops.fastattn_onnx.last_positions.default: last_positions,
    torch.ops.fastattn_onnx.cached_or_fresh.default: choose,
}
