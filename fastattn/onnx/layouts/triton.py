"""NVIDIA Triton Inference Server: a model repository, one model for every graph.

`triton/<name>/config.pbtxt` beside `triton/<name>/1/model.onnx`, for
`tritonserver --model-repository=<folder>/triton`. Batches are a dimension like any other (max_batch_size 0):
the inputs of one graph have several that vary together, which the server's own batching cannot know.
"""

from __future__ import annotations

from typing import Any

from fastattn.onnx.graph_spec import Source
from fastattn.onnx.layouts.context import LayoutContext
from fastattn.onnx.targets import Target

__all__ = ["FOLDER", "refusal", "write"]

FOLDER = "triton"

# onnx.TensorProto's data types -> Triton's.
_TYPES = {
    **{1: "TYPE_FP32", 2: "TYPE_UINT8", 3: "TYPE_INT8", 5: "TYPE_INT16", 6: "TYPE_INT32", 7: "TYPE_INT64"},
    **{9: "TYPE_BOOL", 10: "TYPE_FP16", 11: "TYPE_FP64", 16: "TYPE_BF16"},
}


def refusal(source: Source, target: Target) -> str | None:
    if target.name == "web":
        return "target 'web' is for browsers; choose 'cpu', 'cuda' or 'standard' for a server"
    return None


def write(context: LayoutContext) -> None:
    import onnx

    for spec in context.source.graphs:
        # A repository may hold several exports: the architecture tells them apart.
        architecture = context.source.architecture
        name = architecture if spec.name == "model" else f"{architecture}-{spec.name}"
        graph = onnx.load(context.staging / f"{spec.name}.onnx", load_external_data=False).graph
        # Inputs that have a default are left out: Triton wants every declared one with every request.
        optional = {tensor.name for tensor in graph.initializer}
        inputs = [value for value in graph.input if value.name not in optional]
        content = _config(name, inputs, graph.output, context.target)
        folder = f"{FOLDER}/{name}"
        context.link_graph(spec.name, f"{folder}/1/model.onnx")
        (context.staging / folder / "config.pbtxt").write_text(content, encoding="utf-8")


def _config(name: str, inputs: Any, outputs: Any, target: Target) -> str:
    kind = "KIND_GPU" if target.provider == "CUDAExecutionProvider" else "KIND_CPU"
    return "\n".join(
        [
            f'name: "{name}"',
            'backend: "onnxruntime"',
            'platform: "onnxruntime_onnx"',
            'default_model_filename: "model.onnx"',
            "max_batch_size: 0",
            *_tensors("input", inputs),
            *_tensors("output", outputs),
            f"instance_group [ {{ count: 1, kind: {kind} }} ]",
            "",
        ]
    )


def _tensors(field: str, values: Any) -> list[str]:
    """A tensor a line; a dimension that varies is -1."""
    lines = []
    for value in values:
        tensor = value.type.tensor_type
        dims = [size.dim_value if size.HasField("dim_value") else -1 for size in tensor.shape.dim]
        lines.append(f'  {{ name: "{value.name}", data_type: {_TYPES[tensor.elem_type]}, dims: {dims} }}')
    return [f"{field} [", *[f"{line}," for line in lines[:-1]], *lines[-1:], "]"]
