"""Which keys the queries of one attention call see: torch.nn's masks as the operations' arguments."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastattn.ops.validation import is_traced, shape_of
from fastattn.packing import Packing

__all__ = ["Visibility", "is_causal_mask", "may_branch", "padding_of"]


class Visibility:
    """torch.nn's masks (bool True = ignore, float = added) of one call, turned once for all layers that share
    them.

    Attributes:
        key_padding_mask: [B, S] or None.
        attn_mask: [L, S], [B * heads, L, S] or None.
        is_causal: torch.nn's hint that `attn_mask` is the causal mask; the mask is read where torch.nn reads
            it.
        causal: `attn_mask` is known to be the causal mask and need not be read.
        packing: the layout of a packed batch, whose padding is already gone; the masks are then None.
    """

    def __init__(
        self,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        causal: bool = False,
        packing: Packing | None = None,
    ) -> None:
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise TypeError(
                    f"{name} is {mask.dtype}; it must be bool (True = ignore) or floating point (added)"
                )
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal=True is a hint about the mask and needs that mask too; "
                "nn.Transformer.generate_square_subsequent_mask makes it"
            )
        self.key_padding_mask, self.attn_mask, self.is_causal = key_padding_mask, attn_mask, is_causal
        self.causal, self.packing = causal, packing
        self._terms: dict[tuple[int, ...], tuple[Tensor | None, Tensor | None, bool]] = {}

    def terms(
        self, batch: int, heads: int, length: int, keys: int, extra: int = 0, read_mask: bool = False
    ) -> tuple[Tensor | None, Tensor | None, bool]:
        """mask, bias and causal for `fastattn.ops.attention`.

        Args:
            batch, heads, length, keys: of the scores.
            extra: keys appended after those the masks speak of, which every query sees.
            read_mask: take no hint: the mask itself counts.
        """
        # Sizes of a traced graph are symbols, and looking them up would pin them.
        sizes = (batch, heads, length, keys, extra)
        if read_mask or not all(type(size) is int for size in sizes):
            return self._turned(*sizes, read_mask=read_mask)
        if sizes not in self._terms:
            self._terms[sizes] = self._turned(*sizes, read_mask=False)
        return self._terms[sizes]

    def _turned(
        self, batch: int, heads: int, length: int, keys: int, extra: int, read_mask: bool
    ) -> tuple[Tensor | None, Tensor | None, bool]:
        padding, attn_mask = self.key_padding_mask, self.attn_mask
        causal = not read_mask and (self.causal or (self.is_causal and padding is None))
        if causal:
            attn_mask = None
        mask: Tensor | None = None
        bias: Tensor | None = None
        if padding is not None:
            if padding.shape != (batch, keys):
                raise ValueError(
                    f"key_padding_mask must be [batch, keys] = [{batch}, {keys}]; got {shape_of(padding)}"
                )
            if padding.dtype == torch.bool:
                mask = _with_extra(~padding, extra)
            else:
                bias = _with_extra(padding, extra)[:, None, None, :]
        if attn_mask is not None:
            attn_mask = _with_extra(_four_dimensional(attn_mask, batch, heads, length, keys), extra)
            if attn_mask.dtype == torch.bool:
                # What was appended is False, which in torch.nn's masks means visible.
                mask = ~attn_mask if mask is None else mask[:, None, None, :] & ~attn_mask
            else:
                bias = attn_mask if bias is None else bias + attn_mask
        if mask is not None and mask.dim() == 2 and mask.device.type == "cpu" and may_branch(mask):
            # Nothing hidden: the unmasked kernel is the faster one. On a GPU, asking would wait for it.
            mask = None if bool(mask.all()) else mask
        return mask, bias, causal


def may_branch(x: Tensor) -> bool:
    """Whether the course of the program may depend on the values of `x`: outside every kind of tracing, the
    old `torch.jit.trace` included, which would keep the one course it saw.
    """
    return not is_traced(x) and not torch.jit.is_tracing()


def _with_extra(mask: Tensor, extra: int) -> Tensor:
    """The mask with `extra` visible keys appended: True in our masks, False or 0 in torch.nn's."""
    if not extra:
        return mask
    visible = mask.dtype == torch.bool and mask.dim() == 2
    return pad(mask, (0, extra), value=True if visible else 0)


def _four_dimensional(mask: Tensor, batch: int, heads: int, length: int, keys: int) -> Tensor:
    if mask.dim() == 2 and mask.shape == (length, keys):
        return mask[None, None]
    if mask.dim() == 3 and mask.shape == (batch * heads, length, keys):
        return mask.view(batch, heads, length, keys)
    raise ValueError(
        f"attn_mask must be [queries, keys] = [{length}, {keys}] or "
        f"[batch * heads, queries, keys] = [{batch * heads}, {length}, {keys}]; got {shape_of(mask)}"
    )


def is_causal_mask(mask: Tensor | None, length: int) -> bool:
    """Whether a mask is exactly the causal one of `length` positions; False where it cannot be read."""
    if mask is None or mask.shape != (length, length) or not may_branch(mask):
        return False
    hidden = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, hidden)
    return torch.equal(mask, torch.zeros_like(mask).masked_fill(hidden, float("-inf")))


def padding_of(mask: Tensor) -> Tensor | None:
    """Which positions a key padding mask hides, bool [B, S]; None where it is a float mask that does more
    than hide, or one whose values cannot be read.
    """
    if mask.dtype == torch.bool:
        return mask
    if not may_branch(mask):
        return None
    hidden = mask == float("-inf")
    return hidden if bool((hidden | (mask == 0)).all()) else None
