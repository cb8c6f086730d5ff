"""Vision: ViT with any head, CLIP's vision models, and CLIP, which has texts beside its images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.onnx.graph_spec import GraphSpec, Source
from fastattn.onnx.sources.copies import fused_and_reference
from fastattn.onnx.sources.encoder import limits_of, only_tensors, text_example
from fastattn.onnx.sources.promises import traced_operations
from fastattn.onnx.sources.tasks import infer_task
from fastattn.verification.batches import forward_parameters
from fastattn.verification.comparison import named_tensors

__all__ = ["prepare"]

# What CLIP compares and how well it goes together; its towers' hidden states stay inside.
_SIMILARITIES = ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")


def prepare(model: nn.Module, task: str | None, example_inputs: Mapping[str, Tensor] | None) -> Source:
    """Check that `model` can be exported and make the copies; `model` itself is not touched.

    Images have the size the config names, and their number varies; of CLIP's texts and images there may be
    different numbers.

    Raises:
        TypeError, ValueError: what is wrong with the model, the task or the example.
    """
    found = infer_task(model, task)
    fused, reference = fused_and_reference(model)
    config: Any = reference.config
    original: Any = type(config).from_dict(config.to_dict())
    only_tensors(fused, reference)
    has_texts = "input_ids" in forward_parameters(reference)
    images = "image_batch_size" if has_texts else "batch"
    texts = ("text_batch_size", "sequence")
    sides = _image_sides(config)
    dimensions: dict[str, tuple[str | int, ...]] = {"pixel_values": (images, *sides)}
    # Noise, of a generator of its own: the caller's is left as it is.
    noise = torch.randn(2, *sides, generator=torch.Generator().manual_seed(0))
    inputs, limits, value_limits = {"pixel_values": noise}, {}, {}
    if has_texts:
        text = config.text_config
        limits, value_limits = (
            limits_of(reference.get_submodule("text_model")),
            {"input_ids": int(text.vocab_size)},
        )
        tokens = text_example(text, ("input_ids", "attention_mask"), texts, limits)
        # Three texts: as many as images would be taken for the same number.
        tokens = {name: torch.cat((x, x[:1])) for name, x in tokens.items()}
        dimensions = {"input_ids": texts, **dimensions, "attention_mask": texts}
        inputs = {name: {**inputs, **tokens}[name] for name in dimensions}
    if example_inputs is not None:
        inputs = _checked_example(example_inputs, inputs, dimensions)
    with torch.no_grad():
        outputs = tuple(named_tensors(reference(**inputs)))
    module = fused
    if has_texts:
        outputs, module = _SIMILARITIES, _Similarities(fused)
    spec = GraphSpec(
        "model",
        module,
        inputs,
        dimensions,
        outputs,
        limits=limits,
        defaults={"attention_mask": 1} if has_texts else {},
        value_limits=value_limits,
        traced=traced_operations(fused),
    )
    return Source("vision", found, type(model).__name__, original, fused, reference, (spec,))


class _Similarities(nn.Module):
    """CLIP with its four outputs that are tensors."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        found = self.module(**inputs)
        return {name: found[name] for name in _SIMILARITIES}


def _image_sides(config: Any) -> tuple[int, int, int]:
    """Channels, height and width."""
    vision = getattr(config, "vision_config", config)
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return int(getattr(vision, "num_channels", 3)), int(height), int(width)


def _checked_example(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], dimensions: Mapping[str, tuple[str | int, ...]]
) -> dict[str, Tensor]:
    """The caller's batch on the CPU, in the graph's order.

    Raises:
        TypeError, ValueError: other names, dtypes or shapes than the graph takes.
    """
    if set(given) != set(own):
        raise ValueError(f"example_inputs has {sorted(given)}; it must have {', '.join(own)}")
    sizes: dict[str, int] = {}
    for name, tensor in ((name, given[name]) for name in own):
        wanted = dimensions[name]
        described = f"{str(own[name].dtype).removeprefix('torch.')} [{', '.join(map(str, wanted))}]"
        if not isinstance(tensor, Tensor) or tensor.dtype != own[name].dtype:
            raise TypeError(f"example_inputs[{name!r}] must be {described}")
        if tensor.dim() != len(wanted) or any(
            size != (sizes.setdefault(each, size) if isinstance(each, str) else each)
            for size, each in zip(tensor.shape, wanted, strict=True)
        ):
            raise ValueError(f"example_inputs[{name!r}] must be {described}; got {list(tensor.shape)}")
    if min(sizes.values()) < 2 or len(set(sizes.values())) < len(sizes):
        raise ValueError(
            "example_inputs must tell its dimensions apart, none of them 1 and no two equal; got "
            f"{', '.join(f'{name} = {size}' for name, size in sizes.items())}"
        )
    return {name: given[name].cpu() for name in own}
