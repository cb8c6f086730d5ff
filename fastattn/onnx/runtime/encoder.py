"""Exported encoders and vision models: one graph, one call."""

from __future__ import annotations

from typing import Any

from fastattn.onnx.runtime.pretrained import OnnxPretrainedModel

__all__ = ["OnnxEncoder"]


class OnnxEncoder(OnnxPretrainedModel):
    """An exported encoder or vision model, with any head."""

    generates = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run a batch.

        Args:
            the original's arguments by name or in its order, torch tensors or numpy arrays. What has a
            default (an
            attention mask: all ones; token types: zeros) may be left out.

        Returns:
            The original's output class, or a tuple with return_dict=False; torch tensors on the device of
            the first input where that is one, else numpy arrays.

        Raises:
            TypeError: an unknown, missing or doubled argument, or a dtype of another kind.
            ValueError: a rank, shape, length or token that the model cannot take, or an output that was not
            exported.
        """
        given = self._names_given(args, kwargs)
        (graph,) = self.graphs.values()
        feeds = self._only_inputs(given, graph.input_names)
        first = feeds.get(graph.input_names[0], next(iter(feeds.values()), None))
        return self._answer(graph.run(feeds), first, given.get("return_dict", self.config.return_dict))
