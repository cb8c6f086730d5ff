"""`fastattn.load`: an exported folder run by ONNX Runtime, called and read as the original model is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastattn.onnx.requirements import require

__all__ = ["MANIFEST", "MODEL_FILE", "OnnxModel", "OnnxOutput", "load"]

MANIFEST = "fastattn.json"
MODEL_FILE = "model.onnx"


def load(folder: Any, session_options: Any = None) -> Any:
    """What `fastattn.export` or `save_pretrained` wrote, ready to run. Safetensors and ONNX, never pickle.

    Args:
        folder: a local folder.
        session_options: an `onnxruntime.SessionOptions` for an exported folder. Default ONNX Runtime's own:
            every graph optimization, one thread a physical core.

    Returns:
        For an exported folder an `OnnxModel`; for a folder of safetensors the transformers model, in eval
        mode.

    Raises:
        ValueError: not such a folder, or a damaged one; the message says what was found.
        ImportError: onnxruntime or transformers is missing.

    Example:
        >>> import fastattn
        >>> fastattn.load("no-such-folder")
        Traceback (most recent call last):
        ...
        ValueError: no-such-folder is not a folder
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    if (path / MANIFEST).is_file():
        return OnnxModel(path, session_options)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        if session_options is not None:
            raise ValueError(f"session_options is for exported folders; {path} holds safetensors")
        return _load_pretrained(path)
    if any((path / name).is_file() for name in ("pytorch_model.bin", "model.pt")):
        raise ValueError(
            f"{path} holds pickled weights, which can run code when loaded: save the model again with "
            "save_pretrained, which writes safetensors"
        )
    names = sorted(entry.name for entry in path.iterdir())[:8]
    raise ValueError(
        f"{path} is neither an export ({MANIFEST}, {MODEL_FILE}) nor a saved model (config.json, "
        f"*.safetensors); it holds {', '.join(names) if names else 'nothing'}"
    )


