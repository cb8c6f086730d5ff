"""What transformers records while a model runs: hidden states and attentions the caller asked for."""

from __future__ import annotations

from typing import Any

from transformers.utils import output_capturing

__all__ = ["is_recording_hook", "recorded_outputs", "records_attentions"]

_NOTHING: frozenset[str] = frozenset()


def recorded_outputs() -> frozenset[str]:
    """What transformers records in the forward now running: "hidden_states", "attentions", ..."""
    collected = output_capturing._active_collector.get()
    return frozenset(collected) if collected else _NOTHING


def records_attentions() -> bool:
    """Whether any attention weights are recorded in the forward now running, cross-attention's included."""
    collected = output_capturing._active_collector.get()
    return bool(collected) and any(name.endswith("attentions") for name in collected)


def is_recording_hook(hook: Any) -> bool:
    """Whether a forward hook is transformers' own recorder, idle unless something is recorded."""
    return getattr(hook, "__module__", None) == output_capturing.__name__
