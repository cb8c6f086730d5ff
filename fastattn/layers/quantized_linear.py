"""A linear layer with a quantized weight, in the place of `nn.Linear` or of transformers' `Conv1D`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastattn import ops
from fastattn.ops import PackedWeight

__all__ = ["QuantizedLinear", "dequantize_layers", "rounds_inputs"]

# Buffer of the layer -> field of `PackedWeight`; `weight`, the values, is told apart below.
_SCALES = {
    "weight_scale": "scales",
    "weight_zero_point": "zero_points",
    "weight_input_scale": "input_scales",
}


class QuantizedLinear(nn.Linear):
    """`activation(x @ W^T + bias)` with W quantized: `ops.quantized_linear` as a layer.

    A subclass of `nn.Linear`, so that PEFT puts its adapters on it (QLoRA: the weight is frozen, x and the
    bias have gradients). Made by `from_packed`, or with tensors not yet filled by the constructor, which is
    what a loader needs.

    Buffers: `weight`, int8, the packed values ("fp8": the bytes of float8_e4m3fn numbers: code that asks
    `weight.dtype` and casts its input to it leaves int8 alone); `weight_scale`, float32 [N, G];
    `weight_zero_point`, float32 [N, G] or None; `weight_input_scale`, float32 [K] or None. The parameter
    `bias` is [N] or None. A move to another device takes all of them along, a change of dtype (`.half()`)
    only the bias: the layer computes in its input's dtype. Where `layout` is not "plain", `weight` lies as a
    CPU kernel wants it; the state_dict always holds the plain one.

    Args:
        in_features, out_features: K and N.
        scheme, group_size: as `PackedWeight` has them.
        bias: whether there is one.
        input_scale: whether inputs are divided by `weight_input_scale` first.
        device, dtype: of the tensors; dtype is the bias's.

    Example:
        >>> import torch, fastattn
        >>> packed = fastattn.ops.quantize_absmax(torch.eye(4), "int8")
        >>> layer = fastattn.layers.QuantizedLinear.from_packed(packed)
        >>> layer(torch.ones(2, 4)).shape, layer.weight.dtype
        (torch.Size([2, 4]), torch.int8)
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_input_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: str,
        group_size: int,
        bias: bool = True,
        input_scale: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.group_size, self.layout = scheme, group_size, "plain"
        columns = -(-in_features // 2) if scheme == "int4-weight" else in_features
        groups = (out_features, -(-in_features // group_size))

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        self.register_buffer("weight", torch.empty(out_features, columns, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", empty(*groups))
        self.register_buffer("weight_zero_point", empty(*groups) if scheme == "int4-weight" else None)
        self.register_buffer("weight_input_scale", empty(in_features) if input_scale else None)
        made = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", made)
        self._register_state_dict_hook(_record_scheme)

    @classmethod
    def from_packed(cls, packed: PackedWeight, bias: nn.Parameter | None = None) -> QuantizedLinear:
        """The layer of a weight; `bias`, [N], becomes its parameter as it is, `requires_grad` included.

        Raises:
            ValueError: a bias of another shape.
        """
        if bias is not None and tuple(bias.shape) != (packed.out_features,):
            raise ValueError(f"bias must be [{packed.out_features}]; got {list(bias.shape)}")
        layer = cls(
            packed.in_features, packed.out_features, packed.scheme, packed.group_size, False, device="meta"
        )
        layer.set_packed(packed)
        layer.bias = bias  # type: ignore[assignment]
        return layer

    def set_packed(self, packed: PackedWeight) -> None:
        """Take the tensors of `packed`, of this layer's shape and scheme."""
        # The same tensor where it can be: layers may share it.
        values = packed.values
        self.weight = values if values.dtype == torch.int8 else values.view(torch.int8)
        self.layout = packed.layout
        for name, field in _SCALES.items():
            self._buffers[name] = getattr(packed, field)

    @property
    def packed_weight(self) -> PackedWeight:
        """The weight as `ops.quantized_linear` takes it: the same tensors.

        Making it takes longer than a token's product, so it is made once for the same tensors. Whoever puts
        others in place (`.to`, a loader, `functional_call`) is noticed.
        """
        if torch.compiler.is_compiling():
            return self._packed()
        buffers = self._buffers
        made = self.__dict__.get("_made")
        if made is None or not all(each is buffers[name] for name, each in made[0].items()):
            # The layout changes with the tensor, never without.
            made = (dict(buffers), self._packed())
            self.__dict__["_made"] = made
        packed: PackedWeight = made[1]
        return packed

    def _packed(self) -> PackedWeight:
        buffers = self._buffers
        values: Any = buffers["weight"]
        return PackedWeight(
            values.view(torch.float8_e4m3fn) if self.scheme == "fp8" else values,
            buffers["weight_scale"],  # type: ignore[arg-type]
            self.scheme,
            self.in_features,
            self.group_size,
            buffers["weight_zero_point"],
            buffers["weight_input_scale"],
            self.layout,
        )

    def prepare(self) -> None:
        """Lay the weight out as this machine multiplies it fastest."""
        self.set_packed(ops.prepare(self.packed_weight))

    def packed_rows(self, rows: slice) -> PackedWeight:
        """Part of the outputs, in the plain layout: views of the same tensors where that is the layer's."""
        packed = ops.plain(self.packed_weight)
        zeros = packed.zero_points
        return replace(
            packed,
            values=packed.values[rows],
            scales=packed.scales[rows],
            zero_points=None if zeros is None else zeros[rows],
        )

    def forward(self, input: Tensor, activation: str | None = None) -> Tensor:
        """[..., K] -> [..., N] in the input's dtype.

        Args:
            input: floating point.
            activation: None, "gelu", "gelu_tanh", "relu" or "silu", applied to the product.
        """
        return ops.quantized_linear(input, self.packed_weight, self.bias, activation)

    def dequantized(self) -> nn.Linear:
        """An `nn.Linear` of the same bias whose float32 weight is the numbers this layer stands for."""
        weight = self.packed_weight.dequantize()
        layer = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=torch.float32
        )
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.bias = self.bias
        return layer.train(self.training)

    def reset_parameters(self) -> None:
        """Nothing: quantized numbers are not drawn at random."""

    def extra_repr(self) -> str:
        groups = f", group_size={self.group_size}" if self.scheme == "int4-weight" else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme!r}"
            f"{groups}, bias={self.bias is not None}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_made"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        buffers = [each for each in self._buffers.values() if each is not None]

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or not any(tensor is each for each in buffers):
                return moved
            return tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        if self.layout != "plain" and self.weight.device.type != "cpu":
            self.set_packed(ops.plain(self.packed_weight))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != "plain":
            destination[f"{prefix}weight"] = ops.plain(self.packed_weight).values

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Copying would cast floating-point weights to zeros, and read float8 bytes as integers.
        weight = state_dict.get(f"{prefix}weight")
        scheme = local_metadata.get("scheme", self.scheme)
        if weight is not None and weight.dtype != self.weight.dtype:
            error_msgs.append(
                f"{prefix}weight is {weight.dtype} in the state_dict, and this layer is quantized: load it "
                "into the model before fastattn.quantize"
            )
        elif scheme != self.scheme:
            error_msgs.append(f"{prefix}weight is quantized to {scheme!r}, this layer to {self.scheme!r}")
        else:
            prepared = self.layout != "plain"
            if prepared:
                self.set_packed(ops.plain(self.packed_weight))
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            if prepared:
                self.prepare()


def rounds_inputs(model: nn.Module) -> bool:
    """Whether a layer of `model` rounds its inputs. Two right ways of computing such a model differ by as
    much as the rounding costs: the last bit of an input decides which way it is rounded.
    """
    return any(
        isinstance(module, QuantizedLinear) and module.scheme in ("int8", "fp8") for module in model.modules()
    )


def dequantize_layers(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put float layers in the place of every quantized layer below `model`, in `dtype` (default float32, the
    bias as it is); one in several places stays one.
    """
    made: dict[int, nn.Linear] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, QuantizedLinear):
                parent._modules[name] = made.setdefault(id(child), child.dequantized().to(dtype))


def _record_scheme(
    module: QuantizedLinear, state_dict: Any, prefix: str, local_metadata: dict[str, Any]
) -> None:
    local_metadata["scheme"] = module.scheme
