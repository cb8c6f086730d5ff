"""Every operation is a well-formed PyTorch operator: schema, fake, autograd and compiled graphs agree with
it.
"""

from __future__ import annotations

import pytest
import torch


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


SEED = torch.tensor([2**40 + 5])
BOUNDS = torch.tensor([0, 2, 2, 5], dtype=torch.int32)

CALLS = {
    "attention": (
        leaf(2, 4, 5, 16), leaf(2, 2, 7, 16), leaf(2, 2, 7, 16), torch.rand(2, 7) > 0.3, leaf(1, 4, 5, 7),
        torch.tensor([7, 3]), True, 2, None, 0.25, 0.0, None, False,
    ),
    "attention with logsumexp": (
        leaf(2, 4, 5, 16), leaf(2, 2, 7, 16), leaf(2, 2, 7, 24), torch.rand(2, 1, 5, 7) > 0.3, None,
        None, True, 2, torch.tensor([0, 1]), 0.25, 0.0, None, True,
    ),
    "attention with dropout": (
        leaf(2, 4, 5, 16), leaf(2, 2, 7, 16), leaf(2, 2, 7, 16), None, None,
        None, False, 2, None, 0.25, 0.3, SEED, False,
    ),
    "varlen_attention": (
        leaf(5, 4, 16), leaf(5, 2, 16), leaf(5, 2, 16), BOUNDS, BOUNDS, 4, 5,
        True, 0, None, True, 0.25, 0.0, None, True,
    ),
    "add_layer_norm": (leaf(3, 8), leaf(3, 8), leaf(8), leaf(8), 1e-5, 0.0, None),
    "add_layer_norm with dropout": (leaf(3, 8), leaf(3, 8), leaf(8), None, 1e-5, 0.2, SEED),
    "bias_gelu": (leaf(3, 8), leaf(8), "tanh"),
    "packed_linear": (leaf(2, 3, 8), [leaf(4, 8), leaf(6, 8)], [leaf(4), leaf(6)]),
    "packed_linear without bias": (leaf(3, 8), [leaf(4, 8), leaf(6, 8)], []),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call):
    import fastattn.ops  # noqa: F401  (registers the operations)

    operation = getattr(torch.ops.fastattn, call.split(" ")[0]).default
    results = torch.library.opcheck(operation, CALLS[call])
    assert set(results.values()) == {"SUCCESS"}
