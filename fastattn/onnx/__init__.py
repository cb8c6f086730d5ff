"""Export to ONNX, and running what was exported."""

from fastattn.onnx.exporter import ExportResult, export
from fastattn.onnx.runtime.load import load
from fastattn.onnx.runtime.plain import OnnxModel, OnnxOutput

__all__ = ["ExportResult", "OnnxModel", "OnnxOutput", "export", "load"]
