"""Rotary position embedding of query and key in one pass: contract, reference and registration."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.backend import backend_for
from fastattn.ops.registration import register, runs_in_pytorch
from fastattn.ops.validation import FLOAT_DTYPES, check_device, check_same, shape_of

__all__ = ["rotary"]


def rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Query and key rotated by their positions. Su et al., "RoFormer" (2021), equation 34.

    The first R elements of each head become `x * cos + rotated(x) * sin`, the rest pass. Of pairs (a, b),
    rotated(x) is (-b, a): elements i and i + R / 2 are a pair, or 2 i and 2 i + 1 where `interleaved`.
    Computed in float32 and rounded once, also under autocast.

    Args:
        query: [B, Hq, S, D], float16, bfloat16, float32 or float64, any strides.
        key: [B, Hk, S, D], the dtype of query.
        cos, sin: [S, R], [1, S, R] or [B, S, R] with R even and at most D, floating point of any dtype;
            angles repeated as models have them: twice over (Llama), or each twice where `interleaved`
            (GPT-J).
        interleaved: which elements are a pair.

    Returns:
        The rotated query and key: shapes and dtypes of the arguments, and the layout in memory of those that
        are dense.

    Raises:
        TypeError: dtypes that are not floating point or do not agree.
        ValueError: shapes or devices that do not fit.

    Example:
        >>> import torch, fastattn
        >>> query = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
        >>> quarter = torch.zeros(1, 4), torch.ones(1, 4)  # cos and sin of 90 degrees
        >>> fastattn.ops.rotary(query, query, *quarter)[0].flatten()
        tensor([-3., -4.,  1.,  2.])
        >>> fastattn.ops.rotary(query, query, *quarter, interleaved=True)[0].flatten()
        tensor([-2.,  1., -4.,  3.])
    """
    check_same("rotary", "query", query, "key", key)
    if (
        query.dim() != 4
        or key.dim() != 4
        or key.shape[0] != query.shape[0]
        or key.shape[2:] != query.shape[2:]
    ):
        raise ValueError(
            f"rotary: query must be [B, Hq, S, D] and key [B, Hk, S, D]; "
            f"got {shape_of(query)} and {shape_of(key)}"
        )
    for name, tensor in (("cos", cos), ("sin", sin)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"rotary: {name} is {tensor.dtype}; accepted are {FLOAT_DTYPES}")
        check_device("rotary", "query", query, name, tensor)
    batch, _, length, head_dim = query.shape
    fits = cos.dim() in (2, 3) and cos.shape[-2] == length and (cos.dim() == 2 or cos.shape[0] in (1, batch))
    if not fits or sin.shape != cos.shape:
        raise ValueError(
            f"rotary: cos and sin must be [{length}, R] or [{batch}, {length}, R]; "
            f"got {shape_of(cos)} and {shape_of(sin)}"
        )
    width = cos.shape[-1]
    if width > head_dim or width % 2:
        raise ValueError(f"rotary: cos has R = {width}; it must be even and at most D = {head_dim}")
    compute = _in_pytorch if runs_in_pytorch(query) else _rotary
    rotated_query, rotated_key = compute(query, key, cos, sin, interleaved)
    return rotated_query, rotated_key


def rotary_reference(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """`fastattn::rotary` in plain PyTorch; computes in float32, or float64 where query is float64."""
    computing = torch.float64 if query.dtype == torch.float64 else torch.float32
    cos, sin = (_over_heads(t).to(computing) for t in (cos, sin))
    rotated_query, rotated_key = (
        torch.cat([_rotate(x[..., : cos.shape[-1]], cos, sin, interleaved), x[..., cos.shape[-1] :]], -1)
        for x in (query, key)
    )
    return rotated_query, rotated_key


def _over_heads(x: Tensor) -> Tensor:
    """[S, R] or [B, S, R] as [B, 1, S, R]."""
    return x.unsqueeze(-3) if x.dim() == 3 else x[None, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = x.to(cos.dtype)
    if interleaved:
        rotated = torch.stack([-wide[..., 1::2], wide[..., ::2]], -1).flatten(-2)
    else:
        first, second = wide.chunk(2, -1)
        rotated = torch.cat([-second, first], -1)
    return (wide * cos + rotated * sin).to(x.dtype)


def _forward(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    if backend_for(query.device) == "triton" and query.dtype != torch.float64:
        from fastattn_kernels.rotary import rotary_forward

        kernel_result: tuple[Tensor, Tensor] = rotary_forward(query, key, cos, sin, interleaved)
        return kernel_result
    return _into_new(query, cos, sin, interleaved), _into_new(key, cos, sin, interleaved)


def _in_pytorch(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, cos, sin)):
        return rotary_reference(query, key, cos, sin, interleaved)
    return _into_new(query, cos, sin, interleaved), _into_new(key, cos, sin, interleaved)


def _into_new(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`x` rotated, half by half into its place in the result: no rotated copy, no concatenation."""
    out = torch.empty_like(x)
    width = cos.shape[-1]
    out[..., width:] = x[..., width:]
    # In half precision in float32, as everywhere.
    computing = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (_over_heads(t).to(computing) for t in (cos, sin))
    if interleaved:
        first, second = slice(0, width, 2), slice(1, width, 2)
    else:
        first, second = slice(0, width // 2), slice(width // 2, width)
    a, b = x[..., first].to(computing), x[..., second].to(computing)
    out[..., first] = (a * cos[..., first]).addcmul_(b, sin[..., first], value=-1)
    out[..., second] = (b * cos[..., second]).addcmul_(a, sin[..., second])
    return out


def _fake(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key)


_rotary = register(
    "rotary",
    "Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved",
    "(Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    reference=rotary_reference,
)
