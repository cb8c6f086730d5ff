"""`ops.rotary` against transformers' own functions and float64."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close

from fastattn import ops

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
INTERLEAVED = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])


def angles(*shape, interleaved, dtype=torch.float32):
    half = torch.randn(*shape[:-1], shape[-1] // 2) * 100
    both = half.repeat_interleave(2, -1) if interleaved else torch.cat([half, half], -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def theirs(x, cos, sin, interleaved):
    """transformers' formula for one tensor, in x's dtype, with the rest passed on."""
    from transformers.models.gptj.modeling_gptj import rotate_every_two
    from transformers.models.llama.modeling_llama import rotate_half

    rotated = rotate_every_two if interleaved else rotate_half
    width = cos.shape[-1]
    cos, sin = (t.to(x.dtype) if t.dim() == 2 else t.to(x.dtype)[:, None] for t in (cos, sin))
    head = x[..., :width]
    # GPT-J's function takes four dimensions whose last is the head's.
    return torch.cat([head * cos + rotated(head) * sin, x[..., width:]], -1)


@DTYPES
@INTERLEAVED
@pytest.mark.parametrize("width", [16, 6, 2, 0])
@pytest.mark.parametrize("positions", [(5,), (1, 5), (2, 5)], ids=str)
@pytest.mark.parametrize("no_grad", [True, False])
def test_rotary(no_grad, positions, width, interleaved, dtype):
    query = torch.randn(2, 5, 4, 16).to(dtype).transpose(1, 2).requires_grad_(not no_grad)
    key = torch.randn(2, 2, 5, 16).to(dtype)
    cos, sin = angles(*positions, width, interleaved=interleaved)
    before = query.clone()
    for found, x in zip(ops.rotary(query, key, cos, sin, interleaved), (query, key), strict=True):
        exact = theirs(x.detach().double(), cos, sin, interleaved)
        assert found.dtype == dtype
        assert_close(found.detach(), theirs(x.detach(), cos, sin, interleaved), exact, (positions, width))
    assert torch.equal(query, before)


def test_llama_s_own_embedding():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    query, key = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16)
    cos, sin = LlamaRotaryEmbedding(config)(query, torch.arange(7)[None])
    for found, expected in zip(
        ops.rotary(query, key, cos, sin), apply_rotary_pos_emb(query, key, cos, sin), strict=True
    ):
        torch.testing.assert_close(found, expected)


@INTERLEAVED
def test_gradients(interleaved):
    shapes = [(2, 3, 4, 6), (2, 1, 4, 6), (4, 4), (4, 4)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *a: ops.rotary(*a, interleaved), leaves)


def test_half_precision_cosines_of_float32_rows_and_the_reverse():
    cos, sin = angles(5, 8, interleaved=False)
    x = torch.randn(1, 2, 5, 8)
    assert ops.rotary(x, x, cos.bfloat16(), sin.bfloat16())[0].dtype == torch.float32
    found, _ = ops.rotary(x.bfloat16(), x.bfloat16(), cos, sin)
    assert torch.equal(found, theirs(x.bfloat16().double(), cos, sin, False).bfloat16())


X = torch.ones(2, 3, 5, 8)
ANGLE = torch.ones(5, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.rotary(X, X[0], ANGLE, ANGLE), ValueError, r"key \[B, Hk, S, D\]; got \[2, 3, 5, 8\]"),
        (lambda: ops.rotary(X, X[:, :, :4], ANGLE, ANGLE), ValueError, "query must be"),
        (lambda: ops.rotary(X, X.half(), ANGLE, ANGLE), TypeError, "key is torch.float16 but query"),
        (lambda: ops.rotary(X.int(), X.int(), ANGLE, ANGLE), TypeError, "query is torch.int32"),
        (lambda: ops.rotary(X, X, ANGLE.int(), ANGLE), TypeError, "cos is torch.int32"),
        (lambda: ops.rotary(X, X, ANGLE[:4], ANGLE[:4]), ValueError, r"must be \[5, R\] or \[2, 5, R\]"),
        (lambda: ops.rotary(X, X, ANGLE, ANGLE[:, :4]), ValueError, r"got \[5, 8\] and \[5, 4\]"),
        (lambda: ops.rotary(X, X, *[ANGLE.expand(3, 5, 8)] * 2), ValueError, r"got \[3, 5, 8\]"),
        (lambda: ops.rotary(X, X, *[torch.ones(5, 10)] * 2), ValueError, "R = 10; .* at most D = 8"),
        (lambda: ops.rotary(X, X, *[torch.ones(5, 3)] * 2), ValueError, "R = 3; it must be even"),
        (lambda: ops.rotary(X, X, ANGLE, ANGLE.to("meta")), ValueError, "sin is on meta"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
