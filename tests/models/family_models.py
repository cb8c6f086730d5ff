"""Models, batches and comparisons of the registry-driven family test: what it does not say about a family is
here.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from family_cases import CASES, PAD, VOCABULARY, FamilyCase
from torch import Tensor, nn

import fastattn

# Largest error relative to the reference output's largest value, float32 (DESIGN rule 5).
TOLERANCE = 1e-4
LENGTH = 17
TARGET = 11
NEW_TOKENS = 8
BY_NAME = {case.name: case for case in CASES}


def build(case: FamilyCase, head: str, implementation: str | None = None, **changes: Any) -> nn.Module:
    """The untouched model in eval mode, weights wide enough that every mask and norm shows in the outputs."""
    import transformers

    config = getattr(transformers, case.config)(**copy.deepcopy({**case.options, **changes}))
    model_class = getattr(transformers, head)
    parts = {"CLIPText": "text_config", "CLIPVision": "vision_config"}
    for prefix, part in parts.items():
        if head.startswith(prefix):
            config = getattr(config, part)
    _without_dropout(config)
    if implementation is not None:
        config._attn_implementation = implementation
    torch.manual_seed(0)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # A table of positions as wide as the scores it is added to.
            std = 1.0 if "relative_attention_bias" in name else case.std
            noise = torch.randn(parameter.shape, generator=generator) * std
            # Norm weights keep their ones (or Gemma's zeros), and no bias stays zero.
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return model


def _without_dropout(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if ("drop" in name or "pdrop" in name) and isinstance(value, float):
            setattr(config, name, 0.0)


@cache
def pair(name: str, head: str) -> tuple[nn.Module, nn.Module]:
    """The untouched eager model and the optimized one, same weights; shared, so left as they are found."""
    case = BY_NAME[name]
    model = build(case, head)
    fastattn.optimize(model)
    return build(case, head, case.reference), model


def fresh(case: FamilyCase, head: str, **options: Any) -> nn.Module:
    """An optimized model of the test's own, to change."""
    model = build(case, head)
    fastattn.optimize(model, **options)
    return model


def takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def has_text(model: nn.Module) -> bool:
    return takes(model, "attention_mask") and (takes(model, "input_ids") or takes(model, "decoder_input_ids"))


