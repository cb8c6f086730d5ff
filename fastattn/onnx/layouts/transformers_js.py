"""transformers.js, in browsers: the graphs in `onnx/`, a suffix telling the dtype a page asks for.

config.json names that dtype, so that a page need not: on WebAssembly the default is 8 bit.
"""

from __future__ import annotations

from fastattn.onnx.graph_spec import Source
from fastattn.onnx.layouts.context import LayoutContext
from fastattn.onnx.targets import Target

__all__ = ["DTYPES", "refusal", "write"]

# Precision -> transformers.js's name of the dtype and the suffix of its files.
DTYPES = {
    "fp32": ("fp32", ""),
    "fp16": ("fp16", "_fp16"),
    "int8": ("q8", "_quantized"),
    "int8-weight": ("q8", "_quantized"),
    "int4-weight": ("q4", "_q4"),
}


def refusal(source: Source, target: Target) -> str | None:
    if source.config is None:
        return "transformers.js runs models of transformers, and this is a module of your own"
    if "transformers.js" not in target.layouts:
        return f"transformers.js runs exports for target 'web', and the target is {target.name!r}"
    return None


def write(context: LayoutContext) -> None:
    dtype, suffix = DTYPES[context.precision]
    for spec in context.source.graphs:
        context.link_graph_alone(spec.name, f"onnx/{spec.name}{suffix}.onnx")
    config = context.read_json("config.json")
    context.write_json("config.json", {**config, "transformers.js_config": {"dtype": dtype}})
