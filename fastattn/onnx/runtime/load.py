"""`fastattn.load`: what this package or `save_pretrained` wrote, ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastattn.onnx.requirements import require
from fastattn.onnx.runtime.manifest import MANIFEST, read_manifest
from fastattn.onnx.runtime.plain import OnnxModel

__all__ = ["load"]


def load(folder: Any, session_options: Any = None, provider: str | None = None) -> Any:
    """What `fastattn.export` or `save_pretrained` wrote, ready to run. Safetensors and ONNX, never pickle.

    Args:
        folder: a local folder.
        session_options: an `onnxruntime.SessionOptions` for an exported folder. Default ONNX Runtime's own:
            every graph optimization, one thread a physical core.
        provider: an ONNX Runtime execution provider for an exported folder. Default that of the export's
            target.

    Returns:
        For an exported Hugging Face model an optimum `OptimizedModel` that is called, and generates, as the
        original; for an exported module of the user's own an `OnnxModel`, which needs neither torch nor
        transformers; for a folder of safetensors the transformers model, in eval mode.

    Raises:
        ValueError: not such a folder, a damaged one, or a provider that is not there; the message says what
            was found.
        ImportError: onnxruntime, transformers or optimum is missing.

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
        require("onnxruntime")
        manifest = read_manifest(path)
        if manifest["kind"] == "module":
            return OnnxModel(path, session_options, provider=provider)
        # optimum's tasks import requests, which it does not ask for itself.
        require("torch", "transformers", "optimum", "requests")
        from fastattn.onnx.runtime.pretrained import open_export

        return open_export(path, manifest, provider, session_options)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        for name, value in (("session_options", session_options), ("provider", provider)):
            if value is not None:
                raise ValueError(f"{name} is for exported folders; {path} holds safetensors")
        return _load_pretrained(path)
    if any((path / name).is_file() for name in ("pytorch_model.bin", "model.pt")):
        raise ValueError(
            f"{path} holds pickled weights, which can run code when loaded: save the model again with "
            "save_pretrained, which writes safetensors"
        )
    names = sorted(entry.name for entry in path.iterdir())[:8]
    raise ValueError(
        f"{path} is neither an export ({MANIFEST}, *.onnx) nor a saved model (config.json, "
        f"*.safetensors); it holds {', '.join(names) if names else 'nothing'}"
    )


def _load_pretrained(path: Path) -> Any:
    require("transformers")
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    if getattr(config, "fastattn_pruning", None):
        from fastattn.compress.pruning.saved import load_pruned

        return load_pruned(path)
    architecture = (config.architectures or [""])[0]
    model_class = getattr(transformers, architecture, transformers.AutoModel)
    model = model_class.from_pretrained(path, local_files_only=True, use_safetensors=True)
    return model.eval()
