"""Every case of the registry-driven family test, in the order docs/models.md shows them."""

from __future__ import annotations

from decoder_cases import DECODERS
from encoder_cases import ENCODERS
from family_case import PAD, VOCABULARY, FamilyCase
from other_cases import OTHERS

__all__ = ["CASES", "PAD", "VOCABULARY", "FamilyCase"]

CASES = (*ENCODERS, *DECODERS, *OTHERS)
