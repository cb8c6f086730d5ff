"""verify catches an error planted in one layer, however narrow its circumstances, and names the layer."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn.packing import Packing

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.model

ATTENTION = "bert.encoder.layer.1.attention.self"


def error_of(model, reference=None, **options) -> fastattn.VerificationError:
    with pytest.raises(fastattn.VerificationError) as caught:
        fastattn.verify(model, reference, **options)
    return caught.value


def louder(result):
    return (result[0] * 1.1, *result[1:])


def is_packed(args, kwargs) -> bool:
    return any(isinstance(value, Packing) for value in (*args, *kwargs.values()))


def test_a_wrong_scale(swapped_bert):
    reference, model = swapped_bert()
    model.get_submodule(ATTENTION).scaling *= 1.05
    error = error_of(model, reference, cases=["right padding", "one row"])
    assert f"first differs in {ATTENTION}" in str(error)
    assert error.report.first_difference in error.report.table()
    assert error.report.to_dict()["first_difference"] == error.report.first_difference


def test_a_dropped_mask(swapped_bert, plant):
    reference, model = swapped_bert(padding="padded")

    def unmasked(forward, self, hidden_states, attention_mask=None, **kwargs):
        return forward(hidden_states, None, **kwargs)

    plant(model.get_submodule(ATTENTION), unmasked)
    error = error_of(model, reference, cases=["no padding", "left padding"])
    assert "left padding: logits has error" in str(error) and str(error).endswith(ATTENTION)
    assert [result.passed for result in error.report.results] == [False, True]


def test_another_epsilon_of_a_norm(swapped_bert):
    reference, model = swapped_bert()
    model.bert.encoder.layer[0].output.LayerNorm.eps = 1e-2
    # Fused, the norm is not called by itself; with hooks below, the layer calls it.
    error = error_of(model, reference, cases=["no padding"])
    assert str(error).endswith("first differs in bert.encoder.layer.0.output.LayerNorm")


def test_nan_in_padding(swapped_bert, plant):
    reference, model = swapped_bert("BertModel", padding="padded")

    def spoiled(forward, self, hidden_states, attention_mask=None, **kwargs):
        result = forward(hidden_states, attention_mask, **kwargs)
        if attention_mask is not None and attention_mask.dim() == 2:
            result.last_hidden_state[~attention_mask] = float("nan")
        return result

    plant(model.encoder, spoiled)
    error = error_of(model, reference, cases=["right padding"])
    assert "last_hidden_state has values that are not finite" in str(error)
    assert str(error).endswith("first differs in encoder")


def test_an_error_of_packed_execution_only(swapped_bert, plant):
    reference, model = swapped_bert()

    def wrong_when_packed(forward, self, *args, **kwargs):
        result = forward(*args, **kwargs)
        return louder(result) if is_packed(args, kwargs) else result

    for layer in (1, 2):
        plant(model.get_submodule(ATTENTION.replace("1", str(layer))), wrong_when_packed)
    error = error_of(model, reference, cases=["no padding", "right padding"])
    assert "only without hooks on the layers, i.e. in padding-free execution" in str(error)
    assert str(error).endswith(f"it passes once {ATTENTION} is restored")


def test_an_error_of_fused_execution_only(swapped_bert, plant):
    reference, model = swapped_bert()

    def wrong_unless_watched(forward, self, *args, **kwargs):
        result = forward(*args, **kwargs)
        return result if self.dense._forward_hooks else result * 1.1

    plant(model.bert.encoder.layer[1].output, wrong_unless_watched)
    error = error_of(model, reference, cases=["no padding"])
    assert str(error).endswith("first differs in bert.encoder.layer.1.output")


def test_an_error_of_training_only(swapped_bert, plant):
    reference, model = swapped_bert()

    def wrong_in_training(forward, self, *args, **kwargs):
        result = forward(*args, **kwargs)
        return louder(result) if self.training else result

    plant(model.get_submodule(ATTENTION), wrong_in_training)
    fastattn.verify(model, reference, cases=["right padding", "no padding"])
    error = error_of(model, reference, cases=["right padding", "gradients"])
    assert str(error).startswith("gradients: logits") or "gradient of" in str(error)
    assert ATTENTION in str(error)


def test_a_missing_gradient(swapped_bert, plant):
    reference, model = swapped_bert()
    plant(
        model.get_submodule(ATTENTION).value,
        lambda forward, self, x: torch.nn.functional.linear(x, self.weight.detach(), self.bias),
    )
    error = error_of(model, reference, cases=["gradients"])
    assert str(error).startswith(f"gradients: gradient of {ATTENTION}.value.weight is missing")
    assert str(error).endswith(f"first differs, going backwards, in {ATTENTION}.value")


def test_a_wrong_gradient(swapped_bert, plant):
    reference, model = swapped_bert()

    def half_the_gradient(forward, self, x, *args, **kwargs):
        return forward((x + x.detach()) / 2, *args, **kwargs)

    plant(model.bert.encoder.layer[1].attention.output, half_the_gradient)
    error = error_of(model, reference, cases=["gradients"])
    # The layers before are wrong too; the last of them to run is where it began.
    assert f"going backwards, in {ATTENTION}." in str(error)


def test_an_error_with_a_static_cache_only(tiny_llama, plant):
    reference, model = tiny_llama

    def wrong_with_static(forward, self, *args, **kwargs):
        result = forward(*args, **kwargs)
        static = isinstance(kwargs.get("past_key_values"), transformers.StaticCache)
        return louder(result) if static else result

    plant(model.model.layers[1].self_attn, wrong_with_static)
    error = error_of(model, reference, cases=["right padding", "dynamic cache", "static cache"])
    assert [result.passed for result in error.report.results] == [True, True, False]
    assert str(error).startswith("static cache: logits")
    assert str(error).endswith("first differs in model.layers.1.self_attn")


def test_packed_sequences_that_see_each_other(tiny_llama, plant):
    reference, model = tiny_llama

    def unmasked(forward, self, *args, attention_mask=None, **kwargs):
        if attention_mask is None:
            return forward(*args, attention_mask=None, **kwargs)
        length = attention_mask.shape[-1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        return forward(*args, attention_mask=causal.expand_as(attention_mask), **kwargs)

    plant(model.model.layers[0].self_attn, unmasked)
    error = error_of(model, reference, cases=["packed sequences", "no padding"])
    assert str(error).startswith("packed sequences: logits")
    assert str(error).endswith("first differs in model.layers.0.self_attn, before its o_proj")


def test_an_error_when_compiled_only(swapped_bert, plant):
    reference, model = swapped_bert()

    def wrong_compiled(forward, self, *args, **kwargs):
        result = forward(*args, **kwargs)
        return louder(result) if torch.compiler.is_compiling() else result

    plant(model.get_submodule(ATTENTION), wrong_compiled)
    error = error_of(model, reference, cases=["compile", "no padding"])
    assert str(error).startswith("compile: ") and str(error).endswith("only when compiled")


def test_a_graph_that_breaks(swapped_bert, plant):
    reference, model = swapped_bert()

    def breaks(forward, self, x):
        torch._dynamo.graph_break()
        return forward(x)

    plant(model.classifier, breaks)
    error = error_of(model, reference, cases=["compile"])
    assert "the call with right padding, raised Unsupported" in str(error)


def test_a_call_that_fails(swapped_bert, plant):
    reference, model = swapped_bert()

    def fails(forward, self, x, *args, **kwargs):
        if x.shape[0] != 1:
            raise RuntimeError("no such shape")
        return forward(x, *args, **kwargs)

    plant(model.bert.encoder.layer[2].intermediate, fails)
    error = error_of(model, reference, cases=["no padding", "one row"])
    assert str(error) == (
        "no padding: the call raised RuntimeError: no such shape; raised in bert.encoder.layer.2.intermediate"
    )


def test_neighbours_that_leak_and_rows_that_are_misread(swapped_bert, plant):
    reference, model = swapped_bert()
    plant(model.bert.pooler, lambda forward, self, x: forward(x) * x.abs().mean())
    error = error_of(model, reference, cases=["a row of padding", "rows alone"])
    assert {result.case for result in error.report.results if not result.passed} == {
        "a row of padding",
        "rows alone",
    }
    assert "bert.pooler" in str(error)


def test_autocast_and_half_precision(swapped_bert, plant):
    reference, model = swapped_bert()

    def rounded(forward, self, x, *args, **kwargs):
        if x.dtype != torch.bfloat16 and not torch.is_autocast_enabled("cpu"):
            return forward(x, *args, **kwargs)
        return forward(x, *args, **kwargs) + 0.2

    plant(model.bert.encoder.layer[1].intermediate, rounded)
    error = error_of(model, reference, cases=["right padding", "autocast"])
    assert str(error).startswith("autocast: logits")
    assert "bert.encoder.layer.1.intermediate" in str(error)
    error = error_of(model.to(torch.bfloat16), reference.to(torch.bfloat16), cases=["right padding"])
    assert "bert.encoder.layer.1" in str(error)
