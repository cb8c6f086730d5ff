"""Many calls of operations exported as one graph, with dynamic shapes, and run in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Case = Callable[..., Any]


class _Calls(nn.Module):
    def __init__(self, cases: Mapping[str, Case]) -> None:
        super().__init__()
        self.cases = list(cases.values())

    def forward(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        outputs: list[Tensor] = []
        for case in self.cases:
            result = case(inputs)
            outputs.extend(result if isinstance(result, (tuple, list)) else [result])
        return outputs


class Exported:
    """The cases in one ONNX Runtime session; `run` gives every case's outputs as a list of tensors.

    A graph for "cuda" runs on the CPU provider here, which has all its operators.
    """

    def __init__(
        self,
        cases: Mapping[str, Case],
        inputs: dict[str, Tensor],
        dynamic: dict[str, dict[int, str]],
        target: str = "cpu",
    ) -> None:
        import onnx
        import onnxruntime

        from fastattn.onnx.convert import to_onnx, trace
        from fastattn.onnx.fusions import check_operators
        from fastattn.onnx.targets import TARGETS, using_target

        shapes = {name: dict.fromkeys(dynamic[name], torch.export.Dim.DYNAMIC) for name in inputs}
        self.program = trace(_Calls(cases), {"inputs": inputs}, {"inputs": shapes})
        self.target = target
        with using_target(TARGETS[target]):
            self.model = to_onnx(self.program)
        self.cases = dict(cases)
        import onnx_ir

        check_operators(self.model, TARGETS[target])
        assert_runtime_knows(self.model)
        proto = onnx_ir.to_proto(self.model)
        onnx.checker.check_model(proto, full_check=not TARGETS[target].contrib)
        content = proto.SerializeToString()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        # The exporter names an input after the entry of the dictionary it came from.
        self.names = {value.name: name for value, name in zip(self.session.get_inputs(), inputs, strict=True)}

    def run(self, inputs: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        found = self.session.run(None, {key: inputs[name].numpy() for key, name in self.names.items()})
        results: dict[str, list[Tensor]] = {}
        position = 0
        for name, case in self.cases.items():
            expected = case(inputs)
            count = len(expected) if isinstance(expected, (tuple, list)) else 1
            results[name] = [torch.from_numpy(x) for x in found[position : position + count]]
            position += count
        return results


def assert_runtime_knows(model: Any) -> None:
    """Every contrib node is as ONNX Runtime's schema has it: inputs, outputs, types, attributes."""
    import onnx_ir
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    schemas = {
        schema.name: schema for schema in get_all_operator_schema() if schema.domain == "com.microsoft"
    }
    for node in onnx_ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain != "com.microsoft":
            continue
        assert node.op_type in schemas, node.op_type
        schema = schemas[node.op_type]
        unknown = set(node.attributes) - set(schema.attributes)
        missing = {name for name, each in schema.attributes.items() if each.required} - set(node.attributes)
        assert not unknown and not missing, (node.op_type, unknown, missing)
        for values, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
            assert len(values) <= len(formal), node.op_type
            for value, each in zip(values, formal, strict=False):
                assert value is not None or "Optional" in str(each.option), (node.op_type, each.name)
                if value is None or value.dtype is None:
                    continue
                allowed = {each.typeStr}
                for constraint in schema.type_constraints:
                    if constraint.type_param_str == each.typeStr:
                        allowed = set(constraint.allowed_type_strs)
                given = f"tensor({value.dtype.name.lower()})".replace("float32", "float")
                assert given in allowed, (node.op_type, each.name, given)


def in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def assert_close(found: Tensor, own: Tensor, exact: Tensor, context: object) -> None:
    """Against float64: at most twice PyTorch's own error in float32, plus 2 eps of the largest value.

    -inf, the logsumexp of a row that sees nothing, must stand in the same places.
    """
    assert found.shape == exact.shape, f"shape {tuple(found.shape)}, expected {tuple(exact.shape)}; {context}"
    assert not found.isnan().any(), f"NaN; {context}"
    nothing = exact == -torch.inf
    assert torch.equal(found == -torch.inf, nothing), f"-inf elsewhere than in the reference; {context}"
    found, own, exact = (x[~nothing].double() for x in (found, own, exact))
    if exact.numel() == 0:
        return
    allowed = 2 * (own - exact).abs().max() + 2 * torch.finfo(torch.float32).eps * exact.abs().max()
    error = (found - exact).abs().max()
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}; {context}"
