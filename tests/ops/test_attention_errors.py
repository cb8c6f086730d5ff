"""What `ops.attention` and `ops.varlen_attention` refuse: before any work, by the argument's name, saying
what was given and what is accepted.
"""

from __future__ import annotations

import pytest
import torch
from torch import randn, zeros

from fastattn import ops
from fastattn.ops.validation import may_read

BOUNDS = torch.tensor([0, 3, 5], dtype=torch.int32)


def dense(**change):
    arguments = dict(
        query=torch.randn(2, 4, 5, 16), key=torch.randn(2, 2, 7, 16), value=torch.randn(2, 2, 7, 16)
    )
    return ops.attention(**arguments | change)


def packed(**change):
    arguments = dict(
        query=torch.randn(5, 4, 16),
        key=torch.randn(5, 2, 16),
        value=torch.randn(5, 2, 16),
        cu_seqlens_q=BOUNDS,
        cu_seqlens_k=BOUNDS,
        max_seqlen_q=3,
        max_seqlen_k=3,
    )
    return ops.varlen_attention(**arguments | change)


def test_the_cases_below_are_right_but_for_their_change():
    assert dense().shape == (2, 4, 5, 16) and packed().shape == (5, 4, 16)


def relative(heads=4, **options):
    return ops.RelativeBias(zeros(32, heads, **options))


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


INTS = "window is .*; it must be a pair of ints"
# Arguments that both operations take.
SHARED = [
    (dict(window=3), TypeError, INTS),
    (dict(window=(1, 2, 3)), TypeError, INTS),
    (dict(window=(1,)), TypeError, INTS),
    (dict(window=(1.0, 2)), TypeError, INTS),
    (dict(window=(True, 2)), TypeError, INTS),
    (dict(window=torch.tensor([1, 2])), TypeError, INTS),
    (dict(window=(-2, 0)), ValueError, r"window is \(-2, 0\); left and right must be >= -1"),
    (dict(window=(0, -5)), ValueError, r"window is \(0, -5\)"),
    (dict(softcap=-1.0), ValueError, "softcap is -1.0; it must be finite and >= 0"),
    (dict(softcap=float("inf")), ValueError, "softcap is inf"),
    (dict(softcap=float("nan")), ValueError, "softcap is nan"),
    (dict(scale=float("nan")), ValueError, "scale is nan; it must be finite"),
    (dict(sinks=zeros(2)), ValueError, r"sinks must be \[query heads\] = \[4\].*got \[2\]"),
    (dict(sinks=zeros(1, 4)), ValueError, r"sinks must be .* got \[1, 4\]"),
    (dict(sinks=zeros(4, dtype=torch.int32)), TypeError, "sinks is torch.int32"),
    (dict(sinks=[0.0] * 4), TypeError, "sinks is list; it must be a floating-point tensor"),
    (dict(sinks=zeros(4, device="meta")), ValueError, "sinks is on meta but query is on cpu"),
    (dict(alibi_slopes=zeros(2)), ValueError, r"alibi_slopes must be \[query heads\] = \[4\]"),
    (dict(alibi_slopes=zeros(2, 4)), ValueError, r"alibi_slopes must be .* got \[2, 4\]"),
    (dict(alibi_slopes=torch.ones(4, dtype=torch.bool)), TypeError, "alibi_slopes is torch.bool"),
    (dict(alibi_slopes=zeros(4, device="meta")), ValueError, "alibi_slopes is on meta"),
    (dict(relative_bias=zeros(32, 4)), TypeError, "relative_bias is Tensor; .* fastattn.ops.RelativeBias"),
    (dict(relative_bias=relative(2)), ValueError, r"relative_bias.table .*\[num_buckets, 4\].*\[32, 2\]"),
    (dict(relative_bias=relative(device="meta")), ValueError, "relative_bias.table is on meta"),
    (dict(query_start=True), TypeError, r"query_start is True; it must be an int or an int tensor \[2\]"),
    (dict(query_start=1.5), TypeError, "query_start is 1.5"),
    (dict(query_start=torch.ones(2)), ValueError, "query_start must be an int or .* got torch.float32"),
    (dict(query_start=ints([1, 1, 1])), ValueError, r"query_start must be .* \[2\]; got .*\[3\]"),
    (dict(query_start=torch.ones((), dtype=torch.int32)), ValueError, "query_start must be"),
    (dict(query_start=ints([1, 1]).to("meta")), ValueError, "query_start is on meta"),
    (dict(dropout_p=1.5), ValueError, "dropout_p is 1.5"),
    (dict(dropout_p=-0.1), ValueError, "dropout_p is -0.1"),
]  # fmt: skip

