"""What every exported Hugging Face model is: optimum's `OptimizedModel`, with transformers' outputs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from optimum.modeling_base import OptimizedModel
from torch import Tensor
from transformers import AutoConfig

from fastattn.onnx.runtime.architecture import forward_parameters, generation_base, output_class
from fastattn.onnx.runtime.graph_session import GraphSession, open_graph
from fastattn.onnx.runtime.manifest import MANIFEST, read_manifest
from fastattn.onnx.staging import files_of, move, staging

__all__ = ["OnnxPretrainedModel", "class_for", "open_export"]

# Kind of export -> module and class that run it.
CLASSES = {
    "encoder": ("encoder", "OnnxEncoder"),
    "vision": ("encoder", "OnnxEncoder"),
    "decoder": ("decoder", "OnnxDecoder"),
    "encoder-decoder": ("encoder_decoder", "OnnxEncoderDecoder"),
}
MODALITIES = {"pixel_values": "image", "input_features": "audio"}


class OnnxPretrainedModel(OptimizedModel):
    """An exported Hugging Face model in ONNX Runtime, called and read as the original.

    Takes torch tensors or numpy arrays and gives the same kind back, in the original's output class. Safe to
    call from several threads.

    Attributes:
        manifest: what `fastattn.json` holds.
        config: the original's.
        generation_config: the original's, of models that generate; else None.
        graphs: the sessions, by the graphs' names.
        session: the `onnxruntime.InferenceSession` of the graph that gives the answer.
        name_or_path: the folder.
    """

    base_model_prefix = "onnx"
    # What transformers' pipelines and generation ask of a model.
    main_input_name = "input_ids"
    _is_stateful = False
    hf_device_map = None
    training = False

    generation_config: Any = None

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        provider: str | None = None,
        session_options: Any = None,
    ) -> None:
        self.manifest = manifest
        self.folder = folder
        self.graphs: dict[str, GraphSession] = {
            name: open_graph(folder, manifest, name, provider, session_options) for name in manifest["graphs"]
        }
        last = [*self.graphs.values()][-1]
        self.session = last.session
        super().__init__(last.session, _config(folder))
        self.name_or_path = str(folder)
        self.architecture: str = manifest["architecture"]
        first = next(iter(self.graphs.values()))
        self.main_input_name = first.input_names[0]
        cuda = last.session.get_providers()[0] == "CUDAExecutionProvider"
        self.device = torch.device("cuda", 0) if cuda else torch.device("cpu")
        floats = [value.type for value in last.session.get_outputs()]
        self.dtype = torch.float16 if all("float16" in each for each in floats) else torch.float32

    @property
    def input_modalities(self) -> tuple[str, ...]:
        return (MODALITIES.get(self.main_input_name, "text"),)

    @property
    def output_modalities(self) -> tuple[str, ...]:
        return ("text",)

    def can_generate(self) -> bool:
        """Whether `generate` is there."""
        return False

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """None are to be switched."""
        return {}

    def eval(self) -> Self:
        """The model: an export is always in eval mode."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Refused.

        Raises:
            ValueError: mode is True.
        """
        if mode:
            raise ValueError("an export cannot be trained; train the original and export it again")
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The model, where it already is on the device and of the dtype asked for.

        Raises:
            ValueError: it is not, and an export cannot be moved.
        """
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = value
            else:
                device = value
        if device is not None:
            wanted = torch.device(device)
            if wanted.type != self.device.type or (wanted.index or 0) != (self.device.index or 0):
                raise ValueError(
                    f"the export runs on {self.device}, not on {wanted}; export with target='cuda' for a GPU"
                )
        if dtype is not None and dtype != self.dtype:
            raise ValueError(
                f"the export computes in {self.dtype}, not in {dtype}; give export another precision"
            )
        return self

    def _names_given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name, as the original's forward orders them."""
        if not args:
            return dict(kwargs)
        names = forward_parameters(self.architecture) or next(iter(self.graphs.values())).input_names
        if len(args) > len(names):
            raise TypeError(f"{len(args)} positional inputs given; the model takes {', '.join(names)}")
        given = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise TypeError(f"input {name!r} is given twice")
            given[name] = value
        return given

    def _only_inputs(self, given: Mapping[str, Any], taken: tuple[str, ...]) -> dict[str, Any]:
        """Those that a graph takes. What is left out must be without effect on the result.

        Raises:
            ValueError: outputs are asked for that were not exported.
            TypeError: an argument that the export does not have.
        """
        kept: dict[str, Any] = {}
        for name, value in given.items():
            if name in ("output_attentions", "output_hidden_states") and value:
                raise ValueError(
                    f"{name}=True, but the export has no such output; ask the original {self.architecture}"
                )
            if name in taken:
                if value is not None:
                    kept[name] = value
            elif not (name in WITHOUT_EFFECT or self._is_harmless(name, value)):
                raise TypeError(f"unexpected input {name!r}; the model takes {', '.join(taken)}")
        return kept

    def _is_harmless(self, name: str, value: Any) -> bool:
        """Of the original's arguments None, and the token types 0 that tokenizers give."""
        known = forward_parameters(self.architecture)
        if known and name not in known:
            return False
        return value is None or (name == "token_type_ids" and not bool((value != 0).any()))

    def _answer(self, results: Mapping[str, Any], first: Any, return_dict: bool | None) -> Any:
        """Outputs (numpy arrays, tensors, a cache) as the original's class, in the kind of `first`."""
        device = None if isinstance(first, np.ndarray) else getattr(first, "device", self.device)
        values = {name: _in_kind(value, device) for name, value in results.items()}
        made = output_class(self.architecture, tuple(values))(**values)
        return made.to_tuple() if return_dict is False else made

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> Any:
        """Copy the export, whole or not at all, with the config and generation config as they now are.

        Args:
            save_directory: gets the files; those of an earlier export there are replaced.
            push_to_hub, kwargs: as in optimum.

        Raises:
            OSError: the folder cannot be written.
            ValueError: a file of the export is no longer there.
        """
        folder = Path(save_directory)
        with staging(folder) as made:
            self._save_pretrained(made)
            self._save_config(made)
            if self.generation_config is not None:
                self.generation_config.save_pretrained(made)
            move(made, folder)
        return self.push_to_hub(str(folder), **kwargs) if push_to_hub else None

    def _save_pretrained(self, save_directory: Path) -> None:
        names = self.manifest.get("files") or [
            name for name in files_of(self.folder) if name.split(".")[0] in self.graphs or name == MANIFEST
        ]
        for name in names:
            source = self.folder / name
            if not source.is_file():
                raise ValueError(f"{self.folder} no longer has {name}; nothing was saved")
            (save_directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, save_directory / name)

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | None = None,
        token: bool | str | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        session_options: Any = None,
        provider: str | None = None,
    ) -> Self:
        """An export, from a local folder or from the Hub.

        Args:
            model_id: the folder, or the name of a repository on the Hub that holds an export.
            revision, cache_dir, token, local_files_only, force_download: as in transformers.
            session_options, provider: as in `fastattn.load`.

        Raises:
            ValueError: no export, a damaged one, or one of another kind than this class runs.
            OSError: the repository cannot be had.
        """
        folder = Path(model_id)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(
                snapshot_download(
                    os.fspath(model_id),
                    revision=revision,
                    cache_dir=cache_dir,
                    token=token,
                    local_files_only=local_files_only,
                    force_download=force_download,
                )
            )
        made = open_export(folder, read_manifest(folder), provider, session_options)
        if not isinstance(made, cls):
            raise ValueError(
                f"{folder} holds a {made.architecture}, which is no {cls.__name__}; fastattn.load finds the "
                "class"
            )
        return made

    def __repr__(self) -> str:
        manifest = self.manifest
        return (
            f"{type(self).__name__}({self.name_or_path!r}, task={manifest.get('task')!r}, "
            f"precision={manifest['precision']!r}, target={manifest['target']!r})"
        )


