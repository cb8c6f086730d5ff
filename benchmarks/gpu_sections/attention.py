"""Padded attention against SDPA's backends, FlexAttention and torch.compile of the formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import gpu_exact
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn import ops
from fastattn.bench import Contender
from gpu_sections.record import Record
from gpu_sections.timing import DEVICE, OURS, Answer, Case, compiled, run_cases

BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Sizes:
    """[B, H, S, D] of query, key and value, in bf16; key and value have `key_heads`."""

    batch: int
    heads: int
    sequence: int
    head_dim: int
    key_heads: int = 0

    def drawn(self) -> list[Tensor]:
        """Query, key and value as views of [B, S, H, D], as models have them."""
        heads = (self.heads, self.key_heads or self.heads, self.key_heads or self.heads)
        shapes = [(self.batch, self.sequence, each, self.head_dim) for each in heads]
        return [torch.randn(s, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2) for s in shapes]

    def flops(self, causal: bool = False) -> float:
        """Of both matrix products; causality needs half of them."""
        return 4.0 * self.batch * self.heads * self.sequence**2 * self.head_dim * (0.5 if causal else 1.0)


def last_head(tensors: list[Tensor], **flags: Any) -> Answer:
    """The last sequence's last head, every query."""
    query, key, value = (x[-1:, -1:] for x in tensors)
    exact, own = (
        gpu_exact.attention(query, key, value, dtype, **flags)[0] for dtype in (torch.float64, query.dtype)
    )
    return Answer(lambda out: out[-1:, -1:], exact, own)


def sdpa(backend: SDPBackend, tensors: list[Tensor], **named: Any) -> Tensor:
    with sdpa_kernel(backend):
        return functional.scaled_dot_product_attention(*tensors, **named)


def flex(tensors: list[Tensor], **named: Any) -> Callable[[], Callable[[], Any]]:
    """A contender's `prepare`: FlexAttention, compiled, with its block mask made beforehand."""
    from torch.nn.attention.flex_attention import flex_attention

    def run(*inputs: Tensor) -> Any:
        return flex_attention(*inputs, **named)

    return compiled(run, *tensors)


