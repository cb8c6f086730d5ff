"""Softmax, activations and rotary against PyTorch, torch.compile and Liger."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gpu_exact
import torch
from torch import Tensor
from torch.nn import functional

from fastattn import ops
from fastattn.bench import Contender
from gpu_sections.norm import ELEMENTS, first
from gpu_sections.record import Record
from gpu_sections.timing import DEVICE, OURS, Answer, Case, compiled, liger, run_cases


def against_pytorch(
    name: str,
    ours: Callable[[], Any],
    plain: Callable[..., Any],
    arguments: tuple[Tensor, ...],
    answer: Answer,
    moved: int,
    *more: Contender,
) -> Case:
    """Ours, the plain formula and the same compiled."""
    contenders = [
        Contender(OURS, ours, highlight=True),
        Contender("PyTorch", partial(plain, *arguments)),
        Contender("torch.compile", prepare=compiled(plain, *arguments)),
        *more,
    ]
    return Case(name, contenders, ["PyTorch", "torch.compile"], {"": answer}, moved_bytes=moved)


def both(formula: Callable[[torch.dtype], Tensor], pick: Callable[[Any], Tensor] = first) -> Answer:
    return Answer(pick, formula(torch.float64), formula(torch.bfloat16))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)


def softmax(name: str, width: int, elements: int = ELEMENTS) -> Case:
    x = drawn(elements // width, width)
    answer = both(lambda dtype: gpu_exact.softmax(x[-64:], None, 0.125, False, dtype))
    plain = partial(_scaled_softmax, scale=0.125)
    return against_pytorch(name, lambda: ops.softmax(x, scale=0.125), plain, (x,), answer, 4 * x.numel())


def _scaled_softmax(x: Tensor, scale: float) -> Tensor:
    return torch.softmax(x * scale, -1)


def bias_gelu(name: str, width: int, elements: int = ELEMENTS) -> Case:
    x, bias = drawn(elements // width, width), drawn(width)

    def plain(x: Tensor, bias: Tensor) -> Tensor:
        return functional.gelu(x + bias)

    answer = both(lambda dtype: plain(x[-64:].to(dtype), bias.to(dtype)))
    return against_pytorch(name, lambda: ops.bias_gelu(x, bias), plain, (x, bias), answer, 4 * x.numel())


def gated(name: str, width: int, kind: str, elements: int = ELEMENTS) -> Case:
    """Gate and up as the halves of one projection's output."""
    gate, up = drawn(elements // width // 2, 2 * width).chunk(2, -1)

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return gpu_exact.gated_activation(gate, up, kind, gate.dtype)

    answer = both(lambda dtype: gpu_exact.gated_activation(gate[-64:], up[-64:], kind, dtype))
    names = {"silu": ("swiglu", "LigerSiLUMulFunction"), "gelu_tanh": ("geglu", "LigerGELUMulFunction")}
    peer = Contender("Liger", prepare=liger(*names[kind], gate, up))
    run = partial(ops.gated_activation, gate, up, kind=kind)
    return against_pytorch(name, run, plain, (gate, up), answer, 6 * gate.numel(), peer)


def rotary(name: str, interleaved: bool, positions: int = 8192) -> Case:
    """Llama's shapes: 32 query and 8 key heads of 128, 4 sequences."""
    query, key = (drawn(4, positions, heads, 128).transpose(1, 2) for heads in (32, 8))
    angles = torch.randn(positions, 64, device=DEVICE)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()

    def plain(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return (
            gpu_exact.rotary(query, cos, sin, interleaved, query.dtype),
            gpu_exact.rotary(key, cos, sin, interleaved, key.dtype),
        )

    answer = both(
        lambda dtype: gpu_exact.rotary(query[-1:, -1:], cos, sin, interleaved, dtype),
        pick=lambda out: out[0][-1:, -1:],
    )
    run = partial(ops.rotary, query, key, cos, sin, interleaved=interleaved)
    moved = 4 * (query.numel() + key.numel())
    return against_pytorch(name, run, plain, (query, key), answer, moved)


CASES: dict[str, Callable[[str], Case]] = {
    "softmax-4096": partial(softmax, width=4096),
    "gated_activation-silu-14336": partial(gated, width=14336, kind="silu"),
    "gated_activation-gelu_tanh-14336": partial(gated, width=14336, kind="gelu_tanh"),
    "bias_gelu-3072": partial(bias_gelu, width=3072),
    "rotary-half": partial(rotary, interleaved=False),
    "rotary-interleaved": partial(rotary, interleaved=True),
    "softmax-512": partial(softmax, width=512),
}


def run(record: Record, device: torch.device) -> None:
    """The section."""
    run_cases(record, [(name, partial(make, name)) for name, make in CASES.items()], rounds_s=0.8)
