"""The other ways to deploy a model on a CPU, built with their own tools as their documentation says.

Each maker takes a folder for its files, the model and a batch, and returns the call to time; one that is not
installed raises MissingError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastattn.bench.timing import MissingError
from fastattn.verification import shared_copy

__all__ = ["ENCODERS", "ctranslate2_generate", "versions"]

Call = Callable[[], Any]
Batch = Mapping[str, torch.Tensor]


def versions() -> dict[str, str | None]:
    """Of every peer's package; None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in ("transformers", "onnxruntime", "openvino", "ctranslate2"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _need(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise MissingError(f"{package}: pip install {package}")


def _example(batch: Batch) -> dict[str, torch.Tensor]:
    """A small batch with padding to trace with."""
    example = {name: tensor[:, :16].repeat(2, 1)[:2].clone() for name, tensor in batch.items()}
    example["attention_mask"][0, 8:] = 0
    return example


def _eager(model: Any) -> Any:
    copied: Any = shared_copy(model)
    copied.set_attn_implementation("eager")
    return copied


class _Outputs(torch.nn.Module):
    """Positional arguments and a tuple, which the older exporter wants."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
        answer = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return answer.last_hidden_state, answer.pooler_output


def _optimized(folder: Path, model: Any, batch: Batch) -> Path:
    """ONNX Runtime's transformers optimizer on the graph it is made for, the older exporter's."""
    file = folder / "ort-optimized.onnx"
    if file.exists():
        return file
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    raw = folder / "ort-raw.onnx"
    example = _example(batch)
    torch.onnx.export(
        _Outputs(_eager(model)).eval(),
        tuple(example.values()),
        str(raw),
        input_names=list(example),
        output_names=["last_hidden_state", "pooler_output"],
        dynamic_axes={name: {0: "batch", 1: "sequence"} for name in example},
        opset_version=17,
        dynamo=False,
    )
    optimized = optimize_model(
        str(raw),
        model_type="bert",
        num_heads=model.config.num_attention_heads,
        hidden_size=model.config.hidden_size,
        opt_level=0,
        optimization_options=FusionOptions("bert"),
    )
    optimized.save_model_to_file(str(file))
    return file


def _session(file: Path, batch: Batch) -> Call:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    wanted = {each.name for each in session.get_inputs()}
    feeds = {name: tensor.numpy() for name, tensor in batch.items() if name in wanted}
    return lambda: session.run(None, feeds)[0]


def ort_optimizer(folder: Path, model: Any, batch: Batch) -> Call:
    return _session(_optimized(folder, model, batch), batch)


def ort_quantized(per_channel: bool) -> Callable[[Path, Any, Batch], Call]:
    """The optimizer, then `quantize_dynamic` with signed weights: U8S8."""

    def make(folder: Path, model: Any, batch: Batch) -> Call:
        from onnx import TensorProto
        from onnxruntime.quantization import QuantType, quantize_dynamic

        file = folder / f"ort-int8-{per_channel}.onnx"
        quantize_dynamic(
            str(_optimized(folder, model, batch)),
            str(file),
            per_channel=per_channel,
            weight_type=QuantType.QInt8,
            # Without it the quantizer fails on the optimizer's nodes, whose outputs it cannot infer.
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )
        return _session(file, batch)

    return make


def transformers_exporter(quantize: bool) -> Callable[[Path, Any, Batch], Call]:
    """transformers' OnnxExporter with its fusions for the CPU, and its dynamic quantizer."""

    def make(folder: Path, model: Any, batch: Batch) -> Call:
        from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

        options: dict[str, Any] = {}
        if quantize:
            options["quantizer"] = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig())
        config = OnnxConfig(dynamic=True, ort_fusions="cpu", **options)
        exported = OnnxExporter().export(shared_copy(model), _example(batch), config=config)
        out = folder / f"transformers-{quantize}"
        exported.save_pretrained(out)
        return _session(out / "model.onnx", batch)

    return make


def openvino(folder: Path, model: Any, batch: Batch) -> Call:
    """OpenVINO's own conversion, told to compute in fp32, not in the bf16 it would choose here."""
    _need("openvino")
    import openvino as ov

    example = _example(batch)
    converted = ov.convert_model(_Outputs(_eager(model)).eval(), example_input=tuple(example.values()))
    for port, name in zip(converted.inputs, example, strict=True):
        port.get_tensor().set_names({name})
    compiled = ov.Core().compile_model(
        converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    )
    feeds = [tensor.numpy() for tensor in batch.values()]
    return lambda: compiled(feeds)[0]


ENCODERS: dict[str, dict[str, Callable[[Path, Any, Batch], Call]]] = {
    "fp32": {
        "ONNX Runtime optimizer fp32": ort_optimizer,
        "transformers ONNX fp32": transformers_exporter(False),
        "OpenVINO fp32": openvino,
    },
    "int8": {
        "ONNX Runtime int8 per channel": ort_quantized(True),
        "ONNX Runtime int8 per tensor": ort_quantized(False),
        "transformers ONNX int8": transformers_exporter(True),
    },
}


def ctranslate2_generate(folder: Path, model: Any, prompt: torch.Tensor, new_tokens: int) -> Call:
    """CTranslate2's int8 GPT-2, greedily; the vocabulary is numbered, for it wants one."""
    _need("ctranslate2")
    import ctranslate2
    from ctranslate2.converters import TransformersConverter
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    source, out = folder / "gpt2", folder / "gpt2-ctranslate2"
    words = {f"<{index}>": index for index in range(model.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<0>")),
        bos_token="<0>",
        eos_token="<0>",
        unk_token="<0>",
    )
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    TransformersConverter(str(source)).convert(str(out), quantization="int8")
    threads = torch.get_num_threads()
    generator = ctranslate2.Generator(
        str(out), device="cpu", intra_threads=threads, inter_threads=1, compute_type="int8"
    )
    tokens = [f"<{index}>" for index in prompt[0].tolist()]

    def generate() -> Any:
        answer = generator.generate_batch(
            [tokens],
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return torch.tensor(answer[0].sequences_ids)

    return generate
