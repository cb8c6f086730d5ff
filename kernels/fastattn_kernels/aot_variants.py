"""All kernel variants that are compiled ahead of time, by name; each family's own file has them."""

from __future__ import annotations

from collections.abc import Callable

from . import aot_attention_variants, aot_decode_variants, aot_pointwise_variants
from ._launch import Launch

__all__ = ["VARIANTS"]

VARIANTS: dict[str, Callable[[str], Launch]] = {
    **aot_attention_variants.VARIANTS,
    **aot_decode_variants.VARIANTS,
    **aot_pointwise_variants.VARIANTS,
}
