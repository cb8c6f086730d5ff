"""The operations everything rests on: public typed functions over registered PyTorch operators."""

from fastattn.ops.activation import bias_gelu
from fastattn.ops.attention import attention
from fastattn.ops.linear import packed_linear
from fastattn.ops.norm import add_layer_norm
from fastattn.ops.varlen_attention import varlen_attention

__all__ = ["add_layer_norm", "attention", "bias_gelu", "packed_linear", "varlen_attention"]
