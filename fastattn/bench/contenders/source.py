"""What contenders are made of: copies of the model before and after the swap, and a folder of it."""

from __future__ import annotations

import copy
import inspect
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from fastattn.bench.contender import MissingError
from fastattn.bench.workloads import Workload, maximum_positions
from fastattn.processor import cpu_flags
from fastattn.swap import is_swapped, optimize, unfuse

__all__ = ["DTYPES", "Kind", "Models", "Source", "auto_dtypes", "copy_of", "kind_of", "token_inputs"]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Kind = Literal["encoder", "classifier", "decoder", "encoder-decoder"]


@dataclass(frozen=True)
class Models:
    """The user's model, swapped or not, and what it is compared with; contenders get copies of them.

    Attributes:
        model: what is measured.
        reference: its untouched counterpart; None for the model itself, on its original layers.
    """

    model: torch.nn.Module
    reference: torch.nn.Module | None = None

    def untouched(self) -> torch.nn.Module:
        """A copy on the original layers, in fp32."""
        duplicate = copy_of(self.model if self.reference is None else self.reference)
        unfuse(duplicate)
        return duplicate.to(torch.float32)

    def fused(self, padding: str) -> torch.nn.Module:
        """A swapped copy: as the user swapped it, or by `optimize`.

        Raises:
            MissingError: there is no layer to swap.
        """
        duplicate = copy_of(self.model)
        if is_swapped(duplicate) and padding == "auto":
            return duplicate
        report = optimize(duplicate, padding=padding)
        if not is_swapped(duplicate):
            reasons = sorted({site.reason for site in report.sites if site.reason})
            raise MissingError(f"layers to swap ({'; '.join(reasons)})")
        return duplicate


@dataclass
class Source:
    """What contenders are built from.

    Attributes:
        models: the user's, to be copied.
        device: where contenders run.
        kind: what the model is.
        resources: closed when the benchmark ends.
    """

    models: Models
    device: torch.device
    kind: Kind
    resources: ExitStack = field(default_factory=ExitStack)

    @property
    def model(self) -> torch.nn.Module:
        """The user's own, of which only the config and the signature are read."""
        return self.models.model

    def untouched(self) -> torch.nn.Module:
        """A fresh copy of the model on its original layers, in fp32, where contenders run: the reference."""
        return self.models.untouched().to(self.device)

    def fused(self, padding: str = "auto") -> torch.nn.Module:
        """A fresh copy of the model fastattn is measured on, swapped.

        Args:
            padding: as `optimize` takes it.

        Raises:
            MissingError: there is no layer to swap.
        """
        return self.models.fused(padding)

    @cached_property
    def sample(self) -> dict[str, torch.Tensor]:
        """A small batch for exporters to trace: input_ids, attention_mask and, where the model takes them,
        token_type_ids, int64 [2, sequence], one sequence padded on the right.
        """
        limit = maximum_positions(self.model)
        return token_inputs(self.model, Workload(2, min(16, limit or 16), 0.75), self.device)

    @cached_property
    def folder(self) -> Path:
        """A folder for contenders' files, removed when the benchmark ends."""
        return Path(self.resources.enter_context(tempfile.TemporaryDirectory(prefix="fastattn-bench-")))

    @cached_property
    def saved(self) -> Path:
        """The untouched model as `save_pretrained` writes it, with a tokenizer of numbered words: what
        converters that read a folder are given.
        """
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from transformers import PreTrainedTokenizerFast

        target = self.folder / "untouched"
        model: Any = self.untouched()
        model.save_pretrained(target)
        words = {f"<{index}>": index for index in range(model.config.vocab_size)}
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="<0>")),
            bos_token="<0>",
            eos_token="<0>",
            unk_token="<0>",
        ).save_pretrained(target)
        return target


def token_inputs(model: Any, workload: Workload, device: torch.device) -> dict[str, torch.Tensor]:
    """The workload's tokens as `model` takes them: with token_type_ids where it has them, int64 [B, S]."""
    padding = getattr(model.config, "pad_token_id", None)
    inputs = workload.tokens(model.config.vocab_size, avoid=padding, device=str(device))
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    if takes_types and getattr(model.config, "type_vocab_size", None):
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs


def kind_of(model: torch.nn.Module) -> Kind:
    """What a transformers model is, by its config and its name."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    if hasattr(model, "generate") and getattr(model, "can_generate", lambda: False)():
        return "decoder"
    return "classifier" if type(model).__name__.endswith("Classification") else "encoder"


def auto_dtypes(device: torch.device) -> tuple[str, ...]:
    """fp32, and bf16 where the device computes it faster: AVX512-BF16, AMX or Arm's BF16 on a CPU."""
    if device.type == "cuda":
        return ("fp32", "bf16") if torch.cuda.is_bf16_supported() else ("fp32", "fp16")
    return ("fp32", "bf16") if cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"} else ("fp32",)


def copy_of(model: torch.nn.Module) -> torch.nn.Module:
    """An independent copy for inference: of parameters, buffers, and the config object its modules share."""
    duplicate = copy.deepcopy(model).eval()
    return duplicate.requires_grad_(False)
