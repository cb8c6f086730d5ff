"""What the tests of pruning do to every family's model; tests/models is on the path of who imports it."""

from __future__ import annotations

import torch
from family_models import batch, build, outputs, uncached

from fastattn.compress.pruning.structure import sites

__all__ = ["gate", "inputs_of", "model_of", "run", "selection"]


def model_of(case, *, double=False):
    model = build(case, case.classes[1], case.reference)
    if hasattr(model.config, "_experts_implementation"):
        # The other implementations of experts take no float64.
        model.config._experts_implementation = "eager"
    return model.double() if double else model


def inputs_of(model, kind="none"):
    dtype = next(model.parameters()).dtype
    found = batch(model, kind).items()
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in found}


def run(model, inputs):
    with torch.no_grad():
        return outputs(model(**inputs, **uncached(model)))


def selection(structure):
    """Heads and neurons to remove, others in every layer, that grouped queries and linked layers allow."""
    generator = torch.Generator().manual_seed(0)
    heads, neurons = {}, {}
    for index, site in enumerate(structure.attentions):
        if site.linked:
            heads[site.name] = [1]
        elif site.num_kv_heads == 1:
            heads[site.name] = [0, 2]
        elif site.group > 1 and index % 2:
            heads[site.name] = [group * site.group + group % site.group for group in range(site.num_kv_heads)]
        elif site.group > 1:
            heads[site.name] = list(range(site.group))
        elif index:
            heads[site.name] = [index % site.num_heads]
    for index, site in enumerate(structure.feed_forwards):
        count = (3 + 2 * index) if site.multiple == 1 else site.multiple
        neurons[site.name] = torch.randperm(site.width, generator=generator)[:count].tolist()
    return heads, neurons


def gate(model, heads, neurons):
    """The same heads' and neurons' outputs multiplied by zero: their columns of what reads them are zero."""
    structure = sites(model)
    parts = [(site.output, heads.get(site.name, ())) for site in structure.attentions]
    parts += [(site.down, neurons.get(site.name, ())) for site in structure.feed_forwards]
    for part, units in parts:
        ((name, dim),) = part.tensors.items()
        with torch.no_grad():
            getattr(part.owner, name).movedim(dim, 0)[part.places[list(units)].flatten()] = 0
