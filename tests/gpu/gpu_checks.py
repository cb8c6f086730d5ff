"""How the GPU suite judges a call: poisoned memory, the error rule, and the same bits every time."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SEED = int(os.environ.get("FASTATTN_GPU_SEED") or random.SystemRandom().randrange(2**31))


def length(full: int) -> int:
    """`full` positions, or about a twentieth of them, still odd or even as it was, in the interpreter."""
    return full if not INTERPRETED or full <= 40 else full // 20 + (full // 20 + full) % 2


@contextmanager
def poisoned() -> Iterator[None]:
    """Every tensor allocated inside starts as NaN, or as the largest integer."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def run_twice(call: Callable[[], Tensor | tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The outputs of a call into poisoned memory, which a second call must repeat bit by bit."""
    with poisoned():
        first = call()
        again = call()
    first = (first,) if isinstance(first, Tensor) else tuple(first)
    again = (again,) if isinstance(again, Tensor) else tuple(again)
    for one, other in zip(first, again, strict=True):
        same = torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
        assert same, f"a repeat gave other bits: {tuple(one.shape)} {one.dtype}; seed {SEED}"
    return first


def assert_exact(found: Tensor, exact: Tensor, own: Tensor, what: str = "output") -> None:
    """The library's rule: at most twice PyTorch's own largest error, plus 2 eps of the largest true value.

    Args:
        found: what the library gave.
        exact: the same in float64; infinities and what is not there must be matched exactly.
        own: the same from plain PyTorch in the operation's dtype.
        what: the name of the output.
    """
    context = f"{what} {tuple(found.shape)} {found.dtype}; seed {SEED}"
    assert found.shape == exact.shape, f"{context}: expected {tuple(exact.shape)}"
    finite = exact.isfinite()
    outside = torch.where(finite, 0.0, exact)
    wrong = (torch.where(finite, 0.0, found.double()) != outside) | (finite & ~found.isfinite())
    assert not wrong.any(), f"{context}: {int(wrong.sum())} values are NaN, or finite where they must not be"
    if not finite.any():
        return
    error = (found.double() - exact)[finite].abs().max().item()
    # Where PyTorch's own dtype overflows it sets no bar.
    pytorch = (own.double() - exact)[finite].nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    allowed = 2 * pytorch + 2 * torch.finfo(found.dtype).eps * exact[finite].abs().max().item()
    assert error <= allowed, f"{context}: error {error:.3g}, PyTorch's {pytorch:.3g}, allowed {allowed:.3g}"


class Draw:
    """Random tensors on a device from one generator."""

    def __init__(self, generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> None:
        self.generator, self.device, self.dtype = generator, device, dtype

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal numbers."""
        drawn = torch.randn(shape, generator=self.generator)
        return drawn.to(self.device, dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Uniform in [low, high], int32."""
        return torch.randint(low, high + 1, shape, generator=self.generator).int().to(self.device)

    def mask(self, *shape: int, share: float = 0.7) -> Tensor:
        """True with probability `share`."""
        return (torch.rand(shape, generator=self.generator) < share).to(self.device)

    def permutation(self, count: int) -> Tensor:
        """0 to count - 1 in random order, int32."""
        return torch.randperm(count, generator=self.generator).int().to(self.device)

    def heads(self, batch: int, heads: int, sequence: int, size: int) -> Tensor:
        """[B, H, S, D] as models have it: a view of [B, S, H, D]."""
        return self(batch, sequence, heads, size).transpose(1, 2)


def bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    """cu_seqlens [B + 1] of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)
