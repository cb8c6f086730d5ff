"""How much each head, neuron and layer does: what is removed first is what does least."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastattn.compress.calibration import Batch, Calibration
from fastattn.compress.pruning.structure import AttentionSite, FeedForwardSite, LayerStack, Part, Structure

__all__ = [
    "IMPORTANCES",
    "Importance",
    "check_importance",
    "evaluated",
    "loss_of",
    "measure",
    "requiring_grad",
]

IMPORTANCES = ("magnitude", "taylor", "wanda")


@dataclass(frozen=True)
class Importance:
    """Of every attention layer's heads [heads] and every feed-forward layer's neurons [neurons], float32 on
    the CPU, by the layers' names. Heads compare with heads, neurons with neurons.
    """

    heads: Mapping[str, Tensor]
    neurons: Mapping[str, Tensor]

    def layer_scores(self, stack: LayerStack) -> list[float]:
        """Of each of the stack's layers: what its heads and neurons do together."""
        scores = []
        for index in range(len(stack.layers)):
            prefix = f"{stack.name}.{index}."
            within = [
                float(values.sum())
                for found in (self.heads, self.neurons)
                for name, values in found.items()
                if f"{name}.".startswith(prefix)
            ]
            scores.append(sum(within))
        return scores


def check_importance(importance: str, calibration: Any, structure: Structure) -> None:
    """Raise a ValueError where `importance` is unknown, or cannot be measured here."""
    if importance not in IMPORTANCES:
        raise ValueError(f"importance is {importance!r}; it must be one of {IMPORTANCES}")
    if importance != "magnitude" and calibration is None and structure.blocks:
        raise ValueError(f"importance={importance!r} needs calibration: batches the model is run on")
    if importance == "wanda":
        for site in structure.feed_forwards:
            if "weight" not in site.down.tensors:
                raise ValueError(
                    f"importance='wanda' needs what goes into the last layer of {site.name!r}, which is a "
                    f"tensor of {type(site.module).__name__}, no layer: use another importance, or exclude it"
                )


def measure(
    model: nn.Module, structure: Structure, importance: str, calibration: Calibration | None
) -> Importance:
    """The importance of all heads and neurons of `structure`; the model is as before.

    - "magnitude": the size of the linear map that a head is from its values to the output, the Frobenius
      norm of W_O W_V (with the values' bias as one more column), and a neuron's product of the norms of its
      weights.
    - "taylor": |d loss / d gate| of a gate of 1 on the head's or neuron's output, averaged over the batches
      (Michel, Levy and Neubig 2019, "Are Sixteen Heads Really Better than One?"). The loss is the model's own
      where the batch has labels, a causal language model's next-token loss where it has none, else a fixed
      random sum of the outputs, whose gradient is large where the outputs depend on the gate.
    - "wanda": |W| * ||x|| summed over the weights that read the head's or neuron's output, ||x|| the norm of
      that input over the calibration's tokens (Sun et al. 2023, "A Simple and Effective Pruning Approach for
      Large Language Models").
    """
    outputs = {site.name: site.output for site in structure.attentions}
    downs = {site.name: site.down for site in structure.feed_forwards}
    if importance == "magnitude":
        return Importance(
            {site.name: _head_magnitude(site) for site in structure.attentions},
            {site.name: _neuron_magnitude(site) for site in structure.feed_forwards},
        )
    if not structure.blocks:
        return Importance({}, {})
    assert calibration is not None
    parts = [*outputs.values(), *downs.values()]
    if importance == "wanda":
        scores = _wanda(model, parts, calibration)
    else:
        scores = _taylor(model, parts, calibration)
    found = dict(zip((id(part) for part in parts), scores, strict=True))
    return Importance(
        {name: found[id(part)] for name, part in outputs.items()},
        {name: found[id(part)] for name, part in downs.items()},
    )


def _head_magnitude(site: AttentionSite) -> Tensor:
    """||W_O W_V|| by head, from the [D, D] products of each with itself."""
    values = _with_bias(site.value, site.others)
    output = site.output.weight()
    read = output @ output.mT
    written = (values @ values.mT).repeat_interleave(site.group, dim=0)
    size: Tensor = (read * written).sum(dim=(1, 2)).clamp_min(0.0).sqrt()
    return size.cpu()


def _with_bias(part: Part, others: tuple[Part, ...]) -> Tensor:
    """The weight [units, places, inputs] with the bias, if any, as one more input."""
    weight = part.weight()
    biases = [(part, name) for name in part.tensors if "bias" in name]
    # torch.nn's attention has one bias for queries, keys and values.
    biases += [(other, "in_proj_bias") for other in others[2:3] if "in_proj_bias" in other.tensors]
    for holder, name in biases:
        bias = holder.tensor(name).reshape(*weight.shape[:2], -1)
        weight = torch.cat([weight, bias.to(weight.dtype)], dim=2)
    return weight


