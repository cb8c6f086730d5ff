"""Precisions below float32 on a finished graph: int8, weights of 8 and 4 bits, float16."""

from fastattn.onnx.quantization.plain_tables import without_block_gathers
from fastattn.onnx.quantization.quantizer import PRECISIONS, quantize

__all__ = ["PRECISIONS", "quantize", "without_block_gathers"]