# Arguments of many models that say how to compute or to hand back, not what.
WITHOUT_EFFECT = frozenset({"output_attentions", "output_hidden_states", "use_cache", "return_dict"})


def open_export(
    folder: Path, manifest: Mapping[str, Any], provider: str | None = None, session_options: Any = None
) -> Any:
    """The model of an exported folder of a Hugging Face model.

    Raises:
        ValueError: a damaged folder, a kind this version does not know, or a provider that is not there.
    """
    kind = manifest["kind"]
    if kind not in CLASSES:
        raise ValueError(
            f"{folder / MANIFEST} is of kind {kind!r}; this version of fastattn runs {', '.join(CLASSES)} "
            "and module"
        )
    return class_for(kind, manifest["architecture"])(folder, manifest, provider, session_options)


@lru_cache
def class_for(kind: str, architecture: str) -> Any:
    """The class for exports of this kind and architecture.

    It bears the original's name, by which transformers' pipelines tell what a model can do, and has the
    original's own `generate` among its bases.
    """
    module, name = CLASSES[kind]
    base = getattr(import_module(f"fastattn.onnx.runtime.{module}"), name)
    bases = (base, generation_base(architecture)) if base.generates else (base,)
    return type(architecture, bases, {"__module__": base.__module__, "__doc__": base.__doc__})


def _config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, which fastattn.export writes; export the model again")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder / 'config.json'} cannot be read ({error}); export the model again"
        ) from error


def _in_kind(value: Any, device: torch.device | None) -> Any:
    """An array or tensor as a tensor on the device, or as an array where that is None; others as they are."""
    if device is None:
        return value.cpu().numpy() if isinstance(value, Tensor) else value
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    return value.to(device) if isinstance(value, Tensor) else value
