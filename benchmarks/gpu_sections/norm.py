"""Norms against PyTorch, torch.compile, Liger, and a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gpu_exact
import torch
from torch import Tensor
from torch.nn import functional

from fastattn import ops
from fastattn.bench import Contender
from gpu_sections.record import Record
from gpu_sections.timing import DEVICE, OURS, Answer, Case, compiled, liger, run_cases

EPS = 1e-5
# 256 MiB a tensor in bf16: no cache holds it.
ELEMENTS = 2**27
COPY = "copy, same bytes"


def first(output: Any) -> Tensor:
    """The normalized rows of an output, the last 64 of them."""
    return (output[0] if isinstance(output, (tuple, list)) else output)[-64:]


def copied(tensors: Sequence[Tensor]) -> Contender:
    """A copy of these tensors: as many bytes read and written as by a kernel that turns them into as many."""
    targets = [torch.empty_like(each) for each in tensors]

    def run() -> None:
        for target, source in zip(targets, tensors, strict=True):
            target.copy_(source)

    return Contender(COPY, run)


def norm_case(name: str, kind: str, width: int, elements: int = ELEMENTS) -> Case:
    """layer_norm, rms_norm, add_layer_norm or add_rms_norm of [elements / width, width] in bf16."""
    rows = elements // width
    x, residual = (torch.randn(rows, width, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    weight, bias = (torch.randn(width, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    adds, layer = kind.startswith("add"), kind.endswith("layer_norm")

    def pytorch(x: Tensor, residual: Tensor) -> Any:
        total = x + residual if adds else x
        if layer:
            normalized = functional.layer_norm(total, (width,), weight, bias, EPS)
        else:
            normalized = functional.rms_norm(total, (width,), weight, EPS)
        return (normalized, total) if adds else normalized

    calls: dict[str, Callable[[], Any]] = {
        "layer_norm": lambda: ops.layer_norm(x, weight, bias, eps=EPS),
        "rms_norm": lambda: ops.rms_norm(x, weight, eps=EPS),
        "add_layer_norm": lambda: ops.add_layer_norm(x, residual, weight, bias, EPS),
        "add_rms_norm": lambda: ops.add_rms_norm(x, residual, weight, EPS),
    }
    contenders = [
        Contender(OURS, calls[kind], against=COPY, highlight=True),
        copied([x, residual] if adds else [x]),
        Contender("PyTorch", partial(pytorch, x, residual)),
        Contender("torch.compile", prepare=compiled(pytorch, x, residual)),
    ]
    # Their forward functions by module, name and arguments; Liger has no fused add and layer norm.
    peers = {
        "layer_norm": ("layer_norm", "LigerLayerNormFunction", x, weight, bias, EPS),
        "rms_norm": ("rms_norm", "LigerRMSNormFunction", x, weight, EPS),
        "add_rms_norm": ("fused_add_rms_norm", "LigerFusedAddRMSNormFunction", x, residual, weight, EPS),
    }
    if kind in peers:
        contenders.append(Contender("Liger", prepare=liger(*peers[kind])))

    def formula(dtype: torch.dtype) -> Tensor:
        total = x[-64:].to(dtype) + residual[-64:].to(dtype) if adds else x[-64:]
        if layer:
            return gpu_exact.layer_norm(total, weight, bias, EPS, dtype)
        return gpu_exact.rms_norm(total, weight, EPS, 0.0, dtype)

    answers: dict[str, Answer | None] = {
        "": Answer(first, formula(torch.float64), formula(torch.bfloat16)),
        COPY: None,
    }
    moved = (4 if adds else 2) * x.numel() * x.element_size()
    return Case(name, contenders, ["PyTorch", "torch.compile"], answers, moved_bytes=moved)


WIDTHS = (512, 1024, 2048, 4096, 8192, 16384)
CASES: dict[str, Callable[[str], Case]] = {
    **{f"add_layer_norm-{width}": partial(norm_case, kind="add_layer_norm", width=width) for width in WIDTHS},
    "add_layer_norm-768-batch8": partial(norm_case, kind="add_layer_norm", width=768, elements=8 * 512 * 768),
    "add_rms_norm-4096": partial(norm_case, kind="add_rms_norm", width=4096),
    "layer_norm-4096": partial(norm_case, kind="layer_norm", width=4096),
    "rms_norm-4096": partial(norm_case, kind="rms_norm", width=4096),
    "rms_norm-65536": partial(norm_case, kind="rms_norm", width=65536),
}


def run(record: Record, device: torch.device) -> None:
    """The section."""
    run_cases(record, [(name, partial(make, name)) for name, make in CASES.items()], rounds_s=0.8)
