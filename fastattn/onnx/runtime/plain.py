"""An exported graph called and read as the module it was made of."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastattn.onnx.requirements import require
from fastattn.onnx.runtime.graph_session import open_graph
from fastattn.onnx.runtime.manifest import read_manifest

__all__ = ["OnnxModel", "OnnxOutput"]


class OnnxOutput(Mapping[str, Any]):
    """A model's outputs by name, attribute or position, as in transformers' ModelOutput."""

    def __init__(self, outputs: dict[str, Any]) -> None:
        self.__dict__["_outputs"] = outputs

    def __getitem__(self, key: Any) -> Any:
        return self._outputs[key] if isinstance(key, str) else self.to_tuple()[key]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_outputs"][name]
        except KeyError:
            raise AttributeError(f"the model has no output {name!r}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={list(value.shape)}" for name, value in self._outputs.items())
        return f"OnnxOutput({shapes})"

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self._outputs.values())


class OnnxModel:
    """An exported graph in an ONNX Runtime session; safe to call from several threads.

    Attributes:
        manifest: what `fastattn.json` holds: versions, precision, task, graphs, verification.
        inputs: the manifest's entry of every input.
        input_names, output_names: in order.
        session: the `onnxruntime.InferenceSession`.
    """

    def __init__(
        self, folder: Path, session_options: Any = None, graph: str = "model", provider: str | None = None
    ) -> None:
        """Open one graph of an exported folder.

        Raises:
            ValueError: the folder is damaged, or has no such graph, or the provider is not there.
            ImportError: onnxruntime is missing.
        """
        require("onnxruntime")
        self.manifest = read_manifest(folder)
        self._graph = open_graph(folder, self.manifest, graph, provider, session_options)
        self.session = self._graph.session
        self.inputs: list[dict[str, Any]] = self.manifest["graphs"][graph]["inputs"]
        self.input_names, self.output_names = self._graph.input_names, self._graph.output_names

    def __call__(self, *args: Any, **kwargs: Any) -> OnnxOutput:
        """Run a batch.

        Args:
            the graph's inputs by name or position: torch tensors or numpy arrays. What has a default (an
            attention mask: all ones; token types: zeros) may be left out.

        Returns:
            The outputs, torch tensors (on the device of the first input) where that is one, else numpy
            arrays.

        Raises:
            TypeError: an unknown, missing or doubled name, or a dtype of another kind.
            ValueError: a rank, shape, length or token that the model cannot take.
        """
        if len(args) > len(self.input_names):
            accepted = ", ".join(self.input_names)
            raise TypeError(f"{len(args)} positional inputs given; the model takes {accepted}")
        given = dict(zip(self.input_names, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise TypeError(f"input {name!r} is given twice")
            given[name] = value
        results: dict[str, Any] = dict(self._graph.run(given))
        first, torch = given.get(self.input_names[0]), sys.modules.get("torch")
        if torch is not None and isinstance(first, torch.Tensor):
            results = {name: torch.from_numpy(value).to(first.device) for name, value in results.items()}
        return OnnxOutput(results)
