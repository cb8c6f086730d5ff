"""What other loaders need beside an exported graph, each layout in a file of its own."""

from __future__ import annotations

from collections.abc import Iterable

from fastattn.onnx.graph_spec import Source
from fastattn.onnx.layouts import exported_model, genai, optimum_models, sentences, transformers_js, triton
from fastattn.onnx.layouts.context import Layout, LayoutContext
from fastattn.onnx.targets import Target

__all__ = ["LAYOUTS", "Layout", "LayoutContext", "resolve_layouts", "write_layouts"]

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("transformers", exported_model.refusal, exported_model.write, automatic=True),
        Layout("sentence-transformers", sentences.refusal, sentences.write, automatic=True),
        # Completes the files that are there: after the one that may save a tokenizer.
        Layout("optimum", optimum_models.refusal, optimum_models.write, automatic=True),
        Layout("transformers.js", transformers_js.refusal, transformers_js.write),
        Layout("onnxruntime-genai", genai.refusal, genai.write),
        Layout("triton", triton.refusal, triton.write),
    )
}


def resolve_layouts(layouts: str | Iterable[str], source: Source, target: Target) -> tuple[str, ...]:
    """Names of the layouts to write, in the order of `LAYOUTS`.

    Args:
        layouts: "auto" (those that are automatic, or the target's, as far as the source has them), one
            name, or several; an empty sequence for none.

    Raises:
        TypeError, ValueError: an unknown layout, or one that cannot be had of this model or target.
    """
    if isinstance(layouts, str) and layouts == "auto":
        return tuple(
            name
            for name, layout in LAYOUTS.items()
            if (layout.automatic or name in target.layouts) and layout.refusal(source, target) is None
        )
    names = [layouts] if isinstance(layouts, str) else list(layouts)
    for name in names:
        if name not in LAYOUTS:
            raise ValueError(
                f"layouts has {name!r}; a layout is one of {', '.join(map(repr, LAYOUTS))}, or 'auto' alone"
            )
        reason = LAYOUTS[name].refusal(source, target)
        if reason is not None:
            raise ValueError(f"layout {name!r} cannot be written: {reason}")
    return tuple(name for name in LAYOUTS if name in names)


def write_layouts(context: LayoutContext, wanted: Iterable[str]) -> None:
    """Write them into the folder under construction; names as `resolve_layouts` gives them."""
    for name in wanted:
        LAYOUTS[name].write(context)
