"""What is special to the encoder-decoders: which tokens their encoders compute, and T5's relative positions
in every form they take.
"""

from __future__ import annotations

import pytest
import torch
from family_models import BY_NAME, TOLERANCE, assert_same, assert_same_gradients, batch, build, gradients

import fastattn
from fastattn.ops import RelativeBias

pytest.importorskip("transformers")

pytestmark = pytest.mark.model


def optimized(name, head, **options):
    model = build(BY_NAME[name], head)
    fastattn.optimize(model, **options)
    return model


def rows_of(linear, run):
    """How many rows `linear` multiplies while `run` runs, without a hook, which would end packing."""
    seen = []
    forward = type(linear).forward

    def counting(self, x):
        if self is linear:
            seen.append(x.shape[:-1].numel())
        return forward(self, x)

    type(linear).forward = counting
    try:
        run()
    finally:
        type(linear).forward = forward
    return seen


@pytest.mark.parametrize("name", ["T5", "T5 v1.1", "BART", "mBART", "Marian", "Pegasus"])
@torch.no_grad()
def test_padding_is_not_computed(name):
    model = optimized(name, BY_NAME[name].base)
    encoder = model.get_encoder()
    inputs = {key: x for key, x in batch(model, "right").items() if not key.startswith("decoder_")}
    last = (
        encoder.block[-1].layer[-1].DenseReluDense.wo if "T5" in name else encoder.layers[-1].self_attn.q_proj
    )
    rows = rows_of(last, lambda: encoder(**inputs))
    assert rows == [int(inputs["attention_mask"].sum())]


@torch.no_grad()
def test_left_padding_of_relative_positions_runs_padded():
    model = optimized("T5", "T5EncoderModel", padding="packed")
    with pytest.raises(fastattn.packing.PackingError, match="positions are relative"):
        model(**batch(model, "left"))


@pytest.mark.parametrize("past", [0, 3, 40])
@pytest.mark.parametrize("decoder", [False, True], ids=["encoder", "decoder"])
def test_relative_bias_is_the_original_s(decoder, past):
    """As a tensor and as a RelativeBias, at every distance, of one query and of many."""
    model = optimized("T5", "T5Model")
    reference = build(BY_NAME["T5"], "T5Model", "eager")
    first, original = (
        (each.decoder if decoder else each.encoder).block[0].layer[0].SelfAttention
        for each in (model, reference)
    )
    for length in (1, 9):
        keys = past + length
        query, key = torch.randn(1, 3, length, 12), torch.randn(1, 3, keys, 12)
        expected = original.compute_bias(length, keys, past_seen_tokens=past)
        found = first._position_bias(query, key, None, past)
        seen = (
            torch.ones(length, keys, dtype=torch.bool).tril(past)
            if decoder
            else torch.ones(length, keys).bool()
        )
        assert torch.equal(found.where(seen, expected), expected), (length, keys)
        assert not decoder or bool(found.masked_select(~seen).isneginf().all())
        relative = first.relative_bias()
        assert isinstance(relative, RelativeBias)
        by_op = fastattn.ops.attention(
            query, key, key, relative_bias=relative, query_start=past, causal=decoder, scale=1.0
        )
        dense = fastattn.ops.attention(query, key, key, bias=expected, mask=seen[None, None], scale=1.0)
        torch.testing.assert_close(by_op, dense, rtol=TOLERANCE, atol=TOLERANCE)


@torch.no_grad()
def test_embedding_that_must_be_called():
    """A hook on the embedding of relative positions sees a call, packed or not."""
    model, reference = optimized("T5", "T5EncoderModel"), build(BY_NAME["T5"], "T5EncoderModel", "eager")
    calls = []
    for each in (model, reference):
        embedding = each.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        embedding.register_forward_hook(lambda module, args, output: calls.append(1) or output * 2)
    inputs = batch(model, "right")
    assert_same(model(**inputs), reference(**inputs), inputs)
    assert len(calls) == 2


@torch.no_grad()
def test_stream_kept_in_float32():
    """Half-precision T5 keeps `wo` in float32, and with it the residual stream."""
    inputs = batch(build(BY_NAME["T5"], "T5EncoderModel"), "right")
    results = []
    for model in (optimized("T5", "T5EncoderModel"), build(BY_NAME["T5"], "T5EncoderModel", "eager")):
        model.half()
        for block in model.encoder.block:
            block.layer[-1].DenseReluDense.wo.float()
        results.append(model(**inputs).last_hidden_state)
    assert results[0].dtype == results[1].dtype
    assert_same({"": results[0].float()}, {"": results[1].float()}, inputs, tolerance=0.05)


def test_dropout_of_packed_attention():
    """Training with dropout runs packed, and each seed is one result."""
    model = optimized("T5", "T5EncoderModel", padding="packed").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
        elif hasattr(module, "key_value_proj_dim"):
            module.dropout = 0.1
    inputs = batch(model, "right")
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(model(**inputs).last_hidden_state)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_gradients_with_a_row_of_padding():
    """Packed, such a row is a query without keys; it takes part in no gradient."""
    model, reference = optimized("T5", "T5EncoderModel"), build(BY_NAME["T5"], "T5EncoderModel", "eager")
    inputs = batch(model, "empty")
    assert_same_gradients(gradients(model, inputs), gradients(reference, inputs))


@torch.no_grad()
def test_clamp_of_half_precision():
    """float16 sums beyond the largest number are finite, as the original leaves them."""
    for name in ("mBART", "T5"):
        reference = build(BY_NAME[name], BY_NAME[name].base, "eager").half()
        model = optimized(name, BY_NAME[name].base).half()
        for each in (model, reference):
            encoder = each.get_encoder()
            last = encoder.block[0].layer[-1].DenseReluDense.wo if name == "T5" else encoder.layers[0].fc2
            last.weight.fill_(3e4)
        inputs = {key: x for key, x in batch(model, "none").items() if not key.startswith("decoder_")}
        found = model.get_encoder()(**inputs).last_hidden_state
        assert torch.isfinite(reference.get_encoder()(**inputs).last_hidden_state).all()
        assert torch.isfinite(found).all(), name
