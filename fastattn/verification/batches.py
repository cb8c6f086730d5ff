"""Batches that break implementations, drawn for whatever a model's config and forward say it takes."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.verification.state import device_of

__all__ = ["Batch", "Drawing", "adversarial_batches", "forward_parameters", "window_of", "with_choices"]

Batch = dict[str, Tensor]

# Sequences are this long unless the model's positions end before.
_LENGTH = 48
# Rows of a batch as long as it is wide, where every row is an image or a recording too.
_FEW = 4


def adversarial_batches(model: nn.Module) -> dict[str, Batch]:
    """Batches on the model's device, drawn with a fixed seed, none of them with rows of padding.

    Token ids with right, left and no padding, as many rows as columns, one token and one row; for an
    encoder-decoder on both sides; images and recordings of the size the config names. A head that chooses
    among texts is given [B, S] here.

    Raises:
        ValueError: the model has no config that says what it takes.
    """
    return Drawing(model).batches()


def forward_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The named parameters of the model's forward; of the model inside where a wrapper (PEFT) passes on."""
    parameters = inspect.signature(model.forward).parameters
    named = {
        name: each
        for name, each in parameters.items()
        if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    }
    base = getattr(model, "get_base_model", None)
    if not named and base is not None and base() is not model:
        return forward_parameters(base())
    return named


def window_of(model: nn.Module) -> int | None:
    """How many keys a query of a sliding-window layer sees; None for a model without such layers."""
    config = _text_config(getattr(model, "config", None))
    if getattr(config, "use_sliding_window", True) is False:
        return None
    for name in ("sliding_window", "local_attention", "window_size"):
        window = getattr(config, name, None)
        if isinstance(window, int) and window > 0:
            return window
    return None


def with_choices(batch: Batch) -> Batch:
    """The batch [B, S] for a head that chooses among texts, [B, 2, S]: a row's second text has its length."""
    return {
        name: torch.stack((x, x if "mask" in name else x.roll(1, -1)), dim=1) for name, x in batch.items()
    }


def _text_config(config: Any) -> Any:
    getter = getattr(config, "get_text_config", None)
    return config if getter is None else getter()


@dataclass(frozen=True)
class _Side:
    """The names of the token inputs of an encoder or of a decoder."""

    ids: str
    mask: str


_ENCODER, _DECODER = (
    _Side("input_ids", "attention_mask"),
    _Side("decoder_input_ids", "decoder_attention_mask"),
)


