"""What a sweep times: batches of forward's arguments, given or drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.bench import Workload
from fastattn.bench.contenders.source import kind_of, token_inputs
from fastattn.bench.contenders.stamps import start_token
from fastattn.bench.workloads import auto_workloads, maximum_positions

__all__ = ["NO_LABEL", "decoder_inputs", "timed_batches"]

# A label that losses leave out.
NO_LABEL = -100


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """What an encoder-decoder's decoder reads to predict `labels`: they, moved on by one.

    Args:
        model: whose start and padding tokens are used, in its own way where it has one.
        labels: int64 [B, S], -100 at padding.

    Returns:
        int64 [B, S].
    """
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        moved: Tensor = own(labels=labels)
        return moved
    padding = getattr(model.config, "pad_token_id", None) or 0
    start = torch.full_like(labels[:, :1], start_token(model))
    return torch.cat((start, labels[:, :-1].masked_fill(labels[:, :-1] == NO_LABEL, padding)), 1)


def timed_batches(
    model: nn.Module, workload: Workload | Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None
) -> tuple[list[dict[str, Tensor]], str]:
    """The batches of `sweep`'s workload, and what they are in words.

    Of a workload's tokens an encoder-decoder reads the same in its encoder and, moved on by one, in its
    decoder.

    Raises:
        ValueError: there is none and the model does not take tokens alone, or it holds no mappings.
    """
    if workload is None or isinstance(workload, Workload):
        config: Any = getattr(model, "config", None)
        if getattr(model, "main_input_name", None) != "input_ids" or not hasattr(config, "vocab_size"):
            given = "None" if workload is None else "one of tokens"
            raise ValueError(
                f"workload is {given}, and {type(model).__name__} does not say that it takes tokens; give a "
                "batch, a mapping of its forward's arguments"
            )
        kind = kind_of(model)
        if workload is None:
            workload = auto_workloads(kind, maximum_positions(model))[0]
        batch = token_inputs(model, workload, next(model.parameters()).device)
        if kind == "encoder-decoder":
            batch["decoder_input_ids"] = decoder_inputs(model, batch["input_ids"])
        return [batch], str(workload)
    batches = [workload] if isinstance(workload, Mapping) else list(workload)
    if not batches or not all(isinstance(batch, Mapping) and batch for batch in batches):
        raise ValueError("workload holds no batches; a batch is a mapping of forward's arguments")
    shapes = sorted({"x".join(map(str, next(iter(batch.values())).shape[:2])) for batch in batches})
    count = f"{len(batches)} batches" if len(batches) > 1 else "a batch"
    return [dict(batch) for batch in batches], f"{count} of {shapes[0]}" + (
        f" to {shapes[-1]}" if len(shapes) > 1 else ""
    )