def uncached(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if takes(model, "use_cache") else {}


def _tokens(rows: int, length: int, generator: torch.Generator, pad: int) -> Tensor:
    """No special tokens among them: a head that looks for one finds the padding where it is."""
    return torch.randint(4, VOCABULARY, (rows, length), generator=generator)


def _masked(lengths: list[int], width: int, left: bool) -> Tensor:
    position, length = torch.arange(width), torch.tensor(lengths)[:, None]
    return (position >= width - length if left else position < length).long()


def batch(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """One of the batches that break implementations, for whatever inputs `model` takes.

    Args:
        model: any of the family's classes.
        kind: "right", "left" or "none" (the padding), "square" (as many rows as columns), "one token",
            "empty" (right padding and a row of nothing else).
    """
    generator = torch.Generator().manual_seed(1)
    left = kind == "left"
    lengths = {
        "none": [LENGTH] * 2,
        "square": [5, 1, 4, 2, 5],
        "one token": [1, 1],
        "empty": [LENGTH, 0, 9],
    }.get(kind, [LENGTH, 9, 1, 12])
    width = max(lengths)
    result: dict[str, Tensor] = {}
    decoder = takes(model, "decoder_input_ids")
    if takes(model, "pixel_values"):
        vision = getattr(model.config, "vision_config", model.config)
        shape = (len(lengths), 3, vision.image_size, vision.image_size)
        result["pixel_values"] = torch.randn(shape, generator=generator)
    if takes(model, "input_features"):
        shape = (len(lengths), model.config.num_mel_bins, 2 * model.config.max_source_positions)
        result["input_features"] = torch.randn(shape, generator=generator)
    if takes(model, "input_ids"):
        result |= _text(model, lengths, width, left, generator, "")
    if decoder:
        targets = [min(length, TARGET) if kind != "square" else length for length in reversed(lengths)]
        if kind == "empty":
            targets = [TARGET, 7, 5]
        result |= _text(model, targets, max(targets), left, generator, "decoder_")
    return result


def _text(
    model: nn.Module, lengths: list[int], width: int, left: bool, generator: torch.Generator, prefix: str
) -> dict[str, Tensor]:
    text = getattr(model.config, "text_config", model.config)
    mask = _masked(lengths, width, left)
    pad = getattr(text, "pad_token_id", None)
    ids = _tokens(len(lengths), width, generator, PAD)
    ids = ids.masked_fill(mask == 0, PAD if pad is None else pad)
    found = {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}
    if not prefix and getattr(text, "type_vocab_size", 0) > 1 and takes(model, "token_type_ids"):
        found["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=generator) * mask
    return found


def outputs(result: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of a model's output by name, caches left out."""
    if isinstance(result, Tensor):
        return {prefix: result}
    found: dict[str, Tensor] = {}
    if isinstance(result, Mapping):
        for name, value in result.items():
            if name != "past_key_values":
                found |= outputs(value, f"{prefix}.{name}" if prefix else name)
    elif isinstance(result, tuple | list):
        for index, value in enumerate(result):
            found |= outputs(value, f"{prefix}.{index}")
    return found


def rows_and_positions(name: str, value: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """What is compared of an output: its real positions; whole rows where it has no value a position."""
    encoder = name.startswith(("encoder", "text_model")) or "decoder_attention_mask" not in inputs
    mask = inputs.get("attention_mask" if encoder else "decoder_attention_mask")
    if mask is None or name.startswith(("vision", "image", "logits_per")) or not value.dim():
        return value
    real = mask.bool()
    if "attentions" in name and value.dim() == 4 and value.shape[2] == real.shape[1]:
        return value.transpose(1, 2)[real]
    if value.shape[:2] == real.shape and "pool" not in name:
        return value[real]
    return value[real.any(dim=1)] if value.shape[0] == real.shape[0] else value


def errors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> dict[str, float]:
    """Of each output, relative to its largest expected value; infinite where it is missing or not finite."""
    result = {}
    for name, wanted in expected.items():
        if name not in found or found[name].shape != wanted.shape or not torch.isfinite(found[name]).all():
            result[name] = float("inf")
            continue
        want = rows_and_positions(name, wanted, inputs).double()
        if not want.numel():
            continue
        got = rows_and_positions(name, found[name], inputs).double()
        result[name] = ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()
    return result


def assert_same(
    found: Any, expected: Any, inputs: Mapping[str, Tensor], context: str = "", tolerance: float = TOLERANCE
) -> None:
    for name, error in errors(outputs(found), outputs(expected), inputs).items():
        assert error <= tolerance, f"{context}: {name} has error {error:.2e} of its scale"


def varied_loss(result: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """A sum over real positions, its weights fixed and varied, so that no symmetry hides an error."""
    loss = torch.zeros(())
    for name, value in outputs(result).items():
        if value.is_floating_point() and value.requires_grad:
            real = rows_and_positions(name, value, inputs)
            weights = torch.sin(torch.arange(real.numel(), dtype=torch.float32)).view(real.shape)
            loss = loss + (real * weights).sum() / max(real.numel(), 1) ** 0.5
    return loss


def gradients(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Of every parameter, in training mode; the model is left in eval mode without gradients."""
    model.train()
    try:
        with torch.enable_grad():
            options = {"use_cache": False} if takes(model, "use_cache") else {}
            varied_loss(model(**inputs, **options), inputs).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}
    finally:
        model.zero_grad()
        model.eval()


def assert_same_gradients(
    found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], context: str = ""
) -> None:
    """Each parameter within 1e-4 of its own scale, or, where it is next to nothing (a key's bias moves no
    softmax), of a hundredth of the largest.
    """
    assert found.keys() == expected.keys()
    present = {name: grad for name, grad in expected.items() if grad is not None}
    largest = max(grad.abs().max().item() for grad in present.values())
    for name, grad in expected.items():
        got = found[name]
        # Without a gradient and with one of zeros is the same step.
        if grad is None or got is None:
            other = got if grad is None else grad
            assert other is None or not other.any(), f"{context}: {name} has a gradient on one side only"
            continue
        scale = max(grad.abs().max().item(), 1e-2 * largest)
        error = (got - grad).abs().max().item() / scale
        assert error <= TOLERANCE, f"{context}: the gradient of {name} has error {error:.2e} of its scale"


def generated(model: nn.Module, inputs: Mapping[str, Tensor], **options: Any) -> Any:
    inputs = {name: x for name, x in inputs.items() if not name.startswith("decoder_")}
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, **options}
    if "pad_token_id" not in options and model.config.pad_token_id is None:
        options["pad_token_id"] = 0
    return model.generate(
        **inputs, **options, return_dict_in_generate=True, output_logits=True, output_scores=True
    )


def assert_same_tokens(
    model: nn.Module, reference: nn.Module, inputs: Mapping[str, Tensor], **options: Any
) -> None:
    """Token-identical; where not, the reference must itself have been undecided."""
    expected, found = generated(reference, inputs, **options), generated(model, inputs, **options)
    if torch.equal(found.sequences, expected.sequences):
        return
    if options.get("num_beams", 1) > 1:
        torch.testing.assert_close(
            found.sequences_scores,
            expected.sequences_scores,
            rtol=TOLERANCE,
            atol=TOLERANCE,
            msg=str(options),
        )
        return
    assert found.sequences.shape == expected.sequences.shape, options
    logits = torch.stack(expected.logits, dim=1)
    start = expected.sequences.shape[1] - logits.shape[1]
    for row in range(len(logits)):
        differs = (found.sequences[row] != expected.sequences[row]).nonzero()
        if len(differs):
            at = logits[row, int(differs[0]) - start]
            best = at.topk(2).values
            assert best[0] - best[1] <= TOLERANCE * at.abs().max(), (
                f"{options}: row {row} differs at {differs[0]}"
            )


def assert_as_exact(
    found: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    true: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> None:
    """At most twice as far from the float32 outputs as the original's, plus two units of the precision."""
    theirs = errors(own, true, inputs)
    for name, error in errors(found, true, inputs).items():
        allowed = 2 * theirs[name] + 2 * torch.finfo(dtype).eps
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
