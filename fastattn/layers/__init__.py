"""Layers built from the operations: torch.nn's own by name, for use in a model, and what adapters swap in."""

from fastattn.layers.add_norm import AddLayerNorm, AddRMSNorm
from fastattn.layers.attention import MultiheadAttention
from fastattn.layers.border import Border
from fastattn.layers.decoder import TransformerDecoder, TransformerDecoderLayer
from fastattn.layers.encoder import TransformerEncoder, TransformerEncoderLayer
from fastattn.layers.fused import (
    FusedActivation,
    FusedLayer,
    FusedResidualNorm,
    activated_linear,
    cannot_fuse_activation,
    dense_add_norm,
    project,
)
from fastattn.layers.gated import FusedGatedMLP, gated
from fastattn.layers.plain import is_observed, is_plain, modules_below
from fastattn.layers.quantized_linear import QuantizedLinear, dequantize_layers, rounds_inputs
from fastattn.layers.residual import PlainStream, ResidualLayer, ResidualStream, add_norm
from fastattn.layers.rms_norm import FusedRMSNorm

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "Border",
    "FusedActivation",
    "FusedGatedMLP",
    "FusedLayer",
    "FusedRMSNorm",
    "FusedResidualNorm",
    "MultiheadAttention",
    "PlainStream",
    "QuantizedLinear",
    "ResidualLayer",
    "ResidualStream",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "activated_linear",
    "add_norm",
    "cannot_fuse_activation",
    "dense_add_norm",
    "dequantize_layers",
    "gated",
    "is_observed",
    "is_plain",
    "modules_below",
    "project",
    "rounds_inputs",
]
