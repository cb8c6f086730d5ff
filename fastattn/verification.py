"""verify: a swapped model against the same weights unswapped, on the batches that break implementations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.report import format_table
from fastattn.swap import is_swapped, restore

__all__ = [
    "CaseResult",
    "VerificationError",
    "VerificationReport",
    "adversarial_batches",
    "compare_outputs",
    "lone_padding",
    "real_positions",
    "shared_copy",
    "verify",
]

# Largest error relative to the reference output's largest value, float32.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class CaseResult:
    """One output of one batch. `error` and `tolerance` are relative to the reference's largest value,
    `scale`.
    """

    case: str
    output: str
    error: float
    tolerance: float
    scale: float
    finite: bool

    @property
    def passed(self) -> bool:
        return self.finite and self.error <= self.tolerance


@dataclass
class VerificationReport:
    """Every comparison made, the worst first to be named."""

    results: list[CaseResult] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    @property
    def worst(self) -> CaseResult:
        return max(
            self.results,
            key=lambda result: (not result.finite, result.error / max(result.tolerance, 1e-30)),
        )

    def to_dict(self) -> dict[str, Any]:
        rows = [{**asdict(result), "passed": result.passed} for result in self.results]
        return {"passed": self.passed, "results": rows}

    def table(self) -> str:
        rows = [
            (
                result.case,
                result.output,
                f"{result.error:.1e}",
                f"{result.tolerance:.1e}",
                "ok" if result.passed else "FAILED" if result.finite else "NOT FINITE",
            )
            for result in self.results
        ]
        return format_table(("case", "output", "error", "tolerance", "result"), rows)


class VerificationError(AssertionError):
    """The model differs from its reference; `report` holds every comparison."""

    def __init__(self, report: VerificationReport) -> None:
        self.report = report
        worst = report.worst
        found = f"error {worst.error:.2e}" if worst.finite else "values that are not finite"
        super().__init__(
            f"{worst.case}: {worst.output} has {found}, "
            f"accepted is {worst.tolerance:.2e} of the scale {worst.scale:.3g}"
        )


def verify(
    model: nn.Module, reference: nn.Module | None = None, inputs: Mapping[str, Tensor] | None = None
) -> VerificationReport:
    """Compare `model` with the same model unswapped: outputs at real positions, pooled and head outputs,
    gradients.

    Batches with right, left and no padding, as many rows as columns, one token, and a row of nothing but
    padding (which
    must be finite and leave the other rows unchanged). float32 errors may reach 1e-4 of the output's largest
    value; in
    float16 and bfloat16 an output may be twice as far from the float32 reference as the unswapped model's,
    plus two units of the dtype's precision.

    Args:
        model: a swapped Hugging Face model; its mode (train or eval) and gradients are left as they are.
        reference: compared with, called with the same inputs; default the model unswapped, sharing its
            parameters.
        inputs: one batch of keyword arguments to compare on, in place of the adversarial ones;
            `attention_mask`, where given, says which positions are compared.

    Returns:
        The report.

    Raises:
        VerificationError: an output is too far off; the message names the worst case.
        ValueError: the model is not swapped and no reference is given, or has no config to draw batches from.

    Example:
        >>> import fastattn, transformers
        >>> config = transformers.BertConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
        >>> model = transformers.BertModel(config)
        >>> _ = fastattn.optimize(model)
        >>> fastattn.verify(model).passed
        True
    """
    if reference is None:
        if not is_swapped(model):
            raise ValueError(
                "model has no swapped layer to verify; call fastattn.optimize first, or give a reference"
            )
        reference = shared_copy(model)
        restore(reference)
    batches = {"given inputs": dict(inputs)} if inputs is not None else adversarial_batches(model)
    report = VerificationReport()
    exact = _exact_copy(reference)
    with _evaluating(model, reference):
        for case, batch in batches.items():
            with torch.no_grad():
                found, expected = _outputs(model, batch), _outputs(reference, batch)
                truth = None if exact is None else _outputs(exact, batch)
            report.results.extend(compare_outputs(case, found, expected, batch.get("attention_mask"), truth))
        if inputs is None:
            report.results.extend(lone_padding(partial(_outputs, model), batches["right padding"]))
            report.results.extend(_compare_gradients(model, reference, batches["right padding"]))
    if not report.passed:
        raise VerificationError(report)
    return report


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree with the model's own parameters and buffers: no memory, and free to restore
    or swap.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, dict(tensors))


def adversarial_batches(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Token batches on the model's device, drawn from its vocabulary with a fixed seed, none of them with
    padding rows.

    Raises:
        ValueError: the model has no config with a vocabulary.
    """
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        raise ValueError(f"{type(model).__name__} has no config.vocab_size to draw a batch from; give inputs")
    types = getattr(config, "type_vocab_size", 0)
    longest = min(getattr(config, "max_position_embeddings", 48), 48)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def batch(lengths: list[int], width: int, left: bool = False) -> dict[str, Tensor]:
        ids = torch.randint(0, vocabulary, (len(lengths), width), generator=generator)
        position = torch.arange(width)
        length = torch.tensor(lengths)[:, None]
        mask = position >= width - length if left else position < length
        tensors = {"input_ids": ids, "attention_mask": mask.long()}
        if types > 1:
            tensors["token_type_ids"] = torch.randint(0, types, ids.shape, generator=generator)
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    half, third = max(1, longest // 2), max(1, longest // 3)
    lengths = [longest, half, 1, third]
    return {
        "right padding": batch(lengths, longest),
        "left padding": batch(lengths, longest, left=True),
        "no padding": batch([longest, longest], longest),
        "batch == length": batch([half, 1, *[third] * (half - 2)][:half], half),
        "one token": batch([1, 1], 1),
        "one row": batch([third], longest),
    }


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode for all submodules, each put back as it was."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _exact_copy(reference: nn.Module) -> nn.Module | None:
    """The reference in float32 where it is half precision: what both errors are measured against."""
    dtype = next((p.dtype for p in reference.parameters() if p.is_floating_point()), torch.float32)
    if dtype in (torch.float32, torch.float64):
        return None
    return copy.deepcopy(reference).float().eval()


def _outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = model(**_multiple_choice(model, batch))
    items = result.items() if isinstance(result, Mapping) else enumerate(result)
    return {str(name): value for name, value in items if isinstance(value, Tensor)}


def _multiple_choice(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Heads that choose among texts take [batch, choices, length]."""
    if type(model).__name__.endswith("ForMultipleChoice") and batch["input_ids"].dim() == 2:
        return {name: tensor.unsqueeze(1) for name, tensor in batch.items()}
    return dict(batch)


def real_positions(name: str, value: Tensor, mask: Tensor | None) -> Tensor:
    """What of an output is compared: real tokens where it has one value a token, else whole sequences.

    Args:
        name: the output's name.
        value: any shape.
        mask: [B, S] (or [B, choices, S]), nonzero where a position is real; None compares everything.
    """
    if mask is None or not value.shape or value.shape[0] != mask.shape[0]:
        return value
    real = mask.to(value.device) != 0
    # A pooled output is [B, H]: with H equal to the length it only looks like one value a token.
    per_token = value.shape[: real.dim()] == real.shape and "pool" not in name
    return value[real] if per_token else value[real.flatten(1).any(dim=1)]


def compare_outputs(
    case: str,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    mask: Tensor | None,
    truth: Mapping[str, Tensor] | None = None,
) -> Iterator[CaseResult]:
    """Every output of one batch at real positions; an output that is missing fails.

    Args:
        case: the batch's name.
        found: the outputs to judge.
        expected: the reference's.
        mask: the batch's padding mask, or None to compare all.
        truth: the float32 reference's outputs where both are half precision: what both errors are measured
            from.
    """
    for name, value in expected.items():
        if name not in found:
            yield CaseResult(case, name, float("inf"), TOLERANCE, 0.0, False)
            continue
        own = real_positions(name, value, mask).double()
        true = own if truth is None else real_positions(name, truth[name], mask).double()
        scale = true.abs().max().item() if true.numel() else 0.0
        tolerance = TOLERANCE
        if truth is not None:
            tolerance = 2 * _relative(own - true, scale) + 2 * torch.finfo(value.dtype).eps
        error = _relative(real_positions(name, found[name], mask).double() - true, scale)
        finite = bool(torch.isfinite(found[name]).all())
        yield CaseResult(case, name, error, tolerance, scale, finite)


def _relative(difference: Tensor, scale: float) -> float:
    if difference.numel() == 0:
        return 0.0
    worst: float = difference.abs().max().item()
    return worst / scale if scale else worst


def lone_padding(
    run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], batch: Mapping[str, Tensor]
) -> Iterator[CaseResult]:
    """The batch with its second row all padding: finite, and without influence on the rows beside it."""
    mask = batch["attention_mask"].clone()
    mask[1] = 0
    padded = {**batch, "attention_mask": mask}
    kept = [0, *range(2, mask.shape[0])]
    with torch.no_grad():
        together = run(padded)
        alone = run({name: tensor[kept] for name, tensor in padded.items()})
    for name, value in together.items():
        if value.shape[:1] != mask.shape[:1]:
            continue
        expected = real_positions(name, alone[name], mask[kept]).double()
        scale = expected.abs().max().item()
        error = _relative(real_positions(name, value[kept], mask[kept]).double() - expected, scale)
        eps = torch.finfo(value.dtype).eps if value.dtype in (torch.float16, torch.bfloat16) else 0.0
        finite = bool(torch.isfinite(value).all())
        yield CaseResult("a row of padding", name, error, max(TOLERANCE, 4 * eps), scale, finite)


def _compare_gradients(
    model: nn.Module, reference: nn.Module, batch: Mapping[str, Tensor]
) -> Iterator[CaseResult]:
    """Gradients of every parameter of a loss over real positions, dropout off; float32 only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters or parameters[0].dtype not in (torch.float32, torch.float64):
        return
    mask = batch["attention_mask"]

    def gradients(which: nn.Module, wanted: list[nn.Parameter]) -> list[Tensor | None]:
        with torch.enable_grad():
            outputs = _outputs(which, batch)
            losses = [
                _varied_sum(real_positions(name, value, mask))
                for name, value in outputs.items()
                if value.is_floating_point() and value.requires_grad
            ]
            return list(torch.autograd.grad(losses, wanted, allow_unused=True))

    found = gradients(model, parameters)
    expected = gradients(reference, [p for p in reference.parameters() if p.requires_grad])
    missing = sum((got is None) != (want is None) for got, want in zip(found, expected, strict=True))
    pairs = [(g, w) for g, w in zip(found, expected, strict=True) if g is not None and w is not None]
    scale = max((want.abs().max().item() for _, want in pairs), default=0.0)
    error = max((_relative((got - want).double(), scale) for got, want in pairs), default=0.0)
    finite = all(bool(torch.isfinite(got).all()) for got, _ in pairs)
    yield CaseResult(
        "gradients", "parameters", error if not missing else float("inf"), TOLERANCE, scale, finite
    )


def _varied_sum(value: Tensor) -> Tensor:
    """A sum with fixed, varied weights, so that no symmetry of the loss hides an error."""
    weights = torch.sin(torch.arange(value.numel(), device=value.device, dtype=torch.float32))
    return (value * weights.to(value.dtype).view(value.shape)).sum()