def block_mask(keep: Callable[..., Tensor], query: Tensor, *, per_batch: bool = False) -> Any:
    """FlexAttention's mask of the pairs that `keep(b, h, q, k)` keeps; query [B, H, S, D], as many keys."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, _, length, _ = query.shape
    return create_block_mask(keep, batch if per_batch else None, None, length, length, device=query.device)


def plain(name: str, sizes: Sizes, causal: bool) -> Case:
    tensors = sizes.drawn()
    contenders = [Contender(OURS, lambda: ops.attention(*tensors, causal=causal), highlight=True)]
    for title, backend in BACKENDS.items():
        gqa = sizes.key_heads > 0
        run = partial(sdpa, backend, tensors, is_causal=causal, enable_gqa=gqa)
        contenders.append(Contender(title, run))

    def flexible() -> Callable[[], Any]:
        mask = block_mask(lambda b, h, q, k: q >= k, tensors[0]) if causal else None
        return flex(tensors, block_mask=mask, enable_gqa=sizes.key_heads > 0)()

    contenders.append(Contender("FlexAttention", prepare=flexible))
    answers: dict[str, Answer | None] = {"": last_head(tensors, causal=causal)}
    return Case(name, contenders, list(BACKENDS), answers, flops=sizes.flops(causal))


def padding(name: str, sizes: Sizes) -> Case:
    """Key padding: SDPA takes it as a mask over keys or as the dense bias models hand it."""
    tensors = sizes.drawn()
    batch, sequence = sizes.batch, sizes.sequence
    lengths = torch.linspace(1.0, 0.5, batch, device=DEVICE).mul(sequence).long()
    mask = torch.arange(sequence, device=DEVICE) < lengths[:, None]
    bias = torch.zeros(batch, 1, sequence, sequence, dtype=torch.bfloat16, device=DEVICE)
    bias.masked_fill_(~mask[:, None, None], float("-inf"))
    efficient = BACKENDS["SDPA efficient"]
    contenders = [
        Contender(
            OURS, lambda: ops.attention(*tensors, mask=mask), against=f"{OURS}, no mask", highlight=True
        ),
        Contender(f"{OURS}, no mask", lambda: ops.attention(*tensors)),
        Contender("SDPA, dense bias", partial(functional.scaled_dot_product_attention, *tensors, bias)),
        Contender(
            "SDPA efficient, key mask", partial(sdpa, efficient, tensors, attn_mask=mask[:, None, None])
        ),
        Contender(
            "FlexAttention",
            prepare=lambda: flex(
                tensors, block_mask=block_mask(lambda b, h, q, k: k < lengths[b], tensors[0], per_batch=True)
            )(),
        ),
    ]
    answers: dict[str, Answer | None] = {
        "": last_head(tensors, mask=mask[-1:]),
        f"{OURS}, no mask": last_head(tensors),
    }
    return Case(name, contenders, ["SDPA, dense bias"], answers, flops=sizes.flops())


def t5(name: str, sizes: Sizes) -> Case:
    """T5's relative bias: ours from its table, SDPA from a dense bias, FlexAttention by distance."""
    tensors = sizes.drawn()
    sequence = sizes.sequence
    table = torch.randn(32, sizes.heads, device=DEVICE)
    relative = ops.RelativeBias(table, "t5", 128)
    distance = torch.arange(1 - sequence, sequence)
    by_distance = table[gpu_exact.bucket(distance, "t5", 32, 128).to(DEVICE)].T.contiguous()
    position = torch.arange(sequence, device=DEVICE)
    bias = by_distance.bfloat16()[:, position[None, :] - position[:, None] + sequence - 1][None]

    def score(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + by_distance[h, k - q + sequence - 1]

    contenders = [
        Contender(
            OURS,
            lambda: ops.attention(*tensors, relative_bias=relative),
            against=f"{OURS}, no bias",
            highlight=True,
        ),
        Contender(f"{OURS}, no bias", lambda: ops.attention(*tensors)),
        Contender("SDPA, dense bias", partial(functional.scaled_dot_product_attention, *tensors, bias)),
        Contender("FlexAttention", prepare=lambda: flex(tensors, score_mod=score)()),
    ]
    last = gpu_exact.Relative(table[:, -1:], "t5", 128)
    answers: dict[str, Answer | None] = {
        "": last_head(tensors, relative=last),
        f"{OURS}, no bias": last_head(tensors),
        # A bias rounded to bf16 is another function: its own answer.
        "SDPA, dense bias": last_head(tensors, bias=bias[:, -1:]),
    }
    return Case(name, contenders, ["SDPA, dense bias"], answers, flops=sizes.flops())


def window(name: str, sizes: Sizes, left: int) -> Case:
    """A causal sliding window; SDPA takes it as a mask."""
    tensors = sizes.drawn()
    position = torch.arange(sizes.sequence, device=DEVICE)
    distance = position[:, None] - position
    mask = (distance >= 0) & (distance <= left)
    contenders = [
        Contender(OURS, lambda: ops.attention(*tensors, causal=True, window=(left, 0)), highlight=True),
        Contender("SDPA, dense mask", partial(functional.scaled_dot_product_attention, *tensors, mask)),
        Contender(
            "FlexAttention",
            prepare=lambda: flex(
                tensors, block_mask=block_mask(lambda b, h, q, k: (q >= k) & (q - k <= left), tensors[0])
            )(),
        ),
    ]
    answers: dict[str, Answer | None] = {"": last_head(tensors, causal=True, window=(left, 0))}
    inside = 4.0 * sizes.batch * sizes.heads * sizes.head_dim * sizes.sequence * (left + 1)
    return Case(name, contenders, ["SDPA, dense mask"], answers, flops=inside)


def formula(name: str, sizes: Sizes) -> Case:
    """Soft-capped scores, which SDPA does not have: against torch.compile of the plain formula."""
    tensors = sizes.drawn()

    def plainly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = 30.0 * torch.tanh(query @ key.transpose(-1, -2) * sizes.head_dim**-0.5 / 30.0)
        return torch.softmax(scores.float(), -1).to(value.dtype) @ value

    contenders = [
        Contender(OURS, lambda: ops.attention(*tensors, softcap=30.0), highlight=True),
        Contender("PyTorch", partial(plainly, *tensors)),
        Contender("torch.compile", prepare=compiled(plainly, *tensors)),
    ]
    answers: dict[str, Answer | None] = {"": last_head(tensors, softcap=30.0)}
    return Case(name, contenders, ["PyTorch", "torch.compile"], answers, flops=sizes.flops())


# The promised ones first: a section cut short has lost the others.
CASES: dict[str, Callable[[str], Case]] = {
    "attention-d128-8k": partial(plain, sizes=Sizes(2, 16, 8192, 128), causal=False),
    "attention-d64-8k": partial(plain, sizes=Sizes(2, 32, 8192, 64), causal=False),
    "attention-padding-d64-4k": partial(padding, sizes=Sizes(4, 16, 4096, 64)),
    "attention-t5-d64-4k": partial(t5, sizes=Sizes(4, 16, 4096, 64)),
    "attention-d128-8k-causal": partial(plain, sizes=Sizes(2, 16, 8192, 128), causal=True),
    "attention-d64-8k-causal": partial(plain, sizes=Sizes(2, 32, 8192, 64), causal=True),
    "attention-window1k-d128-8k": partial(window, sizes=Sizes(2, 16, 8192, 128), left=1023),
    "attention-gqa-d128-4k-causal": partial(plain, sizes=Sizes(4, 32, 4096, 128, 8), causal=True),
    "attention-softcap-d128-2k": partial(formula, sizes=Sizes(4, 16, 2048, 128)),
    "attention-padding-d64-512": partial(padding, sizes=Sizes(32, 12, 512, 64)),
    "attention-d256-4k": partial(plain, sizes=Sizes(2, 16, 4096, 256), causal=False),
}


def run(record: Record, device: torch.device) -> None:
    """The section."""
    run_cases(record, [(name, partial(make, name)) for name, make in CASES.items()])
