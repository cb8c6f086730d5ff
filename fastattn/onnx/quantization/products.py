"""The matrix products and embedding tables of a graph: what quantization replaces, and what it must leave."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

__all__ = ["Candidates", "Product", "Table", "constant", "find_candidates"]

# Fewer outputs than this are a head over a few labels: nothing to gain, and its logits decide.
_FEWEST_OUTPUTS = 16

# Smaller tables (token types, buckets of a relative position bias) do not show in the file's size.
_SMALLEST_TABLE = 1 << 14


@dataclass(frozen=True)
class Product:
    """`alpha * rows [..., K] @ weight + bias`.

    Attributes:
        node: the Gemm or MatMul.
        weight: its constant weight, float32: [N, K] if `transposed`, as PyTorch stores it, else [K, N].
        transposed: how the weight is stored.
        bias: a constant of N elements, or None.
        alpha: Gemm's factor.
    """

    node: Any
    weight: Any
    transposed: bool
    bias: Any | None = None
    alpha: float = 1.0

    @property
    def rows(self) -> Any:
        """Its activations, which the rewriting of another product may have replaced."""
        return self.node.inputs[0]

    @property
    def inputs(self) -> int:
        """K."""
        return int(self.weight.shape[1 if self.transposed else 0])

    @property
    def outputs(self) -> int:
        """N."""
        return int(self.weight.shape[0 if self.transposed else 1])

    @property
    def key(self) -> tuple[str, bool, float]:
        """Products of one key have one quantized weight."""
        return (self.weight.name, self.transposed, self.alpha)

    def matrix(self) -> Tensor:
        """The weight times alpha as float32 [N, K], a row an output; where it can be, a view of the storage.

        Raises:
            ValueError: an element is not finite.
        """
        stored = _finite(self.weight)
        rows = stored if self.transposed else stored.T
        return rows if self.alpha == 1.0 else rows * self.alpha


@dataclass(frozen=True)
class Table:
    """Rows of a constant float32 [V, K] that a Gather picks."""

    node: Any
    weight: Any

    def matrix(self) -> Tensor:
        """float32 [V, K].

        Raises:
            ValueError: an element is not finite.
        """
        return _finite(self.weight)


@dataclass(frozen=True)
class Candidates:
    """What may be quantized, and how many nodes that hold weights may not, by kind and reason."""

    products: list[Product] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    left: Counter[tuple[str, str]] = field(default_factory=Counter)


def find_candidates(model: Any) -> Candidates:
    """Every node of the graph and of its subgraphs that holds a weight, by what can be done with it."""
    found = Candidates()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain != "":
            continue
        if node.op_type in ("Gemm", "MatMul"):
            _sort_product(node, found)
        elif node.op_type == "Gather" and _is_matrix(node.inputs[0]):
            weight: Any = node.inputs[0]
            if node.attributes.get_int("axis", 0) != 0 or weight.shape[0] * weight.shape[1] < _SMALLEST_TABLE:
                found.left["embedding table", "small: exact costs next to nothing"] += 1
            else:
                found.tables.append(Table(node, weight))
        elif node.op_type in ("Conv", "ConvTranspose") and constant(node.inputs[1]) is not None:
            found.left["convolution", "a small part of the work, first on the raw signal"] += 1
    return found


def _sort_product(node: Any, found: Candidates) -> None:
    first, weight = node.inputs[:2]
    if constant(weight) is None:
        if constant(first) is not None:
            found.left["product", "the weight is the first operand"] += 1
        return  # two activations: attention, which stays float
    if not _is_matrix(weight):
        found.left["product", f"a weight {weight.dtype} {list(weight.shape)}, not a float32 matrix"] += 1
        return
    product = _gemm(node) if node.op_type == "Gemm" else Product(node, weight, transposed=False)
    if product is None:
        found.left["product", "transposed activations, or a bias that is not one constant row"] += 1
    elif product.outputs < _FEWEST_OUTPUTS:
        found.left["product", f"a head of fewer than {_FEWEST_OUTPUTS} outputs: its values decide"] += 1
    else:
        found.products.append(product)


def _gemm(node: Any) -> Product | None:
    attributes = node.attributes
    weight = node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    transposed = bool(attributes.get_int("transB", 0))
    width = weight.shape[0 if transposed else 1]
    if attributes.get_int("transA", 0):
        return None
    if bias is not None and (
        constant(bias) is None
        or list(bias.shape) not in ([width], [1, width])
        or attributes.get_float("beta", 1.0) != 1.0
    ):
        return None
    return Product(node, weight, transposed, bias, attributes.get_float("alpha", 1.0))


def constant(value: Any) -> Any | None:
    """The tensor of an initializer that no caller can replace; None for anything else."""
    if value is None or not value.is_initializer() or value.is_graph_input():
        return None
    return value.const_value


def _is_matrix(value: Any) -> bool:
    tensor = constant(value)
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2


def _finite(weight: Any) -> Tensor:
    array = weight.const_value.numpy()
    if not np.isfinite(array).all():
        raise ValueError(f"the weight {weight.name} {list(array.shape)} has elements that are not finite")
    with warnings.catch_warnings():
        # A file mapped into memory cannot be written to, which torch remarks on; nothing here writes.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)
