"""What of the processor int8 products depend on."""

from __future__ import annotations

from fastattn.processor import cpu_flags

__all__ = ["int8_instructions", "saturates_products"]

_NAMES = {"amx_int8": "AMX", "avx512_vnni": "AVX512-VNNI", "avx_vnni": "AVX-VNNI", "i8mm": "I8MM"}


def int8_instructions() -> str | None:
    """The fastest instructions for int8 products of this processor; None without any, or where unknown."""
    flags = cpu_flags()
    return next((name for flag, name in _NAMES.items() if flag in flags), None)


def saturates_products() -> bool:
    """Whether pairs of uint8 x int8 products are added in 16 bits, and overflow: x86 before VNNI.

    False where the flags cannot be read: processors have had VNNI for years.
    """
    return "avx2" in cpu_flags() and int8_instructions() is None
