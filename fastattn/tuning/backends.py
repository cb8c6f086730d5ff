"""Which implementation of each operation is faster: Triton kernels or PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastattn import ops
from fastattn.backend import BackendError, set_backend
from fastattn.bench.rows import Row
from fastattn.bench.timing import Contender, MissingError
from fastattn.bench.workloads import Workload
from fastattn.tuning.trials import Trials

__all__ = ["OPERATIONS", "measure_backends"]

_TORCH, _TRITON = "torch", "triton"
_BATCH, _LENGTH, _HEADS, _HEAD_DIM, _FFN = 8, 256, 12, 64, 3072

Run = Callable[[], Any]


def measure_backends(trials: Trials, budget_s: float) -> dict[str, str]:
    """Operation to backend, of each operation with a kernel. Without a GPU one comparison, with the reason
    why there is no choice.
    """
    if trials.device == "cpu":
        _ask(trials, "all operations", _add_layer_norm(_random(trials)), budget_s)
        return {}
    return {
        name: _ask(trials, name, make(_random(trials)), budget_s / len(OPERATIONS))
        for name, make in OPERATIONS.items()
    }


def _ask(trials: Trials, case: str, run: Run, budget_s: float) -> str:
    chosen = _TORCH

    def prepare(backend: str) -> Run:
        try:
            set_backend(backend).__exit__(None, None, None)
        except BackendError as error:
            raise MissingError(str(error)) from error

        def selected() -> Any:
            with set_backend(backend):
                return run()

        return selected

    def choose(rows: list[Row]) -> str:
        nonlocal chosen
        # Kernels, which run unless told otherwise, stay where PyTorch is not surely faster.
        kernel = rows[1]
        slower = kernel.ratio is not None and kernel.ratio.high < 1
        chosen = _TRITON if kernel.status == "measured" and not slower else _TORCH
        return chosen

    contenders = [Contender(name, prepare=lambda name=name: prepare(name)) for name in (_TORCH, _TRITON)]  # type: ignore[misc]
    trials.ask("backend", case, contenders, choose, budget_s)
    return chosen


def _random(trials: Trials) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(trials.device, trials.dtype)


def _attention(randn: Callable[..., Tensor]) -> Run:
    query, key, value = (randn(_BATCH, _HEADS, _LENGTH, _HEAD_DIM) for _ in range(3))
    mask = Workload(_BATCH, _LENGTH, 0.7).tokens(10)["attention_mask"].bool().to(query.device)
    return lambda: ops.attention(query, key, value, mask=mask)


def _varlen_attention(randn: Callable[..., Tensor]) -> Run:
    lengths = torch.tensor(Workload(_BATCH, _LENGTH, 0.7).lengths())
    query, key, value = (randn(int(lengths.sum()), _HEADS, _HEAD_DIM) for _ in range(3))
    bounds = pad(lengths.cumsum(0), (1, 0)).int().to(query.device)
    return lambda: ops.varlen_attention(query, key, value, bounds, bounds, _LENGTH, _LENGTH)


def _decode_attention(randn: Callable[..., Tensor]) -> Run:
    query = randn(_BATCH, _HEADS, 1, _HEAD_DIM)
    key, value = (randn(_BATCH, _HEADS, 4 * _LENGTH, _HEAD_DIM) for _ in range(2))
    lengths = torch.full((_BATCH,), 4 * _LENGTH, dtype=torch.int32, device=query.device)
    return lambda: ops.decode_attention(query, key, value, lengths)


def _add_layer_norm(randn: Callable[..., Tensor]) -> Run:
    x, residual = (randn(_BATCH, _LENGTH, _HEADS * _HEAD_DIM) for _ in range(2))
    weight, bias = (randn(_HEADS * _HEAD_DIM) for _ in range(2))
    return lambda: ops.add_layer_norm(x, residual, weight, bias, 1e-12)


def _add_rms_norm(randn: Callable[..., Tensor]) -> Run:
    x, residual = (randn(_BATCH, _LENGTH, _HEADS * _HEAD_DIM) for _ in range(2))
    weight = randn(_HEADS * _HEAD_DIM)
    return lambda: ops.add_rms_norm(x, residual, weight, 1e-6)


def _bias_gelu(randn: Callable[..., Tensor]) -> Run:
    x, bias = randn(_BATCH, _LENGTH, _FFN), randn(_FFN)
    return lambda: ops.bias_gelu(x, bias)


def _gated_activation(randn: Callable[..., Tensor]) -> Run:
    gate, up = randn(_BATCH, _LENGTH, 2 * _FFN).chunk(2, -1)
    return lambda: ops.gated_activation(gate, up, kind="silu")


def _softmax(randn: Callable[..., Tensor]) -> Run:
    x = randn(_BATCH, _HEADS, _LENGTH, _LENGTH)
    return lambda: ops.softmax(x, scale=0.125)


def _rotary(randn: Callable[..., Tensor]) -> Run:
    query, key = (randn(_BATCH, _HEADS, _LENGTH, _HEAD_DIM) for _ in range(2))
    angles = randn(_LENGTH, _HEAD_DIM)
    cos, sin = angles.cos(), angles.sin()
    return lambda: ops.rotary(query, key, cos, sin)


OPERATIONS: dict[str, Callable[[Callable[..., Tensor]], Run]] = {
    "attention": _attention,
    "varlen_attention": _varlen_attention,
    "decode_attention": _decode_attention,
    "add_layer_norm": _add_layer_norm,
    "add_rms_norm": _add_rms_norm,
    "bias_gelu": _bias_gelu,
    "gated_activation": _gated_activation,
    "softmax": _softmax,
    "rotary": _rotary,
}