DENSE = [
    (dict(key=randn(2, 3, 7, 16), value=randn(2, 3, 7, 16)), ValueError, "4 query heads.*3 key heads"),
    (dict(key=randn(2, 0, 7, 16), value=randn(2, 0, 7, 16)), ValueError, "4 query heads.*0 key heads"),
    (dict(query=randn(4, 5, 16)), ValueError, "query, key and value must be"),
    (dict(key=randn(2, 2, 7, 8)), ValueError, "same head_dim"),
    (dict(query=randn(2, 4, 5, 0), key=randn(2, 2, 7, 0)), ValueError, "head_dim must be at least 1"),
    (dict(key=randn(3, 2, 7, 16), value=randn(3, 2, 7, 16)), ValueError, "batch, key heads"),
    (dict(value=randn(2, 2, 6, 16)), ValueError, "key length must agree"),
    (dict(key=randn(2, 2, 7, 16).half()), TypeError, "key is torch.float16"),
    (dict(value=randn(2, 2, 7, 16).double()), TypeError, "value is torch.float64"),
    (dict(query=torch.ones(2, 4, 5, 16, dtype=torch.int64)), TypeError, "accepted are float16"),
    (dict(key=randn(2, 2, 7, 16, device="meta")), ValueError, "key is on meta"),
    (dict(mask=torch.ones(2, 7)), TypeError, "mask is torch.float32; it must be bool"),
    (dict(mask=torch.ones(7, 2, dtype=torch.bool)), ValueError, r"mask must be \[batch, key.*\] = \[2, 7\]"),
    (dict(mask=torch.ones(2, 4, 5, 6, dtype=torch.bool)), ValueError, r"mask must be .*\[2, 4, 5, 7\]"),
    (dict(mask=torch.ones(2, 5, 7, dtype=torch.bool)), ValueError, "mask must be 4-D"),
    (dict(mask=torch.ones(2, 7, dtype=torch.bool, device="meta")), ValueError, "mask is on meta"),
    (dict(bias=torch.ones(2, 4, 5, 7, dtype=torch.bool)), TypeError, "bias is torch.bool"),
    (dict(bias=torch.ones(5, 7)), ValueError, "bias must be 4-D"),
    (dict(bias=torch.ones(2, 2, 5, 7)), ValueError, r"bias must be .*got \[2, 2, 5, 7\]"),
    (dict(bias=torch.ones(2, 4, 5, 7, device="meta")), ValueError, "bias is on meta"),
    (dict(key_lengths=torch.ones(2)), ValueError, r"key_lengths must be .* int64 tensor \[2\]; got .*32"),
    (dict(key_lengths=ints([1, 1, 1])), ValueError, r"key_lengths .*\[2\]; got torch.int32 \[3\]"),
    (dict(key_lengths=[7, 7]), ValueError, "key_lengths must be .*; got list"),
    (dict(key_lengths=ints([1, 1]).to("meta")), ValueError, "key_lengths is on meta"),
]  # fmt: skip

VARLEN = [
    (dict(cu_seqlens_q=BOUNDS.flip(0)), ValueError, "cu_seqlens_q must start at 0"),
    (dict(cu_seqlens_q=ints([0, 4, 3])), ValueError, "cu_seqlens_q .*never decrease"),
    (dict(cu_seqlens_q=ints([1, 3, 5])), ValueError, "cu_seqlens_q must start at 0"),
    (dict(cu_seqlens_k=ints([0, 3, 4])), ValueError, "cu_seqlens_k .*end at 5"),
    (dict(cu_seqlens_k=ints([0, 6, 5])), ValueError, "cu_seqlens_k .*never decrease"),
    (dict(cu_seqlens_q=BOUNDS.long()), ValueError, "cu_seqlens_q must be an int32 tensor.*got torch.int64"),
    (dict(cu_seqlens_q=BOUNDS[None], cu_seqlens_k=BOUNDS[None]), ValueError, r"cu_seqlens_q .*\[1, 3\]"),
    (dict(cu_seqlens_q=BOUNDS[:0], cu_seqlens_k=BOUNDS[:0]), ValueError, r"cu_seqlens_q must be .*\[0\]"),
    (dict(cu_seqlens_k=BOUNDS.to("meta")), ValueError, "cu_seqlens_k is on meta"),
    (dict(cu_seqlens_k=ints([0, 5])), ValueError, "cu_seqlens_q and cu_seqlens_k"),
    (dict(max_seqlen_q=2), ValueError, "sequence of 3 tokens, more than its bound max_seqlen_q = 2"),
    (dict(max_seqlen_k=0), ValueError, "more than its bound max_seqlen_k = 0"),
    (dict(max_seqlen_q=-1), ValueError, "max_seqlen_q is -1; it must be an int >= 0"),
    (dict(max_seqlen_k=3.0), ValueError, "max_seqlen_k is 3.0"),
    (dict(query=randn(5, 3, 16)), ValueError, "3 query heads are not a multiple of 2"),
    (dict(query=randn(5, 4, 8)), ValueError, "head_dim must agree"),
    (dict(query=randn(5, 4, 0), key=randn(5, 2, 0)), ValueError, "head_dim must be at least 1"),
    (dict(value=randn(6, 2, 16)), ValueError, "key tokens, key heads"),
    (dict(key=randn(2, 5, 2, 16)), ValueError, "tokens, heads, head_dim"),
    (dict(value=randn(5, 2, 16).bfloat16()), TypeError, "value is torch.bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("attend", "change", "error", "message"),
    [(dense, *case) for case in SHARED + DENSE] + [(packed, *case) for case in SHARED + VARLEN],
)
def test_bad_input_is_refused_by_name(attend, change, error, message):
    op = "attention" if attend is dense else "varlen_attention"
    with pytest.raises(error, match=f"^{op}: .*{message}"):
        attend(**change)


def test_values_are_not_read_while_tracing():
    """Compiled, bad bounds cannot be seen: nothing breaks the graph to look at them."""
    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(value=torch.ones(5, 2, 16), cu_seqlens_q=BOUNDS.clone()), torch.ones(5, 4, 16)
    )


def test_values_on_a_gpu_are_read_in_debug_mode_only(monkeypatch):
    """Reading them stalls the stream; a meta tensor stands in for one on a GPU."""
    monkeypatch.delenv("FASTATTN_DEBUG", raising=False)
    assert may_read(BOUNDS) and not may_read(BOUNDS.to("meta"))
    monkeypatch.setenv("FASTATTN_DEBUG", "1")
    assert may_read(BOUNDS.to("meta"))
