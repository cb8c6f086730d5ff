"""One exported graph in an ONNX Runtime session, its inputs checked against the manifest."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["GraphSession"]


class GraphSession:
    """Safe to call from several threads.

    Attributes:
        input_names, output_names: in order.
        session: the `onnxruntime.InferenceSession`.
    """

    def __init__(
        self, folder: Path, entry: Mapping[str, Any], provider: str, session_options: Any = None
    ) -> None:
        """Open `entry`, one of the manifest's graphs.

        Raises:
            ValueError: the file is missing or cannot be loaded.
        """
        import onnxruntime

        self._inputs: list[dict[str, Any]] = entry["inputs"]
        self.input_names = tuple(each["name"] for each in self._inputs)
        self.output_names = tuple(entry["outputs"])
        file = folder / entry["file"]
        if not file.is_file():
            raise ValueError(f"{folder} has no {entry['file']}; export the model again")
        options = onnxruntime.SessionOptions() if session_options is None else session_options
        try:
            self.session: Any = onnxruntime.InferenceSession(str(file), options, providers=[provider])
        except Exception as error:  # onnxruntime has no common base class for its errors
            raise ValueError(f"{file} cannot be loaded ({error}); export the model again") from error

    def run(self, given: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """The outputs by name.

        Args:
            given: torch tensors or numpy arrays by the inputs' names; one that has a default may be left out.

        Raises:
            TypeError: an unknown or missing name, or a dtype of another kind.
            ValueError: a rank, shape, length or token that the graph cannot take.
        """
        unknown = [name for name in given if name not in self.input_names]
        if unknown:
            raise TypeError(f"unexpected input {unknown[0]!r}; the model takes {', '.join(self.input_names)}")
        sizes: dict[str, int] = {}
        feeds: dict[str, Any] = {}
        for entry in self._inputs:
            value = given.get(entry["name"])
            if value is not None:
                feeds[entry["name"]] = self._checked(entry, value, sizes)
        for entry in self._inputs:
            if entry["name"] in feeds:
                continue
            shape = [sizes.get(size) if isinstance(size, str) else size for size in entry["dimensions"]]
            if entry["default"] is None or None in shape:
                raise TypeError(f"{entry['name']} is missing; the model takes {', '.join(self.input_names)}")
            feeds[entry["name"]] = np.full(shape, entry["default"], dtype=entry["dtype"])
        return dict(zip(self.output_names, self.session.run(self.output_names, feeds), strict=True))

    def _checked(self, entry: dict[str, Any], value: Any, sizes: dict[str, int]) -> Any:
        """The input as a contiguous array; `sizes` collects what the dimensions' names stand for."""
        name, dimensions = entry["name"], entry["dimensions"]
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy()
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch tensor or a numpy array")
        wanted = np.dtype(entry["dtype"])
        integers = wanted.kind == "i" and value.dtype.kind in "iub"
        if value.dtype.kind != wanted.kind and not integers:
            raise TypeError(f"{name} is {value.dtype}; it must be {'integers' if wanted.kind == 'i' else wanted}")
        expected = f"[{', '.join(map(str, dimensions))}]"
        if value.ndim != len(dimensions) or value.shape[:1] == (0,) or value.shape[-1:] == (0,):
            raise ValueError(f"{name} must be {expected} and not empty; got {list(value.shape)}")
        for size, dimension in zip(value.shape, dimensions, strict=True):
            if isinstance(dimension, str) and dimension.isidentifier():
                known = sizes.setdefault(dimension, size)
                longest = entry["bounds"].get(dimension, size)
                if size > longest:
                    raise ValueError(f"{name} has {size} as its {dimension}; the model takes at most {longest}")
            else:
                known = dimension if isinstance(dimension, int) else size
            if size != known:
                raise ValueError(f"{name} must be {expected} with {dimension} = {known}; got {list(value.shape)}")
        limit = entry["limit"]
        if limit is not None and value.size and (value.min() < 0 or value.max() >= limit):
            raise ValueError(f"{name} must lie between 0 and {limit - 1}; got {value.min()} to {value.max()}")
        return np.ascontiguousarray(value, dtype=wanted)
