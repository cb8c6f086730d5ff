"""The other side of optimum.py: an ORTModel in an environment that has optimum-onnx and not fastattn.

    python remote_child.py optimum_worker.py SAVED EXPORTED KIND THREADS

SAVED is a folder of `save_pretrained`; EXPORTED gets optimum's export of it.
"""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Heads of an architecture, as its class name ends -> optimum's task and class.
_HEADS = {
    "ForSequenceClassification": ("text-classification", "ORTModelForSequenceClassification"),
    "ForTokenClassification": ("token-classification", "ORTModelForTokenClassification"),
    "ForMaskedLM": ("fill-mask", "ORTModelForMaskedLM"),
    "Model": ("feature-extraction", "ORTModelForFeatureExtraction"),
}
_GENERATORS = {
    "decoder": ("text-generation-with-past", "ORTModelForCausalLM"),
    "encoder-decoder": ("text2text-generation-with-past", "ORTModelForSeq2SeqLM"),
}
_PACKAGES = ("optimum", "optimum-onnx", "onnxruntime", "transformers", "torch")


def prepare(child: Any) -> Any:
    """Export the model, open it, and return what makes a workload's call."""
    try:
        import onnxruntime
        import optimum.onnxruntime
        from optimum.exporters.onnx import main_export
    except ImportError as error:
        raise child.missing(
            f"{error.name} in this environment: pip install optimum-onnx[onnxruntime]"
        ) from None
    import torch

    saved, exported, kind, threads = child.arguments
    task, class_name = _task(child, Path(saved), kind)
    torch.set_num_threads(int(threads))
    options = {"task": task, "do_validation": False, "local_files_only": True}
    try:
        # O3 is the same with an approximate GELU, which is another model.
        with child.stage("export, O2"):
            main_export(saved, exported, optimize="O2", **options)
    except (KeyError, NotImplementedError):  # it has no optimization for this model: said in its stages
        del child.stages_ms["export, O2"]
        with child.stage("export, not optimized"):
            main_export(saved, exported, **options)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = int(threads)
    with child.stage("load"):
        model = getattr(optimum.onnxruntime, class_name).from_pretrained(
            exported, session_options=session_options, local_files_only=True
        )
    if kind in _GENERATORS:
        model.generation_config = _greedy(model.config)
    child.versions.update({package: version(package) for package in _PACKAGES})

    def make_task(request: Any, arrays: Any) -> Any:
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if request["do"] == "generate":
            return lambda: _generated(model, inputs, request["new_tokens"])
        return lambda: _forward(model, kind, inputs)

    return make_task


def _task(child: Any, saved: Path, kind: str) -> tuple[str, str]:
    """optimum's names of what the model does and of its class."""
    if kind in _GENERATORS:
        return _GENERATORS[kind]
    architecture = json.loads((saved / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    for ending, found in _HEADS.items():
        if architecture.endswith(ending):
            return found
    raise child.missing(f"class for {architecture}: optimum's ORTModel is measured with {', '.join(_HEADS)}")


def _greedy(config: Any) -> Any:
    """A generation config without an end token; `generate` fills in from it what it is not told."""
    from transformers import GenerationConfig

    padding, start = config.pad_token_id, getattr(config, "decoder_start_token_id", None)
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        pad_token_id=0 if padding is None else padding,
        bos_token_id=config.bos_token_id,
        decoder_start_token_id=config.bos_token_id if start is None else start,
    )


def _forward(model: Any, kind: str, inputs: Any) -> dict[str, Any]:
    if kind == "decoder":
        return {"logits": model(**inputs).logits[:, -1:].numpy()}
    if kind == "encoder-decoder":
        return {"last_hidden_state": model.encoder(**inputs).last_hidden_state.numpy()}
    return {name: value.numpy() for name, value in model(**inputs).items() if hasattr(value, "numpy")}


def _generated(model: Any, inputs: Any, new_tokens: int) -> Any:
    """The tokens, and in milliseconds when each was there."""
    from transformers.generation.streamers import BaseStreamer

    begin, stamps_ms = time.perf_counter(), []

    class Stamps(BaseStreamer):
        def put(self, value: Any) -> None:
            stamps_ms.append((time.perf_counter() - begin) * 1e3)

        def end(self) -> None:
            pass

    found = model.generate(**inputs, max_new_tokens=new_tokens, streamer=Stamps())
    # The prompt is put before the first new token.
    return {"tokens": found[:, -new_tokens:].numpy()}, {"stamps_ms": stamps_ms[-new_tokens:]}