def _neuron_magnitude(site: FeedForwardSite) -> Tensor:
    size: Tensor = site.down.weight().flatten(1).norm(dim=1) * _with_bias(site.up, ()).flatten(1).norm(dim=1)
    if site.gate is not None:
        size = size * _with_bias(site.gate, ()).flatten(1).norm(dim=1)
    return size.cpu()


def _wanda(model: nn.Module, parts: list[Part], calibration: Calibration) -> list[Tensor]:
    norms: dict[str, Tensor] = {}
    for records in calibration.record_in_groups(model, [part.name for part in parts], "hessian"):
        norms |= {name: moments.diagonal().clamp_min(0.0).sqrt() for name, moments in records.items()}
    scores = []
    for part in parts:
        weight = part.weight()
        # A layer that no batch reaches does nothing.
        norm = norms.get(part.name, torch.zeros(part.places.numel(), device=weight.device))
        scores.append((weight.abs().sum(dim=2) * norm[part.places.to(norm.device)]).sum(dim=1).float().cpu())
    return scores


def _taylor(model: nn.Module, parts: list[Part], calibration: Calibration) -> list[Tensor]:
    names = [next(iter(part.tensors)) for part in parts]
    weights = [getattr(part.owner, name) for part, name in zip(parts, names, strict=True)]
    totals = [torch.zeros(len(part.places)) for part in parts]
    generator = torch.Generator().manual_seed(0)
    with evaluated(model), requiring_grad(weights), torch.enable_grad():
        for batch in calibration:
            loss = loss_of(model, batch, calibration, generator)
            grads = torch.autograd.grad(loss, weights, allow_unused=True)
            for index, (part, name, weight, grad) in enumerate(
                zip(parts, names, weights, grads, strict=True)
            ):
                if grad is not None:
                    # A gate on what the weight reads has this gradient where it is 1.
                    by_place = (weight.detach() * grad).movedim(part.tensors[name], 0).flatten(1).sum(dim=1)
                    by_unit = by_place[part.places.to(grad.device)].sum(dim=1)
                    totals[index] += by_unit.abs().float().cpu() / len(calibration)
    return totals


def loss_of(model: nn.Module, batch: Batch, calibration: Calibration, generator: torch.Generator) -> Tensor:
    """What the gates' gradient is taken of, one number."""
    result = calibration.call(model, batch)
    loss = getattr(result, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    given: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {}
    tokens, logits = given.get("input_ids"), getattr(result, "logits", None)
    if isinstance(tokens, Tensor) and isinstance(logits, Tensor) and _predicts_next(model):
        targets = tokens.to(logits.device)[:, 1:]
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == tokens.shape:
            targets = targets.masked_fill(mask.to(logits.device)[:, 1:] == 0, -100)
        return cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())
    mask = given.get("decoder_attention_mask", given.get("attention_mask"))
    found = [logits] if isinstance(logits, Tensor) else _floating(result)
    return torch.stack([_random_sum(output, mask, generator) for output in found]).sum()


def _random_sum(output: Tensor, mask: Any, generator: torch.Generator) -> Tensor:
    """The sum of an output's elements, each with a sign drawn, over real positions."""
    signs = torch.randint(0, 2, output.shape, generator=generator) * 2.0 - 1.0
    weighted = output.float() * signs.to(output.device)
    if isinstance(mask, Tensor) and output.dim() == 3 and mask.shape == output.shape[:2]:
        weighted = weighted * mask.to(output.device).unsqueeze(-1)
    total: Tensor = weighted.sum() / max(output.numel(), 1) ** 0.5
    return total


def _predicts_next(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", None)
    return (
        callable(can_generate) and bool(can_generate()) and not getattr(config, "is_encoder_decoder", False)
    )


def _floating(result: Any) -> list[Tensor]:
    values = result.values() if isinstance(result, Mapping) else result
    if isinstance(result, Tensor) or not isinstance(values, Iterable):
        values = [result]
    found = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    if not found:
        raise ValueError("importance='taylor' needs a model whose output holds a floating-point tensor")
    return found


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the duration of a `with` statement; every module's own mode comes back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def requiring_grad(weights: list[Any]) -> Iterator[None]:
    """All of `weights` ask for a gradient for the duration of a `with` statement."""
    before = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, required in zip(weights, before, strict=True):
            weight.requires_grad_(required)
