"""One exported graph in an ONNX Runtime session, its inputs checked against the manifest."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastattn.onnx.targets import TARGETS

__all__ = ["GraphSession", "open_graph"]


def open_graph(
    folder: Path,
    manifest: Mapping[str, Any],
    name: str,
    provider: str | None = None,
    session_options: Any = None,
) -> GraphSession:
    """One graph of an exported folder.

    Args:
        provider: an ONNX Runtime execution provider; None for the target's own.

    Raises:
        ValueError: there is no such graph or provider, or the file cannot be loaded.
    """
    graphs, target = manifest["graphs"], manifest["target"]
    if name not in graphs:
        raise ValueError(
            f"{folder} has no graph {name!r}; it has {', '.join(graphs)}: export the model again"
        )
    if target not in TARGETS:
        raise ValueError(
            f"{folder} was exported for target {target!r}, this version of fastattn runs {', '.join(TARGETS)}"
        )
    return GraphSession(folder, graphs[name], _available(provider, target), session_options)


def _available(asked: str | None, target: str) -> str:
    import onnxruntime

    provider, available = asked or TARGETS[target].provider, onnxruntime.get_available_providers()
    if provider in available:
        return provider
    had = f"the installed onnxruntime has {', '.join(available)}"
    if asked is not None:
        raise ValueError(f"provider is {asked!r}; {had}")
    raise ValueError(
        f"the model was exported for target {target!r}, which runs on {provider}; {had}: install "
        "onnxruntime-gpu, pass provider= one of these, or export for target 'cpu'"
    )


class GraphSession:
    """Safe to call from several threads.

    Attributes:
        inputs: the manifest's entries of the inputs, by name.
        input_names, output_names: in order.
        session: the `onnxruntime.InferenceSession`.
    """

    def __init__(
        self, folder: Path, entry: Mapping[str, Any], provider: str, session_options: Any = None
    ) -> None:
        """Open `entry`, one of the manifest's graphs.

        Raises:
            ValueError: a file is missing or cannot be loaded, or the provider did not start.
        """
        import onnxruntime

        self.inputs: dict[str, dict[str, Any]] = {each["name"]: each for each in entry["inputs"]}
        self.input_names = tuple(self.inputs)
        self.output_names = tuple(entry["outputs"])
        file = folder / entry["file"]
        if not file.is_file():
            raise ValueError(f"{folder} has no {entry['file']}; export the model again")
        if session_options is None:
            session_options = onnxruntime.SessionOptions()
            # Errors alone: an initializer that may be overridden, as logits_to_keep, is a warning otherwise.
            session_options.log_severity_level = 3
        try:
            self.session: Any = onnxruntime.InferenceSession(str(file), session_options, providers=[provider])
        except Exception as error:  # onnxruntime has no common base class for its errors
            data = file.with_name(f"{file.name}.data")
            if data.name in str(error) and not data.is_file():
                raise ValueError(
                    f"{folder} has no {data.name}, which holds the weights of {file.name}; copy it there, "
                    "or export the model again"
                ) from error
            raise ValueError(f"{file} cannot be loaded ({error}); export the model again") from error
        if provider not in self.session.get_providers():
            raise ValueError(
                f"{provider} did not start (its libraries are missing or do not fit); ONNX Runtime offers "
                f"{', '.join(self.session.get_providers())} instead, which provider= selects"
            )
        described = (*self.session.get_inputs(), *self.session.get_overridable_initializers())
        taken = {value.name for value in described}
        unknown = [name for name in self.input_names if name not in taken]
        if unknown:
            raise ValueError(
                f"{file} has no input {unknown[0]!r}, which fastattn.json names; export it again"
            )

    def run(self, given: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """The outputs by name.

        Args:
            given: torch tensors or numpy arrays by the inputs' names; one that has a default may be left out.

        Raises:
            TypeError: an unknown or missing name, or a dtype of another kind.
            ValueError: a rank, shape, length or token that the graph cannot take.
        """
        for name in given:
            if name not in self.inputs:
                raise TypeError(f"unexpected input {name!r}; the model takes {', '.join(self.input_names)}")
        sizes: dict[str, int] = {}
        owners: dict[str, str] = {}
        feeds: dict[str, Any] = {}
        for name in self.input_names:
            value = given.get(name)
            if value is not None:
                feeds[name] = self.checked(name, value, sizes, owners)
        for name, entry in self.inputs.items():
            if name in feeds:
                continue
            shape = [sizes.get(size) if isinstance(size, str) else size for size in entry["dimensions"]]
            if entry["default"] is None or None in shape:
                raise TypeError(f"{name} is missing; the model takes {', '.join(self.input_names)}")
            feeds[name] = np.full(shape, entry["default"], dtype=entry["dtype"])
        return dict(zip(self.output_names, self.session.run(self.output_names, feeds), strict=True))

    def checked(
        self,
        name: str,
        value: Any,
        sizes: dict[str, int] | None = None,
        owners: dict[str, str] | None = None,
    ) -> np.ndarray[Any, Any]:
        """An input as a contiguous array of the graph's dtype.

        Args:
            sizes, owners: collect what the dimensions' names stand for, and which input said so first.

        Raises:
            TypeError, ValueError: as `run`.
        """
        entry = self.inputs[name]
        dimensions = entry["dimensions"]
        sizes, owners = {} if sizes is None else sizes, {} if owners is None else owners
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy()
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch tensor or a numpy array")
        wanted = np.dtype(entry["dtype"])
        integers = wanted.kind == "i" and value.dtype.kind in "iub"
        if value.dtype.kind != wanted.kind and not integers:
            accepted = f"integers ({wanted})" if wanted.kind == "i" else wanted
            raise TypeError(f"{name} is {value.dtype}; it must be {accepted}")
        expected = f"[{', '.join(map(str, dimensions))}]"
        if value.ndim != len(dimensions) or value.shape[:1] == (0,) or value.shape[-1:] == (0,):
            raise ValueError(f"{name} must be {expected} and not empty; got {list(value.shape)}")
        for size, dimension in zip(value.shape, dimensions, strict=True):
            if isinstance(dimension, int):
                if size != dimension:
                    raise ValueError(f"{name} must be {expected}; got {list(value.shape)}")
                continue
            longest = entry["bounds"].get(dimension)
            if longest is not None and size > longest:
                raise ValueError(
                    f"{name} is {list(value.shape)}, {expected}: {dimension} may be at most {longest}"
                )
            if not dimension.isidentifier():
                continue
            if size != sizes.setdefault(dimension, size):
                raise ValueError(
                    f"{name} must be {expected} with {dimension} = {sizes[dimension]}, as in "
                    f"{owners[dimension]}; got {list(value.shape)}"
                )
            owners.setdefault(dimension, name)
        limit = entry["limit"]
        if limit is not None and value.size and (value.min() < 0 or value.max() >= limit):
            raise ValueError(f"{name} must lie between 0 and {limit - 1}; got {value.min()} to {value.max()}")
        return np.ascontiguousarray(value, dtype=wanted)
