"""ONNX: export of swapped models, and the exported model ready to run; onnx is imported only when called."""

from fastattn.onnx.exporter import ExportResult, export
from fastattn.onnx.runtime import OnnxModel, OnnxOutput, load

__all__ = ["ExportResult", "OnnxModel", "OnnxOutput", "export", "load"]