class Drawing:
    """What a model takes, as its config and its forward say, and batches of it.

    Attributes:
        names: the parameters of its forward.
        sides: the token inputs it has; none for a vision or audio encoder.
        positions: how many a token may have.
        longest: the length of the longest sequence drawn.
    """

    def __init__(self, model: nn.Module) -> None:
        self.config = getattr(model, "config", None)
        text = _text_config(self.config)
        self.names = forward_parameters(model)
        self.device = device_of(model)
        self.generator = torch.Generator().manual_seed(0)
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.encoder_decoder = bool(getattr(self.config, "is_encoder_decoder", False)) and (
            _DECODER.ids in self.names
        )
        self.dense = self._dense_inputs(model)
        vocabulary = getattr(text, "vocab_size", None)
        # A head that reads one position makes the decoder's tokens from the encoder's itself.
        pooled = any(word in type(model).__name__ for word in ("SequenceClassification", "QuestionAnswering"))
        sides = [_ENCODER] if _ENCODER.ids in self.names else []
        if self.encoder_decoder and not pooled:
            sides.append(_DECODER)
        self.sides = tuple(sides) if vocabulary is not None else ()
        if not self.sides and not self.dense:
            raise ValueError(
                f"{type(model).__name__} has no config to draw a batch from (no vocab_size, image_size or "
                "num_mel_bins that its forward takes); give inputs"
            )
        self.types = getattr(text, "type_vocab_size", 0) or 0 if "token_type_ids" in self.names else 0
        self.positions = _positions(model, text)
        self.longest = max(1, min(_LENGTH, self.positions))
        self.pad = _token(text, "pad_token_id", vocabulary)
        self.eos = _token(text, "eos_token_id", vocabulary)
        special = [getattr(text, f"{name}_token_id", None) for name in ("pad", "eos", "bos", "decoder_start")]
        self.allowed = torch.arange(vocabulary or 0)
        reserved = [each for item in special for each in (item if isinstance(item, list) else [item])]
        reserved_ids = torch.tensor([each for each in reserved if isinstance(each, int)], dtype=torch.long)
        if self.allowed.numel() > 2 * reserved_ids.numel():
            self.allowed = self.allowed[~torch.isin(self.allowed, reserved_ids)]

    def _dense_inputs(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Shapes, without the batch, of the floating-point inputs the model needs."""
        needed: dict[str, tuple[int, ...]] = {}
        vision = getattr(self.config, "vision_config", self.config)
        size = getattr(vision, "image_size", None)
        if "pixel_values" in self.names and size is not None:
            height, width = (size, size) if isinstance(size, int) else tuple(size)
            needed["pixel_values"] = (getattr(vision, "num_channels", 3), height, width)
        mels = getattr(self.config, "num_mel_bins", None)
        if "input_features" in self.names and mels is not None:
            # Two convolutions, one of stride 2, stand before Whisper's positions.
            needed["input_features"] = (mels, 2 * getattr(self.config, "max_source_positions", 50))
        if "input_values" in self.names and getattr(model, "main_input_name", "") == "input_values":
            needed["input_values"] = (4000,)
        return needed

    def batches(self) -> dict[str, Batch]:
        """The adversarial batches by case."""
        longest = self.longest
        half, third = max(1, longest // 2), max(1, longest // 3)
        if not self.sides:
            return {"no padding": self.batch([1, 1], 1), "one row": self.batch([1], 1)}
        if self.dense:
            half, third = min(half, _FEW), min(third, 2)
        lengths = [longest, half, 1, third]
        return {
            "right padding": self.batch(lengths, longest),
            "left padding": self.batch(lengths, longest, left=True),
            "no padding": self.batch([longest, longest], longest),
            "batch == length": self.batch([half, 1, *[third] * (half - 2)][:half], half),
            "one token": self.batch([1, 1], 1),
            "one row": self.batch([third], longest),
        }

    def batch(self, lengths: list[int], width: int, left: bool = False) -> Batch:
        """One row a length; an encoder-decoder's decoder side has other lengths and another width."""
        tensors: Batch = {}
        for side in self.sides:
            if side is _DECODER and len(self.sides) > 1 and width > _FEW:
                tensors |= self._tokens(side, [max(1, n - 3) for n in reversed(lengths)], width - 3, left)
            elif side is _DECODER:
                tensors |= self._tokens(side, lengths[::-1], width, left)
            else:
                tensors |= self._tokens(side, lengths, width, left)
        for name, shape in self.dense.items():
            noise = torch.randn(len(lengths), *shape, generator=self.generator)
            tensors[name] = noise.to(self.dtype)
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _tokens(self, side: _Side, lengths: list[int], width: int, left: bool) -> Batch:
        rows = len(lengths)
        drawn = torch.randint(0, len(self.allowed), (rows, width), generator=self.generator)
        ids = self.allowed[drawn]
        position, length = torch.arange(width), torch.tensor(lengths)[:, None]
        real = position >= width - length if left else position < length
        if self.eos is not None:
            # Read by heads that take the last token of a text (CLIP, BART).
            ids[torch.arange(rows), width - 1 if left else torch.tensor(lengths) - 1] = self.eos
        if self.pad is not None:
            # Read by models that count positions and by heads that find the last token.
            ids[~real] = self.pad
        tensors = {side.ids: ids}
        if side.mask in self.names:
            tensors[side.mask] = real.long()
        if side is _ENCODER and self.types > 1:
            tensors["token_type_ids"] = torch.randint(0, self.types, ids.shape, generator=self.generator)
        return tensors


def _positions(model: nn.Module, text: Any) -> int:
    """How many positions the model has for tokens."""
    names = ("max_position_embeddings", "n_positions", "max_target_positions", "n_ctx")
    limits = [value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0]
    # T5 names a length it is not limited to: its positions are relative.
    if hasattr(text, "relative_attention_num_buckets") and "max_position_embeddings" not in text.__dict__:
        limits = []
    fewest = min(limits, default=sys.maxsize)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx:
            # RoBERTa's positions start behind the padding index.
            fewest = min(fewest, module.num_embeddings - module.padding_idx - 1)
    return fewest


def _token(text: Any, name: str, vocabulary: int | None) -> int | None:
    """A special token's id; None where the config has none within the vocabulary."""
    value = getattr(text, name, None)
    value = value[0] if isinstance(value, list) and value else value
    if isinstance(value, int) and vocabulary is not None and 0 <= value < vocabulary:
        return value
    return None
