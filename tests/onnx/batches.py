"""Token batches, and the comparison every exported model must pass."""

from __future__ import annotations

import torch


def token_batch(lengths, width, left=False, vocabulary=400, choices=None, seed=0):
    """int64 tensors [rows, width], or [rows, choices, width]; `lengths` real tokens a row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (len(lengths), width), generator=generator)
    types = torch.randint(0, 2, ids.shape, generator=generator)
    position, real = torch.arange(width), torch.tensor(lengths)[:, None]
    mask = (position >= width - real if left else position < real).long()
    tensors = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    if choices is not None:
        tensors = {name: x.unsqueeze(1).repeat(1, choices, 1) for name, x in tensors.items()}
    return tensors


def assert_same_outputs(found, expected, mask, context=""):
    """Names, and values to 1e-4 of each output's scale: at real tokens, or everywhere in pooled outputs."""
    assert list(found) == list(expected.keys()), context
    for name, value in expected.items():
        per_token = value.shape[: mask.dim()] == mask.shape
        got, wanted = (x[mask.bool()] if per_token else x for x in (found[name], value))
        assert found[name].shape == value.shape, (name, context)
        assert torch.isfinite(found[name]).all(), (name, context)
        error, scale = (got - wanted).abs().max(), wanted.abs().max()
        assert error <= 1e-4 * scale, f"{name}: error {error:.2e} of {scale:.2e}; {context}"
