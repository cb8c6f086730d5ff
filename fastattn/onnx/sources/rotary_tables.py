"""Rotary angles looked up in tables that the model's own module has filled once, in place of that module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RotaryTable", "use_rotary_tables"]

# Their angles depend on how long the whole run is.
_REFUSED = ("longrope",)


class RotaryTable(nn.Module):
    """cos and sin [B, S, R] of position_ids [B, S], as the module it replaces would compute them.

    Args:
        original: called with (x, position_ids) and, if it has several kinds of layers, layer_type.
        longest: positions 0 to longest - 1 are tabulated.
    """

    def __init__(self, original: nn.Module, longest: int, layer_types: tuple[str, ...]) -> None:
        super().__init__()
        self.doubled: dict[str, bool] = {}
        positions = torch.arange(longest)[None]
        for kind in layer_types or ("",):
            with torch.no_grad():
                cos, sin = original(torch.zeros(1), positions, *([kind] if kind else []))
            half = cos.shape[-1] // 2
            # Most keep every angle twice, for both halves of a head.
            doubled = all(torch.equal(x[..., :half], x[..., half:]) for x in (cos, sin))
            self.doubled[kind] = doubled
            for name, x in (("cos", cos), ("sin", sin)):
                rows = x[0, :, :half] if doubled else x[0]
                self.register_buffer(f"{name}_{kind}", rows.contiguous(), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str = "") -> tuple[Tensor, Tensor]:
        rows = [
            nn.functional.embedding(position_ids, getattr(self, f"{name}_{layer_type}"))
            for name in ("cos", "sin")
        ]
        if self.doubled[layer_type]:
            rows = [torch.cat((each, each), dim=-1) for each in rows]
        return rows[0], rows[1]


def use_rotary_tables(model: nn.Module, longest: int | None) -> None:
    """Replace the rotary modules of a private copy, in place.

    Raises:
        ValueError: the angles depend on the length of the run.
    """
    for name, module in list(model.named_modules()):
        if not type(module).__name__.endswith("RotaryEmbedding"):
            continue
        kinds: Any = getattr(module, "rope_type", "default")
        refused = [
            kind for kind in _REFUSED if kind in (kinds.values() if isinstance(kinds, dict) else [kinds])
        ]
        if refused:
            raise ValueError(
                f"{name} has rope_type {refused[0]!r}, whose angles depend on the length of the whole run; a "
                "graph that decodes from a cache cannot hold them. Other rope types are exported"
            )
        if longest is None:
            continue
        layer_types = tuple(kinds) if isinstance(kinds, dict) else ()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, RotaryTable(module, longest, layer_types))