def _load_pretrained(path: Path) -> Any:
    require("transformers")
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    architecture = (config.architectures or [""])[0]
    model_class = getattr(transformers, architecture, transformers.AutoModel)
    model = model_class.from_pretrained(path, local_files_only=True, use_safetensors=True)
    return model.eval()


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
    """An exported model in an ONNX Runtime session; safe to call from several threads.

    Attributes:
        manifest: what `fastattn.json` holds: versions, precision, task, inputs, outputs, verification.
        input_names, output_names: in order.
        session: the `onnxruntime.InferenceSession`.
    """

    def __init__(self, folder: Path, session_options: Any = None) -> None:
        require("onnxruntime")
        import onnxruntime

        try:
            self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            self._inputs: list[dict[str, Any]] = self.manifest["inputs"]
            self.output_names: tuple[str, ...] = tuple(self.manifest["outputs"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / MANIFEST} is damaged ({error}); export the model again") from error
        self.input_names: tuple[str, ...] = tuple(entry["name"] for entry in self._inputs)
        file = folder / MODEL_FILE
        if not file.is_file():
            raise ValueError(f"{folder} has no {MODEL_FILE}; export the model again")
        options = onnxruntime.SessionOptions() if session_options is None else session_options
        try:
            self.session: Any = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has no common base class for its errors
            raise ValueError(f"{file} cannot be loaded ({error}); export the model again") from error

    def __call__(self, *args: Any, **kwargs: Any) -> OnnxOutput:
        """Run a batch.

        Args:
            input_ids, attention_mask, token_type_ids, for a Hugging Face model: torch tensors or numpy arrays
            of integers, [batch,
                sequence] (for multiple choice [batch, choices, sequence]). A mask left out is all ones, types
                are zeros. A module of your own takes the arguments it was exported with, all of them.

        Returns:
            The outputs, torch tensors (on the device of the first input) where that is one, else numpy
            arrays.

        Raises:
            TypeError: an unknown, missing or doubled name, or a dtype of another kind.
            ValueError: a rank, shape, length or token that the model cannot take.
        """
        given = self._bind(args, kwargs)
        ids = given[self.input_names[0]]
        torch = sys.modules.get("torch")
        as_torch = torch is not None and isinstance(ids, torch.Tensor)
        feeds: dict[str, Any] = {}
        sizes: dict[str, int] = {}
        for entry in self._inputs:
            value = given.get(entry["name"])
            if "bounds" in entry:
                feeds[entry["name"]] = self._checked_tensor(entry, value, sizes)
                continue
            if value is None:
                shape = feeds[self.input_names[0]].shape
                feeds[entry["name"]] = np.full(shape, entry["default"], dtype=np.int64)
            else:
                feeds[entry["name"]] = self._checked(entry, value, feeds)
        results = dict(zip(self.output_names, self.session.run(self.output_names, feeds), strict=True))
        if as_torch:
            assert torch is not None
            results = {name: torch.from_numpy(value).to(ids.device) for name, value in results.items()}
        return OnnxOutput(results)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        accepted = ", ".join(self.input_names)
        if len(args) > len(self.input_names):
            raise TypeError(f"{len(args)} positional inputs given; the model takes {accepted}")
        given = dict(zip(self.input_names, args, strict=False))
        for name, value in kwargs.items():
            if name not in self.input_names:
                raise TypeError(f"unexpected input {name!r}; the model takes {accepted}")
            if name in given:
                raise TypeError(f"input {name!r} is given twice")
            given[name] = value
        if given.get(self.input_names[0]) is None:
            raise TypeError(f"{self.input_names[0]} is missing; the model takes {accepted}")
        return given

    def _checked_tensor(self, entry: dict[str, Any], value: Any, sizes: dict[str, int]) -> Any:
        """An input of a module that is no Hugging Face model; `sizes` collects what the dimensions' names
        stand for.
        """
        name, dimensions = entry["name"], entry["dimensions"]
        if value is None:
            raise TypeError(f"{name} is missing; the model takes {', '.join(self.input_names)}")
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy()
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch tensor or a numpy array")
        wanted = np.dtype(entry["dtype"])
        if value.dtype.kind != wanted.kind and not (value.dtype.kind in "iu" and wanted.kind == "i"):
            raise TypeError(f"{name} is {value.dtype}; it must be {wanted}")
        expected = f"[{', '.join(map(str, dimensions))}]"
        if value.ndim != len(dimensions) or 0 in value.shape:
            raise ValueError(f"{name} must be {expected} and not empty; got {list(value.shape)}")
        for size, dimension in zip(value.shape, dimensions, strict=True):
            if isinstance(dimension, str) and dimension.isidentifier():
                known = sizes.setdefault(dimension, size)
                longest = entry["bounds"].get(dimension, size)
                if size > longest:
                    raise ValueError(
                        f"{name} has {size} as its {dimension}; the model takes at most {longest}"
                    )
            else:
                known = dimension if isinstance(dimension, int) else size
            if size != known:
                raise ValueError(
                    f"{name} must be {expected} with {dimension} = {known}; got {list(value.shape)}"
                )
        return np.ascontiguousarray(value, dtype=wanted)

    def _checked(self, entry: dict[str, Any], value: Any, feeds: dict[str, Any]) -> Any:
        """The input as a contiguous int64 array, its values checked."""
        name, dimensions = entry["name"], entry["dimensions"]
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy()
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch tensor or a numpy array")
        if value.dtype.kind not in "iub":
            raise TypeError(f"{name} is {value.dtype}; it must be integers")
        expected = f"[{', '.join(dimensions)}]"
        if value.ndim != len(dimensions) or 0 in value.shape:
            raise ValueError(f"{name} must be {expected} and not empty; got {list(value.shape)}")
        first = feeds.get(self.input_names[0])
        if first is not None and value.shape != first.shape:
            raise ValueError(
                f"{name} must have the shape of {self.input_names[0]}, {list(first.shape)}; "
                f"got {list(value.shape)}"
            )
        if value.shape[-1] > entry["longest"]:
            raise ValueError(
                f"{name} has {value.shape[-1]} tokens a sequence; the model takes at most {entry['longest']}"
            )
        limit = entry["limit"]
        if limit is not None and (value.min() < 0 or value.max() >= limit):
            raise ValueError(f"{name} must lie between 0 and {limit - 1}; got {value.min()} to {value.max()}")
        return np.ascontiguousarray(value, dtype=np.int64)
