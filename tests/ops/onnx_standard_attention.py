"""The ONNX standard's own cases of its Attention operator, each as one call of `fastattn.ops.attention`.

Attention-23 to -25: https://onnx.ai/onnx/operators/onnx__Attention.html. The standard counts positions from
the number of cached keys, `nonpad_kv_seqlen` less the queries where the cache is static, and otherwise from
0. Its optional fourth output, the scores, is a debugging aid that fused attention never holds: the other
outputs of those cases are compared.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from fastattn import ops

__all__ = ["OUTPUTS", "StandardCase", "run_case", "standard_cases"]

OUTPUTS = ("Y", "present_key", "present_value", "qk_matmul_output")
_INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
_ATTRIBUTES = {
    "is_causal",
    "kv_num_heads",
    "left_window_size",
    "q_num_heads",
    "qk_matmul_output_mode",  # which scores the fourth output shows
    "right_window_size",
    "scale",
    "softcap",
    "softmax_precision",  # ours is float32 at least, within every case's tolerance
}


@dataclass(frozen=True)
class StandardCase:
    """One case: `inputs` and `outputs` by the standard's names, absent ones left out."""

    name: str
    attributes: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    rtol: float
    atol: float

    @property
    def dtype(self) -> torch.dtype:
        return self.inputs["Q"].dtype


def standard_cases() -> list[StandardCase]:
    """All cases but those that only write the operator out in others (`_expanded`)."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the cases of other operators, which are built on the way
        collected = collect_testcases("Attention")
    return [_case(case) for case in collected if "_expanded" not in case.name]


def _case(case: Any) -> StandardCase:
    (node,) = case.model.graph.node
    assert node.op_type == "Attention", case.name
    assert len(node.input) <= len(_INPUTS), (case.name, list(node.input))
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    unknown = attributes.keys() - _ATTRIBUTES
    assert not unknown, f"{case.name}: the standard has gained {unknown}"
    ((inputs, outputs),) = case.data_sets
    return StandardCase(
        case.name, attributes, _named(_INPUTS, node.input, inputs), _named(OUTPUTS, node.output, outputs),
        case.rtol, case.atol,
    )  # fmt: skip


def _named(names: tuple[str, ...], present: Any, arrays: Any) -> dict[str, Tensor]:
    """The arrays by the standard's names; `present` has an empty string where an optional one is left out."""
    found = [name for name, given in zip(names, present, strict=False) if given]
    return {name: _tensor(array) for name, array in zip(found, arrays, strict=True)}


def _tensor(array: Any) -> Tensor:
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def run_case(case: StandardCase) -> dict[str, Tensor]:
    """The case's outputs but the scores, by name, computed by `fastattn.ops.attention`."""
    given, attributes = case.inputs, case.attributes
    query, key, value = given["Q"], given["K"], given["V"]
    joined = query.dim() == 3
    if joined:
        query = _split_heads(query, attributes["q_num_heads"])
        key, value = (_split_heads(x, attributes["kv_num_heads"]) for x in (key, value))
    start: int | Tensor = 0
    if "past_key" in given:
        start = given["past_key"].shape[2]
        key, value = torch.cat([given["past_key"], key], 2), torch.cat([given["past_value"], value], 2)
    lengths = given.get("nonpad_kv_seqlen")
    if lengths is not None:
        start = lengths - query.shape[2]
    mask, bias = _mask_and_bias(given.get("attn_mask"), key.shape[2])
    out = ops.attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        causal=bool(attributes.get("is_causal", 0)),
        query_start=start,
        key_lengths=lengths,
        window=(attributes.get("left_window_size", -1), attributes.get("right_window_size", -1)),
        scale=attributes.get("scale"),
        softcap=attributes.get("softcap", 0.0),
    )
    assert isinstance(out, Tensor)
    results = {"Y": out.transpose(1, 2).flatten(2) if joined else out}
    if "present_key" in case.outputs:
        results |= {"present_key": key, "present_value": value}
    return results


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, H * D] -> [B, H, S, D]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _mask_and_bias(given: Tensor | None, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """attn_mask, bool or additive, of one to four dimensions and perhaps fewer keys, as a mask or a bias."""
    if given is None:
        return None, None
    boolean = given.dtype == torch.bool
    missing = keys - given.shape[-1]
    padded = torch.nn.functional.pad(given, (0, missing), value=False if boolean else -torch.inf)
    whole = padded.reshape([1] * (4 - padded.dim()) + list(padded.shape))
    return (whole, None) if boolean else (None, whole)
