"""The fused nodes of a graph, counted against what a traced model's operations must have become."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import onnx_ir as ir

from fastattn.onnx.dense_attention import within_fused_operator
from fastattn.onnx.graph import CONTRIB_DOMAIN, arguments_by_name
from fastattn.onnx.packed_attention import ONE_SEQUENCE
from fastattn.onnx.standard_attention import within_standard_operator
from fastattn.onnx.targets import Target, current_target
from fastattn.ops.attention_terms import AttentionTerms

__all__ = [
    "FusionError",
    "check_operators",
    "check_promised",
    "check_traced",
    "checked_fusions",
    "count_fusions",
    "operations",
]

_TERMS = frozenset(field.name for field in fields(AttentionTerms))
_STANDARD_DOMAINS = ("", "ai.onnx")


class FusionError(RuntimeError):
    """The graph does not hold the fused nodes that the model's operations should have become, or holds nodes
    that its target has not.
    """


def operations(program: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and arguments of every fastattn operation in an exported program."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.name.startswith("fastattn::"):
            yield schema.name.removeprefix("fastattn::"), arguments_by_name(node.target, node.args)


def count_fusions(model: Any) -> dict[str, int]:
    """The fused forms of the current target in a graph, subgraphs included: how many of each.

    attention: MultiHeadAttention, or ai.onnx's Attention; packed_attention: those of them over sequences
    without padding between layers, one at a time (its form for a batch of one is not counted again) or by key
    lengths; add_layer_norm: LayerNormalization of a residual
    addition; bias_gelu: a GELU of a product that adds its own bias, or one that adds the bias itself.
    """
    found = Counter(attention=0, packed_attention=0, add_layer_norm=0, bias_gelu=0)
    addition = current_target().addition
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type in ("MultiHeadAttention", "Attention"):
            if node.graph is not None and node.graph.name == ONE_SEQUENCE:
                continue
            found["attention"] += 1
            found["packed_attention"] += node.graph is not model.graph or _takes_key_lengths(node)
        elif node.op_type == "LayerNormalization":
            found["add_layer_norm"] += _made_by(node.inputs[0]) == addition
        elif node.op_type in ("Gelu", "FastGelu"):
            found["bias_gelu"] += len(node.inputs) == 2 or _made_by(node.inputs[0]) == "Gemm"
        elif node.op_type == "BiasGelu":
            found["bias_gelu"] += 1
    return dict(found)


def _takes_key_lengths(node: Any) -> bool:
    """Whether a MultiHeadAttention's mask is one number a sequence."""
    if node.op_type != "MultiHeadAttention" or len(node.inputs) < 5 or node.inputs[4] is None:
        return False
    shape = node.inputs[4].shape
    return shape is not None and len(shape) == 1


def _made_by(value: Any) -> str | None:
    node = value.producer()
    while node is not None and node.op_type in ("Reshape", "Unsqueeze", "Squeeze"):
        node = node.inputs[0].producer()
    return None if node is None else str(node.op_type)


def checked_fusions(program: Any, model: Any) -> dict[str, int]:
    """Every operation of the traced model that the current target can fuse must be there in its fused form.

    Raises:
        FusionError: one is not.
    """
    wanted: Counter[str] = Counter()
    for name, arguments in operations(program):
        if name in ("attention", "varlen_attention"):
            fused = _becomes_fused_attention(arguments)
            wanted["attention"] += fused
            wanted["packed_attention"] += name == "varlen_attention" and fused
        elif name in ("add_layer_norm", "bias_gelu"):
            wanted[name] += 1
    found = count_fusions(model)
    check_promised(wanted, found)
    return found


def _becomes_fused_attention(arguments: Mapping[str, Any]) -> bool:
    """Whether the fused operator must be there: the arguments are within its reach, or nearly all are."""
    terms = AttentionTerms(**{name: x for name, x in arguments.items() if name in _TERMS})
    query, key, mask = (arguments.get(name) for name in ("query", "key", "mask"))
    assert query is not None and key is not None
    if not current_target().contrib:
        return within_standard_operator(terms)
    # A mask of four dimensions may hide keys by query, which the fused operator cannot.
    padding_mask = mask is None or mask.meta["val"].dim() == 2
    heads, key_heads = (x.meta["val"].shape[1] for x in (query, key))
    return within_fused_operator(terms) and padding_mask and bool(heads == key_heads)


def check_traced(promised: Mapping[str, int], program: Any) -> None:
    """Every operation that a source promises must be in the trace.

    Raises:
        FusionError: one is not.
    """
    found = Counter(name for name, _ in operations(program))
    for name, count in promised.items():
        if found[name] < count:
            raise FusionError(
                f"of the model's {count} {name} operations {found[name]} are in its trace; "
                "this is a defect of fastattn with this version of torch and transformers"
            )


def check_promised(promised: Mapping[str, int], found: Mapping[str, int]) -> None:
    """Every fused node that is promised must have been found.

    Raises:
        FusionError: one is not.
    """
    for name, count in promised.items():
        if found.get(name, 0) < count:
            raise FusionError(
                f"of the model's {count} {name} operations {found.get(name, 0)} became fused nodes; "
                "this is a defect of fastattn with this version of torch and onnxscript"
            )


def check_operators(model: Any, target: Target) -> None:
    """A finished graph may hold only operators that the target's runtime has.

    Raises:
        FusionError: a contrib node where the target allows none, or one that its runtime does not know.
    """
    domains = (*_STANDARD_DOMAINS, CONTRIB_DOMAIN) if target.contrib else _STANDARD_DOMAINS
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain not in domains:
            raise FusionError(
                f"the graph holds {node.domain}.{node.op_type}, which target {target.name!r} has not; "
                "this is a defect of fastattn"
            )
        if node.domain != CONTRIB_DOMAIN:
            continue
        names = {node.op_type, *(f"{node.op_type}.{name}" for name in _given(node))}
        for name in sorted(names & target.unknown):
            raise FusionError(
                f"the graph holds {name}, which the ONNX Runtime of target {target.name!r} does not know; "
                "this is a defect of fastattn"
            )


# Input -> its position, for those that a target may not know.
_LATER_INPUTS = {"GroupQueryAttention": {"q_norm_weight": 14, "k_norm_weight": 15}}


def _given(node: Any) -> Iterator[str]:
    """The attributes of a node, and those of its later inputs that are there."""
    yield from node.attributes
    for name, position in _LATER_INPUTS.get(node.op_type, {}).items():
        if len(node.inputs) > position and node.inputs[position] is not None:
            yield name
