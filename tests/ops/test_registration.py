"""Every operation is a well-formed PyTorch operator: schema, fake, autograd and compiled graphs agree with
it.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


SEED = torch.tensor([2**40 + 5])
BOUNDS = torch.tensor([0, 2, 2, 5], dtype=torch.int32)

CALLS = {
    "attention": (
        leaf(2, 4, 5, 16), leaf(2, 2, 7, 16), leaf(2, 2, 7, 16), torch.rand(2, 7) > 0.3, leaf(1, 4, 5, 7),
        leaf(8, 4), "t5", 16, leaf(4), torch.tensor([7, 3]), True, 2, None, 3, -1, 0.25, 0.0, leaf(4),
        0.0, None, False,
    ),
    "attention with everything": (
        leaf(2, 4, 5, 16), leaf(2, 2, 7, 16), leaf(2, 2, 7, 24), torch.rand(2, 1, 5, 7) > 0.3,
        leaf(1, 4, 5, 7), leaf(8, 4), "mpnet", 16, leaf(4), torch.tensor([7, 3]), True, 2,
        torch.tensor([0, 1]), 3, 1, 0.25, 5.0, leaf(4), 0.3, SEED, True,
    ),
    "attention with logsumexp": (
        leaf(2, 4, 5, 16), leaf(2, 2, 7, 16), leaf(2, 2, 7, 24), torch.rand(2, 1, 5, 7) > 0.3, None,
        None, "t5", 0, None, None, True, 2, torch.tensor([0, 1]), -1, -1, 0.25, 0.0, None, 0.0, None, True,
    ),
    "attention with dropout": (
        leaf(2, 4, 5, 16), leaf(2, 2, 7, 16), leaf(2, 2, 7, 16), None, None,
        None, "t5", 0, None, None, False, 2, None, -1, -1, 0.25, 0.0, None, 0.3, SEED, False,
    ),
    "varlen_attention": (
        leaf(5, 4, 16), leaf(5, 2, 16), leaf(5, 2, 16), BOUNDS, BOUNDS, 4, 5,
        None, "t5", 0, None, True, 0, None, True, -1, -1, 0.25, 0.0, None, 0.0, None, True,
    ),
    "varlen_attention with everything": (
        leaf(5, 4, 16), leaf(5, 2, 16), leaf(5, 2, 24), BOUNDS, BOUNDS, 4, 5,
        leaf(8, 4), "t5-causal", 16, leaf(4), True, 0, torch.tensor([0, 1, 1]), False, 1, 2, 0.25, 5.0,
        leaf(4), 0.3, SEED, True,
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


@pytest.mark.parametrize("call", CALLS)
def test_gradients_under_a_dispatch_mode(call):
    """Counting FLOPs, or any other dispatch mode, does not change the gradients."""
    operation = getattr(torch.ops.fastattn, call.split(" ")[0]).default
    flat = [x for argument in CALLS[call] for x in (argument if isinstance(argument, list) else [argument])]
    leaves = [x for x in flat if isinstance(x, torch.Tensor) and x.requires_grad]

    def gradients():
        outputs = operation(*CALLS[call])
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        return torch.autograd.grad(sum(x.sin().sum() for x in outputs if x.requires_grad), leaves)

    expected = gradients()
    with FlopCounterMode(display=False):
        found = gradients()
    torch.testing.assert_close(found, expected)
