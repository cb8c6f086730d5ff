"""The operations everything rests on: public typed functions over registered PyTorch operators."""

from fastattn.ops.activation import bias_gelu, gated_activation
from fastattn.ops.attention import attention
from fastattn.ops.decode_attention import decode_attention
from fastattn.ops.linear import packed_linear
from fastattn.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastattn.ops.packed_weight import (
    PackedWeight,
    pack_int4,
    plain,
    prepare,
    quantize_absmax,
    unpack_int4,
)
from fastattn.ops.quantized_linear import quantized_linear, quantized_linears
from fastattn.ops.relative_bias import RelativeBias
from fastattn.ops.rotary import rotary
from fastattn.ops.softmax import softmax
from fastattn.ops.varlen_attention import varlen_attention

__all__ = [
    "PackedWeight",
    "RelativeBias",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "bias_gelu",
    "decode_attention",
    "gated_activation",
    "layer_norm",
    "pack_int4",
    "packed_linear",
    "plain",
    "prepare",
    "quantize_absmax",
    "quantized_linear",
    "quantized_linears",
    "rms_norm",
    "rotary",
    "softmax",
    "unpack_int4",
    "varlen_attention",
]
