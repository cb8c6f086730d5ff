"""The first minute on a machine: versions, and one launch of every operation against float64."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

import gpu_exact
import torch
from gpu_checks import Draw, assert_exact, bounds, length, run_twice
from torch import Tensor
from torch.nn import functional

from fastattn import ops
from gpu_sections.record import Record

EPS = 1e-5
Outputs = tuple[Tensor, ...]
# What an operation gave, and a formula of its outputs by dtype.
Launched = tuple[Outputs, Callable[[torch.dtype], Outputs]]


def attention(draw: Draw) -> Launched:
    query, key, value = (draw.heads(2, heads, length(300), 64) for heads in (4, 2, 2))
    mask = draw.mask(2, length(300))
    table = draw(32, 4, dtype=torch.float32)
    found = run_twice(
        lambda: ops.attention(
            query, key, value, mask=mask, causal=True, return_lse=True,
            relative_bias=ops.RelativeBias(table, "t5-causal", 128),
        )
    )  # fmt: skip
    relative = gpu_exact.Relative(table, "t5-causal", 128)
    return found, lambda dtype: gpu_exact.attention(
        query, key, value, dtype, mask=mask, causal=True, relative=relative
    )


def varlen_attention(draw: Draw) -> Launched:
    size = length(200)
    query, key, value = (draw(2 * size, 4, 64) for _ in range(3))
    starts = bounds([size, size], draw.device)
    found = run_twice(
        lambda: ops.varlen_attention(query, key, value, starts, starts, size, size, causal=True)
    )

    def formula(dtype: torch.dtype) -> Outputs:
        wide = (x.view(2, size, 4, 64).transpose(1, 2) for x in (query, key, value))
        out, _ = gpu_exact.attention(*wide, dtype, causal=True)
        return (out.transpose(1, 2).reshape(2 * size, 4, 64),)

    return found, formula


def decode_attention(draw: Draw) -> Launched:
    size = length(2000)
    query, key, value = draw.heads(2, 8, 1, 64), draw(2, 2, size, 64), draw(2, 2, size, 64)
    lengths = draw.integers(1, size, 2)
    found = run_twice(lambda: ops.decode_attention(query, key, value, lengths))
    return found, lambda dtype: gpu_exact.attention(query, key, value, dtype, key_lengths=lengths)[:1]


def layer_norm(draw: Draw) -> Launched:
    x, weight, bias = draw(9, 768), draw(768), draw(768)
    found = run_twice(lambda: ops.layer_norm(x, weight, bias, eps=EPS))
    return found, lambda dtype: (gpu_exact.layer_norm(x, weight, bias, EPS, dtype),)


def rms_norm(draw: Draw) -> Launched:
    x, weight = draw(9, 768), draw(768)
    found = run_twice(lambda: ops.rms_norm(x, weight, eps=EPS))
    return found, lambda dtype: (gpu_exact.rms_norm(x, weight, EPS, 0.0, dtype),)


def add_layer_norm(draw: Draw) -> Launched:
    x, residual, weight, bias = draw(9, 768), draw(9, 768), draw(768), draw(768)
    found = run_twice(lambda: ops.add_layer_norm(x, residual, weight, bias, EPS))

    def formula(dtype: torch.dtype) -> Outputs:
        total = x.to(dtype) + residual.to(dtype)
        return gpu_exact.layer_norm(total, weight, bias, EPS, dtype), total

    return found, formula


def add_rms_norm(draw: Draw) -> Launched:
    x, residual, weight = draw(9, 768), draw(9, 768), draw(768)
    found = run_twice(lambda: ops.add_rms_norm(x, residual, weight, EPS))

    def formula(dtype: torch.dtype) -> Outputs:
        total = x.to(dtype) + residual.to(dtype)
        return gpu_exact.rms_norm(total, weight, EPS, 0.0, dtype), total

    return found, formula


def softmax(draw: Draw) -> Launched:
    x = draw(9, 500)
    found = run_twice(lambda: ops.softmax(x, scale=0.5))
    return found, lambda dtype: (gpu_exact.softmax(x, None, 0.5, False, dtype),)


def bias_gelu(draw: Draw) -> Launched:
    x, bias = draw(9, 500), draw(500)
    found = run_twice(lambda: ops.bias_gelu(x, bias))
    return found, lambda dtype: (functional.gelu(x.to(dtype) + bias.to(dtype)),)


def gated_activation(draw: Draw) -> Launched:
    gate, up = draw(9, 500), draw(9, 500)
    found = run_twice(lambda: ops.gated_activation(gate, up, kind="silu"))
    return found, lambda dtype: (gpu_exact.gated_activation(gate, up, "silu", dtype),)


def rotary(draw: Draw) -> Launched:
    query, key, angles = draw.heads(2, 4, 50, 64), draw.heads(2, 2, 50, 64), draw(50, 32)
    cos, sin = (torch.cat([x, x], -1) for x in (angles.cos(), angles.sin()))
    found = run_twice(lambda: ops.rotary(query, key, cos, sin))
    return found, lambda dtype: tuple(gpu_exact.rotary(x, cos, sin, False, dtype) for x in (query, key))


LAUNCHES = (
    attention, varlen_attention, decode_attention, layer_norm, rms_norm, add_layer_norm, add_rms_norm,
    softmax, bias_gelu, gated_activation, rotary,
)  # fmt: skip


def run(record: Record, device: torch.device) -> None:
    """The section; the interpreter, on the CPU, multiplies bf16 wrongly and gets float16."""
    import triton

    record.set(python=platform.python_version(), torch=torch.__version__, triton=triton.__version__)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    for launch in LAUNCHES:
        draw = Draw(torch.Generator().manual_seed(0), device, dtype)
        entry: dict[str, Any] = {"operation": launch.__name__, "passed": False, "reason": ""}
        started = time.perf_counter()
        try:
            found, formula = launch(draw)
            for each, exact, own in zip(found, formula(torch.float64), formula(dtype), strict=True):
                assert_exact(each, exact, own)
            entry["passed"] = True
        except Exception as error:
            entry["reason"] = f"{type(error).__name__}: {error}"
            record.fail(f"{launch.__name__}: {entry['reason'][:300]}")
        record.add(entry | {"seconds": round(time.perf_counter() - started, 3)})
