"""transformers: `ExportedModel.from_pretrained(folder)(**inputs)` returns the original's output class.

`export.json` says which file holds the graph, what it was traced with and how its outputs are put together
again (transformers/exporters/base.py, metadata.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.onnx.graph_spec import Source
from fastattn.onnx.layouts.context import LayoutContext
from fastattn.onnx.targets import Target

__all__ = ["refusal", "write"]

_SCHEMA = 1


def refusal(source: Source, target: Target) -> str | None:
    if source.config is None:
        return "ExportedModel is for models of transformers, and this is a module of your own"
    if source.cache is not None:
        return (
            "ExportedModel binds a cache by the paths of transformers' cache object, and this graph's inputs "
            "carry the names that optimum and onnxruntime-genai give them; fastattn.load reads the folder"
        )
    return None


def write(context: LayoutContext) -> None:
    components = {}
    for spec in context.source.graphs:
        outputs = _outputs(context.source.reference, spec.inputs, spec.outputs)
        leaves, structure = torch.utils._pytree.tree_flatten(outputs)
        metadata = {
            "architecture": context.source.architecture,
            "packages": context.manifest["versions"],
            "export_config": {
                "dynamic": True,
                "export_format": "onnx",
                "opset_version": context.target.opset,
            },
            "export_dtype": "float16" if context.precision == "fp16" else "float32",
            "export_device": "cpu",
            "kwargs": {
                name: {
                    "rank": tensor.dim(),
                    "shape": list(tensor.shape),
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                }
                for name, tensor in spec.inputs.items()
            },
            "in_spec": None,
            "out_spec": torch.utils._pytree.treespec_dumps(structure),
            "in_constants": {},
            "out_constants": [[i, leaf] for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)],
        }
        components[spec.name] = {"file": f"{spec.name}.onnx", "metadata": metadata}
        # It asks for the file of the weights whether the graph has one or not.
        (context.staging / f"{spec.name}.onnx.data").touch()
    manifest = {"schema_version": _SCHEMA, "export_format": "onnx", "components": components}
    context.write_json("export.json", manifest)


def _outputs(reference: Any, inputs: dict[str, Tensor], names: tuple[str, ...]) -> Any:
    """What the original returns, with the graph's outputs alone in it."""
    with torch.no_grad():
        outputs = reference(**inputs)
    leaves = torch.utils._pytree.tree_leaves(outputs)
    if sum(isinstance(leaf, Tensor) for leaf in leaves) == len(names):
        return outputs
    # Of CLIP's outputs the graph has some, which its class holds as well.
    kept = [name for name in outputs if name in names]
    if kept != list(names):
        raise ValueError(f"the model returns {list(outputs)} and its graph {list(names)}")
    return type(outputs)(**{name: outputs[name] for name in names})
